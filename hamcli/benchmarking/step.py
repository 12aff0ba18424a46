"""What one optimizer step costs: HAM's forms beside torch's own, in one process.

Every round goes through all variants in turn, so that whatever else the machine does meets all of
them; what is compared is medians inside one run. The variants are

    torch fused       torch.optim.AdamW(fused=True), or SGD: the measure of all others
    native            HAM by the C++ extension
    native, masked    the same with half of the weights dropped
    native, large     the same where every exponent is large, and takes the full exponential
    numba, ...        the same three by numba's loop: where there is no compiler
    blocks            HAM in plain torch, block by block: where there is neither
    foreach           torch fused, then the mirror step by foreach functions
    published         torch fused, then the published wrapper's steps written out in Python
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hamcli import native
from hamcli.benchmarking.measuring import (
    Clock,
    VariantCost,
    cost_of,
    extra_peak_bytes,
    time_rounds,
)
from hamcli.optim import HAM, ExponentStatistics, cpu, fused, jit

LR = 2e-5  # of a fine-tune of a transformer
GRADIENT = 1e-4
LARGE_LR, LARGE_GRADIENT = 0.1, 1e-2  # exponents of 0.2 on the mean at the published alpha
ALPHA, BETA = 200.0, 1e-3  # arXiv 2506.02630

SMALL = 1 << 20  # weights of a tensor whose exponents are looked at
FORMS = (
    "native",
    "numba",
    "blocks",
)  # what the optimizer itself would take, the first that is there

Base = Literal["adamw", "adam", "sgd"]


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step costs here.

    Attributes:
        base: Base optimizer.
        num_weights: Number of weights of the model.
        dtype: Their dtype; low-precision ones have fp32 masters and moments.
        threads: Threads of torch.
        clock: wall, or cpu: the process's own time.
        rounds: Measured rounds.
        native: Whether the C++ extension is in use, and why not.
        numba: Whether the numba form can be, and why not.
        variants: One for each variant that can run here.
        training_seconds: Median of forward and backward of one step; None if there was no model.
        step_share: The HAM step's share of a whole training step, in the form that is used here.
        exponents: Of one measured step of calibrated HAM on these weights.
    """

    base: str
    num_weights: int
    dtype: str
    threads: int
    clock: str
    rounds: int
    native: str
    numba: str
    variants: tuple[VariantCost, ...]
    training_seconds: float | None
    step_share: float | None
    exponents: ExponentStatistics | None

    def variant(self, name: str) -> VariantCost | None:
        """The variant of that name, if it ran."""
        return next((variant for variant in self.variants if variant.name == name), None)

    @property
    def ours(self) -> VariantCost | None:
        """The form that the optimizer takes here."""
        return next((found for name in FORMS if (found := self.variant(name)) is not None), None)

    def ratio(self, name: str) -> float:
        """A variant's median over that of torch fused."""
        found = self.variant(name)
        assert found is not None, name
        return found.ratio

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_step(
    shapes: Sequence[tuple[int, ...]],
    *,
    base: Base = "adamw",
    dtype: torch.dtype = torch.float32,
    rounds: int = 15,
    clock: Clock = "wall",
    train: Callable[[], None] | None = None,
    only: Sequence[str] | None = None,
) -> StepCost:
    """Time a step of every variant that this machine can run.

    Args:
        shapes: Of the model's parameters; those of two or more dimensions are mirrored.
        base: Base optimizer; sgd has a momentum of 0.9.
        dtype: Of the weights.
        rounds: How often each variant is timed.
        clock: "cpu" where torch has one thread and other processes disturb.
        train: Forward and backward of a model with these shapes, timed with the steps.
        only: Names of the variants; all if not given. Torch fused is always there.
    """
    steps = _variants(shapes, base, dtype)
    if only is not None:
        steps = {name: step for name, step in steps.items() if name in ("torch fused", *only)}
    extra = {name: extra_peak_bytes(step) for name, step in steps.items()}
    if train is not None:
        steps["training"] = train
        train()
    times = time_rounds(steps, rounds=rounds, clock=clock)
    training = statistics.median(times.pop("training")) if train is not None else None
    costs = tuple(cost_of(name, times, "torch fused", extra[name]) for name in times)
    best = next((cost.seconds for name in FORMS for cost in costs if cost.name == name), None)
    return StepCost(
        base=base,
        num_weights=sum(math.prod(shape) for shape in shapes),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        clock=clock,
        rounds=rounds,
        native=native.status().reason,
        numba=jit.status().reason,
        variants=costs,
        training_seconds=training,
        step_share=None if training is None or best is None else best / (best + training),
        exponents=_exponents(shapes, dtype),
    )


class _Weights:
    """Parameters, gradients and state that the variants share."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], base: Base, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.base = base
        self.dtype = dtype
        self.w = [torch.randn(shape).mul_(0.05) for shape in shapes]
        self.is_low = dtype != torch.float32
        self.low = [w.to(dtype) if self.is_low else None for w in self.w]
        self.g = [torch.randn(shape).mul_(GRADIENT).to(dtype) for shape in shapes]
        # torch's fused form takes weights and gradients of one dtype
        self.wide_g = [g.float() for g in self.g]
        self.m = [torch.zeros_like(w) for w in self.w]
        self.v = [torch.zeros_like(w) for w in self.w] if base != "sgd" else []
        self.steps = [torch.ones(()) for _ in self.w]
        self.mirrored = [len(shape) >= 2 for shape in shapes]
        self.masks = [
            torch.rand(w.shape) > 0.5 if is_mirrored else None
            for w, is_mirrored in zip(self.w, self.mirrored, strict=True)
        ]

    def torch_step(self) -> None:
        """Torch's fused step, on the masters where weights are low-precision."""
        if self.base == "sgd":
            torch._fused_sgd_(
                self.w,
                self.wide_g,
                self.m,
                weight_decay=0.0,
                momentum=0.9,
                lr=LR,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )
            return
        step = torch._fused_adamw_ if self.base == "adamw" else torch._fused_adam_
        step(
            self.w,
            self.wide_g,
            self.m,
            self.v,
            [],
            self.steps,
            lr=LR,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.01,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    def ham_step(
        self, form: Any, *, masked: bool = False, a: float = LR * ALPHA, clamp: float = 0.1
    ) -> None:
        """The whole step by one of the forms."""
        common = {
            "masks": self.masks if masked else [None] * len(self.w),
            "rounded": self.low,
            "a": [a if is_mirrored else 0.0 for is_mirrored in self.mirrored],
            "b": 0.0,
            "clamp": clamp,
            "lr": LR,
        }
        if self.base == "sgd":
            form.sgd_ham_(
                self.w,
                self.g,
                self.m,
                momentum=0.9,
                nesterov=False,
                weight_decay=0.0,
                is_first_step=False,
                **common,
            )
            return
        form.adam_ham_(
            self.w,
            self.g,
            self.m,
            self.v,
            self.steps,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            decoupled=self.base == "adamw",
            **common,
        )

    def foreach_step(self) -> None:
        """Torch's fused step, then the mirror step over the whole list, function by function."""
        self.torch_step()
        chosen = [index for index, is_mirrored in enumerate(self.mirrored) if is_mirrored]
        ws, gs = [self.w[index] for index in chosen], [self.wide_g[index] for index in chosen]
        exponents = torch._foreach_sign(ws)
        torch._foreach_mul_(exponents, gs)
        torch._foreach_mul_(exponents, -LR * ALPHA)
        torch._foreach_sub_(exponents, LR * BETA)
        torch._foreach_clamp_min_(exponents, -0.1)
        torch._foreach_clamp_max_(exponents, 0.1)
        torch._foreach_expm1_(exponents)
        torch._foreach_addcmul_(ws, ws, exponents)

    def published_step(self) -> None:
        """The published wrapper's semantics, rendered from its description alone.

        Base step; then for every parameter of two or more dimensions a check for NaN, which only
        prints, the mirror step with its exponent clamped to 5, and a bound of 1,000 on the norm;
        at last the gradients are clipped, which no longer acts on this step.
        """
        self.torch_step()
        for w, g, is_mirrored in zip(self.w, self.wide_g, self.mirrored, strict=True):
            if not is_mirrored:
                continue
            if bool(torch.isnan(g).any()) or bool(torch.isnan(w).any()):
                print("NaN detected", file=sys.stderr)  # noqa: T201 - the semantics in question
            exponent = -LR * (ALPHA * torch.sign(w) * g + BETA)
            w.copy_(w * torch.exp(torch.clamp(exponent, -5.0, 5.0)))
            norm = float(torch.linalg.vector_norm(w))
            if norm > 1000.0:
                w.mul_(1000.0 / norm)
        _clip(self.wide_g)


def _clip(grads: Sequence[Tensor]) -> None:
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    factor = torch.clamp(20.0 / (norm + 1e-6), max=1.0)
    for g in grads:
        g.mul_(factor)


def _variants(
    shapes: Sequence[tuple[int, ...]], base: Base, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    on = _Weights(shapes, base, dtype)
    # large exponents come from a large a: weights and gradients stay what they are
    large = LARGE_LR * ALPHA * LARGE_GRADIENT / GRADIENT
    steps: dict[str, Callable[[], None]] = {"torch fused": on.torch_step}
    for name, form in (("native", fused), ("numba", jit)):
        if form.is_usable():
            steps[name] = partial(on.ham_step, form)
            steps[f"{name}, masked"] = partial(on.ham_step, form, masked=True)
            steps[f"{name}, large"] = partial(on.ham_step, form, a=large, clamp=5.0)
    steps["blocks"] = lambda: on.ham_step(cpu)
    steps["foreach"] = on.foreach_step
    steps["published"] = on.published_step
    return steps


def _exponents(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> ExponentStatistics | None:
    """Of a step of HAM as it comes, on the smaller tensors of the model."""
    mirrored = sorted((shape for shape in shapes if len(shape) >= 2), key=math.prod)
    if not mirrored:
        return None
    small = [shape for shape in mirrored if math.prod(shape) <= SMALL] or mirrored[:1]
    params = [nn.Parameter(torch.randn(shape).mul_(0.05).to(dtype)) for shape in small]
    optimizer = HAM(params, lr=LR)
    optimizer.measure_next_step()
    for param in params:
        param.grad = torch.randn(param.shape).mul_(GRADIENT).to(dtype)
    optimizer.step()
    return optimizer.exponent_statistics()

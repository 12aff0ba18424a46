"""The lists of a run under way, stepped by a backend, on a GPU where there is one."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hamcli.optim import gpu, rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton reads it when it is imported, which something else may cause once tests run
    os.environ["TRITON_INTERPRET"] = "1"


BASES = ("adamw", "adam", "sgd", "momentum", "nesterov")


@dataclass
class Lists:
    """The weights of a run under way, and what belongs to them."""

    weights: list[Tensor]
    grads: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    steps: list[Tensor]
    masks: list[Tensor | None]
    rounded: list[Tensor | None]

    def step_(self, base: str, *, module: Any = gpu, **options: Any) -> None:
        """One step by a backend; `options` replace the defaults."""
        chosen = {"a": 0.02, "b": 1e-7, "clamp": 5.0, "lr": 1e-4, "weight_decay": 1e-2}
        chosen |= {"masks": self.masks, "rounded": self.rounded} | options
        for step in self.steps:
            step += 1
        if base in ("adamw", "adam"):
            betas = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8} | {"decoupled": base == "adamw"}
            module.adam_ham_(
                self.weights, self.grads, self.m, self.v, self.steps, **(betas | chosen)
            )
            return
        has_momentum = base != "sgd"
        if chosen.get("seed") is not None:
            chosen["steps"] = self.steps
        momentum = {"momentum": 0.9 * has_momentum, "nesterov": base == "nesterov"}
        buffers = self.m if has_momentum else [None] * len(self.m)
        module.sgd_ham_(
            self.weights,
            self.grads,
            buffers,
            **({"is_first_step": False} | momentum | chosen),
        )


def make_lists(*sizes: int, seed: int = 0, step: int = 10, grad_size: float = 1e-3) -> Lists:
    """Weights of a trained net's size, moments as after some steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int, scale: float) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(DEVICE)

    return Lists(
        [normal(size, 0.04) for size in sizes],
        [normal(size, grad_size) for size in sizes],
        [normal(size, 0.3 * grad_size) for size in sizes],
        [normal(size, grad_size) ** 2 for size in sizes],
        [torch.tensor(float(step), device=DEVICE) for _ in sizes],
        [None] * len(sizes),
        [None] * len(sizes),
    )


def copy(lists: Lists) -> Lists:
    def cloned(tensors: list[Any]) -> list[Any]:
        return [None if tensor is None else tensor.clone() for tensor in tensors]

    return Lists(
        cloned(lists.weights),
        cloned(lists.grads),
        cloned(lists.m),
        cloned(lists.v),
        cloned(lists.steps),
        cloned(lists.masks),
        cloned(lists.rounded),
    )


def part(lists: Lists, i: int) -> Lists:
    """The lists with their `i`th weight alone."""
    return Lists(
        [lists.weights[i]],
        [lists.grads[i]],
        [lists.m[i]],
        [lists.v[i]],
        [lists.steps[i]],
        [lists.masks[i]],
        [lists.rounded[i]],
    )


def by_rule(lists: Lists, base: str, *, dtype: torch.dtype, lr: float, a: float, b: float) -> None:
    """The same step as `Lists.step_` takes by default, by the rule in `dtype`, one tensor."""
    w, g, m, v = (t[0].to(dtype) for t in (lists.weights, lists.grads, lists.m, lists.v))
    lists.steps[0] += 1
    if base in ("adamw", "adam"):
        w, m, v = rule.adam_step(
            w, g, m, v, step=int(lists.steps[0]), lr=lr, beta1=0.9, beta2=0.999, eps=1e-8,
            weight_decay=1e-2, decoupled=base == "adamw",
        )  # fmt: skip
    else:
        momentum = 0.0 if base == "sgd" else 0.9
        w, buffer = rule.sgd_step(
            w, g, m, lr=lr, momentum=momentum, nesterov=base == "nesterov", weight_decay=1e-2
        )
        m = m if buffer is None else buffer
    w = rule.multiply(w, rule.exponent(w, g, a=a, b=b, clamp=5.0))
    lists.weights, lists.m, lists.v = [w], [m], [v]


def ulps(found: Tensor, exact: Tensor) -> Tensor:
    """Distance in units in the last place that fp32 has at `exact`, a float64 tensor."""
    exponents = torch.frexp(exact.float()).exponent.double()
    return (found.double() - exact).abs() / torch.pow(2.0, exponents - 24)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(found: Lists, expected: Lists) -> None:
    for name in ("weights", "m", "v", "rounded"):
        for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert torch.equal(bits(one), bits(other)), name

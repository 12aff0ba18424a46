"""HAM as a torch optimizer: base step, mirror step, mask.

Source: Hyperbolic Aware Minimization, ICLR 2026 (arXiv 2506.02630). Where we differ from the
published wrapper: `expm1` instead of `exp`, so that small exponents survive fp32; the decay
lr * beta is summed up per group and applied when it reaches 2^-12, since alone it is below the
resolution of fp32; alpha may be found by calibration or per tensor (`scaling`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hamcli.optim import cpu, rule

Scaling = Literal["auto", "raw", "calibrated", "normalised"]

BETA = 1e-3  # METHODS: its total log-shrink is beta * sum of lr
STRENGTH = {"calibrated": 0.004, "normalised": 0.008}  # mean |exponent| a step at peak lr
CLAMP = {"raw": 5.0, "calibrated": 0.1, "normalised": 0.1}
CALIBRATION_STEPS = 10
GUARD_MEAN = 0.05  # a mean |exponent| above it collapses tensors
MIN_DECAY = 2.0**-12  # exact enough in fp32: 2^-12 is 2,048 times its resolution
LOW_PRECISION = (torch.bfloat16, torch.float16)
DEFAULT_DECAY = {"adamw": 1e-2, "adam": 0.0, "sgd": 0.0}


@dataclass(frozen=True, slots=True)
class ExponentStatistics:
    """What one mirror step did, over all mirrored weights that are not zero.

    Attributes:
        mean: Mean of |exponent|.
        max: Greatest |exponent|.
        moved_fraction: Share of the weights whose stored value changed.
        clamped_fraction: Share of the exponents cut at the clamp.
        alpha: alpha in force; None where it differs between groups or tensors.
        guard_events: How often the guard has halved alpha so far.
    """

    mean: float
    max: float
    moved_fraction: float
    clamped_fraction: float
    alpha: float | None
    guard_events: int


class HAM(torch.optim.Optimizer):
    """AdamW, Adam or SGD, each step followed by HAM's mirror step and the masks.

    Order: base step -> mirror step on parameters with two or more dimensions -> mask. Clip before
    the step: the mirror step sees the gradient that the base step saw. With alpha = beta = 0 it is
    torch's own (fused) optimizer bit for bit. Non-finite gradients are the caller's to refuse.
    fp16 and bf16 weights get fp32 masters in the state; the weight is their rounded copy.

    Args:
        params: Parameters or groups. A group may say `mirror=False`, or have its own alpha, beta,
            scaling, strength, clamp and lr_peak.
        base: The base optimizer; its arguments default as torch's.
        lr: Learning rate; also the peak that `strength` refers to unless a group has `lr_peak`.
        weight_decay: Decoupled for adamw, an L2 term otherwise; None = torch's default.
        betas: Of adamw and adam.
        eps: Of adamw and adam.
        momentum: Of sgd.
        nesterov: Of sgd.
        alpha: At least 0, or "auto": found by `scaling`.
        beta: At least 0, or "auto": 1e-3.
        scaling: "raw": alpha as given. "calibrated": alpha = strength / (lr_peak * mean|g|), the
            mean over the first ten steps. "normalised" (not the paper's): each tensor's gradient
            over its root mean square, times strength. "auto": raw for a given alpha, else
            calibrated.
        strength: Mean |exponent| of a step at peak lr that calibrated and normalised aim at.
        clamp: Limit of |exponent|; None = 5 for raw, 0.1 otherwise.
        backend: "auto" and "cpu": cache-blocked torch; "rule": the oracle.

    Raises:
        ValueError: An argument is out of range, or a parameter is complex.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        base: Literal["adamw", "adam", "sgd"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.0,
        nesterov: bool = False,
        alpha: float | Literal["auto"] = "auto",
        beta: float | Literal["auto"] = "auto",
        scaling: Scaling = "auto",
        strength: float | None = None,
        clamp: float | None = None,
        backend: Literal["auto", "rule", "cpu", "gpu"] = "auto",
    ) -> None:
        if base not in DEFAULT_DECAY:
            raise ValueError(f"base is {base!r}: must be adamw, adam or sgd")
        if backend not in ("auto", "rule", "cpu"):
            raise ValueError(f"backend is {backend!r}: here are auto, rule and cpu")
        if nesterov and momentum <= 0:
            raise ValueError("nesterov needs momentum above 0")
        self._base = base
        self._backend = backend
        self._measure = False
        self._statistics: ExponentStatistics | None = None
        defaults = {
            "lr": lr,
            "weight_decay": DEFAULT_DECAY[base] if weight_decay is None else weight_decay,
            "betas": tuple(betas),
            "eps": eps,
            "momentum": momentum,
            "nesterov": nesterov,
            "mirror": True,
            "alpha": alpha,
            "beta": beta,
            "scaling": scaling,
            "strength": strength,
            "clamp": clamp,
            "lr_peak": None,
            "ham_alpha": None,
            "ham_gradient_sum": 0.0,
            "ham_calibrated": 0,
            "ham_decay_due": 0.0,
            "ham_guard_events": 0,
        }
        super().__init__(params, defaults)
        # Otherwise GradScaler calls step() with infinite gradients and leaves the skipping to a
        # fused kernel, and the mirror step would run on them.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked and with its scaling resolved."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _resolve(group)
        for param in group["params"]:
            if param.is_complex():
                raise ValueError("HAM takes no complex parameters")

    # ---- masks ----

    def set_masks(self, masks: Mapping[Tensor, Tensor | None]) -> None:
        """Hold masks from now on: True where kept, None for no mask. Applied at once."""
        known = {id(param) for group in self.param_groups for param in group["params"]}
        for param, mask in masks.items():
            if id(param) not in known:
                raise ValueError("a mask names a parameter that this optimizer does not hold")
            if mask is None:
                self.state[param].pop("ham_mask", None)
                continue
            if mask.shape != param.shape or mask.dtype != torch.bool:
                raise ValueError("a mask is bool and has the shape of its parameter")
            self.state[param]["ham_mask"] = mask.to(param.device)
            self._apply_mask(param)

    def masks(self) -> dict[Tensor, Tensor]:
        """The masks in force, True where kept."""
        return {p: state["ham_mask"] for p, state in self.state.items() if "ham_mask" in state}

    def _apply_mask(self, param: Tensor) -> None:
        state = self.state[param]
        keys = ("ham_master", "exp_avg", "exp_avg_sq", "momentum_buffer")
        held = [param, *(state[key] for key in keys if state.get(key) is not None)]
        cpu.mask_([tensor.detach() for tensor in held], [state["ham_mask"]] * len(held))

    # ---- statistics ----

    def measure_next_step(self) -> None:
        """Measure the mirror step of the next `step()`; costs about one more pass."""
        self._measure = True

    def exponent_statistics(self) -> ExponentStatistics | None:
        """The last measurement, None before the first."""
        return self._statistics

    # ---- the step ----

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Base step, mirror step, mask. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sums = _Sums() if self._measure else None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if any(param.grad.is_sparse for param in params):
                raise ValueError("HAM takes no sparse gradients")
            for batch in _by_device_and_dtype(params):
                self._base_step(group, batch)
            self._mirror_step(group, [p for p in params if group["mirror"] and p.dim() >= 2], sums)
            for param in group["params"]:
                if "ham_mask" in self.state.get(param, ()):
                    self._apply_mask(param)
        if sums is not None:
            self._statistics = sums.statistics(self.param_groups)
            self._measure = False
        return loss

    def _weight(self, param: Tensor) -> Tensor:
        """What is updated: the master of a low-precision parameter, else the parameter."""
        master = self.state[param].get("ham_master")
        return param if master is None else master

    def _base_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            self._init_state(group, param)
        weights = [self._weight(param).detach() for param in params]
        grads = [_grad(param, weight) for param, weight in zip(params, weights, strict=True)]
        states = [self.state[param] for param in params]
        fused = weights[0].device.type in ("cpu", "cuda")
        if self._base == "sgd":
            self._sgd(group, weights, grads, states, fused)
        else:
            step = adamw if self._base == "adamw" else adam
            beta1, beta2 = group["betas"]
            step(
                weights,
                grads,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                foreach=not fused,
                fused=fused,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        for param, weight in zip(params, weights, strict=True):
            if weight.dtype != param.dtype:
                param.copy_(weight)

    def _sgd(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
        fused: bool,
    ) -> None:
        has_momentum = group["momentum"] != 0.0
        buffers = [state.get("momentum_buffer") for state in states]
        for is_first in (True, False):  # torch's fused form takes no mixture of both
            chosen = [i for i, buffer in enumerate(buffers) if (buffer is None) == is_first]
            if not chosen:
                continue
            part = [buffers[i] for i in chosen]
            sgd(
                [weights[i] for i in chosen],
                [grads[i] for i in chosen],
                part,
                foreach=not fused,
                fused=fused,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
            )
            if has_momentum:
                for i, buffer in zip(chosen, part, strict=True):
                    states[i]["momentum_buffer"] = buffer

    def _init_state(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        if param.dtype in LOW_PRECISION and "ham_master" not in state:
            state["ham_master"] = param.detach().float().clone()
        if self._base != "sgd" and "step" not in state:
            weight = self._weight(param)
            on_device = weight.device.type == "cuda"
            state["step"] = torch.zeros((), device=weight.device if on_device else "cpu")
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(weight, memory_format=torch.preserve_format)

    def _mirror_step(
        self, group: dict[str, Any], params: list[Tensor], sums: "_Sums | None"
    ) -> None:
        if not params or (group["alpha"] == 0.0 and group["beta"] == 0.0):
            return
        weights = [self._weight(param).detach() for param in params]
        grads = [_grad(param, weight) for param, weight in zip(params, weights, strict=True)]
        strengths = self._strengths(group, params, grads)
        group["ham_decay_due"] += group["lr"] * group["beta"]
        b = group["ham_decay_due"] if group["ham_decay_due"] >= MIN_DECAY else 0.0
        if b:
            group["ham_decay_due"] = 0.0
        for weight, grad, a in zip(weights, grads, strengths, strict=True):
            before = weight.clone() if sums is not None else None
            if self._backend == "rule":
                made = rule.mirror_step(weight, grad, a=a, b=b, clamp=group["clamp"])
                weight.copy_(made)
            else:
                cpu.mirror_step_([weight], [grad], [a], b=b, clamp=group["clamp"])
            if sums is not None and before is not None:
                sums.add(before, weight, grad, a, b, group["clamp"])
        for param, weight in zip(params, weights, strict=True):
            if weight.dtype != param.dtype:
                param.copy_(weight)

    def _strengths(
        self, group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[float]:
        """A = lr * alpha of each tensor."""
        if group["scaling"] == "raw":
            return [group["lr"] * group["alpha"]] * len(grads)
        lr_share = group["lr"] / group["lr_peak"]
        if group["scaling"] == "normalised":
            scales = [self._rms(p, g) for p, g in zip(params, grads, strict=True)]
            eta = group["strength"] * lr_share
            return [eta / scale if scale > 0 else 0.0 for scale in scales]
        total = sum(float(norm) for norm in torch._foreach_norm(list(grads), 1))
        mean = total / sum(grad.numel() for grad in grads)
        _calibrate(group, mean)
        return [group["lr"] * group["ham_alpha"]] * len(grads)

    def _rms(self, param: Tensor, grad: Tensor) -> float:
        mask = self.state[param].get("ham_mask")
        if mask is None:
            return float(grad.norm()) / math.sqrt(max(1, grad.numel()))
        kept = int(mask.count_nonzero())
        return float(torch.where(mask, grad, 0.0).norm()) / math.sqrt(max(1, kept))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; masks stay bool and masters stay fp32, whatever the parameter's dtype."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        held = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(order, held, strict=True):
            for key, value in saved.get(index, {}).items():
                if isinstance(value, Tensor) and key != "step":  # torch casts to param.dtype
                    self.state[param][key] = value.detach().clone().to(param.device)


def ham_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: float,
    alpha: float,
    beta: float,
    clamp: float = 5.0,
    masks: Sequence[Tensor | None] | None = None,
) -> None:
    """HAM's mirror step, in place, after the step of any optimizer (arXiv 2506.02630).

    w <- w * exp(clamp(-lr * (alpha * sign(w) * g + beta))), then the masks.

    Args:
        params: Weights after the base step, fp32 or wider for small exponents to count.
        grads: The gradients that the base step used.
        lr: Learning rate of the step.
        alpha: Strength of the gradient term, at least 0.
        beta: Pull towards zero, at least 0.
        clamp: Limit of |exponent|.
        masks: True where kept, None where there is none.
    """
    weights = [param.detach() for param in params]
    cpu.mirror_step_(weights, grads, [lr * alpha] * len(weights), b=lr * beta, clamp=clamp)
    if masks is not None:
        cpu.mask_(weights, masks)


def _resolve(group: dict[str, Any]) -> None:
    """Check a group's words and turn "auto" and None into what they mean."""
    for key in ("lr", "weight_decay", "eps"):
        if not (math.isfinite(group[key]) and group[key] >= 0):
            raise ValueError(f"{key} is {group[key]!r}: must be finite and at least 0")
    if group["scaling"] == "auto":
        group["scaling"] = "calibrated" if group["alpha"] == "auto" else "raw"
    if group["scaling"] not in CLAMP:
        raise ValueError(f"scaling is {group['scaling']!r}: auto, raw, calibrated or normalised")
    if group["scaling"] == "raw" and group["alpha"] == "auto":
        group["alpha"] = 200.0  # the published default
    group["beta"] = BETA if group["beta"] == "auto" else group["beta"]
    for key in ("alpha", "beta"):
        value = group[key]
        if value != "auto" and not (math.isfinite(value) and value >= 0):
            raise ValueError(f'{key} is {value!r}: must be "auto" or finite and at least 0')
    if group["scaling"] != "raw" and group["alpha"] not in ("auto", 0.0):
        raise ValueError(f"alpha {group['alpha']} is raw: scaling {group['scaling']} finds its own")
    if group["alpha"] == 0.0:
        group["scaling"] = "raw"
    if group["strength"] is None:
        group["strength"] = STRENGTH.get(group["scaling"])
    if group["clamp"] is None:
        group["clamp"] = CLAMP[group["scaling"]]
    if group["lr_peak"] is None:
        group["lr_peak"] = group["lr"]
    if group["scaling"] != "raw" and group["lr_peak"] <= 0:
        raise ValueError("lr_peak must be above 0: it is what strength refers to")


def _calibrate(group: dict[str, Any], mean: float) -> None:
    """Alpha from the mean gradient seen so far, for the first ten steps; then the guard alone."""
    if group["ham_calibrated"] < CALIBRATION_STEPS and math.isfinite(mean) and mean > 0:
        group["ham_gradient_sum"] += mean
        group["ham_calibrated"] += 1
        average = group["ham_gradient_sum"] / group["ham_calibrated"]
        group["ham_alpha"] = group["strength"] / (group["lr_peak"] * average)
    if group["ham_alpha"] is None:
        group["ham_alpha"] = 0.0
    for _ in range(64):
        if group["lr"] * group["ham_alpha"] * mean <= GUARD_MEAN:
            break
        group["ham_alpha"] /= 2
        group["ham_guard_events"] += 1


def _grad(param: Tensor, weight: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad.detach().to(weight.dtype)


def _by_device_and_dtype(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters that one call of the base step can take."""
    made: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        made.setdefault((param.device, param.dtype), []).append(param)
    return list(made.values())


class _Sums:
    """Adds up what a measured mirror step did."""

    def __init__(self) -> None:
        self.total = self.moved = self.clamped = 0
        self.absolute = self.greatest = 0.0

    def add(
        self, before: Tensor, after: Tensor, grad: Tensor, a: float, b: float, clamp: float
    ) -> None:
        """One tensor, its weights before and after."""
        alive = before != 0
        raw = (a * torch.sign(before) * grad + b).abs()
        size = torch.where(alive, raw.clamp(max=clamp), 0.0)
        self.total += int(alive.count_nonzero())
        self.moved += int((before != after).count_nonzero())
        self.clamped += int(((raw > clamp) & alive).count_nonzero())
        self.absolute += float(size.sum(dtype=torch.float64))
        self.greatest = max(self.greatest, float(size.max()) if size.numel() else 0.0)

    def statistics(self, groups: Sequence[dict[str, Any]]) -> ExponentStatistics:
        """The record of the step."""
        total = max(1, self.total)
        found = {_alpha(group) for group in groups if group["mirror"]}
        return ExponentStatistics(
            mean=self.absolute / total,
            max=self.greatest,
            moved_fraction=self.moved / total,
            clamped_fraction=self.clamped / total,
            alpha=found.pop() if len(found) == 1 else None,
            guard_events=sum(group["ham_guard_events"] for group in groups),
        )


def _alpha(group: dict[str, Any]) -> float | None:
    if group["scaling"] == "raw":
        return float(group["alpha"])
    found = group["ham_alpha"]
    return None if found is None else float(found)

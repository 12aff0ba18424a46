"""HAM as a torch optimizer: groups, state, masks and which backend; arithmetic is for the others.

Each step: base step, mirror step on the mirrored weights, mask (`rule` has the equations). What the
step size of the mirror step is, `alpha`, `scaling` and `strength` say:

    raw          alpha as given: the paper's rule
    calibrated   alpha = strength / (lr_peak * mean|g|): at the peak learning rate the mean exponent is
                 `strength`, on every model. mean|g| runs over the first steps, then is frozen
    normalised   alpha = strength / (lr_peak * rms(g)), for each tensor and step anew. Ours, not the
                 paper's

The decay lr * beta is far below what float32 resolves, so it is summed up, one number a group, and
applied once it is due; the exponent of a step is the gradient's part, plus the sum when due. It falls
on the weights that have a gradient on that step.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hamcli.optim import base_step, cpu, rule

ALPHA_PUBLISHED = 200.0  # arXiv 2506.02630, ImageNet
BETA_PUBLISHED = 1e-3  # arXiv 2506.02630, ImageNet
STRENGTHS = {"raw": None, "calibrated": 0.004, "normalised": 0.008}
CLAMPS = {"raw": 5.0, "calibrated": 0.1, "normalised": 0.1}  # 5: arXiv 2506.02630
WEIGHT_DECAYS = {"adamw": 1e-2, "adam": 0.0, "sgd": 0.0}  # torch's own
BACKENDS = ("auto", "rule", "cpu", "gpu")
CALIBRATION_STEPS = 10
EXPONENT_LIMIT = 0.05  # a mean |exponent| above this halves alpha
DECAY_DUE = 2.0**-12  # decay applied at once: large beside float32's rounding, small beside 1
LOW_PRECISION = (torch.bfloat16, torch.float16)

Scaling = Literal["auto", "raw", "calibrated", "normalised"]


@dataclass(frozen=True, slots=True)
class ExponentStatistics:
    """The mirror step of one step, over the mirrored weights that are kept and not zero.

    Attributes:
        mean: Mean of |exponent|, after the clamp.
        max: Greatest |exponent|.
        moved_fraction: Share of the stored weights that the mirror step changed.
        clamped_fraction: Share of the exponents at the clamp.
        alpha: Alpha of the step; None where tensors or groups have their own.
        guard_events: How often so far alpha was halved because the exponents were too large or not
            finite.
    """

    mean: float
    max: float
    moved_fraction: float
    clamped_fraction: float
    alpha: float | None
    guard_events: int


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter with a gradient: what is updated, its gradient in the same memory order."""

    param: Tensor
    w: Tensor
    g: Tensor


def choose_automatic_scaling() -> tuple[str, float]:
    """What `alpha="auto", scaling="auto"` means: the scaling and its strength."""
    return "calibrated", 0.004


class HAM(torch.optim.Optimizer):
    """Base optimizer, HAM's multiplicative mirror step, and masks (HAM, arXiv 2506.02630).

    w <- w' * exp(clamp(-lr * (alpha * sign(w') * g + beta))) with w' the weight after the base step and
    g the gradient that step used: clip before `step`, not after. Stateless; zeros stay zero and no sign
    changes. With alpha = beta = 0 it is torch's fused base optimizer, bit for bit.

    bfloat16 and float16 weights have float32 masters in the state; the parameter is their rounded
    copy, and writing to it from outside has no lasting effect. All of the options except `base` and
    `backend` can be given by group, as can `mirror` (False leaves the group to the base optimizer; the
    default is True for parameters of two or more dimensions) and `lr_peak`.

    Args:
        params: Parameters or groups, as for every torch optimizer.
        base: The base optimizer.
        lr: Learning rate. Its value here is the group's `lr_peak` unless that is given: construct
            before a scheduler lowers it for a warm-up.
        weight_decay: The base optimizer's; None is torch's default for it.
        betas: Adam's.
        eps: Adam's.
        momentum: SGD's.
        nesterov: SGD's.
        alpha: Strength of the gradient's part. A number means the paper's rule, as does "auto" with
            `scaling="raw"` (200).
        beta: Strength of the decay; "auto" is 1e-3.
        scaling: How alpha "auto" is found.
        strength: Mean |exponent| (calibrated) or rms of it (normalised) at the peak learning rate.
        clamp: Bound of |exponent|; None is 5 for raw and 0.1 otherwise.
        backend: "rule" is the slow oracle; "cpu" blocked torch operations, for any device.

    Raises:
        ValueError: For a value out of range, a complex or sparse parameter or gradient, a backend that
            does not exist.

    Example:
        >>> optimizer = HAM(model.parameters(), lr=1e-3)
        >>> optimizer.set_masks({model.weight: mask})
        >>> loss.backward(); optimizer.step()
    """

    # Fused torch optimizers say True, and then GradScaler calls step() on infinite gradients too.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        params: Any,
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
        _require(base in WEIGHT_DECAYS, f"base is {base!r}; adamw, adam or sgd")
        _require(backend in BACKENDS, f"backend is {backend!r}; one of {', '.join(BACKENDS)}")
        _require(backend != "gpu", "backend gpu does not exist yet; auto and cpu run on any device")
        defaults = {
            "base": base,
            "lr": lr,
            "weight_decay": WEIGHT_DECAYS[base] if weight_decay is None else weight_decay,
            "betas": tuple(betas),
            "eps": eps,
            "momentum": momentum,
            "nesterov": nesterov,
            "alpha": alpha,
            "beta": beta,
            "scaling": scaling,
            "strength": strength,
            "clamp": clamp,
            "mirror": True,
            "backend": backend,
        }
        self._start_measuring()
        super().__init__(params, defaults)

    def _start_measuring(self) -> None:
        self._is_measured = False
        self._statistics: ExponentStatistics | None = None
        self._num_kept: dict[Tensor, int] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and make what is not part of the state."""
        super().__setstate__(state)
        if not hasattr(self, "_num_kept"):
            self._start_measuring()
        self._count_kept()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not say is as given to the constructor.

        Raises:
            ValueError: As for the constructor.
        """
        group = dict(self.defaults) | param_group
        _resolve(group)
        super().add_param_group(group)
        for param in self.param_groups[-1]["params"]:
            if param.is_complex() or param.layout != torch.strided:
                self.param_groups.pop()
                raise ValueError("HAM takes dense real parameters, not complex or sparse ones")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Base step, mirror step, mask. Weights without a gradient keep their value.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            ValueError: For a sparse gradient; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise ValueError("HAM takes dense gradients, not sparse ones")
        scratch = cpu.Scratch()
        tally = cpu.Tally() if self._is_measured else None
        weights = [self._weights(group) for group in self.param_groups]
        alphas = self._alphas(weights, scratch)
        for group, of_group, of_alphas in zip(self.param_groups, weights, alphas, strict=True):
            self._step_group(group, of_group, of_alphas, scratch, tally)
        if tally is not None:
            self._statistics = self._summary(tally)
            self._is_measured = False
        return loss

    def _weights(self, group: dict[str, Any]) -> list[_Weight]:
        """The group's parameters that have a gradient, their state begun."""
        found = []
        for param in group["params"]:
            if param.grad is None:
                continue
            w = self._stored(param)
            base_step.start(self.state[param], w, group["base"])
            found.append(_Weight(param, w, cpu.like(param.grad, w)))
        return found

    def _stored(self, param: Tensor) -> Tensor:
        """What is updated: the parameter, or its float32 master, made at first use."""
        if param.dtype not in LOW_PRECISION:
            return param
        state = self.state[param]
        if "ham_master" not in state:
            state["ham_master"] = param.detach().to(torch.float32, copy=True)
        master: Tensor = state["ham_master"]
        return master

    def _step_group(
        self,
        group: dict[str, Any],
        weights: list[_Weight],
        alphas: list[float],
        scratch: cpu.Scratch,
        tally: cpu.Tally | None,
    ) -> None:
        """One step of one group; `alphas` has lr * alpha for each of its weights."""
        decay = self._decay_due(group) if weights else 0.0
        self._take_base_step(group, weights)
        for weight, a in zip(weights, alphas, strict=True):
            is_mirrored = _is_mirrored(group, weight.param)
            self._mirror(
                group,
                weight,
                a if is_mirrored else 0.0,
                decay if is_mirrored else 0.0,
                scratch,
                tally if is_mirrored else None,
            )
        for param in group["params"]:
            if param.grad is None and "ham_mask" in self.state.get(param, {}):
                self._mask(param, scratch)

    def _take_base_step(self, group: dict[str, Any], weights: list[_Weight]) -> None:
        if group["backend"] == "rule":
            for weight in weights:
                g = weight.g.to(weight.w.dtype)
                base_step.take_by_rule(group, weight.w, g, self.state[weight.param])
            return
        same = [weight for weight in weights if weight.g.dtype == weight.w.dtype]
        states = [self.state[weight.param] for weight in same]
        base_step.take(group, [weight.w for weight in same], [weight.g for weight in same], states)
        # one at a time: the wide copy of a gradient lives no longer than its step
        for weight in weights:
            if weight.g.dtype != weight.w.dtype:
                g = weight.g.to(weight.w.dtype)
                base_step.take(group, [weight.w], [g], [self.state[weight.param]])

    def _mirror(
        self,
        group: dict[str, Any],
        weight: _Weight,
        a: float,
        b: float,
        scratch: cpu.Scratch,
        tally: cpu.Tally | None,
    ) -> None:
        """Mirror step and mask of one weight, and the rounded copy of its master."""
        state = self.state[weight.param]
        mask = state.get("ham_mask")
        moments = base_step.first_moments(state)
        clamp = group["clamp"]
        if group["backend"] == "rule":
            _mirror_by_rule(weight, a, b, clamp, mask, moments, tally)
        elif cpu.is_dense(weight.w):
            cpu.mirror_(
                weight.w,
                weight.g,
                a=a,
                b=b,
                clamp=clamp,
                mask=mask,
                moments=moments,
                scratch=scratch,
                tally=tally,
            )
        else:
            _mirror_by_rule(weight, a, b, clamp, mask, moments, tally)
        if weight.w is not weight.param:
            weight.param.copy_(weight.w)

    def _mask(self, param: Tensor, scratch: cpu.Scratch) -> None:
        """Zero what the parameter's mask drops, in all of its copies and its momentum."""
        state = self.state[param]
        tensors = [param, *base_step.first_moments(state)]
        tensors += [state["ham_master"]] if "ham_master" in state else []
        for tensor in tensors:
            tensor.copy_(rule.apply_mask(tensor, state["ham_mask"])) if not cpu.is_dense(
                tensor
            ) else cpu.mask_([tensor], state["ham_mask"], scratch)

    # --- the size of the mirror step

    def _alphas(
        self, weights: Sequence[Sequence[_Weight]], scratch: cpu.Scratch
    ) -> list[list[float]]:
        """lr * alpha for every weight of every group; advances calibration and the guard."""
        groups = self.param_groups
        sums = [
            [self._grad_sums(group, weight, scratch) for weight in of_group]
            for group, of_group in zip(groups, weights, strict=True)
        ]
        self._calibrate(sums)
        return [
            _guarded(group, _plain_alphas(group, of_group), of_group)
            for group, of_group in zip(groups, sums, strict=True)
        ]

    def _grad_sums(
        self, group: dict[str, Any], weight: _Weight, scratch: cpu.Scratch
    ) -> tuple[float, float, int]:
        """Sum of |g|, of g squared, and how many weights count; zeros where alpha is given."""
        if group["scaling"] == "raw" or not _is_mirrored(group, weight.param):
            return 0.0, 0.0, 0
        mask = self.state[weight.param].get("ham_mask")
        g = weight.g if cpu.is_dense(weight.g) else weight.g.contiguous()
        mask = None if mask is None else cpu.like(mask, g)
        total, squares = cpu.grad_sums(g, mask, scratch).tolist()
        return total, squares, self._num_kept.get(weight.param, weight.param.numel())

    def _calibrate(self, sums: Sequence[Sequence[tuple[float, float, int]]]) -> None:
        """Take this step's mean|g| over all calibrated groups into their running means."""
        calibrated = [
            (group, of_group)
            for group, of_group in zip(self.param_groups, sums, strict=True)
            if group["scaling"] == "calibrated"
        ]
        total = math.fsum(s[0] for _, of_group in calibrated for s in of_group)
        count = sum(s[2] for _, of_group in calibrated for s in of_group)
        if count == 0 or not math.isfinite(total):
            return
        for group, _ in calibrated:
            done = group["ham_calibration_steps"]
            if done < CALIBRATION_STEPS:
                group["ham_grad_mean"] += (total / count - group["ham_grad_mean"]) / (done + 1)
                group["ham_calibration_steps"] = done + 1

    def _decay_due(self, group: dict[str, Any]) -> float:
        """Add this step's decay to what is pending; all of it once it is due, else 0."""
        group["ham_pending_decay"] += float(group["lr"]) * group["beta"]
        if group["ham_pending_decay"] < DECAY_DUE:
            return 0.0
        due: float = group["ham_pending_decay"]
        group["ham_pending_decay"] = 0.0
        return due

    @torch.no_grad()
    def flush_decay(self) -> None:
        """Apply the decay that is pending, less than 2^-12 of each mirrored weight, at once."""
        scratch = cpu.Scratch()
        for group in self.param_groups:
            due, group["ham_pending_decay"] = group["ham_pending_decay"], 0.0
            for param in group["params"]:
                if due == 0 or not param.requires_grad or not _is_mirrored(group, param):
                    continue
                w = self._stored(param)
                weight = _Weight(param, w, w)
                self._mirror(group, weight, 0.0, due, scratch, None)

    # --- masks

    @torch.no_grad()
    def set_masks(self, masks: Mapping[Tensor, Tensor | None]) -> None:
        """Hold weights at zero, from now on and after every step.

        Args:
            masks: Parameter to bool mask of its shape, True where the weight is kept; None lifts the
                mask. Parameters not named keep theirs. Dropped weights and their momentum are zeroed at
                once; the masks are copied.

        Raises:
            ValueError: For a parameter that is not this optimizer's, a mask of another shape or dtype.
        """
        ours = {param for group in self.param_groups for param in group["params"]}
        for param, mask in masks.items():
            _require(param in ours, "set_masks got a parameter that is not this optimizer's")
            if mask is not None:
                _require(mask.dtype == torch.bool, f"a mask is {mask.dtype}; torch.bool is needed")
                _require(
                    mask.shape == param.shape,
                    f"a mask has shape {tuple(mask.shape)}, its parameter {tuple(param.shape)}",
                )
        scratch = cpu.Scratch()
        for param, mask in masks.items():
            if mask is None:
                self.state.get(param, {}).pop("ham_mask", None)
                self._num_kept.pop(param, None)
                continue
            self.state[param]["ham_mask"] = torch.empty_like(param, dtype=torch.bool).copy_(mask)
            self._num_kept[param] = int(mask.sum())
            self._mask(param, scratch)

    def masks(self) -> dict[Tensor, Tensor]:
        """The masks that hold, by parameter; True where the weight is kept."""
        return {p: state["ham_mask"] for p, state in self.state.items() if "ham_mask" in state}

    def _count_kept(self) -> None:
        self._num_kept = {param: int(mask.bool().sum()) for param, mask in self.masks().items()}

    # --- statistics

    def measure_next_step(self) -> None:
        """Measure the exponents of the next step; it costs a few reductions."""
        self._is_measured = True

    def exponent_statistics(self) -> ExponentStatistics | None:
        """The last measured step; None before there is one."""
        return self._statistics

    def _summary(self, tally: cpu.Tally) -> ExponentStatistics:
        count = max(tally.count, 1)
        alphas = {_alpha(group) for group in self.param_groups if group["mirror"]}
        return ExponentStatistics(
            mean=tally.total / count,
            max=tally.greatest,
            moved_fraction=tally.moved / count,
            clamped_fraction=tally.clamped / count,
            alpha=alphas.pop() if len(alphas) == 1 else None,
            guard_events=sum(group["ham_guard_events"] for group in self.param_groups),
        )

    # --- state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave: the run goes on bit for bit.

        Raises:
            ValueError: If it is another base optimizer's, or groups or sizes differ.
        """
        for group in state_dict["param_groups"]:
            base = self.defaults["base"]
            _require(group.get("base") == base, f"the state is not of HAM with base {base}")
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for i, param in zip(saved, params, strict=True):
            # torch casts state to the parameter's dtype: masks and masters would be lost
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][key] = _placed(key, value, param)
        self._count_kept()


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _resolve(group: dict[str, Any]) -> None:
    """Check a group's options and replace what is automatic; begin its scalars."""
    scaling, alpha = group["scaling"], group["alpha"]
    _require(scaling in (*STRENGTHS, "auto"), f"scaling is {scaling!r}; auto or one of the three")
    _require(
        alpha == "auto" or scaling in ("auto", "raw"),
        f"alpha is given, and scaling {scaling} would choose it; one of the two",
    )
    if alpha != "auto":
        scaling = "raw"
    elif scaling == "auto":
        scaling, strength = choose_automatic_scaling()
        group["strength"] = strength if group["strength"] is None else group["strength"]
    group["scaling"] = scaling
    if scaling == "raw" and alpha == "auto":
        group["alpha"] = ALPHA_PUBLISHED
    if group["beta"] == "auto":
        group["beta"] = BETA_PUBLISHED
    if group["strength"] is None:
        group["strength"] = STRENGTHS[scaling]
    if group["clamp"] is None:
        group["clamp"] = CLAMPS[scaling]
    group.setdefault("lr_peak", float(group["lr"]))
    _check(group)
    group.setdefault("ham_pending_decay", 0.0)
    group.setdefault("ham_calibration_steps", 0)
    group.setdefault("ham_grad_mean", 0.0)
    group.setdefault("ham_alpha_factor", 1.0)
    group.setdefault("ham_guard_events", 0)


def _check(group: Mapping[str, Any]) -> None:
    """Refuse values that are out of range, NaN among them."""
    for name in ("lr", "weight_decay", "eps", "momentum", "beta"):
        _require(0 <= group[name] < math.inf, f"{name} is {group[name]}; 0 or more is needed")
    _require(all(0 <= b < 1 for b in group["betas"]), f"betas are {group['betas']}; in [0, 1)")
    _require(group["clamp"] > 0, f"clamp is {group['clamp']}; more than 0 is needed")
    _require(not group["nesterov"] or group["momentum"] > 0, "nesterov needs a momentum")
    if group["scaling"] == "raw":
        _require(0 <= group["alpha"] < math.inf, f"alpha is {group['alpha']}; 0 or more is needed")
        return
    _require(
        0 <= group["strength"] < math.inf, f"strength is {group['strength']}; 0 or more is needed"
    )
    _require(
        group["lr_peak"] > 0 or not group["mirror"],
        f"lr_peak is {group['lr_peak']}; scaling {group['scaling']} needs the peak learning rate",
    )


def _is_mirrored(group: Mapping[str, Any], param: Tensor) -> bool:
    return bool(group["mirror"]) and param.ndim >= 2


def _alpha(group: Mapping[str, Any]) -> float | None:
    """Alpha of a group now; None where each tensor has its own."""
    if group["scaling"] == "raw":
        return float(group["alpha"])
    if group["scaling"] == "normalised":
        return None
    scale = group["lr_peak"] * group["ham_grad_mean"]
    # with no gradient seen there is nothing to scale by, and nothing to do
    return float(group["strength"] * group["ham_alpha_factor"] / scale) if scale > 0 else 0.0


def _plain_alphas(
    group: Mapping[str, Any], sums: Iterable[tuple[float, float, int]]
) -> list[float]:
    """lr * alpha for each weight of a group, as calibration has it."""
    lr = float(group["lr"])
    alpha = _alpha(group)
    if alpha is not None:
        return [lr * alpha for _ in sums]
    eta = group["strength"] * group["ham_alpha_factor"] * lr / group["lr_peak"]
    return [eta / math.sqrt(q / n) if n > 0 and q > 0 else 0.0 for _, q, n in sums]


def _guarded(
    group: dict[str, Any], alphas: list[float], sums: Sequence[tuple[float, float, int]]
) -> list[float]:
    """`alphas`, halved from now on if their exponents are too large; 0 if they are not finite."""
    count = sum(n for _, _, n in sums)
    if group["scaling"] == "raw" or count == 0:
        return alphas
    mean = sum(a * total for a, (total, _, _) in zip(alphas, sums, strict=True)) / count
    if mean <= EXPONENT_LIMIT:
        return alphas
    group["ham_alpha_factor"] /= 2
    group["ham_guard_events"] += 1
    return [a / 2 if math.isfinite(mean) else 0.0 for a in alphas]


def _mirror_by_rule(
    weight: _Weight,
    a: float,
    b: float,
    clamp: float,
    mask: Tensor | None,
    moments: Sequence[Tensor],
    tally: cpu.Tally | None,
) -> None:
    """Mirror step and mask of one weight as `rule` writes them."""
    w = weight.w
    if a != 0 or b != 0 or tally is not None:
        e = rule.exponent(w, weight.g.to(w.dtype), a=a, b=b, clamp=clamp)
        new = w + w * e.expm1()
        if tally is not None:
            cpu.count_exponents(tally, w, e, clamp, mask)
            changed = new != w
            tally.moved += int((changed if mask is None else changed & mask).sum())
        w.copy_(new)
    for tensor in (w, *moments):
        tensor.copy_(rule.apply_mask(tensor, mask))


def _placed(key: str, value: Tensor, param: Tensor) -> Tensor:
    """A saved tensor of `param`'s state as the running optimizer has it, copied."""
    if key == "step":
        device = param.device if base_step.is_fused(param) else "cpu"
        return value.to(device=device, dtype=torch.float32, copy=True)
    dtype = torch.float32 if param.dtype in LOW_PRECISION else param.dtype
    dtype = torch.bool if key == "ham_mask" else dtype
    return torch.empty_like(param, dtype=dtype).copy_(value)

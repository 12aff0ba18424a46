"""HAM as a torch optimizer: groups, state, masks, and which backend does the arithmetic.

Each step: base step, mirror step on the mirrored weights, mask; `rule` has the equations, and
`exponents` says how strong the mirror step is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from hamcli.optim import cpu, forms, plain
from hamcli.optim.exponents import (
    alpha_now,
    calibrate,
    calibrates_now,
    decay_now,
    has_mirrored,
    is_guarded,
    mirrors,
    require,
    scaled_alphas,
    settle,
)
from hamcli.optim.norms import Asked, Norms, norms_of
from hamcli.optim.sharded import local, of_all_shards

WEIGHT_DECAYS = {"adamw": 1e-2, "adam": 0.0, "sgd": 0.0}  # torch's own
BACKENDS = ("auto", "rule", "cpu", "gpu")
GUARD_EVERY = 10  # steps
GUARD_LIMIT = 0.05  # a mean |exponent| above it lets tensors collapse
LOW_PRECISION = (torch.bfloat16, torch.float16)

Base = Literal["adamw", "adam", "sgd"]
Scaling = Literal["auto", "raw", "calibrated", "tracked", "normalised"]
Backend = Literal["auto", "rule", "cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class ExponentStatistics:
    """The mirror step of one step, over the mirrored weights that are kept and not zero.

    Attributes:
        mean: Mean of |exponent|, after the clamp.
        max: Greatest |exponent|.
        moved_fraction: Share of the weights that the mirror step changed; 0 means it did nothing.
        clamped_fraction: Share of the exponents at the clamp.
        alpha: Alpha of that step; None where groups or tensors have their own.
        guard_events: How often so far alpha was halved because exponents were too large or not
            finite.
    """

    mean: float
    max: float
    moved_fraction: float
    clamped_fraction: float
    alpha: float | None
    guard_events: int


@dataclass(slots=True)
class _Batch:
    """Parameters of one group that one call of a backend steps, and what belongs to each."""

    is_mirrored: bool
    is_first_step: bool
    backend: ModuleType
    params: list[Tensor] = field(default_factory=list)  # as the user holds them
    weights: list[Tensor] = field(default_factory=list)  # the parameters, or their fp32 masters
    grads: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    rounded: list[Tensor | None] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)


class HAM(torch.optim.Optimizer):
    """AdamW, Adam or SGD, each step followed by HAM's mirror step and the masks.

    HAM: arXiv 2506.02630, ICLR 2026. Order: base step -> mirror step -> mask. Clip before the step
    and refuse non-finite gradients yourself: the mirror step sees the gradient that the base step
    saw. With alpha = beta = 0 it is torch's own optimizer bit for bit: the fused one on a CPU.
    fp16 and bf16 weights get fp32 masters in the state, and are the rounded copies of these.

    Args:
        params: Parameters, or groups. Those with two or more dimensions are mirrored, unless the
            group says `mirror=False`. A group may have its own alpha, beta, scaling, eta,
            clamp and lr_peak, and its own arguments of the base optimizer.
        base: The base optimizer. Its arguments default as torch's own.
        lr: Learning rate. At construction also `lr_peak`, the learning rate that `eta` refers
            to, unless the group gives it.
        weight_decay: Decoupled for adamw, else added to the gradient; None for torch's default.
        betas: Of adamw and adam.
        eps: Of adamw and adam.
        momentum: Of sgd.
        nesterov: Of sgd.
        alpha: Pull along the gradient, 0 or more; "auto" leaves it to `scaling`.
        beta: Pull towards zero, 0 or more; "auto" is 1e-3.
        scaling: See the module. "auto" is raw where alpha is a number, else
            `choose_automatic_scaling`.
        eta: Mean |exponent| of a step at `lr_peak`, about; None for the scaling's own.
        clamp: Greatest |exponent|; None for 5 when raw, else 0.1.
        backend: Which form of the step runs: "cpu", "gpu", the slow "rule", or what suits the
            device of each parameter. On a CPU the C++ extension; without a compiler numba, if it
            is installed; else plain torch, block by block.

    Raises:
        ValueError: An argument is out of range, or contradicts another, or a parameter is complex.
    """

    # An optimizer that declares this gets infinite gradients from GradScaler, to skip in a kernel.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        params: Iterable[Any],
        *,
        base: Base = "adamw",
        lr: float = 1e-3,
        weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.0,
        nesterov: bool = False,
        alpha: float | Literal["auto"] = "auto",
        beta: float | Literal["auto"] = "auto",
        scaling: Scaling = "auto",
        eta: float | None = None,
        clamp: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        require(base in WEIGHT_DECAYS, f"base is {base!r}: adamw, adam or sgd is needed")
        require(backend in BACKENDS, f"backend is {backend!r}: one of {', '.join(BACKENDS)}")
        require(base == "sgd" or not momentum, f"momentum is of sgd, not of {base}")
        defaults = {
            "lr": lr,
            "weight_decay": WEIGHT_DECAYS[base] if weight_decay is None else weight_decay,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "nesterov": nesterov,
            "alpha": alpha,
            "beta": beta,
            "scaling": scaling,
            "eta": eta,
            "clamp": clamp,
            "mirror": True,
            "base": base,
        }
        self._begin(base, backend)
        super().__init__(params, defaults)

    def _begin(self, base: Base, backend: Backend) -> None:
        self._base = base
        self._backend = backend
        self._is_measured = False
        self._statistics: ExponentStatistics | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "ham": (self._base, self._backend)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "ham" in state:
            self._begin(*state.pop("ham"))
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked and the automatic ones settled.

        Raises:
            ValueError: As for the class.
        """
        super().add_param_group(param_group)
        try:
            settle(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Base step, mirror step and mask of all parameters that have a gradient.

        A masked weight is zero afterwards, with a gradient or without.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [self._collect(group) for group in self.param_groups]
        norms = _all_norms(self.param_groups, batches)
        calibrate(self.param_groups, norms)
        is_measured = self._is_measured or self._guard_is_due()
        sums = [_no_sums() if is_measured else None for _ in self.param_groups]
        for group, of_group, of_norms, of_sums in zip(
            self.param_groups, batches, norms, sums, strict=True
        ):
            # at lr 0 nothing happens, and torch may step so merely to look at the state
            group["ham_step"] += float(group["lr"]) > 0
            for batch, batch_norms in zip(of_group, of_norms, strict=True):
                self._step_batch(group, batch, batch_norms, of_sums)
            self._mask_idle(group)
        if is_measured:
            found = [of_sums for of_sums in sums if of_sums is not None]
            self._statistics = self._summarise(found)
            self._is_measured = False
        return loss

    def _collect(self, group: dict[str, Any]) -> list[_Batch]:
        """The group's parameters that have a gradient, by what one call can take; state is made."""
        batches: dict[tuple[Any, ...], _Batch] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            require(not param.grad.is_sparse, "HAM takes no sparse gradients")
            state = self.state[param]
            is_first = self._base == "sgd" and "momentum_buffer" not in state
            self._make_state(group, param, state)
            is_mirrored = mirrors(group, param)
            weight = local(state.get("ham_master", param)).detach()
            key = (is_mirrored, is_first, weight.dtype, weight.device)
            if key not in batches:
                batches[key] = _Batch(is_mirrored, is_first, self._backend_for(weight))
            batch = batches[key]
            batch.params.append(param)
            batch.weights.append(weight)
            batch.grads.append(local(param.grad))
            batch.masks.append(local(state["ham_mask"]) if "ham_mask" in state else None)
            batch.rounded.append(local(param).detach() if "ham_master" in state else None)
            batch.states.append(state)
        return list(batches.values())

    def _make_state(self, group: Mapping[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        if param.dtype not in LOW_PRECISION:
            state.pop("ham_master", None)  # of a run in low precision: the weights are their own
        elif "ham_master" not in state:
            state["ham_master"] = param.detach().to(torch.float32, copy=True)
        weight = state.get("ham_master", param)
        if self._base == "sgd":
            if group["momentum"] != 0 and "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
        elif "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)

    def _backend_for(self, weight: Tensor) -> ModuleType:
        on_cpu = weight.device.type == "cpu"
        name = self._backend
        if name == "rule":
            return plain
        require(on_cpu or name != "cpu", f"backend cpu cannot step {weight.device.type} weights")
        if on_cpu and name != "gpu":
            return forms.on_cpu()
        from hamcli.optim import gpu  # numpy and more, that a CPU has no use for

        is_usable = gpu.is_usable(weight)
        require(
            is_usable or name == "auto",
            f"backend gpu needs Triton and a CUDA device; the weights are {weight.dtype} on "
            f"{weight.device.type}",
        )
        return gpu if is_usable else plain

    def _step_batch(
        self,
        group: Mapping[str, Any],
        batch: _Batch,
        norms: Sequence[Norms],
        sums: Tensor | None,
    ) -> None:
        lr = float(group["lr"])
        count = len(batch.weights)
        dtype = batch.weights[0].dtype
        common = {
            "masks": batch.masks,
            "rounded": batch.rounded,
            "a": scaled_alphas(group, norms) if batch.is_mirrored else [0.0] * count,
            "b": decay_now(group, dtype) if batch.is_mirrored else 0.0,
            "clamp": group["clamp"],
            "lr": lr,
            "weight_decay": group["weight_decay"],
            "sums": sums if batch.is_mirrored else None,
        }
        if self._base == "sgd":
            buffers = [state.get("momentum_buffer") for state in batch.states]
            batch.backend.sgd_ham_(
                batch.weights,
                batch.grads,
                [None if buffer is None else local(buffer) for buffer in buffers],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                is_first_step=batch.is_first_step,
                **common,
            )
            return
        beta1, beta2 = group["betas"]
        for state in batch.states:
            state["step"] += 1
        batch.backend.adam_ham_(
            batch.weights,
            batch.grads,
            [local(state["exp_avg"]) for state in batch.states],
            [local(state["exp_avg_sq"]) for state in batch.states],
            [state["step"] for state in batch.states],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            decoupled=self._base == "adamw",
            **common,
        )

    # --- statistics and the guard

    def measure_next_step(self) -> None:
        """Measure the exponents of the next step; it changes no number of the training."""
        self._is_measured = True

    def exponent_statistics(self) -> ExponentStatistics | None:
        """The last measured step; None before there is one.

        Besides the steps that `measure_next_step` asks for, every tenth one is measured where a
        group is calibrated: the guard needs it.
        """
        return self._statistics

    def _guard_is_due(self) -> bool:
        """Whether the coming step is one after which the guard looks."""
        return any(
            is_guarded(group) and (group["ham_step"] + 1) % GUARD_EVERY == 0
            for group in self.param_groups
        )

    def _summarise(self, sums: Sequence[Tensor]) -> ExponentStatistics:
        """The statistics of the step just done; then the guard acts, for the next one."""
        groups = self.param_groups
        params = [param for group in groups for param in group["params"]]
        found = [of_group.tolist() for of_group in of_all_shards(sums, params)]
        alphas = {alpha_now(group) for group in groups if has_mirrored(group)}
        guarded = [f for f, group in zip(found, groups, strict=True) if is_guarded(group)]
        size = sum(f[0] for f in guarded) / max(sum(f[3] for f in guarded), 1)
        if not size <= GUARD_LIMIT:
            for group in groups:
                if is_guarded(group):
                    group["ham_alpha_factor"] /= 2
                    group["ham_guard_events"] += 1
        count = max(sum(f[3] for f in found), 1)
        return ExponentStatistics(
            mean=sum(f[0] for f in found) / count,
            max=max((f[4] for f in found), default=0.0),
            moved_fraction=sum(f[1] for f in found) / count,
            clamped_fraction=sum(f[2] for f in found) / count,
            alpha=alphas.pop() if len(alphas) == 1 else None,
            guard_events=max(group["ham_guard_events"] for group in groups),
        )

    # --- masks

    @torch.no_grad()
    def set_masks(self, masks: Mapping[Tensor, Tensor | None]) -> None:
        """Hold weights at zero, from now on and after every step.

        Args:
            masks: Parameter to bool mask of its shape, True where the weight is kept; None lifts
                its mask. Of a distributed parameter, the part that lies here. Parameters not named
                keep theirs. Weights that are dropped, and their momentum, are zeroed at once. The
                masks are copied.

        Raises:
            ValueError: A parameter is not this optimizer's, a mask is not bool or of another shape.
        """
        ours = {param for group in self.param_groups for param in group["params"]}
        for param, mask in masks.items():
            require(param in ours, "a mask names a parameter that this optimizer does not hold")
            if mask is not None:
                require(mask.dtype == torch.bool, f"a mask is {mask.dtype}: torch.bool is needed")
                mask, held = local(mask), local(param)
                require(
                    mask.shape == held.shape,
                    f"a mask has shape {tuple(mask.shape)}, its parameter {tuple(held.shape)}",
                )
        for param, mask in masks.items():
            state = self.state[param]
            if mask is None:
                state.pop("ham_mask", None)
                continue
            # in the memory order of the weights, so that no step has to turn it
            state["ham_mask"] = torch.empty_like(param, dtype=torch.bool)
            local(state["ham_mask"]).copy_(local(mask))
            _mask_(param, state)

    def second_moment(self, param: Tensor) -> Tensor | None:
        """Adam's running mean of the squared gradients, uncorrected; None before the first step.

        Of masked weights too: their gradients still count.
        """
        moment: Tensor | None = self.state.get(param, {}).get("exp_avg_sq")
        return moment

    def masks(self) -> dict[Tensor, Tensor]:
        """The masks in force, True where the weight is kept."""
        return {p: state["ham_mask"] for p, state in self.state.items() if "ham_mask" in state}

    def _mask_idle(self, group: Mapping[str, Any]) -> None:
        """Mask the parameters that this step did not touch."""
        for param in group["params"]:
            if param.grad is None and "ham_mask" in self.state.get(param, {}):
                _mask_(param, self.state[param])

    # --- state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave: the run goes on bit for bit, on the same backend.

        Raises:
            ValueError: It is another base optimizer's, or groups or their sizes differ.
        """
        loaded: list[dict[str, Any]] = []

        def look(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            loaded.append(state)

        handle = self.register_load_state_dict_pre_hook(look)
        try:
            for group in state_dict["param_groups"]:
                base = group.get("base")
                require(base == self._base, f"the state is of base {base}, not of {self._base}")
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch casts state to the parameter's dtype: masks and masters would be lost
        final = loaded[-1]
        saved = [index for group in final["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for key, value in final["state"].get(index, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    self.state[param][key] = _placed(key, value, param)


def _all_norms(
    groups: Sequence[Mapping[str, Any]], batches: Sequence[Sequence[_Batch]]
) -> list[list[list[Norms]]]:
    """Of each tensor of each batch, how large the gradient is, where the scaling asks."""
    pairs = zip(groups, batches, strict=True)
    found = iter(norms_of([_asked(group, one) for group, of_group in pairs for one in of_group]))
    return [[next(found) for _ in of_group] for of_group in batches]


def _asked(group: Mapping[str, Any], batch: _Batch) -> Asked:
    power = 2 if group["scaling"] == "normalised" else int(calibrates_now(group))
    on_cpu = batch.weights[0].device.type == "cpu"
    return Asked(
        batch.params,
        batch.grads,
        batch.masks,
        power if batch.is_mirrored else 0,
        getattr(batch.backend, "kept_norms", None) if on_cpu else None,
    )


def _no_sums() -> Tensor:
    return torch.zeros(cpu.NUM_SUMS, dtype=torch.float64)


def _mask_(param: Tensor, state: Mapping[str, Any]) -> None:
    """Zero what the mask drops in the weights, their master and their momentum."""
    for tensor in (param, *(state.get(k) for k in ("ham_master", "exp_avg", "momentum_buffer"))):
        if tensor is not None:
            held = local(tensor).detach()
            cpu.mirror_([held], [held], masks=[local(state["ham_mask"])], a=[0.0], b=0.0, clamp=1.0)


def _placed(key: str, value: Tensor, param: Tensor) -> Tensor:
    """A saved tensor as the running optimizer holds it: copied, in its dtype and memory order."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.empty_like(param, dtype=torch.bool if key == "ham_mask" else dtype).copy_(value)

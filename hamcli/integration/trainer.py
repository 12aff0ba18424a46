"""HAM and the sparsity of a whole run inside `transformers.Trainer`.

The Trainer keeps its loop, its clipping, its schedule and its checkpoints. `HAMFactory` gives it
the optimizer, `SparsityCallback` the zeros; each is of use without the other.
"""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback  # noqa: TID253 - whoever imports this has a Trainer

from hamcli.errors import NoRunCheckpoint, UsageError
from hamcli.optim import HAM
from hamcli.optim.eta import choose_eta_and_clamp
from hamcli.sparsity.masks import apply_masks_
from hamcli.sparsity.methods import Sparsifier, make_sparsifier
from hamcli.sparsity.targets import Targets, select_targets

STATE_KEY = "ham_sparsity"  # in the optimizer's first group: the Trainer saves and restores it
CHOSEN_BY = ("base", "alpha", "scaling", "eta", "clamp")
MASK_METHODS = ("gradual", "one-shot")  # those that need nothing but masks


class HAMFactory:
    """Makes HAM for a model: `Trainer(optimizer_cls_and_kwargs=(HAMFactory, {"lr": 1e-4}))`.

    The targets are mirrored and decayed, other weights of two or more dimensions only decayed,
    norms and biases neither. The Trainer's learning-rate schedule multiplies `lr`. Of its arguments
    it puts neither `learning_rate` nor `weight_decay` into the optimizer here: give them. HAM sees
    the gradients as the Trainer clips them: `max_grad_norm`, 1.0 unless set.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] | None = None,
        **options: Any,
    ) -> HAM:
        """HAM over the trainable parameters of `model`.

        Args:
            model: The model that is trained.
            lr: Peak learning rate.
            include: Globs over module names: the targets.
            exclude: Globs too; None leaves embeddings, heads, poolers and routers dense.
            **options: Further arguments of `HAM`; eta and clamp that are not given are what the
                targets' weights stand, see `choose_eta_and_clamp`.

        Raises:
            RecipeError: As `select_targets`.
            UsageError: E115, an adapter, or weights that are sharded.
            ValueError: As `HAM`.
        """
        _refuse_unfit(model, "HAMFactory")
        targets = select_targets(model, include, exclude)
        groups = parameter_groups(model, targets)
        eta, clamp = choose_eta_and_clamp(
            [param for param in targets.params if param.requires_grad],
            lr=lr,
            **{name: options[name] for name in CHOSEN_BY if name in options},
        )
        return HAM(groups, lr=lr, **{**options, "eta": eta, "clamp": clamp})


def parameter_groups(model: nn.Module, targets: Targets) -> list[dict[str, Any]]:
    """Groups for HAM: targets; other wide parameters; flat ones, which are not decayed."""
    targeted = {id(param) for param in targets.params}
    trained = [param for param in model.parameters() if param.requires_grad]
    mirrored = [param for param in trained if id(param) in targeted]
    others = [param for param in trained if id(param) not in targeted]
    wide = [param for param in others if param.dim() >= 2]
    flat = [param for param in others if param.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": mirrored},
        {"params": wide, "mirror": False},
        {"params": flat, "mirror": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class SparsityCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]  # may be Any to mypy
    """Brings a model in a `transformers.Trainer` to an exact sparsity, with any optimizer.

    Masks are chosen by the Trainer's global step, after `optimizer.step()` and before the gradients
    are cleared, and held from there on: whatever is evaluated, saved or returned has its zeros.
    From the last choice on their number is exactly `round(target * total)`. With `HAM` the
    optimizer holds the masks, momentum and fp32 masters included; with any other the callback
    zeroes again after each step.

    Trainer checkpoints are complete: masks travel in the optimizer's state, and
    `train(resume_from_checkpoint=...)` goes on with them. While masks still change,
    `metric_for_best_model` would choose a denser model for being denser; so the best metric is
    forgotten at each change, and the best model is one of those with the final zeros.

    Attributes:
        targets: What may become zero; None before the training begins.
        sparsifier: Schedule and masks; None before the training begins.
    """

    def __init__(
        self,
        target: float,
        *,
        method: str = "gradual",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """Settings of a run; the model is seen when the training begins.

        Args:
            target: Sparsity at the end, 0 to 1.
            method: gradual or one-shot.
            include: Globs over module names: the targets.
            exclude: Globs too; None leaves embeddings, heads, poolers and routers dense.
            **options: Further arguments of `make_sparsifier`: allocation, pattern, ramp_start,
                freeze_last, update_every, min_sparsity, max_sparsity.

        Raises:
            ValueError: The target is not between 0 and 1, or the method not one of the two.
            TypeError: An option that `make_sparsifier` does not have.
        """
        if not 0 <= target <= 1:
            raise ValueError(f"target is {target}: 0 to 1 is needed")
        if method not in MASK_METHODS:
            raise ValueError(f"method is {method!r}: one of {', '.join(MASK_METHODS)} is needed")
        # a wrong word is an error here, and not after the model has been loaded and moved
        inspect.signature(make_sparsifier).bind(method, None, target=target, steps=1, **options)
        self._settings = {"method": method, "target": target, **options}
        self._include, self._exclude = include, exclude
        self.targets: Targets | None = None
        self.sparsifier: Sparsifier | None = None

    @property
    def sparsity(self) -> float:
        """Share of the targets that is held at zero now."""
        return self.sparsifier.sparsity if self.sparsifier is not None else 0.0

    def num_zeros(self) -> int:
        """Zeros among the targets now, counted in the weights."""
        targets = self.targets or ()
        return sum(item.param.numel() - int(item.param.count_nonzero()) for item in targets)

    # --- what the Trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Choose the targets; go on from the checkpoint's masks, or choose those of step 0.

        Raises:
            RecipeError: As `select_targets` and `make_sparsifier`.
            UsageError: E115, an adapter, or weights that are sharded.
            NoRunCheckpoint: E807, a checkpoint without masks, or with those of other settings.
        """
        model, optimizer = given["model"], _bare(given["optimizer"])
        _refuse_unfit(model, "SparsityCallback")
        self.targets = select_targets(model, self._include, self._exclude)
        self.sparsifier = make_sparsifier(
            targets=self.targets, steps=state.max_steps, **self._settings
        )
        if state.global_step > 0:
            self._go_on(optimizer, state.global_step)
        else:
            self._update(0, state, optimizer)
        self._hold(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Zero what the step has moved away from zero; choose masks where they are due."""
        optimizer = _bare(given["optimizer"])
        # the Trainer counts the step only later
        self._update(state.global_step + 1, state, optimizer)
        self._hold(optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Mask what `load_best_model_at_end` has put into the model; warn of an unfinished ramp."""
        assert self.targets is not None
        assert self.sparsifier is not None
        if self.sparsifier.masks is not None:
            apply_masks_(self.targets, self.sparsifier.masks)
        if state.global_step < self.sparsifier.last_update:
            warnings.warn(
                f"training ended at step {state.global_step}, before the last zeros at step "
                f"{self.sparsifier.last_update}: {self.num_zeros():,} of "
                f"{self.sparsifier.num_zeros:,} are there",
                stacklevel=2,
            )

    # --- masks

    def _update(self, step: int, state: Any, optimizer: torch.optim.Optimizer) -> None:
        """Choose masks if they are due, and leave them where the Trainer saves them."""
        assert self.sparsifier is not None
        if self.sparsifier.masks_due(step) is not None:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            self._hand_over(optimizer)
        elif step == 0:
            self._record(optimizer)

    def _hand_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Give new masks to the Trainer's checkpoints, and to HAM."""
        assert self.targets is not None
        assert self.sparsifier is not None
        self._record(optimizer)
        masks = self.sparsifier.masks
        if isinstance(optimizer, HAM) and masks is not None:
            held = _params_of(optimizer)
            pairs = zip(self.targets.params, masks, strict=True)
            optimizer.set_masks({param: mask for param, mask in pairs if id(param) in held})

    def _record(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.sparsifier is not None
        # not in `optimizer.state`: Adam initialises only an empty one, and loading casts to float
        optimizer.param_groups[0][STATE_KEY] = {
            **self.sparsifier.state(),
            "target": torch.tensor(self._settings["target"], dtype=torch.float64),
        }

    def _hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the targets that the optimizer does not hold at zero itself."""
        assert self.targets is not None
        assert self.sparsifier is not None
        if self.sparsifier.masks is None:
            return
        held = _params_of(optimizer) if isinstance(optimizer, HAM) else set()
        loose = [
            (item, mask)
            for item, mask in zip(self.targets, self.sparsifier.masks, strict=True)
            if id(item.param) not in held
        ]
        apply_masks_(Targets(tuple(item for item, _ in loose)), [mask for _, mask in loose])

    def _go_on(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take the masks that came back with the optimizer's state."""
        assert self.targets is not None
        assert self.sparsifier is not None
        saved: dict[str, Tensor] | None = optimizer.param_groups[0].get(STATE_KEY)
        if saved is None:
            raise _unfit_checkpoint(
                step,
                "it holds no masks",
                "a checkpoint of a run with SparsityCallback, and with its optimizer",
            )
        target, names = float(saved["target"]), set(self.targets.names)
        if target != self._settings["target"]:
            raise _unfit_checkpoint(
                step, f"its target is {target:g}, not {self._settings['target']:g}", f"{target:g}"
            )
        masked = {key.removeprefix("mask.") for key in saved if key.startswith("mask.")}
        if masked and masked != names:
            raise _unfit_checkpoint(
                step,
                f"its masks are of {len(masked)} tensors, {len(masked ^ names)} of them or of the "
                f"{len(names)} targets have no partner",
                "the same include and exclude",
            )
        self.sparsifier.load_state(saved)
        self._hand_over(optimizer)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def _params_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _refuse_unfit(model: nn.Module, what: str) -> None:
    """Models whose parameters are not the whole weights."""
    if hasattr(model, "peft_type"):
        raise UsageError(
            "E115",
            f"{what} does not fit the model",
            type(model).__name__,
            "the weights of an adapter are not those that become zero",
            "keep_zeros and merge_keeping_zeros of hamcli.integration.lora",
        )
    if any(hasattr(param, "to_local") or hasattr(param, "ds_id") for param in model.parameters()):
        raise UsageError(
            "E115",
            f"{what} does not fit the model",
            type(model).__name__,
            "its weights are sharded, and masks are chosen over whole tensors",
            "one process, or DDP",
        )


def _unfit_checkpoint(step: int, why: str, right: str) -> NoRunCheckpoint:
    return NoRunCheckpoint("E807", "checkpoint does not fit", f"step {step}", why, right)

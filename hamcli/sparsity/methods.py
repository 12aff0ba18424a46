"""A method = schedule + score + where the zeros may lie + what happens to masked weights.

A new method is a schedule (step → sparsity, and when masks are chosen), a score, a word on regrowth
and an entry in `_METHODS`. The masks are held and applied by the optimizer after each step; this
module only says what they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hamcli.sparsity.masks import (
    Rules,
    apply_masks_,
    choose_masks,
    make_rules,
    nonzero_masks,
    num_dropped,
    prune_masks,
    zeros_at_end,
)
from hamcli.sparsity.schedule import AtOnce, Schedule, make_ramp
from hamcli.sparsity.score import Score, magnitude
from hamcli.sparsity.select import num_zeros
from hamcli.sparsity.targets import Targets

__all__ = ["Method", "Sparsifier", "apply_masks_", "make_sparsifier", "prune_masks"]


@dataclass(frozen=True, slots=True)
class Method:
    """What one method does in one run.

    Attributes:
        schedule: How many zeros, when.
        score: Weights → scores of 0 or more, the larger is kept.
        regrows: Whether a masked weight may come back when masks are chosen anew.
    """

    schedule: Schedule
    score: Score = magnitude
    regrows: bool = False


class Sparsifier:
    """Carries out a method: which masks hold after which step.

    Weights that the model brings as exact zeros count among the zeros and stay zero from step 0 on;
    a model that brings more than the target keeps what it has.

    Everything but the masks is a function of the step, so `state` and `load_state` are all that a
    resumed run needs.

    Attributes:
        masks: True where kept, one a target and in their order; None while nothing is masked.
        natural_zeros: Zeros that the model had at step 0.
        num_zeros: Zeros at the end.
    """

    def __init__(self, targets: Targets, rules: Rules, method: Method) -> None:
        self._targets = targets
        self._rules = rules
        self._method = method
        self.masks: list[Tensor] | None = None
        nonzero = nonzero_masks(targets)
        self.natural_zeros = num_dropped(nonzero)
        self.num_zeros = zeros_at_end(targets, rules, nonzero)
        self._num_masked = 0

    @property
    def num_masked(self) -> int:
        """Weights that are masked now."""
        return self._num_masked

    @property
    def sparsity(self) -> float:
        """Share of the targets that is masked now."""
        return self._num_masked / self._targets.total

    @property
    def last_update(self) -> int:
        """Step from which on the masks are final."""
        return self._method.schedule.last

    def sparsity_due(self, step: int) -> float:
        """Sparsity that the schedule asks for after `step` optimizer steps."""
        start = self.natural_zeros / self._targets.total
        return self._method.schedule.sparsity(step, start)

    def num_zeros_due(self, step: int) -> int:
        """The same as a number of weights; from the last update on exactly `num_zeros`."""
        if step >= self.last_update:
            return self.num_zeros
        due = num_zeros(self.sparsity_due(step), self._targets.total)
        return min(max(due, self.natural_zeros), self.num_zeros)

    @torch.no_grad()
    def masks_due(self, step: int) -> list[Tensor] | None:
        """New masks if they are due now, chosen by the present weights; else None.

        Args:
            step: Optimizer steps done; 0 before the first, which is when `one-shot` prunes.

        Returns:
            One bool tensor a target, True where kept, also held in `masks`.
        """
        if not self._method.schedule.is_due(step):
            return None
        due = self.num_zeros_due(step)
        if due == self._num_masked and not self._method.regrows:
            return None  # the masks that hold are the only ones with this count
        before = self.masks
        if before is None:
            before = nonzero_masks(self._targets) if step == 0 else None
        held = None if self._method.regrows else before
        self._hold(
            choose_masks(self._targets, self._rules, due, masks=held, score=self._method.score)
        )
        return self.masks

    def state(self) -> dict[str, Tensor]:
        """What a run checkpoint must hold; plain tensors."""
        state = {
            "natural_zeros": torch.tensor(self.natural_zeros, dtype=torch.int64),
            "num_zeros": torch.tensor(self.num_zeros, dtype=torch.int64),
        }
        if self.masks is not None:
            pairs = zip(self._targets.names, self.masks, strict=True)
            state.update({f"mask.{name}": mask for name, mask in pairs})
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, on the devices of the targets."""
        self.natural_zeros = int(state["natural_zeros"])
        self.num_zeros = int(state["num_zeros"])
        if not any(key.startswith("mask.") for key in state):
            self.masks, self._num_masked = None, 0
            return
        masks = [
            state[f"mask.{target.name}"].to(target.param.device, torch.bool)
            for target in self._targets
        ]
        for mask, target in zip(masks, self._targets, strict=True):
            assert mask.shape == target.param.shape, f"mask of {target.name} has another shape"
        self._hold(masks)

    def _hold(self, masks: Sequence[Tensor]) -> None:
        self.masks = list(masks)
        self._num_masked = num_dropped(masks)


def make_sparsifier(
    method: str,
    targets: Targets,
    *,
    target: float,
    steps: int,
    allocation: str = "global",
    pattern: str = "unstructured",
    ramp_start: float = 0.0,
    freeze_last: float = 0.3,
    update_every: float = 0.01,
    min_sparsity: float = 0.0,
    max_sparsity: float = 1.0,
) -> Sparsifier:
    """The sparsifier of a run.

    Args:
        method: gradual or one-shot.
        targets: What may become zero.
        target: Sparsity at the end, 0 to 1.
        steps: Optimizer steps of the run.
        allocation: global, uniform or erk.
        pattern: unstructured or N:M.
        ramp_start: Share of the run before the first zeros.
        freeze_last: Share of the run that trains the final zeros only.
        update_every: Share of the run between two choices of masks.
        min_sparsity: Lowest sparsity of each tensor at the end.
        max_sparsity: Highest sparsity of each tensor.

    Raises:
        RecipeError: As `masks.make_rules`.
    """
    rules = make_rules(
        targets,
        target=target,
        allocation=allocation,
        pattern=pattern,
        min_sparsity=min_sparsity,
        max_sparsity=max_sparsity,
    )
    times = Times(steps, ramp_start, freeze_last, update_every)
    return Sparsifier(targets, rules, _METHODS[method](target, times))


@dataclass(frozen=True, slots=True)
class Times:
    """When, as fractions of a run of `steps` optimizer steps."""

    steps: int
    ramp_start: float
    freeze_last: float
    update_every: float


def _gradual(target: float, times: Times) -> Method:
    """Gradual magnitude pruning: Zhu & Gupta 2017 (arXiv 1710.01878), without regrowth."""
    ramp = make_ramp(
        target,
        steps=times.steps,
        ramp_start=times.ramp_start,
        freeze_last=times.freeze_last,
        update_every=times.update_every,
    )
    return Method(ramp)


def _one_shot(target: float, times: Times) -> Method:
    """Prune by magnitude before the first step, then train what is left."""
    return Method(AtOnce(target))


_METHODS: dict[str, Callable[[float, Times], Method]] = {
    "gradual": _gradual,
    "one-shot": _one_shot,
}

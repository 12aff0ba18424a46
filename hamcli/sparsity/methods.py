"""A method = schedule + score + where the zeros may lie + what happens to masked weights.

A new method is a schedule (step → sparsity, and when masks are chosen), a score, a word on regrowth
and an entry in `_METHODS`. The masks are held and applied by the optimizer after each step; this
module only says what they are. A method whose model sees other weights than the optimizer trains
also has a course of its own (`courses`). Gradients reach a method as `param.grad`: masks are chosen
after the optimizer's step and before its gradients are cleared, and they are dense, since masks act
on weights and not in the graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hamcli.errors import RecipeError
from hamcli.sparsity.blocks import Blocks
from hamcli.sparsity.counting import num_zeros
from hamcli.sparsity.exchange import annealed, exchange_all, exchanged
from hamcli.sparsity.masks import (
    apply_masks_,
    choose_masks,
    nonzero_masks,
    num_dropped,
    prune_masks,
    zeros_at_end,
)
from hamcli.sparsity.rules import Rules, make_rules, settled_allocation
from hamcli.sparsity.schedule import (
    AtOnce,
    Exchanging,
    Schedule,
    Stairs,
    make_alternating,
    make_ramp,
)
from hamcli.sparsity.score import Score, magnitude
from hamcli.sparsity.targets import Targets

__all__ = ["Method", "Sparsifier", "apply_masks_", "make_sparsifier", "prune_masks"]


@dataclass(frozen=True, slots=True)
class Method:
    """What one method does in one run.

    Attributes:
        schedule: How many zeros, when.
        score: Weights → scores of 0 or more, the larger is kept.
        regrows: Whether a masked weight may come back when masks are chosen anew. It starts at 0,
            and so does its momentum, which the optimizer holds at zero while the weight is masked.
            Zeros that the model brings are then weights like others.
        exchange: Share of the connections that the first exchange replaces; None where masks are
            chosen by score alone.
        cycles: Steps at which a cycle of the learning rate begins, after the first.
    """

    schedule: Schedule
    score: Score = magnitude
    regrows: bool = False
    exchange: float | None = None
    cycles: tuple[int, ...] = ()


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
        self.natural_zeros = num_dropped(nonzero, targets.across)
        self.num_zeros = (
            rules.num_zeros if method.regrows else zeros_at_end(targets, rules, nonzero)
        )
        self._num_masked = 0

    @property
    def target(self) -> float:
        """Sparsity asked for at the end."""
        return self._rules.target

    @property
    def cycles(self) -> tuple[int, ...]:
        """Steps at which the learning rate begins anew."""
        return self._method.cycles

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
        start = 0.0 if self._method.regrows else self.natural_zeros / self._targets.total
        return self._method.schedule.sparsity(step, start)

    def num_zeros_due(self, step: int) -> int:
        """The same as a number of weights; from the last update on exactly `num_zeros`."""
        if step >= self.last_update:
            return self.num_zeros
        due = num_zeros(self.sparsity_due(step), self._targets.total)
        least = 0 if self._method.regrows else self.natural_zeros
        return min(max(due, least), self.num_zeros)

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
        if self._method.exchange is not None and self.masks is not None:
            fraction = annealed(self._method.exchange, step, self.last_update)
            self._hold(self._exchanged(self.masks, fraction))
            return self.masks
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

    def _exchanged(self, masks: Sequence[Tensor], fraction: float) -> list[Tensor]:
        """The masks after an exchange, of weights or of whole blocks."""
        params, block = self._targets.params, self._rules.block
        if block is None:
            return exchange_all(params, masks, fraction, self._targets.across)
        made, blocks = [], Blocks(self._targets, block)
        for index, (param, mask) in enumerate(zip(params, masks, strict=True)):
            grad = param.grad
            if grad is None:
                made.append(mask.clone())
                continue
            keep = exchanged(
                blocks.any(index, mask),
                blocks.sums(index, magnitude(param)),
                blocks.sums(index, grad.abs()),
                fraction,
                self._targets.across,
            )
            made.append(blocks.spread(index, keep))
        return made

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
        self._num_masked = num_dropped(masks, self._targets.across)


def make_sparsifier(
    method: str,
    targets: Targets,
    *,
    target: float,
    steps: int,
    allocation: str = "auto",
    pattern: str = "unstructured",
    ramp_start: float = 0.0,
    freeze_last: float = 0.3,
    update_every: float | Literal["auto"] = "auto",
    min_sparsity: float = 0.0,
    max_sparsity: float = 1.0,
    score: Score = magnitude,
    outliers: Sequence[float] | None = None,
    phase: float = 0.05,
    drop_fraction: float = 0.3,
    cycles: int = 3,
    start_sparsity: float = 0.5,
) -> Sparsifier:
    """The sparsifier of a run.

    Args:
        method: A name in `METHODS`.
        targets: What may become zero.
        target: Sparsity at the end, 0 to 1.
        steps: Optimizer steps of the run.
        allocation: As for `make_rules`, or auto, see `settled_allocation`.
        pattern: unstructured, N:M or block:RxC.
        ramp_start: Share of the run before the first zeros.
        freeze_last: Share of the run that trains the final zeros only.
        update_every: Share of the run between two choices of masks; auto is `UPDATE_EVERY`'s,
            else 0.01.
        min_sparsity: Lowest sparsity of each tensor at the end.
        max_sparsity: Highest sparsity of each tensor.
        score: Weights → scores of 0 or more, the larger is kept.
        outliers: As for `make_rules`.
        phase: Share of the run of one phase of ac-dc.
        drop_fraction: Share of the connections that rigl's first exchange replaces.
        cycles: Cycles of the learning rate that cyclic makes before it prunes to the target.
        start_sparsity: Sparsity of cyclic before that.

    Raises:
        RecipeError: As `masks.make_rules`; E225, the method does not go with the pattern.
    """
    if method == "rigl" and ":" in pattern and not pattern.startswith("block"):
        raise RecipeError(
            "E225",
            "the method does not go with the pattern",
            "sparsity.pattern",
            f"rigl exchanges connections anywhere in a tensor, {pattern} does not let it",
            "unstructured or block:RxC, or another method",
        )
    rules = make_rules(
        targets,
        target=target,
        allocation=settled_allocation(method, allocation, pattern),
        pattern=pattern,
        min_sparsity=min_sparsity,
        max_sparsity=max_sparsity,
        outliers=outliers,
    )
    if update_every == "auto":
        update_every = UPDATE_EVERY.get(method, 0.01)
    times = Times(
        steps, ramp_start, freeze_last, update_every, phase, drop_fraction, cycles, start_sparsity
    )
    made = METHODS[method](target, times)
    return Sparsifier(targets, rules, replace(made, score=score))


UPDATE_EVERY = {"rigl": 0.05}
"""What `auto` means where it is not 0.01; new connections begin at zero and need steps to grow."""


@dataclass(frozen=True, slots=True)
class Times:
    """When, as fractions of a run of `steps` optimizer steps, and how much."""

    steps: int
    ramp_start: float
    freeze_last: float
    update_every: float
    phase: float = 0.05
    drop_fraction: float = 0.3
    cycles: int = 3
    start_sparsity: float = 0.5

    @property
    def last(self) -> int:
        """Step from which on the final zeros are trained."""
        return max(0, self.steps - round(self.freeze_last * self.steps))


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


def _regrowing(target: float, times: Times) -> Method:
    """The ramp of `gradual` over weights that live on under their mask: str and ast."""
    return replace(_gradual(target, times), regrows=True)


def _one_shot(target: float, times: Times) -> Method:
    """Prune before the first step, then train what is left."""
    return Method(AtOnce(target))


def _ac_dc(target: float, times: Times) -> Method:
    """Alternating compressed and decompressed training: AC/DC (arXiv 2106.12379)."""
    phases = make_alternating(
        target, steps=times.steps, phase=times.phase, freeze_last=times.freeze_last
    )
    return Method(phases, regrows=True)


def _rigl(target: float, times: Times) -> Method:
    """The smallest weights against the largest gradients: RigL (arXiv 1911.11134)."""
    every = max(1, round(times.update_every * times.steps))
    last = times.last // every * every
    return Method(Exchanging(target, every, last), regrows=True, exchange=times.drop_fraction)


def _cyclic(target: float, times: Times) -> Method:
    """Cycles at a low sparsity, one prune to the target, one cycle more: SCULPT (2406.02773)."""
    starts = {round(times.last * part / times.cycles) for part in range(1, times.cycles + 1)}
    return Method(
        Stairs(target, min(times.start_sparsity, target), times.last),
        cycles=tuple(sorted(step for step in starts if 0 < step < times.steps)),
    )


METHODS: dict[str, Callable[[float, Times], Method]] = {
    "gradual": _gradual,
    "one-shot": _one_shot,
    "random": _one_shot,
    "ac-dc": _ac_dc,
    "rigl": _rigl,
    "cyclic": _cyclic,
    "str": _regrowing,
    "ast": _regrowing,
    "spred": _gradual,
    "pilot": _gradual,
    "sign-in": _one_shot,
}

"""When: optimizer step → sparsity, purely, so that a resumed run cannot drift."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol


def cubic(step: int, *, first: int, last: int, target: float, start: float = 0.0) -> float:
    """Sparsity due at `step`: rises fast from `start`, slows towards `target`.

    start + (target - start) * (1 - left**3), with `left` the share of the ramp still ahead:
    Zhu & Gupta 2017 (arXiv 1710.01878).

    Args:
        step: Optimizer steps done in the whole run, not since a restart.
        first: Last step at sparsity `start`.
        last: Step that reaches `target`; later steps stay there. First < last.
        target: Sparsity to reach, 0 to 1.
        start: Sparsity before the ramp; a start above the target is never undone.
    """
    if start >= target or step <= first:
        return start
    if step >= last:
        return target
    left = (last - step) / (last - first)
    return start + (target - start) * (1 - left**3)


class Schedule(Protocol):
    """What a method says about time."""

    def sparsity(self, step: int, start: float) -> float:
        """Sparsity due after `step` optimizer steps, of a model that had `start` at step 0."""

    def is_due(self, step: int) -> bool:
        """Whether masks are chosen anew after `step` optimizer steps."""

    @property
    def last(self) -> int:
        """Step from which on the zeros are final."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """From what the model has to `target` between two steps, with masks every few steps.

    Attributes:
        target: Sparsity at the end, 0 to 1.
        first: Last step before the ramp.
        last: Step that reaches the target.
        every: Steps between two choices of masks; the last step is always one.
    """

    target: float
    first: int
    last: int
    every: int

    def sparsity(self, step: int, start: float) -> float:
        """Cubic between `first` and `last`."""
        return cubic(step, first=self.first, last=self.last, target=self.target, start=start)

    def is_due(self, step: int) -> bool:
        """At step 0, where zeros that the model brings are masked, and along the ramp."""
        if step == 0 or step == self.last:
            return True
        return self.first < step < self.last and (step - self.first) % self.every == 0


@dataclass(frozen=True, slots=True)
class AtOnce:
    """The whole target before the first step.

    Attributes:
        target: Sparsity from step 0 on, 0 to 1.
    """

    target: float

    def sparsity(self, step: int, start: float) -> float:
        """The target, or what the model had if that is more."""
        return max(self.target, start)

    def is_due(self, step: int) -> bool:
        """At step 0 only."""
        return step == 0

    @property
    def last(self) -> int:
        """Step 0."""
        return 0


@dataclass(frozen=True, slots=True)
class Alternating:
    """Dense and sparse phases in turn: AC/DC (arXiv 2106.12379).

    Attributes:
        target: Sparsity of the sparse phases, 0 to 1.
        switches: Steps after which a phase ends, increasing; the first phase is dense, the one
            after the last switch sparse, so that their number is odd.
    """

    target: float
    switches: tuple[int, ...]

    def sparsity(self, step: int, start: float) -> float:
        """0 in a dense phase, `target` in a sparse one; what the model had does not matter."""
        return self.target if bisect_right(self.switches, step) % 2 else 0.0

    def is_due(self, step: int) -> bool:
        """Where one phase gives way to the next."""
        return step in self.switches

    @property
    def last(self) -> int:
        """Start of the last sparse phase."""
        return self.switches[-1]


@dataclass(frozen=True, slots=True)
class Exchanging:
    """The target from step 0 on, with connections exchanged every few steps: RigL.

    Attributes:
        target: Sparsity, 0 to 1.
        every: Steps between two exchanges.
        last: Last step at which an exchange may happen.
    """

    target: float
    every: int
    last: int

    def sparsity(self, step: int, start: float) -> float:
        """The target."""
        return self.target

    def is_due(self, step: int) -> bool:
        """At step 0, and every few steps as long as exchanges happen."""
        return step <= self.last and step % self.every == 0


@dataclass(frozen=True, slots=True)
class Stairs:
    """One sparsity from step 0 on, the target from `last` on.

    Attributes:
        target: Sparsity at the end, 0 to 1.
        first_sparsity: Sparsity before, at most the target.
        last: Step that reaches the target.
    """

    target: float
    first_sparsity: float
    last: int

    def sparsity(self, step: int, start: float) -> float:
        """One of the two, or what the model had if that is more."""
        return max(self.target if step >= self.last else self.first_sparsity, start)

    def is_due(self, step: int) -> bool:
        """At step 0 and at `last`."""
        return step in (0, self.last)


def make_alternating(target: float, *, steps: int, phase: float, freeze_last: float) -> Alternating:
    """AC/DC's phases: dense, then sparse and dense in turn, a longer dense one, a last sparse one.

    The dense warm-up and the last dense phase take two phases each, so that `phase` 0.05 and
    `freeze_last` 0.15 are the published proportions. In a run too short for them, phases that
    round to no step fall away; the last one is always sparse.

    Args:
        target: Sparsity of the sparse phases, 0 to 1.
        steps: Optimizer steps of the run.
        phase: Share of the run of one phase.
        freeze_last: Share of the run of the last sparse phase.
    """
    last = max(0, steps - round(freeze_last * steps))
    places = [2 * phase]
    while places[-1] + phase <= 1 - freeze_last - 2 * phase + 1e-9:
        places.append(places[-1] + phase)
    if len(places) % 2:
        places = places[:-1]  # what is switched on must be off again for the last dense phase
    switches: list[int] = []
    for place in (round(place * steps) for place in places):
        # two switches on one step cancel
        if switches and switches[-1] == place:
            switches.pop()
        elif 0 < place < last:
            switches.append(place)
    if len(switches) % 2:
        switches.pop()
    return Alternating(target, (*switches, last))


def make_ramp(
    target: float, *, steps: int, ramp_start: float, freeze_last: float, update_every: float
) -> Ramp:
    """A ramp whose places are given as fractions of the run.

    Args:
        target: Sparsity at the end, 0 to 1.
        steps: Optimizer steps of the run.
        ramp_start: Share of the run before the first zeros.
        freeze_last: Share of the run that trains the final zeros only.
        update_every: Share of the run between two choices of masks.
    """
    last = max(1, steps - round(freeze_last * steps))
    first = min(round(ramp_start * steps), last - 1)
    return Ramp(target, first, last, max(1, round(update_every * steps)))

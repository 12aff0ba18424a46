"""What a long job tells whoever watches: a protocol, and the watcher that stays silent."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step.

    `sparsity` is the share of zeros the masks hold after the step, 0 to 1. The exponent fields
    are None on steps that did not measure the mirror step.
    """

    step: int
    loss: float
    sparsity: float
    lr: float
    grad_norm: float
    exponent_mean: float | None = None
    exponent_max: float | None = None
    moved_fraction: float | None = None


class Progress(Protocol):
    """A watcher. None of its methods may fail or block for long."""

    def stage(self, text: str) -> None:
        """A new part of the job begins: one short line."""

    def begin_steps(self, *, steps: int, done: int, target: float) -> None:
        """Training begins at step `done` of `steps`, on its way to sparsity `target`."""

    def step(self, record: StepRecord) -> None:
        """One optimizer step is done."""

    def end_steps(self) -> None:
        """Training has ended, or stops here."""

    def begin_bytes(self, text: str, total: int) -> None:
        """A job of `total` bytes begins: one short line."""

    def bytes_done(self, count: int) -> None:
        """`count` more bytes of it are done."""

    def end_bytes(self) -> None:
        """It has ended, or stops here."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def tell(self, text: str) -> None:
        """What happens instead of a run from its start: it goes on, or is done already."""

    def warn(self, text: str) -> None:
        """Something that may be wrong; it also stands in the report."""


class Silent:
    """A watcher that says nothing."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def begin_steps(self, *, steps: int, done: int, target: float) -> None:
        """Say nothing."""

    def step(self, record: StepRecord) -> None:
        """Say nothing."""

    def end_steps(self) -> None:
        """Say nothing."""

    def begin_bytes(self, text: str, total: int) -> None:
        """Say nothing."""

    def bytes_done(self, count: int) -> None:
        """Say nothing."""

    def end_bytes(self) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def tell(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""

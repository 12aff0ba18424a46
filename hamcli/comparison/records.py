"""What runs came to and what follows from them: plain numbers; no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hamcli.comparison.grid import Arm, Cell, Grid

Status = Literal["done", "diverged", "refused"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run came to; all of it but `status` and `why` is None where it did not end well.

    Attributes:
        status: done; diverged, by a number that is not finite; refused, by its recipe.
        why: The error's line; empty when done.
        metric: Name of the quality.
        higher_is_better: Which way it counts.
        value: Quality of the written model.
        loss: Mean loss in nats a prediction, where there are labels.
        agreement: Share of predictions that are the dense model's.
        dense: Quality of the model before.
        dense_loss: Its loss.
        one_shot: Quality of pruning as far without training.
        num_examples: Examples measured on.
        data: Which, in words.
        zeros: Counted in the written file, of the targets.
        total: Weights of the targets.
        overall_sparsity: The same zeros over all parameters.
        exponent_mean: Mean |exponent| of the mirror step.
        moved_fraction: Share of the mirrored weights that HAM moved.
        seconds: Of training.
        warnings: Of the run.
    """

    status: Status
    why: str = ""
    metric: str | None = None
    higher_is_better: bool | None = None
    value: float | None = None
    loss: float | None = None
    agreement: float | None = None
    dense: float | None = None
    dense_loss: float | None = None
    one_shot: float | None = None
    num_examples: int | None = None
    data: str | None = None
    zeros: int | None = None
    total: int | None = None
    overall_sparsity: float | None = None
    exponent_mean: float | None = None
    moved_fraction: float | None = None
    seconds: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A run of the grid: its cell, the key it is cached under, its outcome."""

    cell: Cell
    key: str
    outcome: Outcome

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; without times, which differ between equal runs."""
        outcome = asdict(self.outcome)
        del outcome["seconds"]
        outcome["warnings"] = list(self.outcome.warnings)
        cell = asdict(self.cell)
        return {**cell.pop("arm"), **cell, "key": self.key, **outcome}


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the learning rate of an arm was chosen.

    Attributes:
        arm: Whose.
        target: Sparsity of the trials.
        lr: What was chosen.
        is_edge: Whether the best trial is the lowest or highest lr, so that a better one may lie
            beyond.
        trials: Measured on validation rows; empty where none were made.
    """

    arm: Arm
    target: float
    lr: float
    is_edge: bool
    trials: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            **asdict(self.arm),
            "target": self.target,
            "lr": self.lr,
            "is_edge": self.is_edge,
            "trials": [one.to_dict() for one in self.trials],
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds, its standard error (None for fewer than two), and how many there were."""

    mean: float | None
    standard_error: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Mean:
    """An arm at a sparsity, over the seeds that ended well."""

    arm: Arm
    target: float
    value: Spread
    loss: Spread
    lost: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        found = asdict(self)
        return {**found.pop("arm"), **found}


@dataclass(frozen=True, slots=True)
class Pair:
    """HAM on minus off for a method at a sparsity, over the seeds where both ended well.

    Attributes:
        method: Of both.
        target: Of both.
        value: Difference of the quality.
        loss: Difference of the loss.
        gain: `value.mean` turned so that above 0 HAM is better.
        lost: Seeds without a pair.
    """

    method: str
    target: float
    value: Spread
    loss: Spread
    gain: float | None
    lost: int

    @property
    def verdict(self) -> str:
        """What can be said: beyond one standard error or within."""
        if self.gain is None:
            return "no pair"
        if self.value.standard_error is None:
            return "one seed"
        if abs(self.gain) <= self.value.standard_error:
            return "within one standard error"
        return "HAM ahead" if self.gain > 0 else "HAM behind"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The whole result.

    Attributes:
        grid: What was compared.
        facts: Model, data, recipe and versions behind it, as JSON holds them.
        tunings: One an arm.
        rows: One a run, trials left out.
        means: One an arm and sparsity.
        pairs: One a method and sparsity, where HAM was both on and off.
    """

    grid: Grid
    facts: dict[str, Any]
    tunings: tuple[Tuning, ...]
    rows: tuple[Row, ...]
    means: tuple[Mean, ...]
    pairs: tuple[Pair, ...]

    @property
    def metric(self) -> str:
        """Name of the quality; empty where no run ended well."""
        return next((row.outcome.metric for row in self.done if row.outcome.metric), "")

    @property
    def higher_is_better(self) -> bool:
        """Which way it counts."""
        return next((bool(row.outcome.higher_is_better) for row in self.done), True)

    @property
    def dense(self) -> float | None:
        """Quality of the model before; None where it had none of its own."""
        return next((row.outcome.dense for row in self.done), None)

    @property
    def done(self) -> Sequence[Row]:
        """The runs that ended well."""
        return [row for row in self.rows if row.outcome.status == "done"]

    def to_dict(self, ham_version: str) -> dict[str, Any]:
        """As JSON holds it: the same grid on the same machine gives the same document."""
        return {
            "ham_version": ham_version,
            **self.facts,
            "grid": {
                "methods": list(self.grid.methods),
                "targets": list(self.grid.targets),
                "seeds": list(self.grid.seeds),
                "ham": list(self.grid.hams),
                "trials": self.grid.trials,
            },
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "dense": self.dense,
            "tuning": [one.to_dict() for one in self.tunings],
            "cells": [one.to_dict() for one in self.rows],
            "means": [one.to_dict() for one in self.means],
            "pairs": [one.to_dict() for one in self.pairs],
        }

"""What the checks found: claims with their limits, tables and plots as plain numbers; no torch."""

import math
from dataclasses import dataclass
from typing import Any, Literal

Relation = Literal["at most", "at least"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One measured number and what it must be.

    Attributes:
        name: What was measured.
        value: The number; None where it is not finite, which passes nothing.
        limit: What it must not go beyond.
        relation: On which side of `limit` it must be.
    """

    name: str
    value: float | None
    limit: float
    relation: Relation = "at most"

    @property
    def passed(self) -> bool:
        """Whether the number is on the right side."""
        if self.value is None:
            return False
        return self.value <= self.limit if self.relation == "at most" else self.value >= self.limit

    @property
    def line(self) -> str:
        """`PASS  distance ...: 2.1e-04, at most 0.001`."""
        value = "not finite" if self.value is None else f"{self.value:.2e}"
        verdict = "PASS" if self.passed else "FAIL"
        return f"{verdict}  {self.name}: {value}, {self.relation} {self.limit:g}"


def claim(name: str, value: float, limit: float, relation: Relation = "at most") -> Claim:
    """A claim about a number that may have come out as no number at all."""
    value = float(value)
    return Claim(name, value if math.isfinite(value) else None, limit, relation)


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot; `style` names a colour, and points are marked where `marked`.

    A `hollow` one is drawn as rings without a line.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: str
    marked: bool = False
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves on common axes, with a dashed level and its words where there is one."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_x: bool = False
    log_y: bool = False
    level: tuple[float, str] | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One of the paper's claims.

    Attributes:
        name: A short word for it.
        title: The claim in a sentence.
        claims: What must hold, a number each.
        columns: Heads of the table.
        rows: Numbers behind the claims; a string stands as it is, None was never reached.
        plot: The same as a picture.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[float | str | None, ...], ...]
    plot: Plot

    @property
    def passed(self) -> bool:
        """Whether all its claims hold."""
        return all(one.passed for one in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; the plot is left to the picture."""
        return {
            "name": self.name,
            "title": self.title,
            "passed": self.passed,
            "claims": [
                {
                    "name": one.name,
                    "value": one.value,
                    "relation": one.relation,
                    "limit": one.limit,
                    "passed": one.passed,
                }
                for one in self.claims
            ],
            "table": [
                {
                    head: None if isinstance(cell, float) and not math.isfinite(cell) else cell
                    for head, cell in zip(self.columns, row, strict=True)
                }
                for row in self.rows
            ],
        }


@dataclass(frozen=True, slots=True)
class Results:
    """All checks of one seed."""

    seed: int
    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Claim, ...]:
        """The claims that do not hold."""
        return tuple(one for check in self.checks for one in check.claims if not one.passed)

    def to_dict(self, ham_version: str) -> dict[str, Any]:
        """As JSON holds it: the same seed on the same machine gives the same document."""
        return {
            "ham_version": ham_version,
            "paper": "arXiv 2506.02630",
            "seed": self.seed,
            "passed": not self.failures,
            "checks": [check.to_dict() for check in self.checks],
        }

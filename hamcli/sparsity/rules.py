"""Where zeros may lie and how many: the recipe's words held against each other and the targets.

Imports no torch: a target is a name, a shape and an axis here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from hamcli.errors import RecipeError
from hamcli.recipe.schema import SparsitySection
from hamcli.sparsity.counting import exact, num_zeros
from hamcli.sparsity.globs import covering_globs

PATTERN_TOLERANCE = Fraction(5, 10_000)  # 0.667 is 1:3 to those who write three digits
NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Rules:
    """Where the zeros may lie; made by `make_rules`, which has checked that they fit the targets.

    Attributes:
        target: Sparsity at the end, 0 to 1.
        total: Number of prunable weights.
        allocation: global, uniform, erk, lamp or owl.
        kept_of: (n, m) of an N:M pattern, else None.
        block: (r, c) of a block pattern, else None.
        min_sparsity: Lowest sparsity of each tensor at the end.
        max_sparsity: Highest sparsity of each tensor.
        outliers: Share of outliers of each target's layer; only for owl.
    """

    target: float
    total: int
    allocation: str
    kept_of: tuple[int, int] | None
    min_sparsity: float
    max_sparsity: float
    block: tuple[int, int] | None = None
    outliers: tuple[float, ...] | None = None

    @property
    def num_zeros(self) -> int:
        """Zeros that the target asks for; of blocks, of the nearest number of whole ones."""
        if self.block is not None:
            size = math.prod(self.block)
            return num_zeros(self.target, self.total // size) * size
        if self.kept_of is None:
            return num_zeros(self.target, self.total)
        n, m = self.kept_of
        return self.total // m * (m - n)


class Prunable(Protocol):
    """A tensor that may become sparse, as far as rules look at it."""

    @property
    def name(self) -> str:
        """Its name in the model."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape in the model."""

    @property
    def input_dim(self) -> int:
        """Axis that the layer sums over."""

    @property
    def is_stacked(self) -> bool:
        """Whether axis 0 counts matrices."""


class Prunables(Protocol):
    """The targets, as far as rules look at them."""

    @property
    def exclude(self) -> tuple[str, ...]:
        """Globs that stay dense."""

    @property
    def total(self) -> int:
        """Number of prunable weights."""

    def __iter__(self) -> Iterator[Prunable]: ...


def make_rules(
    targets: Prunables,
    *,
    target: float,
    allocation: str = "global",
    pattern: str = "unstructured",
    min_sparsity: float = 0.0,
    max_sparsity: float = 1.0,
    outliers: Sequence[float] | None = None,
) -> Rules:
    """Check that the recipe's words fit each other and the targets.

    Args:
        targets: What may become zero.
        target: Sparsity at the end, 0 to 1; of N:M, 1 - N/M.
        allocation: global, uniform, erk, lamp or owl; N:M is uniform whatever global or uniform
            says.
        pattern: unstructured, N:M or block:RxC.
        min_sparsity: Lowest sparsity of each tensor.
        max_sparsity: Highest sparsity of each tensor.
        outliers: Share of outliers of each target's layer; needed by owl where masks are chosen.

    Raises:
        RecipeError: E221, the bounds exclude the target. E222, the pattern makes no sense. E223,
            the target is not the pattern's. E224, a tensor cannot be cut into groups of M or whole
            blocks. E225, the allocation does not go with the pattern.
    """
    block = parse_block(pattern)
    kept_of = parse_pattern(pattern) if block is None else None
    if kept_of is not None:
        _refuse_misfit(targets, target, allocation, pattern, kept_of)
    if block is not None:
        from hamcli.sparsity.blocks import fits

        uneven = [one.name for one in targets if not fits(one, block)]
        _refuse_uneven(targets, pattern, uneven)
    _refuse_bounds(target, min_sparsity, max_sparsity)
    known = None if outliers is None else tuple(outliers)
    return Rules(
        target, targets.total, allocation, kept_of, min_sparsity, max_sparsity, block, known
    )


def rules_for(
    targets: Prunables, section: SparsitySection, outliers: Sequence[float] | None = None
) -> Rules:
    """The same from a recipe's own words, whose allocation is settled.

    Raises:
        RecipeError: As `make_rules`.
    """
    return make_rules(
        targets,
        target=section.target,
        allocation=section.allocation,
        pattern=section.pattern,
        min_sparsity=section.min_sparsity,
        max_sparsity=section.max_sparsity,
        outliers=outliers,
    )


def parse_block(pattern: str) -> tuple[int, int] | None:
    """(r, c) of "block:RxC", None of any other pattern."""
    word, _, size = pattern.partition(":")
    rows, _, columns = size.partition("x")
    if word != "block" or not (rows.isdecimal() and columns.isdecimal()):
        return None
    block = int(rows), int(columns)
    return block if min(block) > 0 and math.prod(block) > 1 else None


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(n, m) of "N:M", None of "unstructured".

    Raises:
        RecipeError: E222.
    """
    if pattern == "unstructured":
        return None
    kept, _, group = pattern.partition(":")
    if kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group):
        return int(kept), int(group)
    raise RecipeError(
        "E222",
        "unknown pattern",
        "sparsity.pattern",
        f'"{pattern}"',
        "unstructured, N:M which keeps N of each M weights, 0 < N < M, as 2:4, or block:RxC",
    )


def settled_allocation(method: str, allocation: str, pattern: str) -> str:
    """What `auto` means: as published, erk for random and rigl, uniform for wanda and sparsegpt.

    For all others global.
    """
    if allocation != "auto":
        return allocation
    if method in ("wanda", "sparsegpt"):
        return "uniform"
    is_grouped = ":" in pattern and not pattern.startswith("block")
    return "erk" if method in ("random", "rigl") and not is_grouped else "global"


def _refuse_misfit(
    targets: Prunables, target: float, allocation: str, pattern: str, kept_of: tuple[int, int]
) -> None:
    n, m = kept_of
    if abs(exact(target) - Fraction(m - n, m)) > PATTERN_TOLERANCE:
        raise RecipeError(
            "E223",
            "the target is not the pattern's",
            "sparsity.target",
            f"{pattern} zeroes {m - n} of each {m} weights, not {target:g} of them",
            f"{(m - n) / m:.6g}, or another pattern",
        )
    if allocation not in ("global", "uniform"):
        raise RecipeError(
            "E225",
            "the allocation does not go with the pattern",
            "sparsity.allocation",
            f"{pattern} gives every tensor the same sparsity, {allocation} does not",
            "global or uniform",
        )
    uneven = [item.name for item in targets if item.shape[item.input_dim] % m]
    _refuse_uneven(targets, pattern, uneven)


def _refuse_uneven(targets: Prunables, pattern: str, uneven: Sequence[str]) -> None:
    if uneven:
        even = [item.name for item in targets if item.name not in uneven]
        globs = covering_globs(uneven, even)
        shown = ", ".join(globs[:NAMES_SHOWN])
        more = f" and {len(globs) - NAMES_SHOWN} more" if len(globs) > NAMES_SHOWN else ""
        _, _, size = pattern.partition(":")
        why = (
            f"the shape is no multiple of {size}"
            if pattern.startswith("block")
            else f"the number of inputs is no multiple of {size}"
        )
        raise RecipeError(
            "E224",
            "the pattern does not fit",
            "sparsity.pattern",
            f"{pattern}: {why}: {shown}{more}",
            "exclude them",
            [f"--set 'targets.exclude=[{', '.join([*targets.exclude, *globs])}]'"],
        )


def _refuse_bounds(target: float, min_sparsity: float, max_sparsity: float) -> None:
    if not exact(min_sparsity) <= exact(target) <= exact(max_sparsity):
        raise RecipeError(
            "E221",
            "the bounds leave no room for the target",
            "sparsity.target",
            f"{target:g} is not between min_sparsity {min_sparsity:g} and "
            f"max_sparsity {max_sparsity:g}",
            "min_sparsity <= target <= max_sparsity",
        )

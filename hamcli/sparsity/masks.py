"""One target → masks over all targets: allocation, pattern and selection put together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hamcli.errors import RecipeError
from hamcli.sparsity import blocks
from hamcli.sparsity.allocate import allocate
from hamcli.sparsity.globs import covering_globs
from hamcli.sparsity.score import Score, Scores, magnitude
from hamcli.sparsity.select import exact, exact_masks, global_masks, n_m_mask, num_zeros
from hamcli.sparsity.targets import Targets

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


def make_rules(
    targets: Targets,
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
        _refuse_uneven(
            targets, pattern, [one.name for one in targets if not blocks.fits(one, block)]
        )
    _refuse_bounds(target, min_sparsity, max_sparsity)
    known = None if outliers is None else tuple(outliers)
    return Rules(
        target, targets.total, allocation, kept_of, min_sparsity, max_sparsity, block, known
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


def choose_masks(
    targets: Targets,
    rules: Rules,
    num_zeros: int,
    *,
    masks: Sequence[Tensor] | None = None,
    score: Score = magnitude,
) -> list[Tensor]:
    """Masks with exactly `num_zeros` zeros, or more where more weights are masked already.

    Under N:M they lie among the weights that the pattern would drop, so that every mask on the way
    leads to it; the last one is the pattern itself.

    Args:
        targets: What may become zero.
        rules: Where the zeros may lie.
        num_zeros: Now due; at most `zeros_at_end`, which gives the final masks.
        masks: What they drop stays dropped.
        score: Weights → scores of 0 or more, the larger is kept.
    """
    if rules.block is not None:
        return _block_masks(targets, rules, rules.block, num_zeros, masks, score)
    scores = Scores(targets.params, score, masks)
    already = _counts_dropped(masks) if masks is not None else [0] * len(targets)
    if rules.kept_of is not None:
        return _n_m_masks(targets, rules.kept_of, max(num_zeros, sum(already)), scores)
    if masks is not None and num_zeros <= sum(already):
        return list(masks)
    share = Fraction(num_zeros, max(rules.num_zeros, num_zeros, 1))
    shapes = [target.param.shape for target in targets]
    return _chosen(targets, rules, shapes, num_zeros, scores, already, share)


def _chosen(
    targets: Targets,
    rules: Rules,
    shapes: Sequence[Sequence[int]],
    num_zeros: int,
    scores: Sequence[Tensor],
    already: Sequence[int],
    share: Fraction,
) -> list[Tensor]:
    """Allocation and selection, of weights or of blocks.

    `share` is that of the final zeros now due: the bound from below grows with it, or a ramp could
    not start.
    """
    if rules.allocation == "global" and rules.min_sparsity == 0.0 and rules.max_sparsity == 1.0:
        return global_masks(scores, num_zeros)
    counts = allocate(
        shapes,
        num_zeros,
        rules.allocation,
        scores=scores,
        min_sparsity=exact(rules.min_sparsity) * share,
        max_sparsity=rules.max_sparsity,
        already=already,
        stacked=[target.is_stacked for target in targets],
        outliers=rules.outliers,
    )
    return exact_masks(scores, counts)


def _block_masks(
    targets: Targets,
    rules: Rules,
    block: tuple[int, int],
    num_zeros: int,
    masks: Sequence[Tensor] | None,
    score: Score,
) -> list[Tensor]:
    """As `choose_masks`, for the nearest number of whole blocks; whole ones dropped stay so."""
    size = math.prod(block)
    sums = blocks.sums_of(Scores(targets.params, score), targets.items, block)
    keeps = None
    if masks is not None:
        keeps = [
            blocks.block_any(mask, target, block)
            for mask, target in zip(masks, targets, strict=True)
        ]
    already = _counts_dropped(keeps) if keeps is not None else [0] * len(sums)
    due = max(round(Fraction(num_zeros, size)), sum(already))
    scores = Scores(sums, magnitude, keeps)  # sums of no negative number are their own
    share = Fraction(due, max(rules.num_zeros // size, due, 1))
    chosen = _chosen(targets, rules, [one.shape for one in sums], due, scores, already, share)
    return blocks.spread_all(chosen, targets.items, block)


def prune_masks(
    targets: Targets,
    target: float,
    *,
    allocation: str = "global",
    pattern: str = "unstructured",
    min_sparsity: float = 0.0,
    max_sparsity: float = 1.0,
    outliers: Sequence[float] | None = None,
    score: Score = magnitude,
) -> list[Tensor]:
    """Masks for pruning once; weights that are zero already count and stay zero.

    Args:
        targets: What may become zero.
        target: Sparsity, 0 to 1.
        allocation: As for `make_rules`.
        pattern: unstructured, N:M or block:RxC.
        min_sparsity: Lowest sparsity of each tensor.
        max_sparsity: Highest sparsity of each tensor.
        outliers: As for `make_rules`.
        score: Weights → scores of 0 or more, the larger is kept.

    Raises:
        RecipeError: As `make_rules`.
    """
    rules = make_rules(
        targets,
        target=target,
        allocation=allocation,
        pattern=pattern,
        min_sparsity=min_sparsity,
        max_sparsity=max_sparsity,
        outliers=outliers,
    )
    nonzero = nonzero_masks(targets)
    due = zeros_at_end(targets, rules, nonzero)
    return choose_masks(targets, rules, due, masks=nonzero, score=score)


@torch.no_grad()
def apply_masks_(targets: Targets, masks: Sequence[Tensor]) -> None:
    """Zero, in place, the weights that the masks (True where kept) drop."""
    for target, mask in zip(targets, masks, strict=True):
        # where, not a product: 0 * nan is nan, and -w * 0 stores -0.0
        target.param.copy_(torch.where(mask, target.param, 0.0))


@torch.no_grad()
def nonzero_masks(targets: Targets) -> list[Tensor]:
    """Masks that drop what is zero already."""
    return [target.param != 0 for target in targets]


def num_dropped(masks: Sequence[Tensor]) -> int:
    """Zeros of all masks together."""
    return sum(_counts_dropped(masks))


def zeros_at_end(targets: Targets, rules: Rules, masks: Sequence[Tensor]) -> int:
    """Zeros that the final masks will have, given that what `masks` drop stays dropped.

    More than `rules.num_zeros` only if the masks drop more already, under N:M in some group, of
    blocks whole ones: zeros inside a block that is kept are not the masks'.
    """
    if rules.block is not None:
        size = math.prod(rules.block)
        num_blocks = sum(
            int((~blocks.block_any(mask, target, rules.block)).sum())
            for mask, target in zip(masks, targets, strict=True)
        )
        return max(rules.num_zeros, num_blocks * size)
    if rules.kept_of is None:
        return max(rules.num_zeros, num_dropped(masks))
    n, m = rules.kept_of
    zeros = 0
    for target, mask in zip(targets, masks, strict=True):
        dropped = (~mask).movedim(target.input_dim, -1).reshape(-1, m).sum(dim=-1)
        zeros += int(dropped.clamp(min=m - n).sum())
    return zeros


def _counts_dropped(masks: Sequence[Tensor]) -> list[int]:
    return [mask.numel() - int(mask.count_nonzero()) for mask in masks]


def _n_m_masks(
    targets: Targets, kept_of: tuple[int, int], num_zeros: int, scores: Scores
) -> list[Tensor]:
    ends = [
        n_m_mask(score, *kept_of, target.input_dim)
        for score, target in zip(scores, targets, strict=True)
    ]
    if scores.masks is not None:
        # a group that came with more zeros than the pattern asks for keeps them
        ends = [end & before for end, before in zip(ends, scores.masks, strict=True)]
    if num_zeros >= num_dropped(ends):
        return ends
    return global_masks(Scores(scores.params, scores.score, scores.masks, ends), num_zeros)


def _refuse_misfit(
    targets: Targets, target: float, allocation: str, pattern: str, kept_of: tuple[int, int]
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
    uneven = [item.name for item in targets if item.param.shape[item.input_dim] % m]
    _refuse_uneven(targets, pattern, uneven)


def _refuse_uneven(targets: Targets, pattern: str, uneven: Sequence[str]) -> None:
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

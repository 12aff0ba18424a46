"""One target → masks over all targets: allocation, pattern and selection put together."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from hamcli.errors import RecipeError
from hamcli.sparsity import blocks
from hamcli.sparsity.across import Across, total, totals
from hamcli.sparsity.allocate import allocate
from hamcli.sparsity.counting import exact
from hamcli.sparsity.rules import Rules, make_rules
from hamcli.sparsity.score import Score, Scores, magnitude
from hamcli.sparsity.select import exact_masks, global_masks, n_m_mask
from hamcli.sparsity.targets import Target, Targets


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
    across = targets.across
    scores = Scores(targets.params, score, masks, across=across)
    already = _counts_dropped(masks, across) if masks is not None else [0] * len(targets)
    if rules.kept_of is not None:
        return _n_m_masks(targets, rules.kept_of, max(num_zeros, sum(already)), scores)
    if masks is not None and num_zeros <= sum(already):
        return list(masks)
    share = Fraction(num_zeros, max(rules.num_zeros, num_zeros, 1))
    shapes = [target.shape for target in targets]
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
    across = targets.across
    already = _counts_dropped(keeps, across) if keeps is not None else [0] * len(sums)
    due = max(round(Fraction(num_zeros, size)), sum(already))
    scores = Scores(sums, lambda one: one, keeps, across=across)
    share = Fraction(due, max(rules.num_zeros // size, due, 1))
    shapes = [blocks.shape_of(target, block) for target in targets]
    chosen = _chosen(targets, rules, shapes, due, scores, already, share)
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


def num_dropped(masks: Sequence[Tensor], across: Across | None = None) -> int:
    """Zeros of all masks together, in all processes that hold rows of them."""
    return sum(_counts_dropped(masks, across))


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
        return max(rules.num_zeros, total(num_blocks, targets.across) * size)
    if rules.kept_of is None:
        return max(rules.num_zeros, num_dropped(masks, targets.across))
    n, m = rules.kept_of
    zeros = 0
    for target, mask in zip(targets, masks, strict=True):
        dropped = (~mask).movedim(target.input_dim, -1).reshape(-1, m).sum(dim=-1)
        zeros += int(dropped.clamp(min=m - n).sum())
    return total(zeros, targets.across)


def _counts_dropped(masks: Sequence[Tensor], across: Across | None = None) -> list[int]:
    return totals([mask.numel() - int(mask.count_nonzero()) for mask in masks], across)


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
    if num_zeros >= num_dropped(ends, scores.across):
        return ends
    limited = Scores(scores.params, scores.score, scores.masks, ends, scores.across)
    return global_masks(limited, num_zeros)


def refuse_cut(targets: Targets, rules: Rules) -> None:
    """See that no group or block of rows lies in two processes.

    Raises:
        RecipeError: E246.
    """
    if rules.block is not None:
        shown = "block:{}x{}".format(*rules.block)
        _refuse_cut(targets, shown, [one for one in targets if not one.is_stacked], rules.block[0])
        _refuse_cut(targets, shown, [one for one in targets if not blocks.is_in_rows(one)], 0)
    elif rules.kept_of is not None:
        grouped = [one for one in targets if one.input_dim == 0]
        _refuse_cut(targets, "{}:{}".format(*rules.kept_of), grouped, rules.kept_of[1])


def _refuse_cut(targets: Targets, pattern: str, among: Sequence[Target], rows: int) -> None:
    """Refuse groups of `rows` rows that lie in two processes; 0 rows: any tensor that is cut."""
    cut = [
        one
        for one in among
        if one.part is not None and (rows == 0 or one.part.begin % rows or len(one.param) % rows)
    ]
    if total(len(cut), targets.across) == 0:
        return
    shown = cut[0].name if cut else "in another process"
    raise RecipeError(
        "E246",
        "the pattern is cut by the processes",
        "sparsity.pattern",
        f"{pattern}: {shown}: rows that belong together would lie in two of them",
        "another number of processes, training.parallel ddp, or exclude it",
    )

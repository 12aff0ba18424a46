"""One target → masks over all targets: allocation, pattern and selection put together."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from hamcli.sparsity.across import Across, total, totals
from hamcli.sparsity.allocate import allocate
from hamcli.sparsity.blocks import Blocks
from hamcli.sparsity.counting import exact
from hamcli.sparsity.cuts import across_groups
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
    size, blocks = math.prod(block), Blocks(targets, block)
    sums = [blocks.sums(*one) for one in enumerate(Scores(targets.params, score))]
    keeps = None if masks is None else [blocks.any(*one) for one in enumerate(masks)]
    across = targets.across
    already = _counts_dropped(keeps, across) if keeps is not None else [0] * len(sums)
    due = max(round(Fraction(num_zeros, size)), sum(already))
    # sums of no negative number are their own magnitude
    scores = Scores(sums, magnitude, keeps, across=across)
    share = Fraction(due, max(rules.num_zeros // size, due, 1))
    chosen = _chosen(targets, rules, blocks.shapes, due, scores, already, share)
    return [blocks.spread(*one) for one in enumerate(chosen)]


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
    return one_shot_masks(targets, rules, score)


def one_shot_masks(targets: Targets, rules: Rules, score: Score = magnitude) -> list[Tensor]:
    """The same by rules that are made already."""
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
        blocks = Blocks(targets, rules.block)
        num_blocks = sum(int((~blocks.any(*one)).sum()) for one in enumerate(masks))
        return max(rules.num_zeros, total(num_blocks, targets.across) * size)
    if rules.kept_of is None:
        return max(rules.num_zeros, num_dropped(masks, targets.across))
    apart = _across_groups(targets, rules.kept_of)
    each = zip(targets, masks, apart, strict=True)
    zeros = sum(_zeros_of_groups(*one, rules.kept_of) for one in each)
    return total(zeros, targets.across)


def _zeros_of_groups(
    target: Target, mask: Tensor, across: Across | None, kept_of: tuple[int, int]
) -> int:
    """Zeros at the end of the groups of one tensor that this process counts."""
    n, m = kept_of
    held = mask if across is None else across.whole(mask)
    if across is not None and across.rank > 0:
        return 0  # of what all hold alike, one process counts
    dropped = (~held).movedim(target.input_dim, -1).reshape(-1, m).sum(dim=-1)
    return int(dropped.clamp(min=m - n).sum())


def _across_groups(targets: Targets, kept_of: tuple[int, int]) -> list[Across | None]:
    """For each target, the processes in which its groups of M inputs lie, where they are cut."""
    _, m = kept_of
    return across_groups(targets, [m if one.input_dim == 0 else 1 for one in targets])


def _counts_dropped(masks: Sequence[Tensor], across: Across | None = None) -> list[int]:
    return totals([mask.numel() - int(mask.count_nonzero()) for mask in masks], across)


def _n_m_masks(
    targets: Targets, kept_of: tuple[int, int], num_zeros: int, scores: Scores
) -> list[Tensor]:
    each = zip(targets, scores, _across_groups(targets, kept_of), strict=True)
    ends = [_n_m_end(*one, kept_of) for one in each]
    if scores.masks is not None:
        # a group that came with more zeros than the pattern asks for keeps them
        ends = [end & before for end, before in zip(ends, scores.masks, strict=True)]
    if num_zeros >= num_dropped(ends, scores.across):
        return ends
    limited = Scores(scores.params, scores.score, scores.masks, ends, scores.across)
    return global_masks(limited, num_zeros)


def _n_m_end(
    target: Target, score: Tensor, across: Across | None, kept_of: tuple[int, int]
) -> Tensor:
    """The rows that lie here of one tensor's N:M mask."""
    if across is None:
        return n_m_mask(score, *kept_of, target.input_dim)
    return target.own(n_m_mask(across.whole(score), *kept_of, target.input_dim))

"""How many of each: one number of zeros for all → a number of zeros for each tensor.

    global   the smallest scores of all, wherever they are: one threshold
    uniform  the same sparsity everywhere
    erk      density in proportion to sum(shape) / product(shape): small tensors stay denser
             (Evci et al., arXiv 1911.11134)
    lamp     global, by scores that compare across tensors (Lee et al., arXiv 2010.07611)
    owl      layers with more outliers stay denser (Yin et al., arXiv 2310.05175)

Every allocation sums to the number asked for, exactly, and keeps each tensor between its bounds.
Only what looks at scores imports torch.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from hamcli.errors import RecipeError
from hamcli.sparsity.counting import exact

if TYPE_CHECKING:
    from torch import Tensor

Shape = Sequence[int]

OWL_RANGE = 0.08  # greatest distance of a layer's density from the mean; arXiv 2310.05175
PARTS = 10**9  # densities as integers, to share out exactly


def allocate(
    shapes: Sequence[Shape],
    num_zeros: int,
    allocation: str,
    *,
    scores: "Sequence[Tensor] | None" = None,
    min_sparsity: float | Fraction = 0.0,
    max_sparsity: float | Fraction = 1.0,
    already: Sequence[int] | None = None,
    stacked: Sequence[bool] | None = None,
    outliers: Sequence[float] | None = None,
) -> list[int]:
    """Zeros of each tensor; they sum to `num_zeros`.

    The bounds hold to the weight, rounded inwards; where rounding alone would leave no way to the
    sum (a tensor of 5 at a bound of 0.9), outwards, which is less than one weight a tensor. Zeros
    that are there already are never undone, whatever the bounds say.

    Args:
        shapes: One shape a tensor.
        num_zeros: At least the sum of `already`, at most the number of all weights.
        allocation: global, uniform, erk, lamp or owl.
        scores: One tensor a shape; needed by global and lamp.
        min_sparsity: Lowest sparsity of each tensor.
        max_sparsity: Highest sparsity of each tensor.
        already: Weights of each tensor that are zero and stay zero.
        stacked: Whether the first axis of a shape counts matrices (fused experts); matters to erk.
        outliers: Share of outliers of each tensor's layer; needed by owl.

    Raises:
        RecipeError: E221, the bounds leave no room for `num_zeros`.
    """
    sizes = [math.prod(shape) for shape in shapes]
    already = already or [0] * len(sizes)
    lower, upper = _bounds(sizes, num_zeros, min_sparsity, max_sparsity, already)
    if allocation == "uniform":
        return share_out(num_zeros, sizes, lower, upper)
    if allocation == "erk":
        return _erk(shapes, num_zeros, lower, upper, stacked or [False] * len(shapes))
    if allocation == "owl":
        assert outliers is not None, "owl is made by outliers"
        return _owl(sizes, num_zeros, lower, upper, outliers)
    assert allocation in ("global", "lamp"), allocation
    assert scores is not None, "a global allocation is made by scores"
    if allocation == "lamp":
        from hamcli.sparsity.score import all_layer_adaptive

        scores = all_layer_adaptive(scores)
    return _global(scores, num_zeros, lower, upper)


def share_out(
    total: int, weights: Sequence[int], lower: Sequence[int], upper: Sequence[int]
) -> list[int]:
    """Integers in proportion to `weights`, between their bounds, with the given sum.

    The real solution is clamp(level * weight) with one level; what its floors leave over goes to
    the largest remainders, the earlier one of equals.

    Args:
        total: Between the sums of the bounds.
        weights: Not negative; zero only where both bounds are equal.
        lower: Least share of each.
        upper: Greatest share of each.
    """
    reals = _proportional(total, weights, lower, upper)
    counts = [math.floor(real) for real in reals]
    by_remainder = sorted(range(len(reals)), key=lambda i: (counts[i] - reals[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _proportional(
    total: int, weights: Sequence[int], lower: Sequence[int], upper: Sequence[int]
) -> list[Fraction]:
    """clamp(level * weight, lower, upper) with the level at which they sum to `total`."""
    least, most = list(map(Fraction, lower)), list(map(Fraction, upper))
    shares = {i: low for i, low in enumerate(least) if low == most[i]}
    free = [i for i in range(len(weights)) if i not in shares]
    while free:
        left = total - sum(shares.values(), Fraction(0))
        level = left / sum(weights[i] for i in free)
        clamped = {i: min(max(level * weights[i], least[i]), most[i]) for i in free}
        excess = sum(clamped.values()) - left
        if excess == 0:
            shares.update(clamped)
            break
        # Too much: the true level is lower, so whoever is at its lower bound stays there.
        bound = least if excess > 0 else most
        shares.update({i: clamped[i] for i in free if clamped[i] == bound[i]})
        free = [i for i in free if i not in shares]
    return [shares[i] for i in range(len(weights))]


def _erk(
    shapes: Sequence[Shape],
    num_zeros: int,
    lower: Sequence[int],
    upper: Sequence[int],
    stacked: Sequence[bool],
) -> list[int]:
    sizes = [math.prod(shape) for shape in shapes]
    # density * size, and density is sum(shape) / size up to a factor: kept weights go by sum(shape)
    weights = [
        shape[0] * sum(shape[1:]) if is_stacked else sum(shape)
        for shape, is_stacked in zip(shapes, stacked, strict=True)
    ]
    most = [size - low for size, low in zip(sizes, lower, strict=True)]
    least = [size - high for size, high in zip(sizes, upper, strict=True)]
    kept = share_out(sum(sizes) - num_zeros, weights, least, most)
    return [size - count for size, count in zip(sizes, kept, strict=True)]


def _owl(
    sizes: Sequence[int],
    num_zeros: int,
    lower: Sequence[int],
    upper: Sequence[int],
    outliers: Sequence[float],
) -> list[int]:
    """Densities around the mean one, at most `OWL_RANGE` apart from end to end on either side."""
    span = max(outliers) - min(outliers)
    scaled = [(one - min(outliers)) / span * 2 * OWL_RANGE if span else 0.0 for one in outliers]
    mean = sum(map(math.prod, zip(scaled, sizes, strict=True))) / sum(sizes)
    density = 1 - num_zeros / sum(sizes)
    kept = [
        max(round((density + one - mean) * PARTS), 1) * size
        for one, size in zip(scaled, sizes, strict=True)
    ]
    most = [size - low for size, low in zip(sizes, lower, strict=True)]
    least = [size - high for size, high in zip(sizes, upper, strict=True)]
    counts = share_out(sum(sizes) - num_zeros, kept, least, most)
    return [size - count for size, count in zip(sizes, counts, strict=True)]


def _global(
    scores: "Sequence[Tensor]", num_zeros: int, lower: Sequence[int], upper: Sequence[int]
) -> list[int]:
    """clamp(number of scores below a common threshold, lower, upper), summing to `num_zeros`."""
    from hamcli.sparsity.select import global_counts

    counts: dict[int, int] = {}
    free = list(range(len(lower)))
    while free:
        left = num_zeros - sum(counts.values())
        within = global_counts(_only(scores, free), min(max(left, 0), sum(upper[i] for i in free)))
        clamped = {
            i: min(max(count, lower[i]), upper[i]) for i, count in zip(free, within, strict=True)
        }
        excess = sum(clamped.values()) - left
        if excess == 0:
            counts.update(clamped)
            break
        # Too many: the true threshold is lower, so whoever is at its lower bound stays there.
        bound = lower if excess > 0 else upper
        counts.update({i: clamped[i] for i in free if clamped[i] == bound[i]})
        free = [i for i in free if i not in counts]
    return [counts[i] for i in range(len(lower))]


def _only(scores: "Sequence[Tensor]", indices: Sequence[int]) -> "Sequence[Tensor]":
    from hamcli.sparsity.score import Scores

    if len(indices) == len(scores):
        return scores
    if isinstance(scores, Scores):
        return scores.only(indices)
    return [scores[index] for index in indices]


def _bounds(
    sizes: Sequence[int],
    num_zeros: int,
    min_sparsity: float | Fraction,
    max_sparsity: float | Fraction,
    already: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Least and greatest number of zeros of each tensor, such that `num_zeros` can be reached."""
    least, most = _as_fraction(min_sparsity), _as_fraction(max_sparsity)
    _refuse_bounds(sizes, num_zeros, least, most)
    lower = [math.ceil(least * size) for size in sizes]
    upper = [math.floor(most * size) for size in sizes]
    if sum(upper) < num_zeros:
        upper = [math.ceil(most * size) for size in sizes]
    lower = [min(low, high) for low, high in zip(lower, upper, strict=True)]
    if sum(lower) > num_zeros:
        lower = [math.floor(least * size) for size in sizes]
    upper = [max(pair) for pair in zip(upper, already, strict=True)]
    raised = [max(pair) for pair in zip(lower, already, strict=True)]
    return (raised if sum(raised) <= num_zeros else list(already)), upper


def _refuse_bounds(sizes: Sequence[int], num_zeros: int, least: Fraction, most: Fraction) -> None:
    total = sum(sizes)
    if sum(math.floor(least * size) for size in sizes) > num_zeros:
        raise RecipeError(
            "E221",
            "the bounds leave no room for the target",
            "sparsity.min_sparsity",
            f"{float(least):g} of every tensor is more than {num_zeros:,} of {total:,} weights",
            "at most the target",
        )
    if sum(math.ceil(most * size) for size in sizes) < num_zeros:
        raise RecipeError(
            "E221",
            "the bounds leave no room for the target",
            "sparsity.max_sparsity",
            f"{float(most):g} of every tensor is less than {num_zeros:,} of {total:,} weights",
            "at least the target",
        )


def _as_fraction(value: float | Fraction) -> Fraction:
    return value if isinstance(value, Fraction) else exact(value)

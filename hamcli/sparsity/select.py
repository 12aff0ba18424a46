"""Scores → exact masks. Knows values, counts and patterns; no names, no steps, no files.

Selection is a radix search over the bits of the scores: for floats, made monotone in two integer
operations, bit order is value order. Each pass counts one 16-bit digit (one pass for 16-bit dtypes,
two for fp32, four for fp64) in chunks, so memory stays bounded, nothing is sorted or concatenated,
and the counts, being sums, add up over chunks, shards and processes. Equal scores are dropped by
position: tensors in the order given, row-major inside each, the first ones first. All counts are
Python integers or int64. NaN is above all numbers.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CHUNK = 1 << 18  # elements; a chunk and its keys stay in a core's cache
DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS
DIGIT_MASK = DIGITS - 1

Counts = npt.NDArray[np.int64]
NO_COUNTS: Counts = np.zeros(DIGITS, dtype=np.int64)

_KEYS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where a selection cuts: scores below `key` are dropped, and the first `ties` of those at it.

    Attributes:
        key: Monotone integer image of the score at the cut.
        ties: How many scores equal to it are dropped.
        dtype: The float dtype whose bits the key is made of.
    """

    key: int
    ties: int
    dtype: torch.dtype


def exact(fraction: float) -> Fraction:
    """The number a person wrote: 0.9 is nine tenths, not the double nearest to them."""
    return Fraction(repr(float(fraction)))


def num_zeros(target: float, total: int) -> int:
    """round(target * total), half to even, computed on the decimal that was written.

    Args:
        target: Sparsity, 0 to 1.
        total: Number of weights.
    """
    return min(max(round(exact(target) * total), 0), total)


def global_counts(scores: Sequence[Tensor], num_zeros: int) -> list[int]:
    """How many of each tensor are among the `num_zeros` smallest of all.

    Args:
        scores: Any shapes and float dtypes; may compute its items when asked.
        num_zeros: 0 to the number of all scores.
    """
    threshold = find_threshold(scores, num_zeros)
    ties_left = threshold.ties
    counts = []
    for score in scores:
        below, at = _count(score, threshold)
        taken = min(at, ties_left)
        ties_left -= taken
        counts.append(below + taken)
    return counts


def global_masks(scores: Sequence[Tensor], num_zeros: int) -> list[Tensor]:
    """Masks, True where kept, that drop the `num_zeros` smallest of all; one bool tensor each."""
    threshold = find_threshold(scores, num_zeros)
    ties_left = threshold.ties
    masks = []
    for score in scores:
        mask, ties_left = keep_mask(score, threshold, ties_left)
        masks.append(mask)
    return masks


def exact_mask(score: Tensor, num_zeros: int) -> Tensor:
    """Bool mask, True where kept, that drops exactly the `num_zeros` smallest scores."""
    return global_masks([score], num_zeros)[0]


def exact_masks(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """One mask a tensor, each with its own count of zeros."""
    return [exact_mask(score, count) for score, count in zip(scores, counts, strict=True)]


@torch.no_grad()
def n_m_mask(score: Tensor, n: int, m: int, input_dim: int) -> Tensor:
    """Bool mask that keeps the `n` largest of each `m` neighbours along `input_dim`.

    Args:
        score: Its size along `input_dim` is a multiple of `m`.
        n: Kept in each group, 0 < n < m.
        m: Size of a group.
        input_dim: The axis that the layer sums over.
    """
    moved = score.detach().movedim(input_dim, -1)
    groups = moved.reshape(-1, m)
    mask = torch.ones_like(groups, dtype=torch.bool)
    rows = max(1, CHUNK // m)
    for part, part_mask in zip(torch.split(groups, rows), torch.split(mask, rows), strict=True):
        dropped = part.argsort(dim=-1, stable=True)[:, : m - n]
        part_mask.scatter_(-1, dropped, False)
    return mask.view(moved.shape).movedim(-1, input_dim).contiguous()


@torch.no_grad()
def find_threshold(scores: Sequence[Tensor], num_zeros: int) -> Threshold:
    """Where to cut so that exactly `num_zeros` of all scores go.

    Args:
        scores: Gone through once for each digit; mixed dtypes are compared as their common one.
        num_zeros: 0 to the number of all scores.
    """
    dtype, counts = _count_top_digits(scores)
    bits = torch.finfo(dtype).bits
    offset = 1 << (bits - 1)
    if num_zeros == 0:
        return Threshold(-offset, 0, dtype)
    prefix, left = _find_digit(counts, num_zeros)
    for shift in range(bits - 2 * DIGIT_BITS, -1, -DIGIT_BITS):
        # keys are signed, the digits found so far are not
        begins = prefix - (offset >> (shift + DIGIT_BITS))
        digit, left = _find_digit(_count_digits(scores, dtype, shift, begins), left)
        prefix = prefix << DIGIT_BITS | digit
    return Threshold(prefix - offset, left, dtype)


def _find_digit(counts: Counts, rank: int) -> tuple[int, int]:
    """The digit that holds the score of this rank (from 1), and the rank inside that digit."""
    reached = np.cumsum(counts)
    assert rank <= reached[-1], "more zeros asked for than there are scores"
    digit = int(np.searchsorted(reached, rank))
    return digit, rank - (int(reached[digit - 1]) if digit else 0)


@torch.no_grad()
def keep_mask(score: Tensor, threshold: Threshold, ties_left: int) -> tuple[Tensor, int]:
    """One tensor's mask under a common threshold, and the ties that remain for the next tensor.

    Args:
        score: The tensor, after those already given.
        threshold: From `find_threshold` over all of them.
        ties_left: How many scores at the threshold are still to be dropped.
    """
    mask = torch.empty(score.numel(), dtype=torch.bool, device=score.device)
    parts = torch.split(mask, CHUNK) if mask.numel() else ()
    for keys, part in zip(_keys(score, threshold.dtype), parts, strict=True):
        torch.ge(keys, threshold.key, out=part)
        if ties_left:
            tied = (keys == threshold.key).nonzero().flatten()[:ties_left]
            part[tied] = False
            ties_left -= len(tied)
    return mask.view(score.shape), ties_left


def _count_top_digits(scores: Sequence[Tensor]) -> tuple[torch.dtype, Counts]:
    """The smallest dtype with keys that holds every score exactly, and its first digit's counts."""
    counts: dict[torch.dtype, Counts] = {}
    for score in scores:
        dtype = score.dtype if score.dtype in _KEYS else torch.float32
        counts[dtype] = counts.get(dtype, NO_COUNTS) + _count_top_digit(score, dtype)
    if not counts:
        return torch.float32, NO_COUNTS
    common = functools.reduce(torch.promote_types, counts)
    if len(counts) > 1:
        # mixed: count again, in the common dtype
        return common, sum((_count_top_digit(score, common) for score in scores), NO_COUNTS)
    return common, counts[common]


def _keys(score: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Signed integers in the order of the scores, a chunk at a time, row-major."""
    if score.numel() == 0:
        return
    key_dtype = _KEYS[dtype]
    info = torch.iinfo(key_dtype)
    for chunk in torch.split(score.detach().reshape(-1), CHUNK):
        # adding zero makes -0.0 the equal of 0.0
        bits = (chunk.to(dtype) + 0.0).view(key_dtype)
        yield bits ^ ((bits >> (info.bits - 1)) & info.max)


def _count_top_digit(score: Tensor, dtype: torch.dtype) -> Counts:
    """How often each value of the first digit occurs, signed and so counted from the middle."""
    shift = torch.finfo(dtype).bits - DIGIT_BITS
    counts = NO_COUNTS.copy()
    for keys in _keys(score, dtype):
        counts += _bincount((keys >> shift).to(torch.int32) + DIGITS // 2)
    return counts


def _count_digits(scores: Sequence[Tensor], dtype: torch.dtype, shift: int, begins: int) -> Counts:
    """How often each value of the digit at `shift` occurs among keys that begin with `begins`."""
    counts = NO_COUNTS.copy()
    for score in scores:
        for keys in _keys(score, dtype):
            inside = keys[(keys >> (shift + DIGIT_BITS)) == begins]
            counts += _bincount((inside >> shift) & DIGIT_MASK)
    return counts


def _bincount(digits: Tensor) -> Counts:
    """Counts of 0..65535; numpy's is three times as fast as torch's on a CPU."""
    if digits.device.type == "cpu":
        return np.bincount(digits.numpy(), minlength=DIGITS)
    counts: Counts = torch.bincount(digits, minlength=DIGITS).cpu().numpy()
    return counts


def _count(score: Tensor, threshold: Threshold) -> tuple[int, int]:
    """How many scores are below the threshold, and how many at it."""
    below = at = 0
    for keys in _keys(score, threshold.dtype):
        below += int((keys < threshold.key).sum())
        at += int((keys == threshold.key).sum())
    return below, at

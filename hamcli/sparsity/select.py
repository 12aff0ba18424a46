"""Scores → exact masks. Knows values, counts and patterns; no names, no steps, no files.

Selection is a radix search over the bits of the scores: for floats, made monotone in two integer
operations, bit order is value order. Each pass counts one 16-bit digit (one pass for 16-bit dtypes,
two for fp32, four for fp64) in chunks, so memory stays bounded, nothing is sorted or concatenated,
and the counts, being sums, add up over chunks, shards and processes. Weights on a CPU in fp32, bf16
or fp16 are streamed by `native.selection`, whose keys are the same. Equal scores are dropped by
position: tensors in the order given, row-major inside each, the first ones first. All counts are
Python integers or int64. NaN is above all numbers.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hamcli.native import selection
from hamcli.sparsity.across import Across
from hamcli.sparsity.score import Scores, as_they_are, magnitude

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
class _Streams:
    """Scores as `native.selection` takes them.

    Attributes:
        values: On a CPU, of one dtype.
        options: Whether |value| is meant, and what masks drop.
    """

    values: Sequence[Tensor]
    options: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Of all values."""
        return self.values[0].dtype

    def count(self, key: int) -> list[tuple[int, int]]:
        """Of each tensor, how many scores are below a key, and how many at it."""
        return selection.count_scores(self.values, key, **self.options)

    def count_digits(self, shift: int, begins: int | None) -> Counts:
        """Of a digit of all keys, or of those that begin so."""
        return selection.count_digits(self.values, shift, begins, **self.options)

    def keep_masks(self, key: int, ties: int) -> tuple[list[Tensor], int]:
        """Masks under a cut, and the ties left over."""
        return selection.keep_masks(self.values, key, ties, **self.options)


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


def global_counts(scores: Sequence[Tensor], num_zeros: int) -> list[int]:
    """How many of each tensor are among the `num_zeros` smallest of all.

    Args:
        scores: Any shapes and float dtypes; may compute its items when asked.
        num_zeros: 0 to the number of all scores.
    """
    threshold = find_threshold(scores, num_zeros)
    ties_left = threshold.ties
    counts = []
    found = _count(scores, threshold)
    across = _across(scores)
    if across is not None and found:
        found = [(int(below), int(at)) for below, at in across.add(np.array(found))]
    for below, at in found:
        taken = min(at, ties_left)
        ties_left -= taken
        counts.append(below + taken)
    return counts


def global_masks(scores: Sequence[Tensor], num_zeros: int) -> list[Tensor]:
    """Masks, True where kept, that drop the `num_zeros` smallest of all; one bool tensor each."""
    threshold = find_threshold(scores, num_zeros)
    across = _across(scores)
    if across is None:
        return _keep_masks(scores, threshold, threshold.ties)[0]
    ties = _ties_here(scores, threshold, across)
    return [
        _keep_masks(_only(scores, index), threshold, count)[0][0]
        for index, count in enumerate(ties)
    ]


def _across(scores: Sequence[Tensor]) -> Across | None:
    """The processes that hold the other rows of what is scored."""
    return scores.across if isinstance(scores, Scores) else None


def _ties_here(scores: Sequence[Tensor], threshold: Threshold, across: Across) -> list[int]:
    """How many ties of each tensor are dropped here, so that the first ones of all go.

    First are the earlier tensors, and within one the earlier rows, which earlier processes hold.
    """
    found = across.gather([at for _, at in _count(scores, threshold)])
    ordered = found.T.reshape(-1)  # tensor by tensor, in each process by process
    before = (np.cumsum(ordered) - ordered).reshape(found.T.shape)[:, across.rank]
    here = np.clip(threshold.ties - before, 0, found[across.rank])
    return [int(count) for count in here]


def exact_mask(score: Tensor, num_zeros: int, across: Across | None = None) -> Tensor:
    """Bool mask, True where kept, that drops exactly the `num_zeros` smallest scores.

    Args:
        score: Of one tensor, or of the rows of one that lie here.
        num_zeros: Of the whole tensor.
        across: The processes that hold the other rows.
    """
    if across is None:
        return global_masks([score], num_zeros)[0]
    return global_masks(Scores([score], as_they_are, across=across), num_zeros)[0]


def exact_masks(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """One mask a tensor, each with its own count of zeros."""
    assert len(scores) == len(counts), "a count for each tensor"
    return [global_masks(_only(scores, i), count)[0] for i, count in enumerate(counts)]


@torch.no_grad()
def n_m_mask(score: Tensor, n: int, m: int, input_dim: int) -> Tensor:
    """Bool mask that keeps the `n` largest of each `m` neighbours along `input_dim`.

    Args:
        score: Its size along `input_dim` is a multiple of `m`.
        n: Kept in each group, 0 < n < m.
        m: Size of a group.
        input_dim: The axis that the layer sums over.
    """
    if selection.takes([score]):
        made = selection.keep_n_of_m(score.detach(), n, m, input_dim)
        if made is not None:
            return made
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
    dtype, counts = _count_all_top_digits(scores)
    bits = torch.finfo(dtype).bits
    offset = 1 << (bits - 1)
    if num_zeros == 0:
        return Threshold(-offset, 0, dtype)
    prefix, left = _find_digit(counts, num_zeros)
    for shift in range(bits - 2 * DIGIT_BITS, -1, -DIGIT_BITS):
        # keys are signed, the digits found so far are not
        begins = prefix - (offset >> (shift + DIGIT_BITS))
        counts = _count_digits(scores, dtype, shift, begins)
        across = _across(scores)
        digit, left = _find_digit(counts if across is None else across.add(counts), left)
        prefix = prefix << DIGIT_BITS | digit
    return Threshold(prefix - offset, left, dtype)


def _find_digit(counts: Counts, rank: int) -> tuple[int, int]:
    """The digit that holds the score of this rank (from 1), and the rank inside that digit."""
    reached = np.cumsum(counts)
    assert rank <= reached[-1], "more zeros asked for than there are scores"
    digit = int(np.searchsorted(reached, rank))
    return digit, rank - (int(reached[digit - 1]) if digit else 0)


@torch.no_grad()
def _keep_masks(
    scores: Sequence[Tensor], threshold: Threshold, ties_left: int
) -> tuple[list[Tensor], int]:
    """Every tensor's mask, and the ties that remain."""
    streams = _streams(scores, threshold.dtype)
    if streams is not None:
        return streams.keep_masks(threshold.key, ties_left)
    masks = []
    for index in range(len(scores)):
        shape, device = _place(scores, index)
        mask = torch.empty(shape, dtype=torch.bool, device=device)
        start, flat = 0, mask.view(-1)
        for keys in _keys(scores, index, threshold.dtype):
            part = flat[start : start + len(keys)]
            torch.ge(keys, threshold.key, out=part)
            if ties_left:
                tied = (keys == threshold.key).nonzero().flatten()[:ties_left]
                part[tied] = False
                ties_left -= len(tied)
            start += len(keys)
        masks.append(mask)
    return masks, ties_left


def _streams(scores: Sequence[Tensor], dtype: torch.dtype | None = None) -> _Streams | None:
    """The scores for `native.selection`; None where it does not take them, or not as `dtype`."""
    values: Sequence[Tensor] = scores
    masks = None
    is_magnitude = isinstance(scores, Scores)
    if isinstance(scores, Scores):
        if scores.score is not magnitude:
            return None
        values, masks = scores.params, scores.masks
        if scores.candidates is not None and selection.takes(values, scores.candidates):
            masks = _limits(scores)
        elif scores.candidates is not None:
            return None
    elif not isinstance(scores, list | tuple):
        return None  # made when asked for
    if not values or not selection.takes(values, masks) or dtype not in (None, values[0].dtype):
        return None
    return _Streams(values, {"magnitude": is_magnitude, "masks": masks})


def _count_all_top_digits(scores: Sequence[Tensor]) -> tuple[torch.dtype, Counts]:
    """As `_count_top_digits`, over all processes, in a dtype that holds the scores of all."""
    dtype, counts = _count_top_digits(scores)
    across = _across(scores)
    if across is None:
        return dtype, counts
    known = list(_KEYS)
    # a process without any row has no say
    said = across.gather([known.index(dtype) if counts.any() else -1]).flatten()
    dtypes = [known[int(place)] for place in said if place >= 0]
    common = functools.reduce(torch.promote_types, dtypes) if dtypes else dtype
    if common != dtype and counts.any():
        every = (chunk for index in range(len(scores)) for chunk in _chunks(scores, index))
        counts = sum((_count_top_digit(chunk, common) for chunk in every), NO_COUNTS)
    return common, across.add(counts)


def _limits(scores: Scores) -> list[Tensor]:
    """Masks and candidates in one."""
    spared = scores.candidates
    assert spared is not None
    masks = [None] * len(spared) if scores.masks is None else scores.masks
    return [selection.limits(mask, one) for mask, one in zip(masks, spared, strict=True)]


def _count_top_digits(scores: Sequence[Tensor]) -> tuple[torch.dtype, Counts]:
    """The smallest dtype with keys that holds every score exactly, and its first digit's counts."""
    streams = _streams(scores)
    if streams is not None:
        shift = torch.finfo(streams.dtype).bits - DIGIT_BITS
        return streams.dtype, streams.count_digits(shift, None)
    counts: dict[torch.dtype, Counts] = {}
    for index in range(len(scores)):
        for chunk in _chunks(scores, index):
            dtype = chunk.dtype if chunk.dtype in _KEYS else torch.float32
            counts[dtype] = counts.get(dtype, NO_COUNTS) + _count_top_digit(chunk, dtype)
    if not counts:
        return torch.float32, NO_COUNTS
    common = functools.reduce(torch.promote_types, counts)
    if len(counts) == 1:
        return common, counts[common]
    # mixed: count again, in the common dtype
    every = (chunk for index in range(len(scores)) for chunk in _chunks(scores, index))
    return common, sum((_count_top_digit(chunk, common) for chunk in every), NO_COUNTS)


def _chunks(scores: Sequence[Tensor], index: int) -> Iterator[Tensor]:
    """Flat parts of one tensor's scores, row-major."""
    if isinstance(scores, Scores):
        yield from scores.chunks(index, CHUNK)
        return
    flat = scores[index].detach().reshape(-1)
    yield from (flat[start : start + CHUNK] for start in range(0, flat.numel(), CHUNK))


def _only(scores: Sequence[Tensor], index: int) -> Sequence[Tensor]:
    return scores.only([index]) if isinstance(scores, Scores) else [scores[index]]


def _place(scores: Sequence[Tensor], index: int) -> tuple[torch.Size, torch.device]:
    """Shape and device of one tensor's scores."""
    tensor = scores.params[index] if isinstance(scores, Scores) else scores[index]
    return tensor.shape, tensor.device


def _keys_of(chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """Signed integers in the order of the scores."""
    key_dtype = _KEYS[dtype]
    info = torch.iinfo(key_dtype)
    # adding zero makes -0.0 the equal of 0.0
    bits = (chunk.to(dtype) + 0.0).view(key_dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _keys(scores: Sequence[Tensor], index: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The keys of one tensor's scores, a chunk at a time, row-major."""
    return (_keys_of(chunk, dtype) for chunk in _chunks(scores, index))


def _count_top_digit(chunk: Tensor, dtype: torch.dtype) -> Counts:
    """How often each value of the first digit occurs, signed and so counted from the middle."""
    shift = torch.finfo(dtype).bits - DIGIT_BITS
    return _bincount((_keys_of(chunk, dtype) >> shift).to(torch.int32) + DIGITS // 2)


def _count_digits(scores: Sequence[Tensor], dtype: torch.dtype, shift: int, begins: int) -> Counts:
    """How often each value of the digit at `shift` occurs among keys that begin with `begins`."""
    streams = _streams(scores, dtype)
    if streams is not None:
        return streams.count_digits(shift, begins)
    counts = NO_COUNTS.copy()
    for index in range(len(scores)):
        for keys in _keys(scores, index, dtype):
            inside = keys[(keys >> (shift + DIGIT_BITS)) == begins]
            counts += _bincount((inside >> shift) & DIGIT_MASK)
    return counts


def _bincount(digits: Tensor) -> Counts:
    """Counts of 0..65535; numpy's is three times as fast as torch's on a CPU."""
    if digits.device.type == "cpu":
        return np.bincount(digits.numpy(), minlength=DIGITS)
    counts: Counts = torch.bincount(digits, minlength=DIGITS).cpu().numpy()
    return counts


def _count(scores: Sequence[Tensor], threshold: Threshold) -> list[tuple[int, int]]:
    """How many scores of each tensor are below the threshold, and how many at it."""
    streams = _streams(scores, threshold.dtype)
    if streams is not None:
        return streams.count(threshold.key)
    found = []
    for index in range(len(scores)):
        below = at = 0
        for keys in _keys(scores, index, threshold.dtype):
            below += int((keys < threshold.key).sum())
            at += int((keys == threshold.key).sum())
        found.append((below, at))
    return found

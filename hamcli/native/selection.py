"""Counting the bits of scores, natively or in numpy: what exact selection is made of.

A selection is a radix search: the digit that holds the k-th smallest score is found from the counts
of the first 16 bits of all keys, the rest from a second pass over those that begin with it. 16-bit
scores need one pass. Nothing is sorted or copied; all counts are int64 and add up over tensors,
shards and processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hamcli.native import operators

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS
CHUNK = 1 << 18  # scores of which numpy makes keys at a time

Counts = npt.NDArray[np.int64]

KEYS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the k smallest scores end.

    Attributes:
        key: Key of the k-th smallest score; of a magnitude, its bits.
        below: How many scores are smaller.
        ties: How many of those equal to it are among the k: the first ones, by position.
    """

    key: int
    below: int
    ties: int


def takes(scores: Tensor) -> bool:
    """Whether the functions here can count these scores."""
    return scores.device.type == "cpu" and scores.dtype in KEYS


def count_digits(
    scores: Tensor, shift: int, begins: int | None = None, *, magnitude: bool = False
) -> Counts:
    """How often each value of a 16-bit digit occurs among the keys of `scores`.

    Args:
        scores: fp32, bf16 or fp16, on a CPU.
        shift: Place of the digit's lowest bit in the key: 16 or 0 for fp32, 0 for the others.
        begins: None for the first digit, which is signed: entry 32768 counts its zeros. Else what
            a key must begin with, `key >> (shift + 16)`, to be counted by its digit at `shift`.
        magnitude: Whether |score| is meant.
    """
    extension = operators()
    if extension is not None:
        found: Counts = extension.count_digits(
            scores.detach().contiguous(), shift, begins, magnitude
        ).numpy()
        return found
    counts: Counts = np.zeros(DIGITS, dtype=np.int64)
    for keys in _keys(scores, magnitude):
        if begins is None:
            digits = (keys >> shift).astype(np.int32) + DIGITS // 2
        else:
            digits = (keys[(keys >> (shift + DIGIT_BITS)) == begins] >> shift) & (DIGITS - 1)
        counts += np.bincount(digits, minlength=DIGITS)
    return counts


def count_scores(scores: Tensor, key: int, *, magnitude: bool = False) -> tuple[int, int]:
    """How many scores have a smaller key, and how many have this one."""
    extension = operators()
    if extension is not None:
        below, at = extension.count_scores(scores.detach().contiguous(), key, magnitude)
        return below, at
    below = at = 0
    for keys in _keys(scores, magnitude):
        below += int(np.count_nonzero(keys < key))
        at += int(np.count_nonzero(keys == key))
    return below, at


def kth_magnitude(tensors: Sequence[Tensor], k: int) -> Cut:
    """Where the `k` smallest magnitudes of all tensors end.

    Args:
        tensors: All of one dtype: fp32, bf16 or fp16; on a CPU.
        k: 1 to the number of all weights.
    """
    bits = torch.finfo(tensors[0].dtype).bits
    counts = sum(
        (count_digits(one, bits - DIGIT_BITS, magnitude=True) for one in tensors),
        np.zeros(DIGITS, dtype=np.int64),
    )
    digit, left = _find(counts, k)
    prefix = digit - DIGITS // 2
    if bits == DIGIT_BITS:
        return Cut(prefix, k - left, left)
    counts = sum(
        (count_digits(one, 0, prefix, magnitude=True) for one in tensors),
        np.zeros(DIGITS, dtype=np.int64),
    )
    digit, left = _find(counts, left)
    return Cut(prefix << DIGIT_BITS | digit, k - left, left)


def _find(counts: Counts, rank: int) -> tuple[int, int]:
    """The digit that holds the score of this rank (from 1), and the rank inside that digit."""
    reached = np.cumsum(counts)
    assert 1 <= rank <= reached[-1], "more scores asked for than there are"
    digit = int(np.searchsorted(reached, rank))
    return digit, rank - (int(reached[digit - 1]) if digit else 0)


def _keys(scores: Tensor, magnitude: bool) -> Iterator[npt.NDArray[Any]]:
    """Signed integers in the order of the scores, a chunk at a time."""
    key_dtype = KEYS[scores.dtype]
    most = torch.iinfo(key_dtype).max
    flat = scores.detach().contiguous().view(-1)
    for start in range(0, flat.numel(), CHUNK):
        bits = flat[start : start + CHUNK].view(key_dtype).numpy()
        if magnitude:
            yield bits & most
        else:
            # -0.0 is the smallest integer, and equals 0.0
            yield np.where(bits == -most - 1, 0, bits ^ ((bits >> most.bit_length()) & most))

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


def takes(scores: Sequence[Tensor]) -> bool:
    """Whether the functions here can count these scores: on a CPU, of one dtype with keys."""
    return all(
        one.device.type == "cpu" and one.dtype == scores[0].dtype and one.dtype in KEYS
        for one in scores
    )


def count_digits(
    scores: Sequence[Tensor], shift: int, begins: int | None = None, *, magnitude: bool = False
) -> Counts:
    """How often each value of a 16-bit digit occurs among the keys of all scores.

    Args:
        scores: Of one dtype, fp32, bf16 or fp16, on a CPU.
        shift: Place of the digit's lowest bit in the key: 16 or 0 for fp32, 0 for the others.
        begins: None for the first digit, which is signed: entry 32768 counts its zeros. Else what
            a key must begin with, `key >> (shift + 16)`, to be counted by its digit at `shift`.
        magnitude: Whether |score| is meant.
    """
    extension = operators()
    if extension is not None and scores:
        found: Counts = extension.count_digits(_flat(scores), shift, begins, magnitude).numpy()
        return found
    counts: Counts = np.zeros(DIGITS, dtype=np.int64)
    for keys in (keys for one in scores for keys in _keys(one, magnitude)):
        if begins is None:
            digits = (keys >> shift).astype(np.int32) + DIGITS // 2
        else:
            digits = (keys[(keys >> (shift + DIGIT_BITS)) == begins] >> shift) & (DIGITS - 1)
        counts += np.bincount(digits, minlength=DIGITS)
    return counts


def count_scores(
    scores: Sequence[Tensor], key: int, *, magnitude: bool = False
) -> list[tuple[int, int]]:
    """For each tensor: how many of its scores have a smaller key, and how many have this one."""
    extension = operators()
    if extension is not None and scores:
        counts = extension.count_scores(_flat(scores), key, magnitude).tolist()
        return [(below, equal) for below, equal in counts]
    found = []
    for one in scores:
        below = equal = 0
        for keys in _keys(one, magnitude):
            below += int(np.count_nonzero(keys < key))
            equal += int(np.count_nonzero(keys == key))
        found.append((below, equal))
    return found


def kth_magnitude(tensors: Sequence[Tensor], k: int) -> Cut:
    """Where the `k` smallest magnitudes of all tensors end.

    Args:
        tensors: All of one dtype: fp32, bf16 or fp16; on a CPU.
        k: 1 to the number of all weights.
    """
    bits = torch.finfo(tensors[0].dtype).bits
    digit, left = _find(count_digits(tensors, bits - DIGIT_BITS, magnitude=True), k)
    key = digit - DIGITS // 2
    if bits > DIGIT_BITS:
        digit, left = _find(count_digits(tensors, 0, key, magnitude=True), left)
        key = key << DIGIT_BITS | digit
    return Cut(key, k - left, left)


def _flat(scores: Sequence[Tensor]) -> list[Tensor]:
    return [one.detach().contiguous() for one in scores]


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

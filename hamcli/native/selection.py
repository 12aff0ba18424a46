"""Counting the bits of scores and cutting by them, natively or in numpy: exact selection's core.

A selection is a radix search: the digit that holds the k-th smallest score is found from the counts
of the first 16 bits of all keys, the rest from a second pass over those that begin with it. 16-bit
scores need one pass. Nothing is sorted or copied; all counts are int64 and add up over tensors,
shards and processes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hamcli.native import operators_if_built

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS
CHUNK = 1 << 18  # scores of which numpy makes keys at a time

Counts = npt.NDArray[np.int64]

LIMITS = (torch.bool, torch.uint8)
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


def takes(scores: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> bool:
    """Whether the functions here take these: on a CPU, flat in memory, of one dtype with keys."""
    return all(
        one.device.type == "cpu"
        and one.dtype == scores[0].dtype
        and one.dtype in KEYS
        and one.is_contiguous()
        for one in scores
    ) and all(
        one.device.type == "cpu" and one.dtype in LIMITS and one.is_contiguous()
        for one in masks or ()
    )


def limits(mask: Tensor | None, spared: Tensor) -> Tensor:
    """A mask that also spares: 0 where dropped, 1 where kept, 2 where spared; uint8.

    Args:
        mask: Bool, False where dropped; None where nothing is.
        spared: Bool, True where the score counts as greater than all.
    """
    places = spared.view(torch.uint8) + 1
    return places if mask is None else places.mul_(mask.view(torch.uint8))


def keep_n_of_m(scores: Tensor, n: int, m: int, axis: int) -> Tensor | None:
    """Mask of the `n` greatest of each `m` neighbours along an axis; of equal ones the last stay.

    Args:
        scores: Taken by `takes`; its size along `axis` is a multiple of `m`.
        n: Kept in each group.
        m: Size of a group.
        axis: Where the neighbours lie, from 0.

    Returns:
        Bool; None without the extension.
    """
    extension = operators_if_built()
    if extension is None:
        return None
    made = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    inner = math.prod(scores.shape[axis + 1 :])
    extension.keep_n_of_m(scores, n, m, inner, made)
    return made


def count_digits(
    scores: Sequence[Tensor],
    shift: int,
    begins: int | None = None,
    *,
    magnitude: bool = False,
    masks: Sequence[Tensor] | None = None,
) -> Counts:
    """How often each value of a 16-bit digit occurs among the keys of all scores.

    Args:
        scores: Of one dtype, fp32, bf16 or fp16, on a CPU.
        shift: Place of the digit's lowest bit in the key: 16 or 0 for fp32, 0 for the others.
        begins: None for the first digit, which is signed: entry 32768 counts its zeros. Else what
            a key must begin with, `key >> (shift + 16)`, to be counted by its digit at `shift`.
        magnitude: Whether |score| is meant.
        masks: Of the same shapes: all bool, and where one is False the score is -1; or all as
            `limits` makes them, and where one is 2 the score is greater than all.
    """
    extension = operators_if_built()
    if extension is not None and scores:
        found: Counts = extension.count_digits(
            *_lists(scores, masks), shift, begins, magnitude
        ).numpy()
        return found
    counts: Counts = np.zeros(DIGITS, dtype=np.int64)
    for keys in (keys for of_one in _all_keys(scores, magnitude, masks) for keys in of_one):
        if begins is None:
            digits = (keys >> shift).astype(np.int32) + DIGITS // 2
        else:
            digits = (keys[(keys >> (shift + DIGIT_BITS)) == begins] >> shift) & (DIGITS - 1)
        counts += np.bincount(digits, minlength=DIGITS)
    return counts


def count_scores(
    scores: Sequence[Tensor],
    key: int,
    *,
    magnitude: bool = False,
    masks: Sequence[Tensor] | None = None,
) -> list[tuple[int, int]]:
    """For each tensor: how many of its scores have a smaller key, and how many have this one."""
    extension = operators_if_built()
    if extension is not None and scores:
        counts = extension.count_scores(*_lists(scores, masks), key, magnitude).tolist()
        return [(below, equal) for below, equal in counts]
    found = []
    for of_one in _all_keys(scores, magnitude, masks):
        below = equal = 0
        for keys in of_one:
            below += int(np.count_nonzero(keys < key))
            equal += int(np.count_nonzero(keys == key))
        found.append((below, equal))
    return found


def keep_masks(
    scores: Sequence[Tensor],
    key: int,
    ties: int,
    *,
    magnitude: bool = False,
    masks: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], int]:
    """Masks, True where kept, that drop what is below a key and the first ones that are at it.

    Args:
        scores: As for `count_digits`.
        key: Key of the cut.
        ties: How many of the scores at it are dropped: the first ones, by position.
        magnitude: As for `count_digits`.
        masks: As for `count_digits`.

    Returns:
        A bool tensor for each, and how many ties are still to be dropped.
    """
    made = [torch.empty(one.shape, dtype=torch.bool, device="cpu") for one in scores]
    extension = operators_if_built()
    if extension is not None and scores:
        lists = _lists(scores, masks)
        return made, int(extension.keep_masks(*lists, key, ties, magnitude, made))
    for mask, of_one in zip(made, _all_keys(scores, magnitude, masks), strict=True):
        start, flat = 0, mask.view(-1).numpy()
        for keys in of_one:
            part = flat[start : start + len(keys)]
            np.greater_equal(keys, key, out=part)
            if ties:
                tied = np.flatnonzero(keys == key)[:ties]
                part[tied] = False
                ties -= len(tied)
            start += len(keys)
    return made, ties


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


def _lists(
    scores: Sequence[Tensor], masks: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor | None], int]:
    """The scores and masks flat in memory, and the key of a dropped score."""
    flat = [one.detach().contiguous() for one in scores]
    kept: list[Tensor | None] = [None] * len(flat)
    if masks is not None:
        kept = [one.contiguous() for one in masks]
    return flat, kept, _dropped_key(scores[0].dtype)


def _dropped_key(dtype: torch.dtype) -> int:
    """Key of -1, which is below all magnitudes."""
    return -int(torch.ones((), dtype=dtype, device="cpu").view(KEYS[dtype])) - 1


def _find(counts: Counts, rank: int) -> tuple[int, int]:
    """The digit that holds the score of this rank (from 1), and the rank inside that digit."""
    reached = np.cumsum(counts)
    assert 1 <= rank <= reached[-1], "more scores asked for than there are"
    digit = int(np.searchsorted(reached, rank))
    return digit, rank - (int(reached[digit - 1]) if digit else 0)


def _all_keys(
    scores: Sequence[Tensor], magnitude: bool, masks: Sequence[Tensor] | None
) -> Iterator[Iterator[npt.NDArray[Any]]]:
    kept = [None] * len(scores) if masks is None else masks
    for one, mask in zip(scores, kept, strict=True):
        yield _keys(one, magnitude, mask)


def _keys(scores: Tensor, magnitude: bool, mask: Tensor | None) -> Iterator[npt.NDArray[Any]]:
    """Signed integers in the order of the scores, a chunk at a time."""
    key_dtype = KEYS[scores.dtype]
    most = torch.iinfo(key_dtype).max
    flat = scores.detach().contiguous().view(-1)
    kept = None if mask is None else mask.contiguous().view(-1).numpy()
    for start in range(0, flat.numel(), CHUNK):
        bits = flat[start : start + CHUNK].view(key_dtype).numpy()
        if magnitude:
            keys = bits & most
        else:
            # -0.0 is the smallest integer, and equals 0.0
            keys = np.where(bits == -most - 1, 0, bits ^ ((bits >> most.bit_length()) & most))
        if kept is not None:
            dropped = np.asarray(_dropped_key(scores.dtype), dtype=keys.dtype)
            place = kept[start : start + CHUNK]
            if place.dtype != np.bool_:
                keys = np.where(place == 2, np.asarray(most, dtype=keys.dtype), keys)
            keys = np.where(place != 0, keys, dropped)
        yield keys

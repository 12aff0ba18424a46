"""Exact magnitude pruning of files: which weights go, found and zeroed chunk by chunk, no torch.

A first pass counts the bits of the targets' magnitudes, a second one zeroes and writes; fp32 needs
two of the first kind and fp64 four. Equal magnitudes go by position, in the order of the targets.
What is zero already counts and becomes a plain zero, as in `sparsity.masks`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hamcli.checkpoint.headers import FLOATS, TensorInfo
from hamcli.checkpoint.stream import Shard, Writer, chunks
from hamcli.errors import InputRefused
from hamcli.native import bits as magnitudes
from hamcli.native.bits import Bits, Counts, Cut
from hamcli.sparsity.allocate import allocate
from hamcli.sparsity.counting import exact
from hamcli.sparsity.families import FileTarget, FileTargets
from hamcli.sparsity.rules import Rules

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a file."""

    shard: Shard
    info: TensorInfo

    @property
    def dense_bytes(self) -> int:
        """Its size in the dense file."""
        place = self.shard.places[self.info.name]
        return place.end - place.begin


@dataclass(frozen=True, slots=True)
class Part:
    """A target with the tensors that hold it."""

    target: FileTarget
    pieces: tuple[Piece, ...]

    @property
    def common(self) -> str:
        """The dtype in which its magnitudes compare."""
        return magnitudes.common_dtype({piece.info.dtype for piece in self.pieces})


@dataclass(slots=True)
class Found:
    """What the passes found.

    Attributes:
        threshold: Greatest magnitude dropped; None where nothing was, or where N:M decides.
        natural_zeros: Zeros that the targets held before.
    """

    threshold: float | None = None
    natural_zeros: int = 0


def parts_of(targets: FileTargets, shards: Sequence[Shard]) -> list[Part]:
    """The targets, each with its tensors."""
    where = {
        tensor.name: Piece(shard, tensor) for shard in shards for tensor in shard.header.tensors
    }
    return [Part(one, tuple(where[name] for name in one.pieces)) for one in targets]


def shapes_of(shards: Sequence[Shard]) -> dict[str, tuple[int, ...]]:
    """Name → shape of each floating-point tensor."""
    return {
        tensor.name: tensor.shape
        for shard in shards
        for tensor in shard.header.tensors
        if tensor.dtype in FLOATS
    }


def passes(parts: Sequence[Part], rules: Rules) -> int:
    """How many dense bytes will be read of the targets, the writing pass among them."""
    total = 0
    for part in parts:
        size = sum(piece.dense_bytes for piece in part.pieces)
        digits = magnitudes.digits_of(part.common)
        extra = int(rules.allocation != "global")
        total += size * (1 if rules.kept_of is not None else 1 + digits + extra)
    return total


def cut_files(parts: Sequence[Part], rules: Rules, writer: Writer, advance: Advance) -> Found:
    """Write the targets, pruned as the rules say.

    Args:
        parts: All targets, in the model's order.
        rules: N:M, or unstructured with the allocation global (without bounds), uniform or erk.
        writer: With its files begun.
        advance: Told of dense bytes read; `passes` gives their sum, or more.

    Raises:
        InputRefused: E430, a target holds NaN or infinity; E416, a file changed meanwhile.
        RecipeError: E221, the bounds leave no room.
        OSError: The disk.
    """
    if rules.kept_of is not None:
        return _cut_groups(parts, rules.kept_of, writer, advance)
    if rules.allocation == "global":
        return _cut_globally(parts, rules, writer, advance)
    return _cut_each(parts, rules, writer, advance)


# ---- one threshold for all ----


def _cut_globally(parts: Sequence[Part], rules: Rules, writer: Writer, advance: Advance) -> Found:
    pieces = [piece for part in parts for piece in part.pieces]
    common = magnitudes.common_dtype({piece.info.dtype for piece in pieces})
    counts, natural = _count_top(pieces, common, advance)
    due = max(rules.num_zeros, natural)
    cut = _find_cut(pieces, common, counts, due, advance)
    _write(pieces, common, cut, writer, advance)
    return Found(_threshold([cut], common), natural)


def _count_top(pieces: Sequence[Piece], common: str, advance: Advance) -> tuple[Counts, int]:
    counts: Counts = np.zeros(magnitudes.TOP_DIGITS, np.int64)
    infinite = magnitudes.infinite_digit(common)
    zeros = 0
    for piece in pieces:
        for part in _chunks(piece, 1, advance):
            zeros += magnitudes.count_top(part, piece.info.dtype, common, counts)
        if counts[infinite:].any():
            _refuse_infinite(piece)
    return counts, zeros


def _find_cut(
    pieces: Sequence[Piece], common: str, top: Counts, num_zeros: int, advance: Advance
) -> Cut | None:
    """Where the `num_zeros` smallest end, given the counts of the first digits; None for none."""
    if num_zeros == 0:
        return None
    key, left = magnitudes.find_digit(top, num_zeros)
    for place in range(1, magnitudes.digits_of(common)):
        counts: Counts = np.zeros(magnitudes.DIGITS, np.int64)
        for piece in pieces:
            for part in _chunks(piece, 1, advance):
                magnitudes.count_next(part, piece.info.dtype, common, place, key, counts)
        digit, left = magnitudes.find_digit(counts, left)
        key = key << magnitudes.DIGIT_BITS | digit
    return Cut(key, left)


def _write(
    pieces: Sequence[Piece], common: str, cut: Cut | None, writer: Writer, advance: Advance
) -> None:
    for piece in pieces:
        with writer.tensor(piece.shard, piece.info) as write:
            for part in _chunks(piece, 1, advance):
                if cut is not None:
                    ties = magnitudes.cut_(part, piece.info.dtype, common, cut)
                    cut = Cut(cut.key, ties)
                write(part)


# ---- a count for each tensor ----


def _cut_each(parts: Sequence[Part], rules: Rules, writer: Writer, advance: Advance) -> Found:
    already = [_natural_zeros(part, advance) for part in parts]
    natural = sum(already)
    due = max(rules.num_zeros, natural)
    counts = already
    if due > natural:
        counts = allocate(
            [part.target.shape for part in parts],
            due,
            rules.allocation,
            min_sparsity=exact(rules.min_sparsity),
            max_sparsity=rules.max_sparsity,
            already=already,
            stacked=[part.target.is_stacked for part in parts],
        )
    thresholds = []
    for part, count in zip(parts, counts, strict=True):
        top, _ = _count_top(part.pieces, part.common, advance)
        cut = _find_cut(part.pieces, part.common, top, count, advance)
        _write(part.pieces, part.common, cut, writer, advance)
        thresholds.append(_threshold([cut], part.common))
    known = [one for one in thresholds if one is not None]
    return Found(max(known, default=None), natural)


def _natural_zeros(part: Part, advance: Advance) -> int:
    return sum(
        magnitudes.count_zeros(bits, piece.info.dtype)[0]
        for piece in part.pieces
        for bits in _chunks(piece, 1, advance)
    )


# ---- N of each M ----


def _cut_groups(
    parts: Sequence[Part], kept_of: tuple[int, int], writer: Writer, advance: Advance
) -> Found:
    kept, size = kept_of
    found = Found()
    for part in parts:
        for piece in part.pieces:
            inner = int(np.prod(piece.info.shape[part.target.piece_axis + 1 :], dtype=np.int64))
            width = 16 if piece.info.dtype in ("F16", "BF16") else 8 * _width(piece)
            infinite = magnitudes.infinite_digit(piece.info.dtype) << (width - 16)
            with writer.tensor(piece.shard, piece.info) as write:
                for bits in _chunks(piece, size * inner, advance):
                    zeros, greatest = magnitudes.count_zeros(bits, piece.info.dtype)
                    if greatest >= infinite:
                        _refuse_infinite(piece)
                    found.natural_zeros += zeros
                    magnitudes.keep_n_of_m_(bits, piece.info.dtype, kept, size, inner)
                    write(bits)
    return found


def _width(piece: Piece) -> int:
    return piece.dense_bytes // piece.info.total


# ---- what all share ----


def _chunks(piece: Piece, unit: int, advance: Advance) -> Iterator[Bits]:
    for bits in chunks(piece.shard, piece.info, unit):
        size = bits.nbytes
        yield bits
        advance(size)


def _threshold(cuts: Sequence[Cut | None], common: str) -> float | None:
    keys = [cut.key for cut in cuts if cut is not None]
    return magnitudes.value_of(max(keys), common) if keys else None


def _refuse_infinite(piece: Piece) -> None:
    raise InputRefused(
        "E430",
        "tensor that is not finite",
        f"{piece.shard.name}: {piece.info.name}",
        "it holds NaN or infinity, which have no order among weights",
        "a sound checkpoint, or the tensor among targets.exclude",
    )

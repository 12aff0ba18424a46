"""One block of elements <-> the planes of the packed form, in numpy: the oracle and the fallback.

A block becomes a mask (where an element has any bit set) and the values left, cut into planes of
one byte each, so that what is alike lies together. docs/packed-format.md is the specification;
which codec stores a plane is left to `blocks`, tensors and files to others.

Everything is done on the bits of the elements, so -0.0 and the payload of a NaN stay what they are.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK_FULL, MASK_BITS, MASK_GAPS, MASK_EMPTY = 0, 1, 2, 3
TOP_BYTES, TOP_QUADS = 0, 1

FILLER = 255
"""In a plane of gaps: so many zeros, and no value behind them."""
ESCAPE = 3
"""In a plane of quads: the byte stands in the plane of escapes."""
GAPS_BELOW = 3 / 16
"""Share of values below which gaps are written; above it a bitmap is smaller."""
QUADS_BELOW = 1 / 64
"""Share of escapes up to which quads are written."""

Bits = NDArray[Any]
Bytes = NDArray[np.uint8]
UNSIGNED: dict[int, np.dtype[Any]] = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}
_NONE: Bytes = np.zeros(0, np.uint8)


class DamagedPlanes(ValueError):
    """Planes that no writer made: they contradict each other or the size of their block."""


@dataclass(frozen=True, slots=True)
class Planes:
    """What a block is made of.

    Attributes:
        mask_coding: `MASK_FULL` (no zeros), `MASK_BITS`, `MASK_GAPS` or `MASK_EMPTY` (only zeros).
        top_coding: `TOP_BYTES` or `TOP_QUADS`.
        num_values: Elements that are not zero bits.
        offset: Subtracted from each rotated value before it was cut.
        mask: Bitmap, lowest bit first, or gaps; empty where the coding needs none.
        top: The highest byte of each value, or two bits of it, four to a byte, lowest first.
        escapes: Top bytes that do not fit two bits, in order.
        rest: The lower bytes of the values, a plane each, the highest first.
    """

    mask_coding: int
    top_coding: int
    num_values: int
    offset: int
    mask: Bytes
    top: Bytes
    escapes: Bytes
    rest: tuple[Bytes, ...]

    def all(self) -> tuple[Bytes, ...]:
        """The planes in the order in which they are stored."""
        return (self.mask, self.top, self.escapes, *self.rest)


def split(bits: Bits, *, rotated: bool) -> Planes:
    """Cut a block into planes.

    Args:
        bits: The elements as unsigned integers of 1, 2, 4 or 8 bytes, at least one, flat.
        rotated: Whether they are floats, whose sign moves from the highest bit to the lowest.
    """
    width = bits.dtype.itemsize
    positions = np.flatnonzero(bits)
    num_values = len(positions)
    if num_values == 0:
        return Planes(MASK_EMPTY, TOP_BYTES, 0, 0, _NONE, _NONE, _NONE, (_NONE,) * (width - 1))
    mask_coding, mask = _mask(bits, positions)
    values = bits[positions] if num_values < len(bits) else bits
    if rotated:
        values = (values << 1) | (values >> (8 * width - 1))
    offset = int(values.min())
    offset -= offset & 1 if rotated else 0
    values = values - values.dtype.type(offset)
    cut = [(values >> (8 * at)).astype(np.uint8) for at in reversed(range(width))]
    top_coding, top, escapes = _top(cut[0])
    return Planes(mask_coding, top_coding, num_values, offset, mask, top, escapes, tuple(cut[1:]))


def merge(planes: Planes, out: Bits, *, rotated: bool) -> None:
    """Put a block together again.

    Args:
        planes: As `split` made them; their lengths and codings were checked by `blocks`.
        out: Unsigned integers of the block's size and width; all are written.
        rotated: As it was for `split`.

    Raises:
        DamagedPlanes: The planes do not fit together, or reach beyond the block.
    """
    width = out.dtype.itemsize
    if planes.mask_coding == MASK_EMPTY:
        out[...] = 0
        return
    top = _whole_top(planes)
    values = top.astype(out.dtype)
    for plane in planes.rest:
        values <<= 8
        values |= plane
    values += values.dtype.type(planes.offset)
    if rotated:
        values = (values >> 1) | (values << (8 * width - 1))
    if planes.mask_coding == MASK_FULL:
        out[...] = values
    elif planes.mask_coding == MASK_BITS:
        kept = _bitmap(planes.mask, len(out), planes.num_values)
        out[...] = 0
        out[np.flatnonzero(kept)] = values
    else:
        positions = _positions(planes.mask, len(out), planes.num_values)
        out[...] = 0
        out[positions] = values


def _mask(bits: Bits, positions: NDArray[np.intp]) -> tuple[int, Bytes]:
    if len(positions) == len(bits):
        return MASK_FULL, _NONE
    if len(positions) >= GAPS_BELOW * len(bits):
        return MASK_BITS, np.packbits(bits != 0, bitorder="little")
    gaps = np.diff(positions, prepend=-1) - 1
    fillers = gaps // FILLER
    if not fillers.any():
        return MASK_GAPS, gaps.astype(np.uint8)
    ends = np.cumsum(fillers + 1)
    mask = np.full(int(ends[-1]), FILLER, np.uint8)
    mask[ends - 1] = gaps % FILLER
    return MASK_GAPS, mask


def _top(plane: Bytes) -> tuple[int, Bytes, Bytes]:
    is_escape = plane >= ESCAPE
    if np.count_nonzero(is_escape) > QUADS_BELOW * len(plane):
        return TOP_BYTES, plane, _NONE
    codes = np.zeros((len(plane) + 3) // 4 * 4, np.uint8)
    np.minimum(plane, ESCAPE, out=codes[: len(plane)])
    first, second, third, fourth = codes.reshape(-1, 4).T
    quads: Bytes = (first | second << 2 | third << 4 | fourth << 6).astype(np.uint8)
    return TOP_QUADS, quads, plane[is_escape]


_CODES_OF_QUAD: Bytes = np.stack([np.arange(256) >> at & 3 for at in (0, 2, 4, 6)], axis=1).astype(
    np.uint8
)


def _whole_top(planes: Planes) -> Bytes:
    if planes.top_coding == TOP_BYTES:
        return planes.top
    # four codes are one 32-bit number, which numpy looks up faster than a row
    codes = np.take(_CODES_OF_QUAD.view("<u4").ravel(), planes.top).view(np.uint8)
    if codes[planes.num_values :].any():
        raise DamagedPlanes("bits behind the last top")
    top = codes[: planes.num_values]
    if len(planes.escapes) == 0 and not (top == ESCAPE).any():
        return top
    is_escape = top == ESCAPE
    if np.count_nonzero(is_escape) != len(planes.escapes):
        raise DamagedPlanes("another number of escapes than the tops have")
    top[is_escape] = planes.escapes
    return top


def _bitmap(mask: Bytes, size: int, num_values: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(mask, bitorder="little")
    if np.count_nonzero(bits) != num_values or bits[size:].any():
        raise DamagedPlanes("another number of values than the bitmap has")
    return bits[:size].view(np.bool_)


def _positions(gaps: Bytes, size: int, num_values: int) -> NDArray[np.int64]:
    steps = np.cumsum(gaps, dtype=np.int64)
    has_value = None
    if len(gaps) != num_values:
        has_value = gaps != FILLER
        steps = steps[has_value]
    elif (gaps == FILLER).any():
        raise DamagedPlanes("another number of values than the gaps have")
    if len(steps) != num_values:
        raise DamagedPlanes("another number of values than the gaps have")
    positions: NDArray[np.int64] = steps + np.arange(num_values)
    if positions[-1] >= size:
        raise DamagedPlanes("gaps that lead beyond the block")
    return positions

"""The bytes of one packed block: its planes behind a short header, each by the codec that fits.

docs/packed-format.md gives the layout. Every length is held against what the block can have before
anything is allocated for it, so a damaged block costs no more memory than a sound one.
"""

import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard

from hamcli.checkpoint.packed.planes import (
    MASK_BITS,
    MASK_EMPTY,
    MASK_FULL,
    MASK_GAPS,
    TOP_BYTES,
    TOP_QUADS,
    Bits,
    Bytes,
    DamagedPlanes,
    Planes,
    merge,
    split,
)

Split = Callable[[Bits, bool], Planes]
Merge = Callable[[Planes, Bits, bool], None]

RAW, ZSTD = 0, 1
HEAD = struct.Struct("<BBHIQ")
PLANE = struct.Struct("<B3xII")
_WORTH = 1 / 20
"""Share of a plane that a codec must save, or the plane is stored as it is: read at no cost."""
_LONG = 1 << 12
_SAMPLES = 1 << 12
_SAMPLED = 1 << 13
_RANDOM_BITS = 7.7
"""Bits a byte of a sample from which a plane is stored as it is, without trying."""

# Bytes of weights repeat only by chance: a match found costs more than the literals it saves. The
# smallest table finds hardly any, and leaves what is wanted, the entropy coding.
_FLAT = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    search_log=1,
    window_log=19,
    target_length=0,
)
_LAYERED = zstandard.ZstdCompressionParameters.from_level(3)


class _Codec(threading.local):
    """Contexts of zstandard, which threads must not share."""

    def __init__(self) -> None:
        self.flat = zstandard.ZstdCompressor(compression_params=_FLAT)
        self.layered = zstandard.ZstdCompressor(compression_params=_LAYERED)
        self.decompressor = zstandard.ZstdDecompressor()


_codec = _Codec()


def split_in_numpy(bits: Bits, rotated: bool) -> Planes:
    """`planes.split`."""
    return split(bits, rotated=rotated)


def merge_in_numpy(planes: Planes, out: Bits, rotated: bool) -> None:
    """`planes.merge`."""
    merge(planes, out, rotated=rotated)


def encode_block(bits: Bits, rotated: bool, split: Split = split_in_numpy) -> bytes:
    """The packed bytes of a block.

    Args:
        bits: The elements as unsigned integers, at least one, flat.
        rotated: Whether they are floats.
        split: What cuts it; every one gives the same bytes.
    """
    planes = split(bits, rotated)
    head = HEAD.pack(planes.mask_coding, planes.top_coding, 0, planes.num_values, planes.offset)
    if planes.mask_coding == MASK_EMPTY:
        return head
    heads, bodies = [head], []
    for plane in planes.all():
        codec, body = _stored(plane, rotated)
        heads.append(PLANE.pack(codec, len(plane), len(body)))
        bodies.append(body)
    return b"".join([*heads, *bodies])


def decode_block(data: memoryview, out: Bits, rotated: bool, merge: Merge = merge_in_numpy) -> None:
    """Unpack a block.

    Args:
        data: What `encode_block` gave.
        out: Unsigned integers of the block's size and width; all are written.
        rotated: Whether they are floats.
        merge: What puts it together.

    Raises:
        DamagedPlanes: The bytes are no block of this size.
    """
    merge(_parse(data, len(out), out.dtype.itemsize), out, rotated)


def _stored(plane: Bytes, rotated: bool) -> tuple[int, Any]:
    size = len(plane)
    if size == 0:
        return RAW, b""
    if rotated and size >= _SAMPLED and _is_random(plane):
        return RAW, plane.tobytes()
    # a long plane that repeats itself (a tensor of few different values) deserves a real search
    compressor = _codec.flat if rotated and size >= _LONG else _codec.layered
    made = compressor.compress(plane.data)
    if len(made) > size - size * _WORTH:
        return RAW, plane.tobytes()
    return ZSTD, made


def _is_random(plane: Bytes) -> bool:
    """Whether the bytes of a sample occur about equally often, so that no codec saves enough."""
    counts = np.bincount(plane[:: len(plane) // _SAMPLES], minlength=256)
    counts = counts[counts > 0]
    bits = float((counts * np.log2(counts.sum() / counts)).sum())
    return bits > _RANDOM_BITS * int(counts.sum())


def _parse(data: memoryview, size: int, width: int) -> Planes:
    if len(data) < HEAD.size:
        raise DamagedPlanes("a block shorter than its header")
    mask_coding, top_coding, zero, num_values, offset = HEAD.unpack_from(data)
    if mask_coding > MASK_EMPTY or top_coding > TOP_QUADS or zero:
        raise DamagedPlanes("a coding that is not known")
    if num_values > size or (num_values == 0) != (mask_coding == MASK_EMPTY):
        raise DamagedPlanes("a number of values that the block cannot have")
    if mask_coding == MASK_FULL and num_values != size:
        raise DamagedPlanes("a full block with values missing")
    none: Bytes = np.zeros(0, np.uint8)
    if mask_coding == MASK_EMPTY:
        if len(data) != HEAD.size or offset or top_coding:
            raise DamagedPlanes("an empty block that holds something")
        return Planes(mask_coding, 0, 0, 0, none, none, none, (none,) * (width - 1))
    if offset >> (8 * width):
        raise DamagedPlanes("an offset wider than the elements")
    limits = _lengths(mask_coding, top_coding, num_values, size, width)
    planes = _planes(data, limits)
    return Planes(
        mask_coding,
        top_coding,
        num_values,
        offset,
        planes[0],
        planes[1],
        planes[2],
        tuple(planes[3:]),
    )


def _lengths(
    mask_coding: int, top_coding: int, num_values: int, size: int, width: int
) -> list[tuple[int, int]]:
    """Least and greatest length of each plane."""
    mask = {
        MASK_FULL: (0, 0),
        MASK_BITS: ((size + 7) // 8,) * 2,
        # a filler stands for 255 zeros
        MASK_GAPS: (num_values, num_values + size // 255),
    }[mask_coding]
    tops = num_values if top_coding == TOP_BYTES else (num_values + 3) // 4
    escapes = (0, 0 if top_coding == TOP_BYTES else num_values)
    return [mask, (tops, tops), escapes, *[(num_values, num_values)] * (width - 1)]


def _planes(data: memoryview, limits: list[tuple[int, int]]) -> list[Bytes]:
    position = HEAD.size + PLANE.size * len(limits)
    if len(data) < position:
        raise DamagedPlanes("a block shorter than its header")
    planes = []
    for index, (least, most) in enumerate(limits):
        codec, length, stored = PLANE.unpack_from(data, HEAD.size + PLANE.size * index)
        if not least <= length <= most or stored > len(data) - position:
            raise DamagedPlanes("a plane of the wrong length")
        planes.append(_plane(data[position : position + stored], codec, length))
        position += stored
    if position != len(data):
        raise DamagedPlanes("bytes behind the last plane")
    return planes


def _plane(body: memoryview, codec: int, length: int) -> Bytes:
    if codec == RAW:
        if len(body) != length:
            raise DamagedPlanes("a plane of the wrong length")
        return np.frombuffer(body, np.uint8)
    if codec != ZSTD:
        raise DamagedPlanes("a codec that is not known")
    try:
        # what the frame says is checked before the decoder makes room for it
        if zstandard.frame_content_size(body) != length:
            raise DamagedPlanes("a plane of the wrong length")
        return np.frombuffer(_codec.decompressor.decompress(body), np.uint8)
    except zstandard.ZstdError as error:
        raise DamagedPlanes(f"a plane that zstandard refuses: {error}") from None

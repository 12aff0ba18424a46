"""One packed tensor: a header that says what it is, a table of blocks, the blocks.

docs/packed-format.md gives the layout. A block is decoded by itself, so a part of a tensor can be
read without the rest, and memory is that of a block.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from hamcli.checkpoint.headers import DTYPE_BITS, ELEMENT_LIMIT, RANK_LIMIT
from hamcli.checkpoint.packed.blocks import Merge, Split, decode_block, encode_block
from hamcli.checkpoint.packed.native import coder
from hamcli.checkpoint.packed.planes import UNSIGNED, Bits, DamagedPlanes
from hamcli.errors import InputRefused

VERSION = 1
BLOCK_ELEMENTS = 1 << 20
BLOCK_LIMIT = 1 << 24
"""Elements of a block that a reader must take; a writer makes them smaller."""

CODES = {
    # dtype: (code in the file, whether its sign moves to the lowest bit)
    "BOOL": (0, False),
    "U8": (1, False),
    "I8": (2, False),
    "F8_E4M3": (3, True),
    "F8_E5M2": (4, True),
    "F8_E8M0": (5, False),
    "F8_E4M3FNUZ": (6, True),
    "F8_E5M2FNUZ": (7, True),
    "U16": (8, False),
    "I16": (9, False),
    "F16": (10, True),
    "BF16": (11, True),
    "U32": (12, False),
    "I32": (13, False),
    "F32": (14, True),
    "U64": (15, False),
    "I64": (16, False),
    "F64": (17, True),
    "C64": (18, False),
}
_DTYPES = {code: name for name, (code, _) in CODES.items()}

MAGIC = b"HAMT"
_HEAD = struct.Struct("<4sBBBBI")
_SIZE = struct.Struct("<Q")
_ENTRY = struct.Struct("<II")
_CHECKSUM = struct.Struct("<I")

Reader = Callable[[int, int], memoryview]
"""(offset, length) -> those bytes of the packed tensor; fewer where it ends before."""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """The header of a packed tensor, checked."""

    dtype: str
    shape: tuple[int, ...]
    block_elements: int
    blocks: tuple[tuple[int, int, int], ...]
    """Offset, length and CRC-32 of each block."""

    @property
    def total(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return DTYPE_BITS[self.dtype] // 8

    def elements_of(self, index: int) -> int:
        """Number of elements in a block."""
        return min(self.block_elements, self.total - index * self.block_elements)


def can_pack(dtype: str, total: int) -> bool:
    """Whether a tensor has a packed form at all: whole bytes an element, and not empty."""
    return dtype in CODES and total > 0


def encode_blocks(dtype: str, blocks: Iterator[Bits], split: Split | None = None) -> list[bytes]:
    """The packed blocks of a tensor.

    Args:
        dtype: As safetensors spells it.
        blocks: Its elements as unsigned integers, `BLOCK_ELEMENTS` at a time, the last ones fewer.
        split: What cuts a block; the faster way there is.
    """
    return list(encoded(dtype, blocks, split))


def encoded(dtype: str, blocks: Iterator[Bits], split: Split | None = None) -> Iterator[bytes]:
    """The same, one block at a time."""
    rotated = CODES[dtype][1]
    cut = split or coder()[0]
    return (encode_block(bits, rotated, cut) for bits in blocks)


def head_of(dtype: str, shape: tuple[int, ...], blocks: list[bytes]) -> bytes:
    """Header and table in front of `blocks`."""
    return head_for(dtype, shape, [(len(block), zlib.crc32(block)) for block in blocks])


def head_for(dtype: str, shape: tuple[int, ...], table: list[tuple[int, int]]) -> bytes:
    """Header and table in front of blocks of which length and CRC-32 are given."""
    head = [_HEAD.pack(MAGIC, VERSION, CODES[dtype][0], len(shape), 0, BLOCK_ELEMENTS)]
    head += [_SIZE.pack(size) for size in shape]
    head += [_ENTRY.pack(*entry) for entry in table]
    raw = b"".join(head)
    return raw + _CHECKSUM.pack(zlib.crc32(raw))


def head_bytes(rank: int, num_blocks: int) -> int:
    """Length of header and table."""
    return _HEAD.size + _SIZE.size * rank + _ENTRY.size * num_blocks + _CHECKSUM.size


def read_head(read: Reader, packed_bytes: int, where: object) -> PackedTensor:
    """The header of the packed tensor that `read` reads.

    Args:
        read: Reads the packed tensor.
        packed_bytes: Its length.
        where: For the error.

    Raises:
        InputRefused: It is damaged, or of a version that is not known.
    """
    head = read(0, _HEAD.size)
    if len(head) < _HEAD.size or bytes(head[:4]) != MAGIC:
        _refuse(where, "it does not begin like a packed tensor")
    _, version, code, rank, zero, block_elements = _HEAD.unpack(head)
    if version != VERSION:
        raise InputRefused(
            "E441", "packed by another version", where, f"version {version}", f"version {VERSION}"
        )
    if code not in _DTYPES or rank > RANK_LIMIT or zero or not _is_block(block_elements):
        _refuse(where, "its header is not one")
    shape = _shape(read(_HEAD.size, _SIZE.size * rank), rank, where)
    num_blocks = -(-math.prod(shape) // block_elements)
    length = head_bytes(rank, num_blocks)
    if length > packed_bytes:
        _refuse(where, "its table is longer than itself")
    raw = read(0, length)
    if len(raw) != length or zlib.crc32(raw[: -_CHECKSUM.size]) != _CHECKSUM.unpack(raw[-4:])[0]:
        _refuse(where, "the checksum of its header is wrong")
    blocks = _blocks(raw[_HEAD.size + _SIZE.size * rank : -_CHECKSUM.size], length)
    end = blocks[-1][0] + blocks[-1][1] if blocks else length
    # one byte of padding keeps its length apart from that of the dense tensor
    if packed_bytes - end not in (0, 1):
        _refuse(where, "its blocks are not as long as it is")
    return PackedTensor(_DTYPES[code], shape, block_elements, blocks)


def decode_block_of(
    tensor: PackedTensor, index: int, read: Reader, out: Bits, where: object, merge: Merge
) -> None:
    """Decode one block into `out`.

    Args:
        tensor: From `read_head`.
        index: Which block.
        read: Reads the packed tensor.
        out: Unsigned integers of the tensor's width, as many as the block has.
        where: For the error.
        merge: What puts planes together.

    Raises:
        InputRefused: The block is damaged.
    """
    offset, length, checksum = tensor.blocks[index]
    raw = read(offset, length)
    if len(raw) != length or zlib.crc32(raw) != checksum:
        _refuse(where, f"the checksum of block {index} is wrong")
    try:
        decode_block(raw, out, CODES[tensor.dtype][1], merge)
    except DamagedPlanes as error:
        _refuse(where, f"block {index}: {error}")


def decode_into(
    tensor: PackedTensor, read: Reader, out: Bits, where: object, merge: Merge | None = None
) -> None:
    """Decode all blocks into `out`, unsigned integers, flat."""
    put = merge or coder()[1]
    for index in range(len(tensor.blocks)):
        begin = index * tensor.block_elements
        part = out[begin : begin + tensor.elements_of(index)]
        decode_block_of(tensor, index, read, part, where, put)


def decode_payload(
    payload: memoryview, where: object, merge: Merge | None = None
) -> tuple[PackedTensor, Bits]:
    """A whole packed tensor that lies in memory: its header, and its elements, flat.

    Raises:
        InputRefused: It is damaged.
        MemoryError: It is larger than memory.
    """

    def read(offset: int, length: int) -> memoryview:
        return payload[offset : offset + length]

    tensor = read_head(read, len(payload), where)
    bits = np.empty(tensor.total, UNSIGNED[tensor.width])
    decode_into(tensor, read, bits, where, merge)
    return tensor, bits


def _is_block(elements: int) -> bool:
    """Whole groups of any N:M pattern, and whole bytes of a bitmap."""
    return 0 < elements <= BLOCK_LIMIT and elements % 64 == 0


def _shape(raw: memoryview, rank: int, where: object) -> tuple[int, ...]:
    if len(raw) != _SIZE.size * rank:
        _refuse(where, "it is cut short")
    shape = tuple(size for (size,) in _SIZE.iter_unpack(raw))
    if math.prod(max(size, 1) for size in shape) > ELEMENT_LIMIT:
        _refuse(where, "its shape is too large")
    return shape


def _blocks(table: memoryview, offset: int) -> tuple[tuple[int, int, int], ...]:
    blocks = []
    for length, checksum in _ENTRY.iter_unpack(table):
        blocks.append((offset, length, checksum))
        offset += length
    return tuple(blocks)


def _refuse(where: object, why: str) -> NoReturn:
    raise InputRefused(
        "E442", "damaged packed tensor", where, why, "the whole file; copy or pack it again"
    )

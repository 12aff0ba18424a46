"""Counts of what a written safetensors file really holds: the judge of our own numbers.

Only numpy, in blocks of a few megabytes, without the library that wrote the file: a number in the
report comes from here. What the zeros were meant to be is left to others.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from hamcli.checkpoint.headers import (
    DTYPE_BITS,
    Header,
    TensorInfo,
    open_regular,
    read_exactly,
)
from hamcli.checkpoint.packed.blocks import merge_in_numpy
from hamcli.checkpoint.packed.files import packed_blocks, read_any_header
from hamcli.checkpoint.source import weight_files
from hamcli.errors import InputRefused

BLOCK_BYTES = 4 * 2**20

_EXPONENT_AND_SIGN = {
    # dtype: (unsigned type, bits below the sign, bits of an infinite exponent)
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
    # E4M3 has no infinity: only the all-ones pattern is not a number
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True, slots=True)
class TensorCount:
    """What one tensor of a file holds, in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    total: int
    zeros: int
    """Elements equal to zero, those with the bits of -0.0 among them."""
    negative_zeros: int
    nonfinite: int


def count_zeros(path: Path, names: Collection[str] | None = None) -> dict[str, TensorCount]:
    """Counts of every tensor of a safetensors file, or of the weight files of a folder.

    Names are those of the file, in their order there.

    Args:
        path: The file or folder.
        names: Count only these tensors.

    Raises:
        InputRefused: There is no safetensors file, one is damaged, or a name occurs in two.
    """
    counts: dict[str, TensorCount] = {}
    files: dict[str, Path] = {}
    for file in weight_files(path).values():
        header = read_any_header(file)
        with open_regular(file) as handle:
            for tensor in header.tensors:
                if names is not None and tensor.name not in names:
                    continue
                if tensor.name in counts:
                    refuse_twice(tensor.name, files[tensor.name], file)
                counts[tensor.name] = _count(handle, header, tensor)
                files[tensor.name] = file
    return counts


def refuse_twice(name: str, first: Path, second: Path) -> NoReturn:
    """Refuse a tensor that lies in two files of a folder, of which nothing tells the right one."""
    why = f"in {first.name} and in {second.name}"
    raise InputRefused("E412", "tensor in two files", name, why, f"one of them: {second}")


def blocks(handle: int, header: Header, tensor: TensorInfo) -> Iterator[memoryview]:
    """The bytes of `tensor`, some megabytes at a time, never cut inside an element.

    The buffer is used again for the next block. Packed tensors are unpacked in numpy, by other code
    than that which packed them.
    """
    if tensor.is_packed:
        for bits in packed_blocks(handle, header.path, tensor, merge_in_numpy):
            yield bits.view(np.uint8).data
        return
    buffer = memoryview(bytearray(min(BLOCK_BYTES, tensor.end - tensor.begin)))
    for begin in range(tensor.begin, tensor.end, BLOCK_BYTES):
        block = buffer[: min(BLOCK_BYTES, tensor.end - begin)]
        if read_exactly(handle, block, begin) != len(block):
            raise InputRefused("E416", "the file changed while it was read", header.path)
        yield block


def _count(handle: int, header: Header, tensor: TensorInfo) -> TensorCount:
    zeros = negative = nonfinite = 0
    for block in blocks(handle, header, tensor):
        found = count_block(block, tensor.dtype)
        zeros, negative, nonfinite = zeros + found[0], negative + found[1], nonfinite + found[2]
    return TensorCount(
        tensor.name, tensor.dtype, tensor.shape, tensor.total, zeros, negative, nonfinite
    )


def count_block(block: memoryview, dtype: str) -> tuple[int, int, int]:
    """Zeros, those of them that are -0.0, and non-finite elements among the bytes of `block`."""
    if dtype in _EXPONENT_AND_SIGN:
        unsigned, below_sign, infinite = _EXPONENT_AND_SIGN[dtype]
        bits = np.frombuffer(block, unsigned)
        positive_zeros = bits.size - int(np.count_nonzero(bits))
        magnitude = bits & unsigned(below_sign)
        zeros = bits.size - int(np.count_nonzero(magnitude))
        nonfinite = int(np.count_nonzero(magnitude >= unsigned(infinite)))
        return zeros, zeros - positive_zeros, nonfinite
    return _integer_zeros(block, dtype), 0, 0


def _integer_zeros(block: memoryview, dtype: str) -> int:
    width = DTYPE_BITS[dtype]
    if width not in _UNSIGNED:
        # elements of 4 and 6 bits share bytes, and no model we write holds them
        raise InputRefused("E414", "cannot count a packed dtype", dtype)
    bits: NDArray[np.unsignedinteger[np._typing.NBitBase]] = np.frombuffer(block, _UNSIGNED[width])
    return bits.size - int(np.count_nonzero(bits))

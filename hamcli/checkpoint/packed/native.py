"""Planes by the C++ extension where a process has it, in numpy where not; the bytes are the same.

The extension comes with torch, and a command that has no other use for torch must not pay for it:
it is used where torch is loaded already, or where `prepare` was called for a large job.
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from hamcli.checkpoint.packed.blocks import Merge, Split, merge_in_numpy, split_in_numpy
from hamcli.checkpoint.packed.planes import MASK_EMPTY, Bits, Bytes, DamagedPlanes, Planes

_FAULTS = (
    "",
    "another number of values than the mask has",
    "another number of escapes than the tops have",
    "gaps that lead beyond the block",
)


class _Scratch(threading.local):
    """Memory that a thread cuts its blocks into, kept from block to block."""

    def __init__(self) -> None:
        self.planes: list[Bytes] = []

    def at_least(self, size: int, width: int) -> list[Bytes]:
        """A plane for each part of a block of `size` elements."""
        if len(self.planes) != width + 2 or len(self.planes[0]) < size + 8:
            self.planes = [np.empty(size + 8, np.uint8) for _ in range(width + 2)]
        return self.planes


_scratch = _Scratch()


def prepare(note: Callable[[str], None] | None = None) -> bool:
    """Load torch and the extension, building it if need be; whether it is there."""
    from hamcli.native import prepare as prepare_extension

    return prepare_extension(note).is_available


def coder() -> tuple[Split, Merge]:
    """The faster way to cut a block and to put it together."""
    return (split_natively, merge_natively) if _operators() else (split_in_numpy, merge_in_numpy)


def split_natively(bits: Bits, rotated: bool) -> Planes:
    """`planes.split` by the extension."""
    size, width = len(bits), bits.dtype.itemsize
    planes = _scratch.at_least(size, width)
    places = [_address(plane) for plane in planes]
    mask_coding, top_coding, num_values, offset, *lengths = _operators().split_planes(
        _address(bits), size, width, rotated, places
    )
    lengths += [num_values] * (width - 1)
    mask, top, escapes, *rest = (
        plane[:length].copy() for plane, length in zip(planes, lengths, strict=True)
    )
    unsigned = offset & (1 << 8 * width) - 1
    return Planes(mask_coding, top_coding, num_values, unsigned, mask, top, escapes, tuple(rest))


def merge_natively(planes: Planes, out: Bits, rotated: bool) -> None:
    """`planes.merge` by the extension."""
    if planes.mask_coding == MASK_EMPTY:
        out[...] = 0
        return
    parts = planes.all()
    signed = planes.offset - (planes.offset >> 63 << 64)
    fault = _operators().merge_planes(
        [_address(plane) for plane in parts],
        [len(plane) for plane in parts],
        _address(out),
        len(out),
        out.dtype.itemsize,
        planes.mask_coding,
        planes.top_coding,
        planes.num_values,
        signed,
        rotated,
    )
    if fault:
        raise DamagedPlanes(_FAULTS[fault])


def _operators() -> Any:
    """The extension's operators, or None; torch is not loaded for them."""
    if (
        "torch" not in sys.modules
        or os.environ.get("HAM_NATIVE") == "0"
        or sys.byteorder != "little"
    ):
        return None
    from hamcli.native import operators_if_built

    return operators_if_built()


def _address(array: Any) -> int:
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]
    return address

"""Weight files read and written tensor by tensor, in bounded memory, without torch.

Nothing is mapped: a file that is cut short meanwhile is an error, not a signal. A written file has
the header of the dense file it is made from, byte for byte, and so its names, order and offsets.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hamcli.checkpoint.headers import DTYPE_BITS, Header, TensorInfo, open_regular, read_exactly
from hamcli.checkpoint.packed.files import dense_layout, packed_blocks
from hamcli.checkpoint.packed.planes import UNSIGNED
from hamcli.errors import InputRefused

Bits = npt.NDArray[Any]
Advance = Callable[[int], None]
"""Told how many dense bytes were done."""

CHUNK_BYTES = 4 * 2**20
COPY_BYTES = 64 * 2**20

_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True, slots=True)
class Shard:
    """A weight file, dense or packed, and the dense file that it gives.

    Attributes:
        name: Of the file in its folder.
        header: What it holds.
        head: Length and header of the dense file.
        places: Tensors of the dense file by name.
    """

    name: str
    header: Header
    head: bytes
    places: dict[str, TensorInfo]

    @property
    def dense_bytes(self) -> int:
        """Size of the dense file."""
        return max((one.end for one in self.places.values()), default=len(self.head))


def open_shards(headers: Mapping[str, Header]) -> list[Shard]:
    """The weight files by name, from `source.find_weights`."""
    shards = []
    for name, header in headers.items():
        head, tensors = dense_layout(header)
        shards.append(Shard(name, header, head, {one.name: one for one in tensors}))
    return shards


def chunks(shard: Shard, info: TensorInfo, unit: int = 1) -> Iterator[Bits]:
    """The elements of a tensor as unsigned integers that may be written, some megabytes at a time.

    The memory is used again for the next ones.

    Args:
        shard: Where it lies.
        info: The tensor, of whole bytes an element, as the shard's header has it.
        unit: Each chunk holds a multiple of so many elements; it divides the tensor's number.

    Raises:
        InputRefused: E416, the file changed while it was read.
    """
    if info.total == 0:
        return
    width = DTYPE_BITS[info.dtype] // 8
    with open_regular(shard.header.path) as handle:
        if info.is_packed:
            yield from _in_units(packed_blocks(handle, shard.header.path, info), unit)
            return
        length = unit * width * max(1, CHUNK_BYTES // (unit * width))
        buffer = np.empty(min(length, info.end - info.begin), np.uint8)
        for begin in range(info.begin, info.end, length):
            part = buffer[: min(length, info.end - begin)]
            if read_exactly(handle, part.data, begin) != len(part):
                _refuse_changed(shard.header.path)
            yield part.view(UNSIGNED[width])


def _in_units(blocks: Iterator[Bits], unit: int) -> Iterator[Bits]:
    """The same elements, a multiple of `unit` at a time."""
    rest: Bits | None = None
    for block in blocks:
        whole = block if rest is None else np.concatenate([rest, block])
        end = whole.size - whole.size % unit
        if end:
            yield whole[:end]
        rest = whole[end:].copy() if end < whole.size else None
    assert rest is None, "the unit divides the tensor"


class Writer:
    """The dense files of a stage, each as long as it will be, its tensors written in any order.

    A context manager; leaving it writes nothing more.
    """

    def __init__(self, stage: Path, shards: list[Shard]) -> None:
        self.stage, self.shards = stage, shards

    def begin(self) -> None:
        """Make the files, with their headers.

        Raises:
            OSError: The disk.
        """
        for shard in self.shards:
            with (self.stage / shard.name).open("xb") as out:
                out.write(shard.head)
                out.truncate(shard.dense_bytes)

    @contextmanager
    def tensor(self, shard: Shard, info: TensorInfo) -> Iterator[Callable[[Bits], None]]:
        """What writes the elements of a tensor, in order."""
        place = shard.places[info.name].begin
        with self._open(shard) as handle:

            def write(bits: Bits) -> None:
                nonlocal place
                raw = bits.data.cast("B")
                _write_all(handle, raw, place)
                place += len(raw)

            yield write

    def copy(self, shard: Shard, info: TensorInfo, advance: Advance) -> None:
        """Write a tensor as it is.

        Raises:
            InputRefused: E416, the file changed while it was read.
            OSError: The disk.
        """
        if info.is_packed:
            with self.tensor(shard, info) as write:
                for bits in chunks(shard, info):
                    write(bits)
                    advance(bits.nbytes)
            return
        place = shard.places[info.name].begin
        with open_regular(shard.header.path) as source, self._open(shard) as target:
            for begin in range(info.begin, info.end, COPY_BYTES):
                length = min(COPY_BYTES, info.end - begin)
                _copy_range(source, target, begin, place + begin - info.begin, length, shard)
                advance(length)

    @contextmanager
    def _open(self, shard: Shard) -> Iterator[int]:
        handle = os.open(self.stage / shard.name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield handle
        finally:
            os.close(handle)


def _copy_range(source: int, target: int, begin: int, place: int, length: int, of: Shard) -> None:
    """Copy bytes from file to file, inside the kernel where it can."""
    done = 0
    while done < length and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, length - done, begin + done, place + done)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            break
        if count == 0:
            _refuse_changed(of.header.path)
        done += count
    buffer = memoryview(bytearray(min(CHUNK_BYTES, length - done)))
    while done < length:
        part = buffer[: min(len(buffer), length - done)]
        if read_exactly(source, part, begin + done) != len(part):
            _refuse_changed(of.header.path)
        _write_all(target, part, place + done)
        done += len(part)


def _write_all(handle: int, raw: memoryview, place: int) -> None:
    while len(raw):
        count = os.pwrite(handle, raw, place)
        raw, place = raw[count:], place + count


def _refuse_changed(path: Path) -> None:
    raise InputRefused("E416", "the file changed while it was read", path, right="a file at rest")

"""Safetensors headers, read and checked without torch and without believing a byte of them.

A header is JSON from a stranger. Its size is bounded before it is parsed, its names, shapes and
offsets before anybody else sees the file: each tensor lies where the one before it ends, and the
last one ends with the file. What the bytes of a tensor mean is left to others.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hamcli.errors import InputRefused, ResourceError

ENTRY_LIMIT = 100_000
HEADER_LIMIT = 32 * 2**20
NAME_LIMIT = 512
RANK_LIMIT = 16
ELEMENT_LIMIT = 2**48
"""More elements than any machine holds; a shape beyond it is a lie even beside a zero."""

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
FLOATS = ("F64", "F32", "F16", "BF16")

_LENGTH = struct.Struct("<Q")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it"),
    (b"\x80", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights"),
)
CONVERT_HINT = (
    "convert it where you trust its author: "
    "AutoModel.from_pretrained(OLD).save_pretrained(NEW), then `ham sparsify NEW`"
)
LFS_HINT = "fetch the weights first: git lfs pull"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """As the file spells it: `F32`, `BF16`, ..."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    end: int
    is_packed: bool = False
    """Whether the bytes from `begin` to `end` are those of a packed tensor."""

    @property
    def total(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says it holds, in the order of the data."""

    path: Path
    file_bytes: int
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The checked header of the safetensors file at `path`.

    Raises:
        InputRefused: The file is no safetensors file, is cut short or too long, or its header is
            beyond the limits of this module or contradicts itself.
        ResourceError: The file may not be read.
    """
    with open_regular(path) as handle:
        file_bytes = os.fstat(handle).st_size
        raw = _header_bytes(path, handle, file_bytes)
    header = parse_header(path, raw)
    _check_size(path, header, file_bytes)
    return header


def parse_header(path: Path, raw: bytes) -> Header:
    """The checked header whose JSON text is `raw`, of a file at `path` as long as it says.

    Raises:
        InputRefused: It is beyond the limits of this module or contradicts itself.
    """
    entries = _parse(path, raw)
    metadata = _metadata(path, entries.pop("__metadata__", None))
    start = _LENGTH.size + len(raw)
    tensors = sorted(
        (_tensor(path, name, entry, start) for name, entry in entries.items()),
        key=lambda tensor: (tensor.begin, tensor.end),
    )
    end = _check_layout(path, tensors, start)
    return Header(path, end, tuple(tensors), metadata)


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A file descriptor of the regular file at `path`, which must not be a link.

    A pipe or a device is refused and never waited for.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags)
    except PermissionError as error:
        raise ResourceError("E541", "cannot read the model", path, "permission denied") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a file name"
        raise InputRefused("E410", "cannot open a file of the model", path, reason) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise InputRefused("E410", "not a regular file", path, right="a plain file")
        yield handle
    finally:
        os.close(handle)


def read_exactly(handle: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` of the open file; returns how many bytes there were.

    One `read` may return less than was asked for, which would split an element.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def _header_bytes(path: Path, handle: int, file_bytes: int) -> bytes:
    head = os.pread(handle, 64, 0)
    _refuse_other_formats(path, head)
    if file_bytes < _LENGTH.size:
        _refuse_size(path, f"the file has {file_bytes} bytes", "at least 8")
    (length,) = _LENGTH.unpack(head[: _LENGTH.size])
    if length > HEADER_LIMIT:
        _refuse_header(path, f"a header of {length} bytes", f"at most {HEADER_LIMIT}")
    if _LENGTH.size + length > file_bytes:
        _refuse_size(
            path,
            f"the file has {file_bytes} bytes, its header alone needs {_LENGTH.size + length}",
            "the whole file; copy or download it again",
        )
    raw = bytearray(length)
    if read_exactly(handle, memoryview(raw), _LENGTH.size) != length:
        _refuse_size(path, "the file became shorter while it was read", "a file at rest")
    return bytes(raw)


def _refuse_other_formats(path: Path, head: bytes) -> None:
    for magic, kind in _OTHER_FORMATS:
        # 0x80 may also begin the length of a safetensors header; there `{` follows it
        if head.startswith(magic) and head[8:9] != b"{":
            hint = LFS_HINT if "LFS" in kind else CONVERT_HINT
            raise InputRefused(
                "E408", "not a safetensors file", path, f"it is {kind}", "safetensors", [hint]
            )


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    # each entry is an object, so `{` bounds their number before the parser spends memory on them
    if raw.count(b"{") > ENTRY_LIMIT + 2 or raw.count(b",") > 16 * ENTRY_LIMIT:
        _refuse_header(path, "too many entries", f"at most {ENTRY_LIMIT}")
    if not raw.startswith(b"{"):
        _refuse_header(path, "it does not begin with {")
    try:
        entries = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_count,
        )
    except RecursionError:
        _refuse_header(path, "it is nested too deep")
    except ValueError as error:
        _refuse_header(path, f"it is not valid JSON: {error}")
    assert isinstance(entries, dict)  # it begins with {
    if len(entries) - ("__metadata__" in entries) > ENTRY_LIMIT:
        _refuse_header(path, f"{len(entries)} entries", f"at most {ENTRY_LIMIT}")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:80]!r} occurs twice")
    return unique


def _count(text: str) -> int:
    if text.startswith("-"):  # -0 too: to other readers it is no count
        raise ValueError(f"{text[:40]} is negative")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _refuse_header(path, "__metadata__ is not an object of strings")
    return value


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not name or len(name) > NAME_LIMIT or not name.isprintable():
        _refuse_header(path, f"the tensor name {name[:80]!r}", "a printable name")
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        _refuse_header(path, f"{name}: not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse_header(path, f"{name}: dtype {str(dtype)[:40]!r} is unknown")
    if not _are_counts(shape) or len(shape) > RANK_LIMIT:
        _refuse_header(path, f"{name}: {str(shape)[:80]} is no shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        _refuse_header(path, f"{name}: {str(offsets)[:80]} are no offsets")
    if math.prod(max(size, 1) for size in shape) > ELEMENT_LIMIT:
        _refuse_header(path, f"{name}: shape {shape} is too large")
    info = TensorInfo(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])
    need, rest = divmod(info.total * DTYPE_BITS[dtype], 8)
    if rest or info.end - info.begin != need:
        _refuse_header(
            path, f"{name}: {dtype} {shape} needs {need} bytes, has {info.end - info.begin}"
        )
    return info


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _check_layout(path: Path, tensors: list[TensorInfo], start: int) -> int:
    """Where the last tensor ends."""
    position = start
    for tensor in tensors:
        if tensor.begin != position:
            kind = "overlaps the one before it" if tensor.begin < position else "leaves a hole"
            _refuse_header(path, f"{tensor.name}: its data {kind}")
        position = tensor.end
    return position


def _check_size(path: Path, header: Header, file_bytes: int) -> None:
    if header.file_bytes != file_bytes:
        _refuse_size(
            path,
            f"the file has {file_bytes} bytes, its header says {header.file_bytes}",
            "the whole file; copy or download it again",
        )


def _refuse_header(path: Path, why: str, right: str = "") -> NoReturn:
    raise InputRefused("E414", "damaged safetensors header", path, why, right)


def _refuse_size(path: Path, why: str, right: str) -> NoReturn:
    raise InputRefused("E413", "safetensors file of the wrong size", path, why, right)

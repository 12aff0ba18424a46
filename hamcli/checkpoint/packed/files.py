"""A dense safetensors file <-> a packed one, tensor by tensor in bounded memory.

The packed file is a safetensors file with the same names. A tensor that gains is a flat tensor of
bytes, which `tensors` describes; one that does not is stored as it was. The header of the dense
file is kept in the metadata, so that the dense file comes back byte for byte.
"""

import base64
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import zstandard

from hamcli.checkpoint.headers import (
    DTYPE_BITS,
    HEADER_LIMIT,
    Header,
    TensorInfo,
    open_regular,
    parse_header,
    read_exactly,
    read_header,
)
from hamcli.checkpoint.packed.blocks import Merge
from hamcli.checkpoint.packed.native import coder
from hamcli.checkpoint.packed.planes import UNSIGNED, Bits
from hamcli.checkpoint.packed.tensors import (
    BLOCK_ELEMENTS,
    PackedTensor,
    Reader,
    can_pack,
    decode_block_of,
    encoded,
    head_for,
    read_head,
)
from hamcli.errors import InputRefused

FORMAT_KEY, HEADER_KEY, DIGEST_KEY = "ham.packed", "ham.header", "ham.sha256"
FORMAT_VERSION = "1"
_COPY_BYTES = 4 * 2**20
_ALIGNMENT = 8

Advance = Callable[[int], None]
"""Told how many dense bytes were done."""


def _no_advance(_: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the packed file, its blocks in the spool or its bytes in the dense file."""

    info: TensorInfo
    head: bytes = b""
    block_bytes: int = 0
    padding: int = 0

    @property
    def is_packed(self) -> bool:
        """Whether its blocks are in the spool."""
        return bool(self.head)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the packed file."""
        if self.is_packed:
            return len(self.head) + self.block_bytes + self.padding
        return self.info.end - self.info.begin


# ---- reading ----


def read_any_header(path: Path) -> Header:
    """The header of a dense or packed file, its tensors as the dense file has them.

    The tensors of a packed file have `is_packed` where their bytes, from `begin` to `end`, are
    those of a packed tensor.

    Raises:
        InputRefused: The file is damaged, or packed by another version.
        ResourceError: It may not be read.
    """
    header = read_header(path)
    if FORMAT_KEY not in header.metadata:
        return header
    dense = _dense_header(header)
    stored = {tensor.name: tensor for tensor in header.tensors}
    if dense.keys() != stored.keys():
        _refuse(path, "it holds other tensors than the dense file had")
    tensors = tuple(_as_dense(path, one, dense[one.name]) for one in header.tensors)
    return replace(header, tensors=tensors)


def is_packed_file(header: Header) -> bool:
    """Whether `header` is that of a packed file."""
    return FORMAT_KEY in header.metadata


def dense_bytes(header: Header) -> int:
    """Size of the dense file that `header` is of, packed or not."""
    if not is_packed_file(header):
        return header.file_bytes
    return 8 + len(_dense_text(header)) + sum(map(tensor_bytes, header.tensors))


def dense_layout(header: Header) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """Length and header of the dense file that `header` is of, and the tensors in it."""
    if is_packed_file(header):
        text = _dense_text(header)
    else:
        with open_regular(header.path) as handle:
            text = _text_of(handle, header)
    head = len(text).to_bytes(8, "little") + text
    return head, parse_header(header.path, text).tensors


def tensor_bytes(info: TensorInfo) -> int:
    """Dense bytes of a tensor."""
    return info.total * DTYPE_BITS[info.dtype] // 8


def packed_blocks(
    handle: int, path: Path, info: TensorInfo, merge: Merge | None = None
) -> Iterator[Bits]:
    """The elements of a packed tensor as unsigned integers, block by block.

    Args:
        handle: The open file.
        path: Its name, for errors.
        info: A tensor with `is_packed`.
        merge: What puts planes together; the faster way there is.

    Raises:
        InputRefused: It is damaged.
    """
    tensor, read, where = _open_tensor(handle, path, info)
    put = merge or coder()[1]
    # by itself: the table may promise more than the file gives
    for index in range(len(tensor.blocks)):
        bits = np.empty(tensor.elements_of(index), UNSIGNED[tensor.width])
        decode_block_of(tensor, index, read, bits, where, put)
        yield bits


def read_packed_into(handle: int, path: Path, info: TensorInfo, out: Bits) -> None:
    """Decode a packed tensor into `out`, its elements as unsigned integers, flat."""
    tensor, read, where = _open_tensor(handle, path, info)
    put = coder()[1]
    for index in range(len(tensor.blocks)):
        begin = index * tensor.block_elements
        part = out[begin : begin + tensor.elements_of(index)]
        decode_block_of(tensor, index, read, part, where, put)


def _open_tensor(handle: int, path: Path, info: TensorInfo) -> tuple[PackedTensor, Reader, str]:
    where = f"{path}: {info.name}"

    def read(offset: int, length: int) -> memoryview:
        buffer = bytearray(min(length, info.end - info.begin - offset))
        done = read_exactly(handle, memoryview(buffer), info.begin + offset)
        return memoryview(buffer)[:done]

    tensor = read_head(read, info.end - info.begin, where)
    if tensor.dtype != info.dtype or tensor.shape != info.shape:
        _refuse(where, "its header says another dtype or shape than the file's")
    return tensor, read, where


def _dense_text(header: Header) -> bytes:
    try:
        packed = base64.b64decode(header.metadata.get(HEADER_KEY, ""), validate=True)
        size = zstandard.frame_content_size(packed)
        if not 0 < size <= HEADER_LIMIT:
            _refuse(header.path, "the dense file's header is missing or too long")
        return zstandard.ZstdDecompressor().decompress(packed)
    except (ValueError, zstandard.ZstdError):
        _refuse(header.path, "the dense file's header cannot be decoded")


def _dense_header(header: Header) -> dict[str, TensorInfo]:
    version = header.metadata[FORMAT_KEY]
    if version != FORMAT_VERSION:
        raise InputRefused(
            "E441",
            "packed by another version",
            header.path,
            f"version {version[:20]!r}",
            f"version {FORMAT_VERSION}",
        )
    text = _dense_text(header)
    return {tensor.name: tensor for tensor in parse_header(header.path, text).tensors}


def _as_dense(path: Path, stored: TensorInfo, dense: TensorInfo) -> TensorInfo:
    if (stored.dtype, stored.shape) == (dense.dtype, dense.shape):
        return stored
    if stored.dtype != "U8" or len(stored.shape) != 1 or not can_pack(dense.dtype, dense.total):
        _refuse(f"{path}: {stored.name}", "it is neither packed nor what the dense file had")
    return replace(dense, begin=stored.begin, end=stored.end, is_packed=True)


# ---- writing ----


def pack_file(source: Path, target: Path, advance: Advance = _no_advance) -> int:
    """Write the packed form of the dense file `source`; the size of it.

    Args:
        source: A dense safetensors file.
        target: A file that does not exist, in a folder for the temporary spool too.
        advance: Told of dense bytes done, in the end of all of the dense file.

    Raises:
        InputRefused: The source is damaged, or packed already.
        OSError: The disk.
    """
    header = read_header(source)
    if is_packed_file(header):
        raise InputRefused("E443", "packed already", source, right="a dense file")
    with (
        open_regular(source) as handle,
        tempfile.TemporaryFile(dir=target.parent) as spool,
        target.open("xb") as out,
    ):
        parts = list(_pack_tensors(handle, header, spool, advance))
        text, digest = _text_and_digest(handle, header)
        out.write(_packed_head(parts, header, text, digest))
        spool.seek(0)
        for part in parts:
            if part.is_packed:
                out.write(part.head)
                _copy_stream(spool, out, part.block_bytes)
                out.write(bytes(part.padding))
            else:
                _copy(handle, part.info.begin, part.info.end, out, source)
        out.flush()
        os.fsync(out.fileno())
        advance(8 + len(text))  # length and header, the rest of the dense bytes
        return out.tell()


def packed_bytes(path: Path) -> int:
    """Size of the packed form of a file, dense or packed; nothing is written."""
    header = read_any_header(path)
    return header.file_bytes if is_packed_file(header) else packed_size(path)


def packed_size(source: Path, advance: Advance = _no_advance) -> int:
    """Size that `pack_file` would give, without writing it."""
    header = read_header(source)
    with open_regular(source) as handle:
        parts = list(_pack_tensors(handle, header, None, advance))
        text = _text_of(handle, header)
        return len(_packed_head(parts, header, text, "0" * 64)) + sum(
            part.stored_bytes for part in parts
        )


def restore_file(source: Path, target: Path, advance: Advance = _no_advance) -> int:
    """Write the dense file that the packed file `source` was made from; the size of it.

    Raises:
        InputRefused: The source is damaged: what comes out is not what went in.
        OSError: The disk.
    """
    header = read_any_header(source)
    if not is_packed_file(header):
        raise InputRefused("E443", "not packed", source, right="a packed file")
    digest = hashlib.sha256()
    with target.open("xb") as out:
        for block in dense_stream(source):
            digest.update(block)
            out.write(block)
            advance(len(block))
        if digest.hexdigest() != header.metadata.get(DIGEST_KEY):
            _refuse(source, "the dense file it gives has another SHA-256 than the one packed")
        out.flush()
        os.fsync(out.fileno())
        return out.tell()


def dense_stream(path: Path) -> Iterator[bytes | memoryview]:
    """The bytes of the dense form of a file, dense or packed, some megabytes at a time.

    The buffer may be used again for the next ones.
    """
    header = read_any_header(path)
    with open_regular(path) as handle:
        if not is_packed_file(header):
            yield from _chunks(handle, path, 0, header.file_bytes, _COPY_BYTES)
            return
        text = _dense_text(header)
        stored = {tensor.name: tensor for tensor in header.tensors}
        yield len(text).to_bytes(8, "little") + text
        for dense in parse_header(path, text).tensors:
            yield from _dense_blocks(handle, path, stored[dense.name])


def _dense_blocks(handle: int, path: Path, info: TensorInfo) -> Iterator[memoryview]:
    if info.is_packed:
        for bits in packed_blocks(handle, path, info):
            yield bits.view(np.uint8).data
    else:
        yield from _chunks(handle, path, info.begin, info.end, _COPY_BYTES)


def _pack_tensors(
    handle: int, header: Header, spool: BinaryIO | None, advance: Advance
) -> Iterator[_Part]:
    for info in header.tensors:
        part = _Part(info)
        if can_pack(info.dtype, info.total):
            begin = spool.tell() if spool is not None else 0
            packed = _pack_tensor(handle, header.path, info, spool, advance)
            if packed.stored_bytes < info.end - info.begin:
                part = packed
            elif spool is not None:
                spool.seek(begin)
                spool.truncate()
        else:
            advance(info.end - info.begin)
        yield part


def _pack_tensor(
    handle: int, path: Path, info: TensorInfo, spool: BinaryIO | None, advance: Advance
) -> _Part:
    """Its blocks, written into the spool as they are made: memory is that of a block."""
    table = []
    for block in encoded(info.dtype, _bits(handle, path, info, advance)):
        table.append((len(block), zlib.crc32(block)))
        if spool is not None:
            spool.write(block)
    head = head_for(info.dtype, info.shape, table)
    size = sum(length for length, _ in table)
    # a reader that does not know the form must see another shape than it expects
    return _Part(info, head, size, int(info.shape == (len(head) + size,)))


def _bits(handle: int, path: Path, info: TensorInfo, advance: Advance) -> Iterator[Bits]:
    width = DTYPE_BITS[info.dtype] // 8
    for chunk in _chunks(handle, path, info.begin, info.end, BLOCK_ELEMENTS * width):
        yield np.frombuffer(chunk, UNSIGNED[width])
        advance(len(chunk))


def _chunks(handle: int, path: Path, begin: int, end: int, length: int) -> Iterator[memoryview]:
    """The bytes from `begin` to `end`, in a buffer that is used again."""
    buffer = memoryview(bytearray(min(length, end - begin)))
    for at in range(begin, end, length):
        chunk = buffer[: min(length, end - at)]
        if read_exactly(handle, chunk, at) != len(chunk):
            raise InputRefused("E416", "the file changed while it was read", path)
        yield chunk


def _text_of(handle: int, header: Header) -> bytes:
    """The header of the dense file as it stands there."""
    length = bytearray(8)
    read_exactly(handle, memoryview(length), 0)
    text = bytearray(min(int.from_bytes(length, "little"), HEADER_LIMIT))
    if read_exactly(handle, memoryview(text), 8) != len(text):
        raise InputRefused("E416", "the file changed while it was read", header.path)
    return bytes(text)


def _text_and_digest(handle: int, header: Header) -> tuple[bytes, str]:
    digest = hashlib.sha256()
    for chunk in _chunks(handle, header.path, 0, header.file_bytes, _COPY_BYTES):
        digest.update(chunk)
    return _text_of(handle, header), digest.hexdigest()


def _packed_head(parts: list[_Part], header: Header, text: bytes, digest: str) -> bytes:
    """Length and JSON header of the packed file."""
    kept = base64.b64encode(zstandard.ZstdCompressor(level=19).compress(text)).decode()
    metadata: dict[str, str] = {
        **header.metadata,
        FORMAT_KEY: FORMAT_VERSION,
        HEADER_KEY: kept,
        DIGEST_KEY: digest,
    }
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for part in parts:
        info, end = part.info, position + part.stored_bytes
        entries[info.name] = {
            "dtype": "U8" if part.is_packed else info.dtype,
            "shape": [part.stored_bytes] if part.is_packed else list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    made = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    made += b" " * (-len(made) % _ALIGNMENT)
    return len(made).to_bytes(8, "little") + made


def _copy_stream(source: BinaryIO, out: BinaryIO, count: int) -> None:
    while count:
        chunk = source.read(min(count, _COPY_BYTES))
        out.write(chunk)
        count -= len(chunk)


def _copy(handle: int, begin: int, end: int, out: BinaryIO, path: Path) -> None:
    for chunk in _chunks(handle, path, begin, end, _COPY_BYTES):
        out.write(chunk)


def _refuse(where: object, why: str) -> NoReturn:
    raise InputRefused(
        "E442", "damaged packed file", where, why, "the whole file; copy or pack it again"
    )

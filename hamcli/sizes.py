"""Bytes of weight files in their several forms; imports no torch."""

import zlib
from collections.abc import Sequence
from pathlib import Path

from hamcli.checkpoint.headers import read_header
from hamcli.checkpoint.packed.files import (
    dense_bytes,
    dense_stream,
    is_packed_file,
    packed_bytes,
    read_any_header,
)
from hamcli.checkpoint.source import weight_files
from hamcli.report.records import SizeRecord

GZIP_LEVEL = 6


def size_record(folder: Path, inputs: Sequence[Path]) -> SizeRecord:
    """Bytes of the weight files: dense, packed, and dense as gzip makes them."""
    written = list(weight_files(folder).values())
    return SizeRecord(
        dense_bytes=sum(dense_bytes(read_any_header(path)) for path in written),
        packed_bytes=sum(map(packed_bytes, written)),
        gzip_bytes=sum(gzip_bytes(path) for path in written),
        input_bytes=sum(path.stat().st_size for path in inputs),
        input_gzip_bytes=sum(gzip_bytes(path) for path in inputs),
        format="packed" if any(is_packed_file(read_header(path)) for path in written) else "dense",
    )


def gzip_bytes(path: Path) -> int:
    """Size of the file after gzip, in its dense form, streamed and not kept."""
    packer = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 31)
    total = sum(len(packer.compress(block)) for block in dense_stream(path))
    return total + len(packer.flush())

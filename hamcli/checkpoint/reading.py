"""Tensors of checked files, each read when it is asked for, by the offsets of the headers."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamcli.checkpoint.headers import TensorInfo, open_regular, read_exactly
from hamcli.checkpoint.packed.files import read_packed_into
from hamcli.checkpoint.packed.planes import UNSIGNED
from hamcli.checkpoint.source import Source
from hamcli.errors import InputRefused

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class LazyTensor:
    """A tensor of the file, read when transformers asks for it."""

    def __init__(self, path: Path, info: TensorInfo, stamp: tuple[int, ...]) -> None:
        self.path, self.info, self.stamp = path, info, stamp
        self.was_read = False

    def __getitem__(self, _: Any) -> Tensor:
        self.was_read = True
        return read_tensor(self.path, self.info, self.stamp)

    def get_shape(self) -> list[int]:
        """As transformers asks for it, before it reads."""
        return list(self.info.shape)


def read_tensor(path: Path, info: TensorInfo, stamp: tuple[int, ...] | None = None) -> Tensor:
    """The tensor `info` of the file at `path`, in memory of its own.

    Nothing is mapped: a file that is cut short meanwhile is an error, not a signal.

    Raises:
        InputRefused: The file is no longer the one with this `stamp`.
    """
    dtype = TORCH_DTYPES.get(info.dtype)
    if dtype is None:
        raise InputRefused(
            "E428", "tensor of a dtype that cannot be trained", f"{path}: {info.name}", info.dtype
        )
    tensor = torch.empty(info.shape, dtype=dtype)
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    with open_regular(path) as handle:
        done = info.end - info.begin
        if info.is_packed:
            read_packed_into(handle, path, info, raw.view(UNSIGNED[tensor.element_size()]))
        else:
            # an empty array has no memory to view
            done = read_exactly(handle, memoryview(raw), info.begin) if info.total else 0
        if done != info.end - info.begin or (stamp is not None and stamp != _stamp(handle)):
            raise InputRefused(
                "E416", "the file changed while it was read", path, right="a file at rest"
            )
    return tensor


def _stamp(handle: int) -> tuple[int, ...]:
    status = os.fstat(handle)
    return status.st_ino, status.st_size, status.st_mtime_ns


def lazy_tensors(source: Source) -> dict[str, LazyTensor]:
    """Every tensor of the source by its name; nothing is read yet.

    Raises:
        InputRefused: E416, a file is no longer as long as it was.
    """
    tensors = {}
    for header in source.headers:
        with open_regular(header.path) as handle:
            stamp = _stamp(handle)
        if stamp[1] != header.file_bytes:
            raise InputRefused("E416", "the file changed while it was read", header.path)
        for info in header.tensors:
            tensors[info.name] = LazyTensor(header.path, info, stamp)
    return tensors

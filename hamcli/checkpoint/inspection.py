"""What any safetensors checkpoint holds: sparsity, near-zero mass, N:M fit, dtype and bytes.

Only numpy, block by block, so that a file larger than memory is no trouble. No config is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hamcli.checkpoint.headers import (
    DTYPE_BITS,
    FLOATS,
    Header,
    TensorInfo,
    open_regular,
)
from hamcli.checkpoint.packed.files import read_any_header
from hamcli.checkpoint.recount import blocks, count_block, weight_files
from hamcli.errors import InputRefused

NEAR_ZERO = 1e-3
"""A weight is near zero below this share of the tensor's root mean square."""

PATTERNS = ((2, 4), (4, 8))


@dataclass(frozen=True, slots=True)
class TensorInspection:
    """One tensor, in elements."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    total: int
    zeros: int
    negative_zeros: int
    nonfinite: int
    near_zero: int
    """Not zero, and below `NEAR_ZERO` of the root mean square."""
    rms: float | None
    fits: dict[str, float]
    """`"2:4"` -> share of groups along the last axis with at least 2 non-zeros of 4."""

    @property
    def sparsity(self) -> float:
        """Zeros over all elements."""
        return self.zeros / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class InspectRecord:
    """A checkpoint: its tensors in the order of the files, and their sums."""

    path: str
    files: tuple[str, ...]
    file_bytes: int
    tensors: tuple[TensorInspection, ...]
    total: int
    zeros: int
    matrix_total: int
    """Elements of the tensors with two or more dimensions."""
    matrix_zeros: int
    dtypes: dict[str, int]
    """dtype -> elements."""


def inspect(path: Path) -> InspectRecord:
    """Look at every tensor of the safetensors file or folder at `path`.

    Raises:
        InputRefused: There is no such file, or it is damaged.
    """
    if not path.exists():
        raise InputRefused(
            "E401", "no such checkpoint", path, right="a folder or .safetensors file"
        )
    files = weight_files(path)
    names = [file.name for file in sorted(path.glob("*.safetensors"))] if path.is_dir() else None
    headers = [read_any_header(file) for file in files]
    shown = tuple(names or [path.name])
    tensors = tuple(
        one
        for name, header in zip(shown, headers, strict=True)
        for one in _inspect_file(name, header)
    )
    matrices = [tensor for tensor in tensors if len(tensor.shape) >= 2]
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.total
    return InspectRecord(
        path=str(path),
        files=shown,
        file_bytes=sum(header.file_bytes for header in headers),
        tensors=tensors,
        total=sum(tensor.total for tensor in tensors),
        zeros=sum(tensor.zeros for tensor in tensors),
        matrix_total=sum(tensor.total for tensor in matrices),
        matrix_zeros=sum(tensor.zeros for tensor in matrices),
        dtypes=dtypes,
    )


def _inspect_file(name: str, header: Header) -> Iterator[TensorInspection]:
    with open_regular(header.path) as handle:
        for tensor in header.tensors:
            yield _inspect_tensor(name, handle, header, tensor)


def _inspect_tensor(file: str, handle: int, header: Header, tensor: TensorInfo) -> TensorInspection:
    zeros = negative = nonfinite = near = 0
    rms: float | None = None
    fits: dict[str, float] = {}
    if DTYPE_BITS[tensor.dtype] % 8 == 0:
        for block in blocks(handle, header, tensor):
            found = count_block(block, tensor.dtype)
            zeros, negative, nonfinite = (
                zeros + found[0],
                negative + found[1],
                nonfinite + found[2],
            )
    if tensor.dtype in FLOATS and tensor.total:
        rms = _rms(handle, header, tensor)
        near = _near_zero(handle, header, tensor, NEAR_ZERO * rms)
        fits = _fits(handle, header, tensor)
    return TensorInspection(
        tensor.name,
        file,
        tensor.dtype,
        tensor.shape,
        tensor.end - tensor.begin,
        tensor.total,
        zeros,
        negative,
        nonfinite,
        near,
        rms,
        fits,
    )


def _values(
    handle: int, header: Header, tensor: TensorInfo
) -> Iterator[NDArray[np.float64] | NDArray[np.float32]]:
    """The elements, block by block, as floats that numpy can compute with."""
    for block in blocks(handle, header, tensor):
        if tensor.dtype == "BF16":
            yield (np.frombuffer(block, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif tensor.dtype == "F64":
            yield np.frombuffer(block, np.float64)
        elif tensor.dtype == "F32":
            yield np.frombuffer(block, np.float32)
        else:
            yield np.frombuffer(block, np.float16).astype(np.float32)


def _rms(handle: int, header: Header, tensor: TensorInfo) -> float:
    total = 0.0
    for values in _values(handle, header, tensor):
        finite = np.where(np.isfinite(values), values, 0).astype(np.float64)
        total += float(np.dot(finite, finite))
    return float(np.sqrt(total / tensor.total))


def _near_zero(handle: int, header: Header, tensor: TensorInfo, limit: float) -> int:
    count = 0
    for values in _values(handle, header, tensor):
        count += int(np.count_nonzero((np.abs(values) < limit) & (values != 0)))
    return count


def _fits(handle: int, header: Header, tensor: TensorInfo) -> dict[str, float]:
    """The share of groups of each pattern with no more non-zeros than it keeps.

    Groups lie along the last axis, as they do in a linear layer's weight. Blocks hold whole
    groups, because they are a power of two long.
    """
    fits = {}
    for keep, group in PATTERNS:
        if len(tensor.shape) < 2 or tensor.shape[-1] % group:
            continue
        fitting = 0
        for values in _values(handle, header, tensor):
            kept = np.count_nonzero(values.reshape(-1, group), axis=1)
            fitting += int(np.count_nonzero(kept <= keep))
        fits[f"{keep}:{group}"] = fitting / (tensor.total // group)
    return fits

"""What was written, turned into records: counts, sizes, histogram and gate of a finished folder."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hamcli.checkpoint.recount import count_zeros, weight_files
from hamcli.report.records import (
    FileRecord,
    GateCondition,
    GateRecord,
    Histogram,
    SizeRecord,
    SparsityRecord,
    TensorRecord,
)

GZIP_LEVEL = 6
GZIP_BLOCK = 4 * 2**20
BINS = 80
HISTOGRAM_LIMIT = 2_000_000  # weights; beyond it every n-th counts


def counted_tensors(
    folder: Path, names: Sequence[str], stored: Mapping[str, Sequence[str]]
) -> tuple[TensorRecord, ...]:
    """Zeros of each target, counted in the written file.

    Args:
        folder: The written folder.
        names: The targets by their names in the model.
        stored: Name in the model to names in the files.
    """
    counts = count_zeros(folder)
    made = []
    for name in names:
        for file_name in stored[name]:
            one = counts[file_name]
            made.append(
                TensorRecord.counted(
                    file_name, shape=one.shape, dtype=one.dtype, zeros=one.zeros, total=one.total
                )
            )
    return tuple(made)


def sparsity_record(
    tensors: Sequence[TensorRecord],
    target: float,
    *,
    num_parameters: int,
    threshold: float | None,
    natural_zeros: int,
    method: str | None,
    allocation: str,
    pattern: str,
) -> SparsityRecord:
    """The sums over the targets."""
    return SparsityRecord.counted(
        target,
        zeros=sum(one.zeros for one in tensors),
        total=sum(one.total for one in tensors),
        num_parameters=num_parameters,
        threshold=threshold,
        natural_zeros=natural_zeros,
        method=method,
        allocation=allocation,
        pattern=pattern,
    )


def size_record(folder: Path, inputs: Sequence[Path]) -> SizeRecord:
    """Bytes of the weight files, as they are and as gzip makes them."""
    written = weight_files(folder)
    return SizeRecord(
        dense_bytes=sum(path.stat().st_size for path in written),
        gzip_bytes=sum(gzip_bytes(path) for path in written),
        input_bytes=sum(path.stat().st_size for path in inputs),
        input_gzip_bytes=sum(gzip_bytes(path) for path in inputs),
    )


def gzip_bytes(path: Path) -> int:
    """Size of the file after gzip, streamed and not kept."""
    packer = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 31)
    total = 0
    with path.open("rb") as file:
        while block := file.read(GZIP_BLOCK):
            total += len(packer.compress(block))
    return total + len(packer.flush())


def file_records(folder: Path, files: Sequence[tuple[str, int, str]]) -> tuple[FileRecord, ...]:
    """Path, bytes and digest of each written file."""
    return tuple(FileRecord(path, size, digest) for path, size, digest in files)


def histogram(before: Sequence[Tensor], after: Sequence[Tensor]) -> Histogram:
    """Weights near zero, within one root mean square of the dense ones, before and after."""
    total = sum(one.numel() for one in before)
    stride = max(1, total // HISTOGRAM_LIMIT)
    first = torch.cat([one.detach().flatten()[::stride].float().cpu() for one in before])
    second = torch.cat([one.detach().flatten()[::stride].float().cpu() for one in after])
    scale = float(first.square().mean().sqrt()) or 1.0
    edges = torch.linspace(-1, 1, BINS + 1)
    return Histogram(
        edges=tuple(round(float(edge), 6) for edge in edges),
        before=_bins(first / scale),
        after=_bins(second / scale),
        before_zeros=int((first == 0).sum()),
        after_zeros=int((second == 0).sum()),
        total=first.numel(),
        unit="weight / RMS of the dense targets"
        + (f", every {stride}th weight" if stride > 1 else ""),
    )


def _bins(values: Tensor) -> tuple[int, ...]:
    alive = values[values != 0]
    return tuple(int(count) for count in torch.histc(alive, bins=BINS, min=-1, max=1))


def gate_record(
    max_drop: float | None, min_sparsity: float | None, drop: float | None, achieved: float
) -> GateRecord | None:
    """The verdict on the recipe's gate; None where it sets no condition."""
    conditions = []
    if max_drop is not None:
        passed = drop is not None and drop <= max_drop
        conditions.append(GateCondition("max_drop", max_drop, drop, passed))
    if min_sparsity is not None:
        conditions.append(
            GateCondition("min_sparsity", min_sparsity, achieved, achieved >= min_sparsity)
        )
    return GateRecord.of(*conditions) if conditions else None

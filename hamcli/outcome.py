"""What a run found and wrote, turned into records: counts, sizes, quality, machine, gate."""

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hamcli.checkpoint.recount import count_zeros
from hamcli.data import Data
from hamcli.evaluation import Quality, drop
from hamcli.opening import Opened, data_digests
from hamcli.report.records import (
    DataRecord,
    EnvironmentRecord,
    FileRecord,
    GateCondition,
    GateRecord,
    Histogram,
    ModelRecord,
    QualityRecord,
    SparsityRecord,
    TensorRecord,
)
from hamcli.runstate import installed_versions
from hamcli.sparsity.targets import Targets
from hamcli.speed import Found, speed_of

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
    # several parameters may lie in one tensor of the file, which counts once
    file_names = dict.fromkeys(file_name for name in names for file_name in stored[name])
    found = [counts[file_name] for file_name in file_names]
    return tuple(
        TensorRecord.counted(
            one.name, shape=one.shape, dtype=one.dtype, zeros=one.zeros, total=one.total
        )
        for one in found
    )


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


def file_records(folder: Path, files: Sequence[tuple[str, int, str]]) -> tuple[FileRecord, ...]:
    """Path, bytes and digest of each written file."""
    return tuple(FileRecord(path, size, digest) for path, size, digest in files)


def sampled(tensors: Sequence[Tensor], stride: int, targets: Targets) -> list[Tensor]:
    """Every `stride`-th weight of each, fp32 on the CPU; of parts, those that the whole would give.

    Args:
        tensors: Shaped as the targets' weights.
        stride: At least 1.
        targets: Say where parts begin.
    """
    made = []
    for one, target in zip(tensors, targets, strict=True):
        begin = 0
        if target.part is not None:
            begin = -target.part.begin * math.prod(target.part.shape[1:]) % stride
        made.append(one.detach().flatten()[begin::stride].float().cpu())
    return made


def sampling_stride(total: int) -> int:
    """Which weights the histogram of `total` weights counts: every so manieth."""
    return max(1, total // HISTOGRAM_LIMIT)


def histogram(before: Sequence[Tensor], after: Sequence[Tensor], stride: int) -> Histogram:
    """Weights near zero, within one root mean square of the dense ones, before and after.

    Args:
        before: The dense weights, `sampled`.
        after: The sparse ones.
        stride: Of the samples.
    """
    first, second = torch.cat(list(before)), torch.cat(list(after))
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


def histogram_of(before: Sequence[Tensor], targets: Targets) -> Histogram:
    """The histogram of targets that are whole, `before` and now."""
    stride = sampling_stride(targets.total)
    samples = [sampled(one, stride, targets) for one in (before, targets.params)]
    return histogram(samples[0], samples[1], stride)


def _bins(values: Tensor) -> tuple[int, ...]:
    alive = values[values != 0]
    return tuple(int(count) for count in torch.histc(alive, bins=BINS, min=-1, max=1))


def measured_speed(
    opened: Opened, model: torch.nn.Module, tensors: Sequence[TensorRecord], device: torch.device
) -> Found:
    """Speed of the model as reloaded, some of whose modules become sparse; or why there is none.

    Args:
        opened: The run.
        model: From the written files.
        tensors: As counted there.
        device: Of the run.
    """
    others = (one.dtype for one in tensors if one.dtype != "F32")
    wanted = opened.recipe.evaluation.speed == "auto"
    is_cpu = device.type == "cpu"
    return speed_of(model, wanted=wanted, dtype=next(others, "F32"), is_cpu=is_cpu)


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


def quality_record(
    dense: Quality | None, sparse: Quality, one_shot: Quality | None, data: Data
) -> QualityRecord:
    """Dense beside sparse; without a dense model to compare, the sparse one alone."""
    return QualityRecord(
        metric=sparse.metric,
        dense=dense.value if dense is not None else None,
        sparse=sparse.value,
        drop=drop(dense, sparse) if dense is not None else None,
        data=f"{sparse.num_examples:,} of {data.evaluation_description}",
        num_examples=sparse.num_examples,
        higher_is_better=sparse.higher_is_better,
        one_shot=one_shot.value if one_shot is not None else None,
        agreement=sparse.agreement,
        dense_loss=dense.loss if dense is not None else None,
        sparse_loss=sparse.loss,
    )


def model_record(opened: Opened) -> ModelRecord:
    """Where the dense model came from, without paths of this machine."""
    source = opened.source
    name = source.id.partition("@")[0]
    return ModelRecord(
        id=Path(name).name if Path(name).exists() else name,
        revision=source.revision,
        sha256=dict(source.files),
        task=opened.loaded.task,
        architecture=opened.loaded.class_name,
        is_hub=source.revision is not None,
    )


def environment_record(
    device: torch.device, precision: str, num_processes: int = 1, parallel: str = "none"
) -> EnvironmentRecord:
    """Versions, device and processes; no host name, no path."""
    on_cuda = device.type == "cuda"
    return EnvironmentRecord(
        versions=installed_versions(),
        device=device.type,
        threads=torch.get_num_threads(),
        device_name=torch.cuda.get_device_name(device) if on_cuda else None,
        precision="fp32" if precision == "no" else precision,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        num_processes=num_processes,
        parallel=parallel,
    )


def data_record(opened: Opened) -> DataRecord:
    """What the run learned from."""
    source = opened.recipe.data.source
    return DataRecord(
        description=opened.data.description,
        source=Path(source).name if source is not None and Path(source).exists() else source,
        num_train=len(opened.data.train),
        num_evaluation=len(opened.data.evaluation),
        notes=opened.data.notes,
        sha256=data_digests(opened.recipe),
    )

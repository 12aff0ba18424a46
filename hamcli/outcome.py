"""What a run found and wrote, turned into records: counts, sizes, quality, machine, gate."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hamcli.checkpoint.recount import count_zeros
from hamcli.data import Data
from hamcli.evaluation import Quality, drop
from hamcli.opening import Opened, data_digests
from hamcli.progress import StepRecord
from hamcli.recipe import Recipe
from hamcli.report.records import (
    Curves,
    DataRecord,
    EnvironmentRecord,
    GateCondition,
    GateRecord,
    HamRecord,
    ModelRecord,
    QualityRecord,
    SparsityRecord,
    TensorRecord,
    TrainingRecord,
)
from hamcli.runstate import installed_versions
from hamcli.speed import Found, speed_of

CURVE_LIMIT = 500
"""Points of a curve in the report."""


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


def training_record(
    recipe: Recipe,
    records: Sequence[StepRecord],
    group: Mapping[str, Any],
    exponents: Mapping[str, Any] | None,
    *,
    objective: str,
    seconds: float,
    sign_flips: float,
) -> TrainingRecord:
    """How it was trained.

    Args:
        recipe: Of the run.
        records: One of each step.
        group: The targets' group of the optimizer.
        exponents: Of the last mirror step that was measured.
        objective: What was minimised, in words.
        seconds: Of training.
        sign_flips: Share of the surviving weights that changed their sign.
    """
    means = [one.exponent_mean for one in records if one.exponent_mean is not None]
    greatest = [one.exponent_max for one in records if one.exponent_max is not None]
    moved = [one.moved_fraction for one in records if one.moved_fraction is not None]
    last = exponents or {}
    is_on = not (group["alpha"] == 0 and group["beta"] == 0)
    ham = HamRecord(
        scaling=group["scaling"],
        eta=group["eta"],
        alpha=last.get("alpha"),
        beta=group["beta"],
        clamp=group["clamp"],
        exponent_mean=_mean(means),
        exponent_max=max(greatest, default=None),
        clamped_fraction=last.get("clamped_fraction"),
        guard_events=last.get("guard_events", 0),
    )
    training = recipe.training
    return TrainingRecord(
        steps=training.steps,
        seconds=round(seconds, 1),
        ham_moved_fraction=_mean(moved),
        sign_flips=sign_flips,
        curves=Curves.from_rows(_curve_rows(records), limit=CURVE_LIMIT),
        ham=ham if is_on else None,
        batch_size=training.batch_size * training.accumulation,
        objective=objective,
        optimizer=recipe.optimizer.base,
    )


def _curve_rows(records: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """A row a step; between two measured mirror steps the last one's exponents hold."""
    rows = []
    held: dict[str, Any] = {}
    for record in records:
        row = asdict(record)
        measured = {key: row[key] for key in ("exponent_mean", "exponent_max")}
        held = measured if record.exponent_mean is not None else held
        rows.append({**row, **held})
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


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

"""What a run found, as plain records of words and numbers; imports no torch.

A record is what `report.json` holds, key by key. `to_json` is canonical: sorted keys, ASCII, finite
numbers only (NaN and infinity become null), so that equal runs give equal bytes apart from the
fields that `Report.volatile` names. `html` and `card` make pages for people from the same records.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self, cast

from hamcli.errors import InputRefused
from hamcli.report.plain import canonical, finite, from_plain, no_report, to_plain

SCHEMA_VERSION = 1
REPORT_NAME = "report.json"
REPORT_LIMIT_BYTES = 64 * 2**20
CURVE_LIMIT = 2000

# Measured on the machine: all that may differ between two identical runs. Where zeros gain little
# the speed may be there once and be null, with its reason, another time.
VOLATILE = ("speed", "speed_reason", "training.seconds")

NO_SPEED = (
    "Stock runtimes compute with zeros as with any other number: a dense checkpoint runs at the "
    "speed of the model it came from. No speed-up is claimed; hamcli.load measures whether a "
    "sparse kernel pays on a machine."
)


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """Where the dense model came from.

    Args:
        id: The model as the user named it; a folder by its last name, never an absolute path.
        revision: Commit of a hub model.
        sha256: Digest of each file that was read, by relative name.
        task: What the model was trained and measured as.
        architecture: Class name from the model's own config.
        is_hub: Whether `id` is a hub id; the model card links it as the base model then.
        license: SPDX id when the source states one.
    """

    id: str
    revision: str | None = None
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    task: str | None = None
    architecture: str | None = None
    is_hub: bool = False
    license: str | None = None


@dataclass(frozen=True, slots=True)
class EnvironmentRecord:
    """The machine and the versions that the bytes depend on; no host name, no path, no time.

    Args:
        num_processes: That trained together, as counted when they had met.
        parallel: none, ddp or fsdp.
    """

    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    device_name: str | None = None
    precision: str | None = None
    python: str | None = None
    platform: str | None = None
    num_processes: int = 1
    parallel: str = "none"


@dataclass(frozen=True, slots=True)
class SparsityRecord:
    """Zeros counted in the written file.

    Args:
        target: Fraction of the targets' weights asked to be zero.
        achieved: `zeros / total`.
        zeros: Zeros among the targets' weights, tied tensors once.
        total: Number of the targets' weights.
        overall_achieved: `zeros / num_parameters`.
        num_parameters: All parameters of the model.
        threshold: Largest magnitude that was dropped.
        natural_zeros: Zeros that the dense targets already held.
    """

    target: float
    achieved: float
    zeros: int
    total: int
    overall_achieved: float
    num_parameters: int
    threshold: float | None = None
    natural_zeros: int = 0
    method: str | None = None
    allocation: str | None = None
    pattern: str | None = None

    @property
    def asked_zeros(self) -> int:
        """Zeros that the target asks for: `target * total` rounded half to even, exactly."""
        return round(Fraction(repr(self.target)) * self.total)

    @classmethod
    def counted(
        cls, target: float, *, zeros: int, total: int, num_parameters: int, **more: Any
    ) -> Self:
        """A record whose two fractions follow from its three counts."""
        return cls(
            target=target,
            achieved=_fraction(zeros, total),
            zeros=zeros,
            total=total,
            overall_achieved=_fraction(zeros, num_parameters),
            num_parameters=num_parameters,
            **more,
        )


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One prunable tensor as counted in the written file, by its name there."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    total: int
    sparsity: float

    @classmethod
    def counted(
        cls, name: str, *, shape: Sequence[int], dtype: str, zeros: int, total: int
    ) -> Self:
        """A record whose sparsity follows from its counts."""
        return cls(name, tuple(shape), dtype, zeros, total, _fraction(zeros, total))


HARM = 0.05  # as `QualityRecord.drop` counts; less may be the chance of few examples


@dataclass(frozen=True, slots=True)
class QualityRecord:
    """Quality on held-out data, the dense model beside the sparse one.

    Args:
        metric: Name of the number, `"accuracy"`, `"perplexity"`, `"cosine to dense"`.
        dense: Value of the dense model.
        sparse: Value of the model as reloaded from the written files.
        drop: What was lost, positive when worse: absolute where higher is better, else relative.
        data: What it was measured on, in words.
        num_examples: How many held-out examples.
        higher_is_better: Which way the metric counts.
        one_shot: Value of pruning the same targets as far in one shot, without training.
        agreement: Fraction of predictions that are those of the dense model.
        dense_loss: Held-out loss of the dense model.
        sparse_loss: Held-out loss of the sparse model.
    """

    metric: str
    dense: float | None
    sparse: float | None
    drop: float | None
    data: str
    num_examples: int
    higher_is_better: bool = True
    one_shot: float | None = None
    agreement: float | None = None
    dense_loss: float | None = None
    sparse_loss: float | None = None

    @property
    def is_below_one_shot(self) -> bool:
        """Whether training made the model clearly worse than pruning alone, by over `HARM`."""
        if self.sparse is None or self.one_shot is None:
            return False
        lost = self.one_shot - self.sparse
        return lost > HARM if self.higher_is_better else -lost > HARM * self.one_shot


@dataclass(frozen=True, slots=True)
class DataRecord:
    """What the run learned from, in words and counts."""

    description: str
    source: str | None = None
    num_train: int | None = None
    num_evaluation: int | None = None
    notes: tuple[str, ...] = ()
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One written file, by its path relative to the folder."""

    path: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class SizeRecord:
    """Bytes of the weights on disk.

    Args:
        dense_bytes: The weight files in the dense form.
        packed_bytes: The same in the packed form.
        gzip_bytes: The dense form after gzip.
        input_bytes: The weight files the run started from.
        input_gzip_bytes: Those after gzip.
        format: Form of the weight files that lie beside the report, dense or packed.
    """

    dense_bytes: int
    packed_bytes: int | None = None
    gzip_bytes: int | None = None
    input_bytes: int | None = None
    input_gzip_bytes: int | None = None
    format: str = "dense"

    @property
    def written_bytes(self) -> int:
        """The weight files as they lie there."""
        is_packed = self.format == "packed" and self.packed_bytes is not None
        return cast(int, self.packed_bytes) if is_packed else self.dense_bytes


@dataclass(frozen=True, slots=True)
class SpeedRecord:
    """Measured inference, dense beside sparse, in `unit`; `ratio` above 1 when sparse is faster."""

    runtime: str
    dense: float | None
    sparse: float | None
    ratio: float | None
    unit: str = "examples/s"


@dataclass(frozen=True, slots=True)
class Curves:
    """What the run looked like step by step; all columns as long as `step`, None where unknown."""

    step: tuple[int, ...] = ()
    loss: tuple[float | None, ...] = ()
    sparsity: tuple[float | None, ...] = ()
    lr: tuple[float | None, ...] = ()
    exponent_mean: tuple[float | None, ...] = ()
    exponent_max: tuple[float | None, ...] = ()

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], *, limit: int = CURVE_LIMIT) -> Self:
        """Columns from a history of rows; evenly thinned to `limit` rows, first and last kept."""
        rows = [rows[index] for index in evenly(len(rows), limit)]
        return cls(
            step=tuple(int(row["step"]) for row in rows),
            **{
                field.name: tuple(finite(row.get(field.name)) for row in rows)
                for field in dataclasses.fields(cls)
                if field.name != "step"
            },
        )


@dataclass(frozen=True, slots=True)
class HamRecord:
    """What the mirror step did.

    Args:
        scaling: `"raw"`, `"calibrated"`, `"tracked"` or `"normalised"`.
        eta: Size asked of the exponent where the scaling has one.
        alpha: Strength of the gradient term; None where it differs between groups.
        beta: Strength of the decay term.
        clamp: Largest exponent allowed.
        exponent_mean: Mean magnitude of the exponent over the run.
        exponent_max: Largest magnitude of the exponent in the run.
        clamped_fraction: Fraction of exponents cut at the clamp.
        guard_events: How often the guard made alpha smaller.
    """

    scaling: str
    eta: float | None = None
    alpha: float | None = None
    beta: float | None = None
    clamp: float | None = None
    exponent_mean: float | None = None
    exponent_max: float | None = None
    clamped_fraction: float | None = None
    guard_events: int = 0


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """The fine-tuning.

    Args:
        steps: Optimizer steps done.
        seconds: Wall time over all parts of a resumed run.
        ham_moved_fraction: Fraction of mirrored weights that a mirror step changed, mean of steps.
        sign_flips: Fraction of surviving weights whose sign is not that of the dense model.
        curves: Step by step.
        ham: What the mirror step did; None for a run without it.
        batch_size: Examples per optimizer step.
        skipped_steps: Steps left out because a gradient was not finite.
        objective: What was minimised, in words.
        optimizer: Base optimizer.
    """

    steps: int
    seconds: float | None
    ham_moved_fraction: float | None
    sign_flips: float | None
    curves: Curves = Curves()
    ham: HamRecord | None = None
    batch_size: int | None = None
    skipped_steps: int = 0
    objective: str | None = None
    optimizer: str | None = None


@dataclass(frozen=True, slots=True)
class GateCondition:
    """One condition, `"max_drop"` or `"min_sparsity"`, its limit and the value found."""

    name: str
    limit: float
    value: float | None
    passed: bool


@dataclass(frozen=True, slots=True)
class GateRecord:
    """The verdict; passed when every condition is."""

    passed: bool
    conditions: tuple[GateCondition, ...] = ()

    @classmethod
    def of(cls, *conditions: GateCondition) -> Self:
        """The verdict that follows from its conditions."""
        return cls(all(condition.passed for condition in conditions), conditions)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Weights of the targets near zero, before and after, over the same bins.

    Args:
        edges: Bin edges, ascending, one more than there are bins.
        before: Counts of the dense model's weights, exact zeros left out.
        after: Counts of the written model's weights, exact zeros left out.
        before_zeros: Exact zeros of the dense model.
        after_zeros: Exact zeros of the written model.
        total: Weights of the targets, those outside the bins included.
        unit: What the edges are measured in.
    """

    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    before_zeros: int
    after_zeros: int
    total: int
    unit: str = "weight"


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a run found; the whole of `report.json`."""

    ham_version: str
    model: ModelRecord
    recipe: dict[str, Any]
    environment: EnvironmentRecord
    sparsity: SparsityRecord
    tensors: tuple[TensorRecord, ...]
    files: tuple[FileRecord, ...]
    size: SizeRecord
    quality: QualityRecord | None = None
    speed: SpeedRecord | None = None
    speed_reason: str | None = NO_SPEED
    training: TrainingRecord | None = None
    gate: GateRecord | None = None
    command: str = "sparsify"
    data: DataRecord | None = None
    histogram: Histogram | None = None
    warnings: tuple[str, ...] = ()
    volatile: tuple[str, ...] = VOLATILE
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and finite numbers; every key of the schema is there."""
        return cast(dict[str, Any], to_plain(self))

    def to_json(self) -> str:
        """The canonical text of `report.json`, ASCII, keys sorted."""
        return canonical(self.to_dict())

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """The report that `to_dict` made; keys that this version does not know are passed over.

        Raises:
            InputRefused: A key is missing, a value has the wrong type, or the schema is newer.
        """
        version = document.get("schema_version") if isinstance(document, Mapping) else None
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise no_report("schema_version", f"is {version!r}", f"at most {SCHEMA_VERSION}")
        return cast(Self, from_plain(cls, document, ""))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote.

        Raises:
            InputRefused: The text is no JSON object, or no report.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise no_report("", f"is not JSON: {error}", "one JSON object") from error
        return cls.from_dict(document)


def read_report(path: Path) -> Report:
    """The report at `path`, a `report.json` or the folder that holds one.

    Raises:
        InputRefused: There is none, or it cannot be read as one.
    """
    file = path / REPORT_NAME if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            content = stream.read(REPORT_LIMIT_BYTES + 1)
    except OSError as error:
        raise InputRefused(
            "E446",
            "no report",
            file,
            error.strerror or str(error),
            f"a folder written by ham, with its {REPORT_NAME}",
        ) from error
    if len(content) > REPORT_LIMIT_BYTES:
        raise no_report(file, "is too large", f"at most {REPORT_LIMIT_BYTES:,} bytes")
    try:
        return Report.from_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise no_report(file, "is not UTF-8", "JSON text") from error
    except InputRefused as error:
        raise InputRefused(
            error.code,
            error.what,
            f"{file}: {error.where}" if error.where else file,
            error.why,
            error.right,
        ) from error


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def evenly(length: int, limit: int) -> list[int]:
    """At most `limit` indices spread evenly over `length` items, first and last among them."""
    if length <= limit:
        return list(range(length))
    return [round(index * (length - 1) / (limit - 1)) for index in range(limit)]

"""`ham check`: the CI gate. Counts the zeros in the files anew; imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from hamcli.checkpoint.recount import count_zeros
from hamcli.errors import GateFailed, InputRefused
from hamcli.report.records import REPORT_NAME, read_report


@dataclass(frozen=True, slots=True)
class Check:
    """What was found.

    Attributes:
        path: What was checked.
        zeros: Of the targets that the report lists, or of all matrices without a report.
        total: Weights of the same.
        sparsity: `zeros / total`.
        drop: Quality lost, from the report; None where nothing says.
        failures: One text a failed condition.
    """

    path: str
    zeros: int
    total: int
    sparsity: float
    drop: float | None
    failures: tuple[str, ...]


def check(path: Path, *, min_sparsity: float | None, max_drop: float | None) -> Check:
    """Hold a checkpoint against conditions.

    Args:
        path: A folder written by ham, any folder of safetensors, or one file.
        min_sparsity: Least share of zeros among the targets, recounted in the files.
        max_drop: Greatest loss of quality, as the report says.

    Raises:
        InputRefused: There are no weights, or `max_drop` is asked where no report says.
    """
    if not path.exists():
        raise InputRefused(
            "E401", "no such checkpoint", path, "", "a folder or a .safetensors file"
        )
    has_report = path.is_dir() and (path / REPORT_NAME).exists()
    report = read_report(path) if has_report else None
    counts = count_zeros(path)
    failures = []
    if report is not None:
        names = [tensor.name for tensor in report.tensors]
        lost = [name for name in names if name not in counts]
        if lost:
            raise InputRefused("E448", "a tensor of the report is missing", path, lost[0])
        told = {tensor.name: tensor.zeros for tensor in report.tensors}
        wrong = [name for name in names if counts[name].zeros != told[name]]
        failures += [
            f"{name}: the report says {told[name]:,} zeros, the file has {counts[name].zeros:,}"
            for name in wrong[:1]
        ]
    else:
        names = [name for name, count in counts.items() if len(count.shape) >= 2]
    zeros = sum(counts[name].zeros for name in names)
    total = sum(counts[name].total for name in names)
    sparsity = zeros / total if total else 0.0
    drop = report.quality.drop if report is not None and report.quality is not None else None
    if min_sparsity is not None and sparsity < min_sparsity:
        failures.append(
            f"sparsity is {sparsity:.6g} ({zeros:,} of {total:,}), below {min_sparsity:g}"
        )
    if max_drop is not None:
        if drop is None:
            raise InputRefused(
                "E449",
                "no quality to check",
                path,
                "no report says a drop",
                "a folder written by ham",
            )
        if drop > max_drop:
            failures.append(f"quality drop is {drop:.6g}, above {max_drop:g}")
    return Check(str(path), zeros, total, sparsity, drop, tuple(failures))


def refuse_failures(found: Check) -> None:
    """Raise GateFailed, a line a failed condition."""
    if found.failures:
        first, *others = (
            GateFailed("E301", "gate failed", found.path, text) for text in found.failures
        )
        raise GateFailed("E301", first.what, first.where, first.why, others=others)

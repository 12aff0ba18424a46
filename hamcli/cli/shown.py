"""What commands show on a terminal: records as tables and lines."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from hamcli import __version__
from hamcli.console import Screen, duration, facts, size, table
from hamcli.errors import GateFailed

LINES_SHOWN = 10
NAMES_SHOWN = 3
"""Sets of duplicates, and names in a line, that `ham inspect` shows without --all."""


def show_report(
    screen: Screen,
    report: Any,
    folder: Path,
    *,
    model: str | None = None,
    config: str | None = None,
) -> None:
    """Sparsity, quality and size of a finished run.

    Args:
        screen: Where it is shown.
        report: Of the run.
        folder: Its output.
        model: As it was named, for a line to run.
        config: The same.

    Raises:
        GateFailed: E301, a gate of the report is not met.
    """
    found, quality = report.sparsity, report.quality
    rows = [
        ("sparsity of targets", f"{found.achieved:.4%}", f"{found.zeros:,} of {found.total:,}"),
        ("of all parameters", f"{found.overall_achieved:.4%}", f"of {found.num_parameters:,}"),
    ]
    if quality is not None:
        rows.append((quality.metric + ", sparse", _number(quality.sparse), quality.data))
        if quality.dense is not None:
            rows.append((quality.metric + ", dense", _number(quality.dense), ""))
        if quality.one_shot is not None:
            rows.append((quality.metric + ", one-shot", _number(quality.one_shot), "no training"))
        if quality.drop is not None:
            rows.append(
                ("drop", _number(quality.drop), "" if quality.higher_is_better else "relative")
            )
    else:
        words = _to_evaluate(report, folder, model, config)
        rows.append(("quality", "not measured", words))
    rows.append(("size", size(report.size.dense_bytes), _other_sizes(report.size)))
    screen.result(
        report.to_dict(),
        facts(rows),
        "speed: " + (_speed(report) or "not measured"),
        f"written to {folder}",
    )
    if report.gate is not None and not report.gate.passed:
        failed = [one for one in report.gate.conditions if not one.passed]
        faults = [GateFailed("E301", "gate failed", folder, _condition(one)) for one in failed]
        raise GateFailed("E301", "gate failed", folder, faults[0].why, others=faults[1:])


def _to_evaluate(report: Any, folder: Path, model: str | None, config: str | None) -> str:
    """The command that measures quality, where there can be one."""
    if report.model.task is None:
        return "without a config.json nobody can build the model"
    words = ["ham", "eval", str(folder), "--against", model or report.model.id]
    return shlex.join([*words, *(["--config", config] if config else [])])


def _other_sizes(found: Any) -> str:
    others = [(found.packed_bytes, "packed"), (found.gzip_bytes, "after gzip")]
    return ", ".join(f"{size(one)} {form}" for one, form in others if one is not None)


def _speed(report: Any) -> str:
    """The honest line on speed."""
    if report.speed is None:
        return str(report.speed_reason or "")
    return f"{report.speed.ratio:.2f} x dense with {report.speed.runtime}"


def _condition(one: Any) -> str:
    relation = "above" if one.name == "max_drop" else "below"
    return f"{one.name}: {_number(one.value)} is {relation} {one.limit:g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def show_costs(screen: Screen, found: Any) -> None:
    """What a step and a choice of masks cost."""
    step, chosen = found.step, found.selection
    how = f"{step.threads} thread(s), {step.clock} time, {step.rounds} rounds"
    columns = ["ms", "ratio", "fastest", "10 % .. 90 %", "extra MiB"]
    screen.result(
        found.as_json(),
        f"one step: {step.base}, {step.num_weights:,} weights in {step.dtype}, {how}",
        table(["form", *columns], map(_cost_row, step.variants)),
        f"training: {_training_words(found)}",
        f"exponents: {_exponent_words(step.exponents)}",
        f"extension: {step.native}; {step.numba}",
        f"\nchoice of 90 % of {chosen.num_weights:,} weights, "
        f"which leaves {chosen.mask_bytes / 2**20:.1f} MiB of masks",
        table(["part", *columns], map(_cost_row, chosen.variants)),
        f"\n{found.conclusion}",
    )


def show_runtimes(screen: Screen, found: Any) -> None:
    """What runtimes gain, a table for each number of threads, and where none does."""
    share = found.zeros / max(1, found.total)
    shown: list[Any] = [
        f"{found.model}: {found.task}, {share:.1%} of the weights in matrices are zero"
    ]
    for threads in dict.fromkeys(one.threads for one in found.cells):
        cells = [one for one in found.cells if one.threads == threads]
        clock = "CPU time" if cells[0].clock == "cpu" else "wall time"
        replaced = found.replaced[str(threads)]
        shown.append(
            f"\n{threads} thread(s), {clock}, medians of {found.rounds} rounds in turn; "
            f"auto made {replaced} modules sparse"
        )
        columns = [found.unit, "runtime", "ms", "x dense", "10 % .. 90 %", "error"]
        shown.append(table(columns, map(_runtime_row, cells)))
    screen.result(found.as_json(), *shown, "", *found.conclusions)


def _runtime_row(one: Any) -> tuple[str, ...]:
    low, high = one.ratio_spread
    ratios = f"{one.ratio:.2f}", f"{low:.2f} .. {high:.2f}"
    return (one.shape, one.runtime, f"{one.seconds * 1e3:.2f}", *ratios, f"{one.error:.1e}")


def _cost_row(one: Any) -> tuple[str, ...]:
    low, high = one.ratio_spread
    extra = "-" if one.extra_bytes is None else f"{one.extra_bytes / 2**20:.1f}"
    ratios = f"{one.ratio:.2f}", f"{one.fastest_ratio:.2f}", f"{low:.2f} .. {high:.2f}"
    return (one.name, f"{one.seconds * 1e3:.1f}", *ratios, extra)


def _training_words(found: Any) -> str:
    seconds = found.step.training_seconds
    if seconds is None:
        return str(found.training)
    return (
        f"forward and backward {seconds * 1e3:.0f} ms ({found.training}); "
        f"the step is {found.step.step_share:.1%} of both"
    )


def _exponent_words(found: Any) -> str:
    if found is None:
        return "not measured"
    return (
        f"mean {found.mean:.2g}, greatest {found.max:.2g}, {found.moved_fraction:.1%} of the "
        f"weights moved, {found.clamped_fraction:.1%} at the clamp"
    )


def show_inspection(screen: Screen, found: Any, *, each: bool) -> None:
    """Tensors of a checkpoint, the same place in every layer on one line, or each by itself."""
    shown = found.tensors if each else found.groups
    with_values = found.counted is not None
    columns = ["tensor", *([] if each else ["number"]), "shape", "dtype", "bytes", "weights"]
    columns += ["zeros", "near zero", "2:4 fit"] if with_values else []
    screen.result(
        asdict(found),
        table(columns, [_tensor_row(one, each, with_values) for one in shown]),
        *(f"tied: {one.name} is also {', '.join(one.tied)}" for one in found.tensors if one.tied),
        *(
            _value_lines(found, each)
            if with_values
            else ["zeros, magnitudes, N:M fit and duplicates: --values"]
        ),
        f"{len(found.tensors):,} tensors, {found.total:,} weights, "
        f"{size(found.file_bytes)} in {len(found.files)} file(s)",
    )


def _tensor_row(one: Any, each: bool, with_values: bool) -> tuple[str, ...]:
    shapes, dtypes = ((one.shape,), (one.dtype,)) if each else (one.shapes, one.dtypes)
    first = "x".join(map(str, shapes[0])) or "scalar"
    row = [
        one.name,
        *([] if each else [str(one.num_tensors)]),
        first if len(shapes) == 1 else f"{first} and {len(shapes) - 1} more",
        ", ".join(dtypes),
        size(one.bytes),
        f"{one.total:,}",
    ]
    if with_values:
        fit = (one.fits or {}).get("2:4")
        measured = one.total if each else one.measured
        near = None if one.near_zero is None else one.near_zero / max(1, measured)
        row += [_share(one.sparsity, 2), _share(near, 2), _share(fit, 1)]
    return tuple(row)


def _share(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _value_lines(found: Any, each: bool) -> list[Any]:
    """What values tell beside the table: duplicates, what is not finite, magnitudes, zeros."""
    same = [f"duplicates: {_listed(names, each)}" for names in found.duplicates]
    if not each and len(same) > LINES_SHOWN:
        same[LINES_SHOWN:] = [f"{len(same) - LINES_SHOWN:,} more sets of duplicates: --all"]
    broken = [f"{one.name}, {one.nonfinite:,}" for one in found.tensors if one.nonfinite]
    bad = [f"NaN or infinite: {_listed(broken, each, '; ')}"] if broken else []
    return [*same, *bad, *_magnitude_table(found), *_zero_lines(found)]


def _listed(names: Sequence[str], each: bool, between: str = ", ") -> str:
    if each or len(names) <= NAMES_SHOWN:
        return between.join(names)
    return f"{between.join(names[:NAMES_SHOWN])} and {len(names) - NAMES_SHOWN:,} more"


def _magnitude_table(found: Any) -> list[Any]:
    """Share of the weights in matrices, zeros aside, below each edge of the histograms."""
    from hamcli.checkpoint.inspection import EDGES

    bins = [one.histogram for one in found.tensors if one.histogram and len(one.shape) >= 2]
    counts = [sum(column) for column in zip(*bins, strict=True)]
    if not sum(counts):
        return []
    below = list(accumulate(counts))[: len(EDGES)]
    columns = ["magnitude over rms", *(f"< {edge:g}" for edge in EDGES)]
    shares = [f"{one / sum(counts):.2%}" for one in below]
    return ["", table(columns, [["of matrices, zeros aside", *shares]]), ""]


def _zero_lines(found: Any) -> list[str]:
    zeros, matrix_zeros = found.zeros or 0, found.matrix_zeros or 0
    lines = [
        f"matrices: {matrix_zeros:,} zeros of {found.matrix_counted:,} "
        f"({matrix_zeros / max(1, found.matrix_counted):.4%}); "
        f"all: {zeros:,} of {found.counted:,}"
    ]
    if rest := found.total - found.counted:
        lines.append(f"not counted: {rest:,} weights of 4 or 6 bits")
    return lines


def show_evaluation(screen: Screen, found: Any) -> None:
    """Quality of a checkpoint, and of the dense one beside it."""
    rows = [(found.metric, _number(found.value)), ("dense", _number(found.dense))]
    rows += [("drop", _number(found.drop)), ("agreement with dense", _number(found.agreement))]
    rows += [("loss", _number(found.loss)), ("examples", str(found.num_examples))]
    screen.result(asdict(found), facts(rows), found.data)


def show_check(screen: Screen, found: Any) -> None:
    """The verdict of a gate on one line."""
    drop = "" if found.drop is None else f", drop {found.drop:.6g}"
    verdict = "failed" if found.failures else "passed"
    screen.result(
        asdict(found),
        f"{verdict}: sparsity {found.sparsity:.6g} ({found.zeros:,} of {found.total:,}){drop}",
    )


def show_export(screen: Screen, found: Any) -> None:
    """Bytes before and after."""
    screen.result(
        asdict(found),
        f"{size(found.dense_bytes)} dense, {size(found.packed_bytes)} packed: "
        f"{_times_smaller(found.ratio, 2)}",
        f"written to {found.out}",
    )


def _times_smaller(ratio: float, digits: int) -> str:
    """`7.80 x smaller`, or how much larger: a packed file of few or no zeros may be."""
    if ratio >= 1 or ratio <= 0:
        return f"{ratio:.{digits}f} x smaller"
    return f"{1 / ratio:.{digits}f} x larger"


def show_onnx(screen: Screen, found: Any) -> None:
    """What the graph takes and gives, how exact it is, and its zeros."""
    share = found.zeros / max(1, found.total)
    screen.result(
        asdict(found),
        f"{', '.join(found.inputs)} -> {', '.join(found.outputs)}, opset {found.opset}, fp32",
        f"greatest relative error against torch, in onnxruntime: {found.max_relative_error:.2g}",
        f"zeros in the file: {found.zeros:,} of {found.total:,} in matrices ({share:.4%}), "
        "those of the folder; ONNX engines compute with them as with any other number",
        f"written to {found.out}",
    )


def show_plan(screen: Screen, found: Any) -> None:
    """What a run would do."""
    rows = [
        ("task", found.task),
        ("data", found.data),
        ("targets", f"{len(found.targets)} tensors, {found.prunable:,} weights"),
        ("zeros at the end", f"{found.zeros:,} ({found.overall_sparsity:.2%} of all parameters)"),
        ("stay dense", ", ".join(found.excluded) or "nothing"),
        ("steps", f"{found.steps:,}, about {duration(found.seconds)} here"),
        (
            "memory" if found.world == 1 else f"memory, each of {found.world} ({found.parallel})",
            f"{size(found.memory_bytes)}, and {size(found.memory.activations)} of activations",
        ),
        ("of which", _memory(found.memory)),
        ("disk", size(found.disk_bytes)),
        *(("cost", cost) for cost in found.costs),
        *((f"file, {one.targets}", _size_words(one)) for one in found.sizes),
    ]
    screen.result(asdict(found), facts(rows))


def _size_words(one: Any) -> str:
    packed, gzipped = (one.dense_bytes / max(1, n) for n in (one.packed_bytes, one.gzip_bytes))
    text = (
        f"{size(one.dense_bytes)} dense, about {size(one.packed_bytes)} packed "
        f"({_times_smaller(packed, 1)}), {size(one.gzip_bytes)} in gzip ({gzipped:.1f} x)"
    )
    return f"{text}; --set '{one.setting}', at a cost in quality" if one.setting else text


def _memory(found: Any) -> str:
    parts = {name: count for name, count in asdict(found).items() if name != "activations"}
    return ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)


def show_theory(screen: Screen, found: Any, out: Path | None) -> None:
    """The checks, claim by claim."""
    from hamcli.theory.page import cell_text

    shown: list[Any] = []
    for one in found.checks:
        rows = [[cell_text(cell) for cell in row] for row in one.rows]
        shown += [one.title, *(f"  {line.line}" for line in one.claims)]
        shown += [table(one.columns, rows), ""]
    where = f"written to {out}" if out is not None else "--out DIR writes the plots"
    screen.result(found.to_dict(__version__), *shown, where)


def refuse_failed_claims(found: Any) -> None:
    """Raise GateFailed, E302, if a claim of the theory fails."""
    failed = [GateFailed("E302", "a claim of the theory fails", "", one.line.split("  ", 1)[1])
              for one in found.failures]  # fmt: skip
    if failed:
        first = failed[0]
        raise GateFailed("E302", first.what, "", first.why, others=failed[1:])


def show_comparison(screen: Screen, found: Any, folder: Path) -> None:
    """Quality by method and sparsity, and the pairs."""
    from hamcli.comparison.page import pair_table, quality_table, references

    better = "higher" if found.higher_is_better else "lower"
    screen.result(
        found.to_dict(__version__),
        f"{found.metric}, {better} is better, mean ± standard error",
        table(*quality_table(found)),
        *(f"{name}: {value}" for name, value in references(found)),
        *(["", "HAM on minus off, seed by seed"] if found.pairs else []),
        *([table(*pair_table(found))] if found.pairs else []),
        f"written to {folder}",
    )

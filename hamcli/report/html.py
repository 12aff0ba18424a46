"""`report.html`: a self-contained page of a run, with charts, for light and dark, wide and narrow.

The page asks nothing of the network and runs no script (its own policy forbids both), so that
names taken from other people's files can do nothing in it. It holds no time and no path, so that
equal runs give equal pages; a measured speed is the one exception.
"""

import math
from dataclasses import dataclass
from typing import Any

import yaml
from markupsafe import Markup

from hamcli.report import charts, heatmap, wording
from hamcli.report.page import render_page
from hamcli.report.records import (
    Curves,
    EnvironmentRecord,
    QualityRecord,
    Report,
    SizeRecord,
    SparsityRecord,
    TrainingRecord,
)

HTML_NAME = "report.html"
TEMPLATE = "report.html.j2"
OPEN_TABLE_LIMIT = 100
CUT = 3


@dataclass(frozen=True, slots=True)
class Bar:
    """A labelled bar: `share` of the longest one, 0 to 1, and the words of its value."""

    label: str
    value: str
    share: float
    style: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its heading, the labels of its lines and their styles."""

    title: str
    chart: Markup
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""


def render(report: Report) -> str:
    """The page, as text.

    Args:
        report: All that is shown; every string in it may come from a file nobody vouches for.
    """
    return render_page(TEMPLATE, _view(report))


def _view(report: Report) -> dict[str, Any]:
    training = report.training
    return {
        "report": report,
        "exactness": wording.exactness(report.sparsity),
        "parameters": wording.short_count(report.sparsity.num_parameters),
        "shares": _shares(report.sparsity),
        "quality": _quality(report.quality) if report.quality else None,
        "size_bars": _size_bars(report.size),
        "size_line": wording.size_line(report.size),
        "conditions": [
            (wording.condition(condition), condition.passed)
            for condition in (report.gate.conditions if report.gate else ())
        ],
        "curves": _curves(training.curves, report) if training else [],
        "training_facts": _training_facts(training) if training else [],
        "tensor_figures": _tensor_figures(report),
        "tensors_open": len(report.tensors) <= OPEN_TABLE_LIMIT,
        "histogram": _histogram(report),
        "zero_bars": _zero_bars(report),
        "environment_facts": _environment_facts(report),
        "model_facts": _model_facts(report),
        "recipe": yaml.safe_dump(report.to_dict()["recipe"], width=96).splitlines(),
    }


def _shares(sparsity: SparsityRecord) -> list[Bar]:
    whole = sparsity.num_parameters or 1
    parts = (
        ("zero", sparsity.zeros, "zeros"),
        ("kept in targets", sparsity.total - sparsity.zeros, "kept"),
        ("not targeted", sparsity.num_parameters - sparsity.total, "outside"),
    )
    return [
        Bar(label, f"{wording.count(part)} ({wording.percent(part / whole)})", part / whole, style)
        for label, part, style in parts
    ]


def _quality(quality: QualityRecord) -> dict[str, Any]:
    values = [
        ("dense", quality.dense, "dense"),
        ("sparse", quality.sparse, "sparse"),
        ("one-shot", quality.one_shot, "one-shot"),
    ]
    known = [abs(value) for _, value, _ in values if value is not None]
    trained = [abs(value) for _, value, _ in values[:2] if value is not None]
    # a perplexity of 400 beside 5.8 and 6.0 would leave nothing to see of these: its bar is cut
    longest = min(max(known, default=0.0), CUT * max(trained, default=math.inf)) or 1.0
    return {
        "sparse": wording.metric_value(quality.metric, quality.sparse),
        "drop": wording.drop(quality),
        "is_worse": quality.drop is not None and quality.drop > 0,
        "way": "higher is better" if quality.higher_is_better else "lower is better",
        "bars": [
            Bar(
                label,
                wording.metric_value(quality.metric, value),
                min(1.0, abs(value) / longest),
                f"{style} cut" if abs(value) > longest else style,
            )
            for label, value, style in values
            if value is not None
        ],
    }


def _size_bars(size: SizeRecord) -> list[Bar]:
    written = "sparse, dense form" if size.format == "packed" else "written"
    values = [
        ("input", size.input_bytes, "dense"),
        (written, size.dense_bytes, "sparse"),
        ("input, gzip", size.input_gzip_bytes, "dense"),
        (f"{written}, gzip", size.gzip_bytes, "sparse"),
        ("packed", size.packed_bytes, "sparse"),
    ]
    largest = max([value for _, value, _ in values if value is not None]) or 1
    return [
        Bar(label, wording.megabytes(value), value / largest, style)
        for label, value, style in values
        if value is not None
    ]


def _curves(curves: Curves, report: Report) -> list[Figure]:
    smooth = charts.smoothed(curves.loss)
    clamp = report.training.ham.clamp if report.training and report.training.ham else None
    mean = charts.Line("mean", curves.exponent_mean, "first")
    largest = charts.Line("largest", curves.exponent_max, "second")
    target = report.sparsity.target
    drawn = [
        (
            "Loss",
            (("each step", "faint"), ("smoothed", "first")),
            "",
            charts.curve(
                curves.step,
                [
                    charts.Line("loss", curves.loss, "faint"),
                    charts.Line("smoothed", smooth, "first"),
                ],
                label="Loss by step",
            ),
        ),
        (
            "Sparsity of the targets",
            (),
            "",
            charts.curve(
                curves.step,
                [charts.Line("sparsity", curves.sparsity, "first")],
                label="Sparsity by step",
                show=_in_percent,
                floor=0.0,
                reference=(target, "target"),
            ),
        ),
        (
            "Learning rate",
            (),
            "",
            charts.curve(
                curves.step,
                [charts.Line("lr", curves.lr, "first")],
                label="Learning rate by step",
                floor=0.0,
            ),
        ),
        (
            "Exponent of the mirror step",
            (("mean", "first"), ("largest", "second")),
            "log scale",
            charts.curve(
                curves.step,
                [mean, largest],
                label="Exponent of the mirror step by step",
                log=True,
                reference=(clamp, "clamp") if clamp else None,
            ),
        ),
    ]
    return [Figure(title, chart, legend, note) for title, legend, note, chart in drawn if chart]


def _in_percent(fraction: float | None) -> str:
    return wording.UNKNOWN if fraction is None else f"{wording.number(100 * fraction)}%"


def _training_facts(training: TrainingRecord) -> list[tuple[str, str]]:
    facts = [("steps", wording.count(training.steps))]
    if training.batch_size is not None:
        facts.append(("batch size", wording.count(training.batch_size)))
    if training.optimizer:
        facts.append(("base optimizer", wording.sentence(training.optimizer, 80)))
    if training.objective:
        facts.append(("minimised", wording.sentence(training.objective, 160)))
    if training.skipped_steps:
        facts.append(("steps skipped", wording.count(training.skipped_steps)))
    if training.sign_flips is not None:
        facts.append(("surviving weights that changed sign", wording.percent(training.sign_flips)))
    if training.ham is None:
        return facts
    ham = training.ham
    facts.append(("HAM scaling", wording.name(ham.scaling, 40)))
    for label, value in (
        ("eta", ham.eta),
        ("alpha", ham.alpha),
        ("beta", ham.beta),
        ("clamp", ham.clamp),
        ("exponent, mean", ham.exponent_mean),
        ("exponent, largest", ham.exponent_max),
    ):
        if value is not None:
            facts.append((f"HAM {label}", wording.number(value)))
    if training.ham_moved_fraction is not None:
        facts.append(("weights HAM moved", wording.percent(training.ham_moved_fraction)))
    if ham.clamped_fraction is not None:
        facts.append(("exponents clamped", wording.percent(ham.clamped_fraction)))
    if ham.guard_events:
        facts.append(("times the guard made alpha smaller", wording.count(ham.guard_events)))
    return facts


def _tensor_figures(report: Report) -> list[Figure]:
    figures: list[Figure] = []
    if not report.sparsity.zeros:
        return figures
    grid = heatmap.grid(report.tensors)
    if grid is not None:
        low, high = heatmap.shade_range(grid)
        figures.append(
            Figure(
                "By kind and layer",
                heatmap.heatmap(grid),
                note=f"percent of zeros; colour from {100 * low:g}% to {100 * high:g}%",
            )
        )
    chart = charts.profile(report.tensors, report.sparsity.achieved)
    if chart is not None:
        note = f"dashed: all targets, {wording.percent(report.sparsity.achieved)}"
        figures.append(Figure("Tensor by tensor", chart, note=note))
    return figures


def _histogram(report: Report) -> Figure | None:
    record = report.histogram
    chart = charts.histogram(record, wording.sentence(record.unit, 60)) if record else None
    if chart is None:
        return None
    return Figure(
        "Weights near zero",
        chart,
        (("before", "before"), ("after", "after")),
        "share of the targets' weights in each bin, exact zeros left out",
    )


def _zero_bars(report: Report) -> list[Bar]:
    record = report.histogram
    if record is None or not record.total:
        return []
    return [
        Bar(label, wording.percent(zeros / record.total), zeros / record.total, style)
        for label, zeros, style in (
            ("before", record.before_zeros, "dense"),
            ("after", record.after_zeros, "sparse"),
        )
    ]


def _processes(environment: EnvironmentRecord) -> str:
    kind = f", {environment.parallel}" if environment.num_processes > 1 else ""
    return f"{environment.num_processes}{kind}"


def _environment_facts(report: Report) -> list[tuple[str, str]]:
    environment = report.environment
    device = environment.device
    if environment.device_name:
        device = f"{device} ({environment.device_name})"
    known = [
        ("device", device),
        ("threads", str(environment.threads)),
        ("processes", _processes(environment)),
        ("precision", environment.precision),
        ("platform", environment.platform),
        ("python", environment.python),
        ("ham", report.ham_version),
        *sorted(environment.versions.items()),
    ]
    return [(wording.name(key, 60), wording.name(value)) for key, value in known if value]


def _model_facts(report: Report) -> list[tuple[str, str]]:
    model = report.model
    known = [
        ("model", model.id),
        ("revision", model.revision),
        ("architecture", model.architecture),
        ("task", model.task),
        ("license", model.license),
        ("trained on", report.data.description if report.data else None),
        ("measured on", report.quality.data if report.quality else None),
    ]
    return [(key, wording.sentence(value, 240)) for key, value in known if value]

"""`compare.html`, `compare.json` and `table.md`: a comparison for people and programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hamcli import __version__
from hamcli.comparison.cells import write_whole
from hamcli.comparison.grid import DENSE, Arm
from hamcli.comparison.records import Comparison, Mean, Spread, Tuning
from hamcli.report import charts, wording
from hamcli.report.html import Figure
from hamcli.report.page import render_page

PAGE, DOCUMENT, TABLE = "compare.html", "compare.json", "table.md"
COLOURS = 7  # of the style sheet; more methods begin again with the first
APART, TOGETHER = 6.0, 48.0  # pixels between the bars of two arms at one sparsity, and of all
UNKNOWN = "-"


def write_comparison(found: Comparison, folder: Path) -> None:
    """Write the page, the document and the table; files of these names are replaced.

    Args:
        found: What is told.
        folder: An existing folder.

    Raises:
        ResourceError: The disk is full or the folder may not be written.
    """
    document = json.dumps(
        found.to_dict(__version__), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False
    )
    write_whole(folder / DOCUMENT, document + "\n")
    write_whole(folder / TABLE, markdown(found))
    write_whole(folder / PAGE, render(found))


# ---- tables ----


def quality_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: an arm a row, a sparsity a column, mean ± standard error (n)."""
    at = {(one.arm, one.target): one for one in found.means}
    rates = {one.arm: one.lr for one in found.tunings}
    columns = ["method", "HAM", "lr", *(percent(one) for one in found.grid.targets)]
    rows = []
    for arm in found.grid.arms:
        if arm.method == DENSE:
            continue
        cells = [
            _mean_text(at[arm, target], len(found.grid.seeds)) for target in found.grid.targets
        ]
        rows.append([arm.method, "on" if arm.ham else "off", f"{rates[arm]:g}", *cells])
    return columns, rows


def pair_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: HAM on minus off, a method and sparsity a row."""
    columns = ["method", "sparsity", found.metric or "quality", "loss", "seeds", "verdict"]
    rows = [
        [
            one.method,
            percent(one.target),
            spread_text(one.value, sign=True),
            spread_text(one.loss, sign=True),
            f"{one.value.n} of {one.value.n + one.lost}",
            one.verdict,
        ]
        for one in found.pairs
    ]
    return columns, rows


def tuning_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what each arm gave at each learning rate, on validation rows."""
    width = max((len(one.trials) for one in found.tunings), default=0)
    columns = ["method", "chosen", *(f"trial {index + 1}" for index in range(width))]
    rows = [
        [one.arm.label, f"{one.lr:g}" + (" (edge)" if one.is_edge else ""), *_trial_texts(one)]
        for one in found.tunings
    ]
    return columns, rows if width else []


def _trial_texts(tuning: Tuning) -> list[str]:
    return [
        f"{row.cell.lr:g}: "
        + (row.outcome.status if row.outcome.value is None else wording.number(row.outcome.value))
        for row in tuning.trials
    ]


def references(found: Comparison) -> list[tuple[str, str]]:
    """The dense model before and after as long a training, and one shot at each sparsity."""
    facts = [("dense model", wording.number(found.dense))] if found.dense is not None else []
    for one in found.means:
        if one.arm.method == DENSE:
            facts.append(("dense, fine-tuned as long", spread_text(one.value)))
    for target in found.grid.targets:
        shots = [
            row.outcome.one_shot
            for row in found.done
            if row.cell.target == target and row.outcome.one_shot is not None
        ]
        if shots:
            facts.append((f"one shot at {percent(target)}", wording.number(shots[0])))
    return facts


def lost_runs(found: Comparison) -> list[str]:
    """A line for each run that did not end well."""
    return [
        f"{row.cell.label}: {row.outcome.status}: {row.outcome.why}"
        for row in found.rows
        if row.outcome.status != "done"
    ]


def _mean_text(mean: Mean, seeds: int) -> str:
    text = spread_text(mean.value)
    return text if not mean.lost else f"{text} ({mean.value.n} of {seeds})"


def spread_text(spread: Spread, *, sign: bool = False) -> str:
    """`0.8912 ± 0.0021`; with `sign` a plus is written too."""
    if spread.mean is None:
        return UNKNOWN
    plus = "+" if sign and spread.mean > 0 else ""
    mean = plus + wording.number(spread.mean)
    if spread.standard_error is None:
        return mean
    return f"{mean} ± {wording.number(spread.standard_error, 2)}"


def percent(target: float) -> str:
    """`95 %`."""
    return f"{100 * target:g} %"


def describe(found: Comparison) -> list[str]:
    """Model, budget and how it was tuned, a few words each."""
    training = found.facts["recipe"]["training"]
    seeds, trials = len(found.grid.seeds), found.grid.trials
    tuned = f"lr: best of {trials} on validation rows" if trials > 1 else "lr: the recipe's"
    measured = next((row.outcome.data for row in found.done), None)
    words = [
        str(found.facts["model"]["id"]),
        f"{training['steps']:,} steps of {training['batch_size'] * training['accumulation']}",
        f"{seeds} seed{'s' if seeds != 1 else ''}",
        tuned,
    ]
    return [*words, *([measured] if measured else [])]


def markdown(found: Comparison) -> str:
    """The tables as Markdown."""
    better = "higher" if found.higher_is_better else "lower"
    parts = [
        "# Comparison of methods",
        " · ".join(map(_cell, describe(found))),
        f"{found.metric or 'Quality'}, {better} is better: mean ± standard error over seeds.",
        _markdown_table(*quality_table(found)),
    ]
    if facts := references(found):
        parts.append("\n".join(f"- {name}: {value}" for name, value in facts))
    if found.pairs:
        parts += ["## HAM on minus off, seed by seed", _markdown_table(*pair_table(found))]
    columns, rows = tuning_table(found)
    if rows:
        parts += ["## Learning rates tried", _markdown_table(columns, rows)]
    if lost := lost_runs(found):
        parts += ["## Runs that gave no number", "\n".join(f"- {_cell(one)}" for one in lost)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that is safe in Markdown: names come from files nobody vouches for."""
    escaped = wording.sentence(text).replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("<", "&lt;").replace("[", "\\[").replace("`", "\\`")


# ---- page ----


def render(found: Comparison) -> str:
    """The page, as text: self-contained, without a script, for light and dark."""
    view: dict[str, Any] = {
        "about": describe(found),
        "figures": [one for one in (_quality_figure(found), _pair_figure(found)) if one],
        "quality": quality_table(found),
        "references": references(found),
        "pairs": pair_table(found),
        "tuning": tuning_table(found),
        "tuned_at": percent(max(found.grid.targets)),
        "lost": lost_runs(found),
        "runs": _run_rows(found),
        "metric": found.metric or "quality",
        "better": "higher is better" if found.higher_is_better else "lower is better",
        "version": __version__,
    }
    return render_page("compare.html.j2", view, room="hamcli.comparison")


def _styles(found: Comparison) -> dict[Arm, str]:
    """A colour a method; dashed without HAM, where there is an arm with it."""
    number = {
        name: index % COLOURS
        for index, name in enumerate(one for one in found.grid.methods if one != DENSE)
    }
    return {
        arm: f"m{number[arm.method]}"
        + (" plain" if not arm.ham and Arm(arm.method, True) in found.grid.arms else "")
        for arm in found.grid.arms
        if arm.method != DENSE
    }


def _quality_figure(found: Comparison) -> Figure | None:
    styles = _styles(found)
    series, legend = [], []
    for index, (arm, style) in enumerate(styles.items()):
        shown = [one for one in found.means if one.arm == arm and one.value.mean is not None]
        series.append(_points(arm.label, shown, style, _shift(index, len(styles))))
        legend.append((arm.label, style))
    level = next((one.value.mean for one in found.means if one.arm.method == DENSE), None)
    words = "dense, fine-tuned"
    if level is None:
        level, words = found.dense, "dense"
    chart = charts.relation(
        series,
        label=f"{found.metric} against sparsity",
        x_label="sparsity of the targets, %",
        level=(level, "") if level is not None else None,
        margin=0.06,
    )
    if chart is None:
        return None
    title = f"{wording.sentence(found.metric, 60)} against sparsity"
    note = "mean ± standard error"
    if level is not None:
        note += f"; horizontal: {words}, {wording.number(level)}"
    return Figure(title[:1].upper() + title[1:], chart, tuple(legend), note)


def _pair_figure(found: Comparison) -> Figure | None:
    methods = list(dict.fromkeys(one.method for one in found.pairs))
    styles = _styles(found)
    series, legend = [], []
    for index, method in enumerate(methods):
        shown = [one for one in found.pairs if one.method == method and one.value.mean is not None]
        style = styles[Arm(method, True)]
        series.append(_points(method, shown, style, _shift(index, len(methods))))
        legend.append((method, style))
    chart = charts.relation(
        series,
        label=f"Paired difference of {found.metric}, HAM on minus off",
        x_label="sparsity of the targets, %",
        level=(0.0, ""),
        margin=0.06,
    )
    if chart is None:
        return None
    side = "above" if found.higher_is_better else "below"
    return Figure("HAM on minus off, in pairs", chart, tuple(legend), f"{side} 0 HAM helps")


def _points(label: str, shown: Sequence[Any], style: str, shift: float) -> charts.Points:
    return charts.Points(
        label,
        [100 * one.target for one in shown],
        [one.value.mean for one in shown],
        style,
        marked=True,
        spread=[one.value.standard_error or 0.0 for one in shown],
        shift=shift,
    )


def _shift(index: int, count: int) -> float:
    return (index - (count - 1) / 2) * min(APART, TOGETHER / count)


def _run_rows(found: Comparison) -> list[list[str]]:
    rows = []
    for row in found.rows:
        outcome, cell = row.outcome, row.cell
        rows.append(
            [
                cell.arm.label,
                percent(cell.target),
                str(cell.seed),
                f"{cell.lr:g}",
                outcome.status if outcome.value is None else wording.number(outcome.value),
                UNKNOWN if outcome.loss is None else wording.number(outcome.loss),
                UNKNOWN if outcome.zeros is None else f"{outcome.zeros:,} of {outcome.total:,}",
                UNKNOWN if outcome.exponent_mean is None else f"{outcome.exponent_mean:.2g}",
            ]
        )
    return rows

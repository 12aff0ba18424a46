"""`theory.html`, `theory.png` and `theory.json`: what the checks found, for people and programs."""

import json
import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hamcli import __version__
from hamcli.errors import UsageError
from hamcli.report import charts, wording
from hamcli.report.html import Figure
from hamcli.report.page import render_page
from hamcli.theory.checks import Sizes
from hamcli.theory.records import Curve, Plot, Results

PAGE, PICTURE, DOCUMENT = "theory.html", "theory.png", "theory.json"
LEGEND_COLUMNS = 3
COLOURS = {  # of the picture, which is light; the page has its own for light and dark
    "first": "#2a78d6",
    "middle": "#619be1",
    "pale": "#9dc1ec",
    "second": "#d9601f",
    "third": "#0a7d2c",
    "quiet": "#a3a19a",
}


def make_folder(folder: Path) -> None:
    """Make the folder for `write_results`, if it is not there.

    Raises:
        UsageError: Something else stands there.
        OSError: It may not be made.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError("E111", "cannot be an output folder", folder, "it is a file", "a folder")
    folder.mkdir(parents=True, exist_ok=True)


def write_results(results: Results, folder: Path, *, sizes: Sizes | None = None) -> None:
    """Write the page, the picture and the document; files of these names are replaced.

    Args:
        results: What was found.
        folder: An existing folder.
        sizes: Of the problems behind `results`.

    Raises:
        OSError: The disk is full or the folder may not be written.
    """
    document = json.dumps(
        results.to_dict(__version__), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False
    )
    (folder / DOCUMENT).write_text(document + "\n", encoding="utf-8", newline="\n")
    page = render(results, sizes=sizes)
    (folder / PAGE).write_text(page, encoding="utf-8", newline="\n")
    draw(results, folder / PICTURE)


def render(results: Results, *, sizes: Sizes | None = None) -> str:
    """The page, as text: self-contained, without a script, for light and dark.

    Args:
        results: What was found.
        sizes: Of the problems behind `results`.
    """
    sizes = sizes or Sizes()
    claims = [one for check in results.checks for one in check.claims]
    view: dict[str, Any] = {
        "results": results,
        "checks": [
            (check, _figure(check.plot), [[cell_text(cell) for cell in row] for row in check.rows])
            for check in results.checks
        ],
        "passed": sum(one.passed for one in claims),
        "total": len(claims),
        "rows": sizes.rows,
        "weights": sizes.weights,
        "nonzero": sizes.nonzero,
        "version": __version__,
    }
    return render_page("theory.html.j2", view, room="hamcli.theory")


def cell_text(cell: float | str | None) -> str:
    """A cell of a check's table as a person reads it."""
    if isinstance(cell, str):
        return cell
    return "never" if cell is None else wording.number(cell, 3)


def _figure(plot: Plot) -> Figure:
    chart = charts.relation(
        [
            charts.Points(one.label, one.x, one.y, one.style, one.marked, one.hollow)
            for one in plot.curves
        ],
        label=plot.title,
        x_label=plot.x_label,
        log_x=plot.log_x,
        log_y=plot.log_y,
        level=plot.level,
    )
    legend = tuple((one.label, one.style) for one in plot.curves)
    return Figure(plot.title, chart or Markup(""), legend, plot.y_label)


def draw(results: Results, path: Path) -> None:
    """The plots as one PNG, a panel a check.

    Args:
        results: What was found.
        path: Of the picture.

    Raises:
        OSError: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    canvas = Canvas(figsize=(12, 8.4), dpi=130, layout=layout)
    FigureCanvasAgg(canvas)
    for axes, check in zip(canvas.subplots(2, 2).flat, results.checks, strict=True):
        _draw_plot(axes, check.plot, ("✓ " if check.passed else "✗ ") + check.plot.title)
    canvas.savefig(path, metadata={"Software": None})


def _draw_plot(axes: Any, plot: Plot, title: str) -> None:
    lines = math.ceil(len(plot.curves) / LEGEND_COLUMNS)
    axes.set_title(
        title, loc="left", pad=8 + 15 * lines, fontsize=12, fontweight="bold", color="#141413"
    )
    axes.set_xlabel(plot.x_label, color="#55534f")
    axes.set_ylabel(plot.y_label, color="#55534f")
    if plot.log_x:
        axes.set_xscale("log")
        found = [x for one in plot.curves for x in one.x if x > 0]
        low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
        margin = 0.03 * (high - low)
        axes.set_xlim(10 ** (low - margin), 10 ** (high + margin))
    if plot.log_y:
        axes.set_yscale("log")
    axes.grid(color="#e9e8e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#7d7b75", which="both", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c3c2b7")
    for one in plot.curves:
        _draw_curve(axes, one)
    if plot.level is not None:
        axes.axhline(plot.level[0], color="#55534f", linewidth=1, linestyle=(0, (4, 4)))
        if plot.level[1]:
            axes.annotate(
                f"{plot.level[1]} {wording.number(plot.level[0])}",
                (1, plot.level[0]),
                xycoords=axes.get_yaxis_transform(),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color="#55534f",
            )
    axes.legend(
        ncols=LEGEND_COLUMNS,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        borderpad=0,
        columnspacing=1.4,
        frameon=False,
        fontsize=9,
        labelcolor="#55534f",
    )


def _draw_curve(axes: Any, curve: Curve) -> None:
    colour = COLOURS[curve.style]
    if curve.hollow:
        axes.plot(curve.x, curve.y, "o", ms=9, mfc="none", mec=colour, mew=1.5, label=curve.label)
        return
    marker = "o" if curve.marked else ""
    axes.plot(curve.x, curve.y, color=colour, lw=2, marker=marker, ms=5, label=curve.label)

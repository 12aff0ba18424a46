"""Charts as inline SVG, drawn from numbers; colours are left to the page's style sheet.

A chart scales with its column, so a page needs no script; what a pointer rests on is told by
`<title>`. All text passes through markupsafe, since names come from files nobody vouches for.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from markupsafe import Markup

from hamcli.report import wording
from hamcli.report.records import Histogram, TensorRecord, evenly

POINT_LIMIT = 400
HOVER_LIMIT = 60
WIDE = 990
TINY = 1e-200  # far below any number of a run; products of smaller ones would vanish
NARROW = 460
PROFILE_LEAST = 8
COLUMN_WIDTH = 40
HEATMAP_ROWS = 40
HEATMAP_COLUMNS = 128

RAISED = str.maketrans(
    {
        "-": "\N{SUPERSCRIPT MINUS}",
        "0": "\N{SUPERSCRIPT ZERO}",
        "1": "\N{SUPERSCRIPT ONE}",
        "2": "\N{SUPERSCRIPT TWO}",
        "3": "\N{SUPERSCRIPT THREE}",
        "4": "\N{SUPERSCRIPT FOUR}",
        "5": "\N{SUPERSCRIPT FIVE}",
        "6": "\N{SUPERSCRIPT SIX}",
        "7": "\N{SUPERSCRIPT SEVEN}",
        "8": "\N{SUPERSCRIPT EIGHT}",
        "9": "\N{SUPERSCRIPT NINE}",
    }
)

Number = float | None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart; `style` is a class of the style sheet."""

    label: str
    values: Sequence[Number]
    style: str


@dataclass(frozen=True, slots=True)
class _Frame:
    """A plot's rectangle and the values at its edges; `log` for a logarithmic y axis."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: int = 56
    right: int = 14
    top: int = 12
    bottom: int = 40
    log: bool = False
    log_x: bool = False

    def x(self, value: float) -> float:
        low, high = self.x_range
        if self.log_x:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        share = (value - low) / (high - low)
        return round(self.left + share * (self.width - self.left - self.right), 2)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        share = (value - low) / (high - low)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 2)

    @property
    def base(self) -> int:
        return self.height - self.bottom


def curve(
    step: Sequence[int],
    lines: Sequence[Line],
    *,
    label: str,
    show: Callable[[Number], str] = wording.number,
    log: bool = False,
    floor: float | None = None,
    ceiling: float | None = None,
    reference: tuple[float, str] | None = None,
) -> Markup | None:
    """Lines over training steps, or None where there is nothing to draw.

    Args:
        step: Optimizer steps, ascending.
        lines: One to three lines as long as `step`.
        label: What the chart shows, for those who hear the page.
        show: Words for a value of the y axis.
        log: Whether the y axis is logarithmic; values that are not positive are left out.
        floor: Smallest value that the y axis must show.
        ceiling: Largest value that the y axis must show.
        reference: A value to mark by a dashed line, and its words.
    """
    values = [value for line in lines for value in line.values if _drawable(value, log)]
    if len(step) < 1 or not values:
        return None
    extra = [value for value in (floor, ceiling) if value is not None]
    if reference is not None and not log:
        extra.append(reference[0])
    low, high = min([*values, *extra]), max([*values, *extra])
    y_ticks = _log_ticks(low, high) if log else _ticks(low, high, 4)
    frame = _Frame(
        NARROW,
        250,
        (min(0, step[0]), max(step[-1], step[0] + 1)),
        _log_range(low, high) if log else (y_ticks[0], y_ticks[-1]),
        log=log,
    )
    parts = [
        _y_axis(frame, y_ticks, _power if log else show),
        _x_axis(frame, _ticks(*frame.x_range, 5), "step"),
    ]
    if reference is not None and frame.y_range[0] <= reference[0] <= frame.y_range[1]:
        parts.append(_reference(frame, *reference, show))
    parts += [_path(frame, step, line, log) for line in lines]
    parts.append(_hover(frame, step, lines, show))
    return _svg(frame.width, frame.height, label, parts)


@dataclass(frozen=True, slots=True)
class Points:
    """Points of a `relation`: joined by a line, marked by dots, or rings that stand alone.

    `spread` is what lies on each side of y, drawn as a bar; `shift` moves all by pixels to the
    right, so that bars of several series at one x stand side by side.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    marked: bool = False
    hollow: bool = False
    spread: Sequence[float] = ()
    shift: float = 0.0


def relation(
    series: Sequence[Points],
    *,
    label: str,
    x_label: str,
    log_x: bool = False,
    log_y: bool = False,
    level: tuple[float, str] | None = None,
    margin: float = 0.0,
) -> Markup | None:
    """Curves y over x with axes of their own, or None where there is nothing to draw.

    Args:
        series: Finite numbers; on a logarithmic axis those that are not positive are left out.
        label: What the chart shows, for those who hear the page.
        x_label: Name of the x axis.
        log_x: Whether the x axis is logarithmic.
        log_y: Whether the y axis is.
        level: A value of y to mark by a dashed line, and its words; without words, the line alone.
        margin: Share of the range of x that is left free on both sides; not of a logarithmic one.
    """
    kept = [
        [
            (x, y, spread)
            for x, y, spread in zip(one.x, one.y, one.spread or [0.0] * len(one.x), strict=True)
            if math.isfinite(x) and math.isfinite(y) and _drawable(x, log_x) and _drawable(y, log_y)
        ]
        for one in series
    ]
    found = [point for points in kept for point in points]
    if not found:
        return None
    xs = [x for x, _, _ in found]
    ends = [end for _, y, spread in found for end in (y - spread, y + spread)]
    ys = [y for y in ends if _drawable(y, log_y)] + ([level[0]] if level is not None else [])
    y_ticks = _log_ticks(min(ys), max(ys)) if log_y else _ticks(min(ys), max(ys), 5)
    x_range = _decades(min(xs), max(xs)) if log_x else _with_margin(min(xs), max(xs), margin)
    x_ticks = _log_ticks(*x_range, 8) if log_x else _ticks(min(xs), max(xs), 5, inside=True)
    frame = _Frame(
        NARROW,
        280,
        x_range,
        _log_range(min(ys), max(ys)) if log_y else (y_ticks[0], y_ticks[-1]),
        right=18,
        log=log_y,
        log_x=log_x,
    )
    parts = [
        _y_axis(frame, y_ticks, _power if log_y else wording.number),
        _x_axis(frame, x_ticks, x_label, _power if log_x else None),
    ]
    if level is not None:
        parts.append(_reference(frame, *level, wording.number if level[1] else lambda _: ""))
    for one, points in zip(series, kept, strict=True):
        if not one.hollow and points:
            thin = _extremes([y for _, y, _ in points], POINT_LIMIT)
            path = "L".join(
                f"{_size(frame.x(points[i][0]) + one.shift)} {frame.y(points[i][1])}" for i in thin
            )
            parts.append(Markup('<path class="line {}" d="M{}"/>').format(one.style, path))
        parts += [_error_bar(frame, one, *point) for point in points if point[2] > 0]
    for one, points in zip(series, kept, strict=True):
        if one.marked or one.hollow:
            parts += [_mark(frame, one, x, y, spread, x_label) for x, y, spread in points]
    return _svg(frame.width, frame.height, label, parts)


def _with_margin(low: float, high: float, margin: float) -> tuple[float, float]:
    free = margin * (high - low)
    if high - free <= low:
        free = abs(high) / 20 or 1.0
    return low - free, high + free


def _error_bar(frame: _Frame, series: Points, x: float, y: float, spread: float) -> Markup:
    middle = _size(frame.x(x) + series.shift)
    top, bottom = frame.y(y + spread), frame.y(max(y - spread, frame.y_range[0]))
    left, right = _size(middle - 4), _size(middle + 4)
    path = f"M{middle} {top}V{bottom}M{left} {top}H{right}M{left} {bottom}H{right}"
    return Markup('<path class="line spread {}" d="{}"/>').format(series.style, path)


def _mark(frame: _Frame, series: Points, x: float, y: float, spread: float, x_label: str) -> Markup:
    shape = "ring" if series.hollow else "dot"
    return Markup('<circle class="{} {}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
        shape,
        series.style,
        _size(frame.x(x) + series.shift),
        frame.y(y),
        6 if series.hollow else 3.5,
        f"{series.label}\n{x_label} {wording.number(x)}: {wording.number(y)}"
        + (f" ± {wording.number(spread, 2)}" if spread else ""),
    )


def smoothed(values: Sequence[Number]) -> list[Number]:
    """A trailing exponential mean over a fiftieth of the run; None stays None."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    mean, weight = 0.0, 0.0
    result: list[Number] = []
    for value in values:
        if value is None:
            result.append(None)
            continue
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def histogram(record: Histogram, unit: str) -> Markup | None:
    """Weights near zero before and after, as shares of all the targets' weights."""
    bins = len(record.before)
    if not bins or len(record.edges) != bins + 1 or len(record.after) != bins or not record.total:
        return None
    before = [100 * value / record.total for value in record.before]
    after = [100 * value / record.total for value in record.after]
    ticks = _ticks(0.0, max([*before, *after]) or 1.0, 4)
    frame = _Frame(WIDE, 300, (record.edges[0], record.edges[-1]), (0.0, ticks[-1]))
    parts = [
        _y_axis(frame, ticks, lambda value: f"{wording.number(value)}%"),
        _x_axis(frame, _ticks(*frame.x_range, 9, inside=True), unit),
        _steps(frame, record.edges, before, "before"),
        _steps(frame, record.edges, after, "after"),
    ]
    for index in range(bins):
        left, right = frame.x(record.edges[index]), frame.x(record.edges[index + 1])
        words = (
            f"{wording.number(record.edges[index])} to {wording.number(record.edges[index + 1])}"
            f"\nbefore {wording.count(record.before[index])} weights"
            f"\nafter {wording.count(record.after[index])} weights"
        )
        parts.append(_hover_column(left, right, frame, words))
    label = "Weights near zero before and after; exact zeros are left out"
    return _svg(frame.width, frame.height, label, parts, "wide")


def profile(tensors: Sequence[TensorRecord], achieved: float) -> Markup | None:
    """Sparsity of each tensor in file order, as columns; None for so few that a table tells all."""
    if len(tensors) < PROFILE_LEAST:
        return None
    frame = _Frame(WIDE, 250, (0, len(tensors)), (0.0, 1.0), bottom=28)
    parts = [
        _y_axis(frame, [0.0, 0.25, 0.5, 0.75, 1.0], lambda value: wording.percent(value, 0)),
        _x_axis(frame, [], f"{len(tensors):,} tensors, in file order"),
    ]
    pitch = frame.x(1) - frame.x(0)
    gap = max(2 if pitch >= 7 else 1 if pitch >= 4 else 0, pitch - COLUMN_WIDTH)
    for index, tensor in enumerate(tensors):
        left, top = frame.x(index), frame.y(tensor.sparsity)
        parts.append(
            Markup(
                '<g class="hit"><rect class="strip" x="{}" y="{}" width="{}" height="{}"/>'
            ).format(left, frame.top, _size(pitch), frame.base - frame.top)
            + Markup('<rect class="column" x="{}" y="{}" width="{}" height="{}"/>').format(
                _size(left + gap / 2), top, _size(pitch - gap), _size(frame.base - top)
            )
            + Markup("<title>{}</title></g>").format(_tensor_words(tensor))
        )
    parts.append(_reference(frame, achieved, "all targets", lambda value: wording.percent(value)))
    return _svg(frame.width, frame.height, "Sparsity of each tensor", parts, "wide")


@dataclass(frozen=True, slots=True)
class Grid:
    """Zeros and totals by kind of tensor (rows) and position in the model (columns)."""

    rows: tuple[str, ...]
    columns: tuple[int, ...]
    cells: dict[tuple[str, int], tuple[int, int]]  # (kind, position) -> (zeros, total)


def grid(tensors: Iterable[TensorRecord]) -> Grid | None:
    """The tensors by kind and layer, or None where their names show no such order.

    The first number in a dotted name is the layer, further ones are folded (experts, blocks within
    a stage), so that `encoder.layer.3.output.dense.weight` is kind `encoder.layer.*.output.dense`.
    """
    cells: dict[tuple[str, int], tuple[int, int]] = {}
    for tensor in tensors:
        words = tensor.name.removesuffix(".weight").split(".")
        layers = [
            int(word) for word in words if word.isascii() and word.isdigit() and len(word) < 6
        ]
        if not layers:
            continue
        kind = ".".join("*" if word.isascii() and word.isdigit() else word for word in words)
        zeros, total = cells.get((kind, layers[0]), (0, 0))
        cells[kind, layers[0]] = (zeros + tensor.zeros, total + tensor.total)
    rows = tuple(dict.fromkeys(kind for kind, _ in cells))
    columns = tuple(sorted({layer for _, layer in cells}))
    is_readable = 2 <= len(columns) <= HEATMAP_COLUMNS and 2 <= len(rows) <= HEATMAP_ROWS
    if not is_readable or 2 * len(cells) < len(rows) * len(columns):
        return None
    return Grid(rows, columns, cells)


def heatmap(grid: Grid) -> Markup:
    """Sparsity by kind of tensor and layer; deeper colour means more zeros."""
    labels = _without_common_words(grid.rows)
    label_width = min(260, 24 + max(len(label) for label in labels) * 7)
    cell = max(7.0, min(72.0, (WIDE - 4 - label_width) / len(grid.columns)))
    row_height, top = 24, 8
    width = round(label_width + cell * len(grid.columns) + 4)
    height = top + row_height * len(grid.rows) + 24
    low, high = _shade_range(zeros / total for zeros, total in grid.cells.values() if total)
    parts = []
    for row, (kind, label) in enumerate(zip(grid.rows, labels, strict=True)):
        y = top + row * row_height
        parts.append(
            Markup('<text class="name" x="{}" y="{}">{}<title>{}</title></text>').format(
                label_width - 8, y + 16, wording.name(label, 34), wording.name(kind)
            )
        )
        for column, layer in enumerate(grid.columns):
            if (kind, layer) in grid.cells:
                x = label_width + column * cell
                parts.append(_heat_cell(grid, kind, layer, (x, y, cell, row_height), (low, high)))
    every = max(1, math.ceil(26 / cell))
    base = top + row_height * len(grid.rows)
    for column, layer in enumerate(grid.columns):
        if column % every == 0:
            x = _size(label_width + (column + 0.5) * cell)
            parts.append(
                Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
                    x, base + 16, layer
                )
            )
    parts.append(
        Markup('<text class="tick end" x="{}" y="{}">layer</text>').format(
            label_width - 8, base + 16
        )
    )
    return _svg(width, height, "Sparsity by kind of tensor and layer", parts, "wide")


def shade_range(grid: Grid) -> tuple[float, float]:
    """The sparsities at which the heatmap's lightest and deepest colours stand."""
    return _shade_range(zeros / total for zeros, total in grid.cells.values() if total)


def _heat_cell(
    grid: Grid,
    kind: str,
    layer: int,
    box: tuple[float, float, float, float],
    shades: tuple[float, float],
) -> Markup:
    zeros, total = grid.cells[kind, layer]
    sparsity = zeros / total if total else 0.0
    depth = (sparsity - shades[0]) / (shades[1] - shades[0])
    x, y, width, height = box
    gap = 2 if width >= 12 else 1
    words = (
        f"{wording.name(kind)}, layer {layer}"
        f"\n{wording.percent(sparsity)} zeros: {zeros:,} of {total:,}"
    )
    text = Markup("")
    if width >= 30:
        text = Markup('<text class="{}" x="{}" y="{}">{}</text>').format(
            "in-cell deep" if depth > 0.75 else "in-cell",
            _size(x + (width - gap) / 2),
            _size(y + 15.5),
            f"{100 * sparsity:.0f}" if width < 40 else f"{100 * sparsity:.1f}",
        )
    return Markup(
        '<g class="hit"><rect class="cell-back" x="{0}" y="{1}" width="{2}" height="{3}" rx="3"/>'
        '<rect class="cell" x="{0}" y="{1}" width="{2}" height="{3}" rx="3" fill-opacity="{4}"/>'
        "{5}<title>{6}</title></g>"
    ).format(
        _size(x), y, _size(width - gap), height - gap, round(0.08 + 0.92 * depth, 3), text, words
    )


def _shade_range(sparsities: Iterable[float]) -> tuple[float, float]:
    found = list(sparsities)
    if not found:
        return 0.0, 1.0
    low, high = math.floor(20 * min(found)) / 20, math.ceil(20 * max(found)) / 20
    if high - low < 0.09:  # nearly equal tensors must not look far apart
        low = max(0.0, high - 0.1)
        high = low + 0.1
    return round(low, 2), round(high, 2)


def _without_common_words(kinds: Sequence[str]) -> list[str]:
    """The kinds without the dotted words that all of them begin with, the last word kept."""
    words = [kind.split(".") for kind in kinds]
    shared = 0
    while all(len(row) > shared + 1 for row in words) and len({row[shared] for row in words}) == 1:
        shared += 1
    return [".".join(row[shared:]) for row in words]


def _tensor_words(tensor: TensorRecord) -> str:
    return (
        f"{wording.name(tensor.name)}\n{wording.percent(tensor.sparsity)} zeros: "
        f"{tensor.zeros:,} of {tensor.total:,}"
    )


def _svg(
    width: int, height: int, label: str, parts: Iterable[Markup], style: str = "small"
) -> Markup:
    return Markup(
        '<svg class="chart {0}" viewBox="0 0 {1} {2}" style="--width:{1}px" role="img" '
        'aria-label="{3}">{4}</svg>'
    ).format(style, width, height, label, Markup("").join(parts))


def _y_axis(frame: _Frame, ticks: Sequence[float], show: Callable[[Number], str]) -> Markup:
    right = frame.width - frame.right
    return Markup("").join(
        Markup(
            '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>'
            '<text class="tick end" x="{3}" y="{4}">{5}</text>'
        ).format(
            frame.left, right, frame.y(tick), frame.left - 8, _size(frame.y(tick) + 4), show(tick)
        )
        for tick in ticks
    )


def _x_axis(
    frame: _Frame,
    ticks: Sequence[float],
    unit: str,
    show: Callable[[Number], str] | None = None,
) -> Markup:
    right = frame.width - frame.right
    low, high = frame.x_range
    line = Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(
        frame.left, right, frame.base
    )
    marks = Markup("").join(
        Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
            frame.x(tick), frame.base + 17, show(tick) if show else wording.number(tick, 6)
        )
        for tick in ticks
        if low <= tick <= high
    )
    name = Markup('<text class="unit middle" x="{}" y="{}">{}</text>').format(
        _size((frame.left + right) / 2), frame.height - 6, unit
    )
    return line + marks + name


def _reference(frame: _Frame, value: float, words: str, show: Callable[[Number], str]) -> Markup:
    y = frame.y(value)
    text_y = y - 5 if y - frame.top > 16 else y + 14
    return Markup(
        '<line class="reference" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>'
        '<text class="reference-name end" x="{1}" y="{3}">{4}</text>'
    ).format(frame.left, frame.width - frame.right, y, _size(text_y), f"{words} {show(value)}")


def _path(frame: _Frame, step: Sequence[int], line: Line, log: bool) -> Markup:
    points, pen = [], "M"
    for index in _extremes(line.values, POINT_LIMIT):
        value = line.values[index]
        if not _drawable(value, log):
            pen = "M"
            continue
        points.append(f"{pen}{frame.x(step[index])} {frame.y(value)}")
        pen = "L"
    if len(points) == 1:
        x, y = points[0][1:].split()
        return Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"/>').format(line.style, x, y)
    return Markup('<path class="line {}" d="{}"/>').format(line.style, "".join(points))


def _steps(frame: _Frame, edges: Sequence[float], values: Sequence[float], style: str) -> Markup:
    points = [f"M{frame.x(edges[0])} {frame.base}"]
    for index, value in enumerate(values):
        points.append(f"V{frame.y(value)}H{frame.x(edges[index + 1])}")
    return Markup('<path class="area {}" d="{}V{}Z"/>').format(style, "".join(points), frame.base)


def _hover(
    frame: _Frame, step: Sequence[int], lines: Sequence[Line], show: Callable[[Number], str]
) -> Markup:
    picked = evenly(len(step), HOVER_LIMIT)
    middles = [frame.x(step[index]) for index in picked]
    parts = []
    for place, index in enumerate(picked):
        left = frame.left if place == 0 else (middles[place - 1] + middles[place]) / 2
        right = (
            frame.width - frame.right
            if place == len(picked) - 1
            else (middles[place] + middles[place + 1]) / 2
        )
        words = "\n".join(
            [f"step {step[index]:,}"]
            + [f"{line.label} {show(line.values[index])}" for line in lines]
        )
        parts.append(_hover_column(left, right, frame, words, middles[place]))
    return Markup("").join(parts)


def _hover_column(
    left: float, right: float, frame: _Frame, words: str, middle: float | None = None
) -> Markup:
    middle = (left + right) / 2 if middle is None else middle
    return Markup(
        '<g class="hit"><rect class="strip" x="{0}" y="{1}" width="{2}" height="{3}"/>'
        '<line class="cross" x1="{4}" x2="{4}" y1="{1}" y2="{5}"/><title>{6}</title></g>'
    ).format(
        _size(left),
        frame.top,
        _size(right - left),
        frame.base - frame.top,
        _size(middle),
        frame.base,
        words,
    )


def _power(value: Number) -> str:
    exponent = round(math.log10(value or 1.0))
    return str(10**exponent) if 0 <= exponent < 4 else f"10{str(exponent).translate(RAISED)}"


def _drawable(value: Number, log: bool) -> TypeGuard[float]:
    return value is not None and (value > 0 or not log)


def _size(value: float) -> float:
    return round(value, 2)


def _extremes(values: Sequence[Number], limit: int) -> list[int]:
    """Indices of at most about `limit` points that keep each stretch's smallest and largest."""
    if len(values) <= limit:
        return list(range(len(values)))
    stretch = math.ceil(2 * len(values) / limit)
    kept = {0, len(values) - 1}
    for first in range(0, len(values), stretch):
        inside = range(first, min(first + stretch, len(values)))
        known = [index for index in inside if values[index] is not None]
        if len(known) < len(inside):
            kept.update(index for index in inside if values[index] is None)
        if known:
            kept.add(min(known, key=lambda index: values[index] or 0.0))
            kept.add(max(known, key=lambda index: values[index] or 0.0))
    return sorted(kept)


def _ticks(low: float, high: float, about: int, *, inside: bool = False) -> list[float]:
    """Round numbers that enclose `low` to `high`, or lie inside, some `about` of them."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), TINY):
        pad = abs(high) / 2 if abs(high) > TINY else 1.0
        low, high = (low - pad, high + pad) if low < 0 else (max(0.0, low - pad), high + pad)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    pace = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * (1 - 1e-9))
    first = math.ceil(low / pace - 1e-9) if inside else math.floor(low / pace + 1e-9)
    last = math.floor(high / pace + 1e-9) if inside else math.ceil(high / pace - 1e-9)
    return [float(f"{index * pace:.12g}") for index in range(first, last + 1)]


def _log_range(low: float, high: float) -> tuple[float, float]:
    low, high = max(low, TINY), max(high, TINY)
    return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high * 1.0001))


def _decades(low: float, high: float) -> tuple[float, float]:
    """As `_log_range`, but ending at a `high` that is a power of ten, where a line may end too."""
    bottom = math.floor(math.log10(low) + 1e-9)
    top = math.ceil(math.log10(high) - 1e-9)
    return 10.0**bottom, 10.0 ** max(top, bottom + 1)


def _log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    bottom, top = (round(math.log10(value)) for value in _log_range(low, high))
    every = max(1, math.ceil((top - bottom) / about))
    return [10.0**power for power in range(bottom, top + 1, every)]

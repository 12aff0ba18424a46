"""Charts as inline SVG, drawn from numbers; colours are left to the page's style sheet.

A chart scales with its column, so a page needs no script; what a pointer rests on is told by
`<title>`. All text passes through markupsafe, since names come from files nobody vouches for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from markupsafe import Markup

from hamcli.report import wording
from hamcli.report.axes import (
    NARROW,
    ROOM,
    WIDE,
    Frame,
    Number,
    decades,
    hover_column,
    log_range,
    log_ticks,
    power_of_ten,
    reference_line,
    round_ticks,
    rounded,
    svg,
    x_axis,
    y_axis,
)
from hamcli.report.records import Histogram, TensorRecord, evenly

POINT_LIMIT = 400
HOVER_LIMIT = 60
PROFILE_LEAST = 8
COLUMN_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart; `style` is a class of the style sheet."""

    label: str
    values: Sequence[Number]
    style: str


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
    y_ticks = log_ticks(low, high) if log else round_ticks(low, high, 4)
    frame = Frame(
        NARROW,
        250,
        (min(0, step[0]), max(step[-1], step[0] + 1)),
        log_range(low, high) if log else (y_ticks[0], y_ticks[-1]),
        log=log,
        top=ROOM + 2,  # lines run below the words of the reference, never through them
    )
    parts = [
        y_axis(frame, y_ticks, power_of_ten if log else show),
        x_axis(frame, round_ticks(*frame.x_range, 5), "step"),
    ]
    if reference is not None and frame.y_range[0] <= reference[0] <= frame.y_range[1]:
        parts.append(reference_line(frame, reference[0], f"{reference[1]} {show(reference[0])}"))
    parts += [_path(frame, step, line, log) for line in lines]
    parts.append(_hover(frame, step, lines, show))
    return svg(frame.width, frame.height, label, parts)


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
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else round_ticks(min(ys), max(ys), 5)
    x_range = decades(min(xs), max(xs)) if log_x else _with_margin(min(xs), max(xs), margin)
    x_ticks = log_ticks(*x_range, 8) if log_x else _ticks_of(xs)
    frame = Frame(
        NARROW,
        280,
        x_range,
        log_range(min(ys), max(ys)) if log_y else (y_ticks[0], y_ticks[-1]),
        right=18,
        log=log_y,
        log_x=log_x,
    )
    parts = [
        y_axis(frame, y_ticks, power_of_ten if log_y else wording.number),
        x_axis(frame, x_ticks, x_label, power_of_ten if log_x else None),
    ]
    if level is not None:
        words = f"{level[1]} {wording.number(level[0])}" if level[1] else ""
        parts.append(reference_line(frame, level[0], words))
    for one, points in zip(series, kept, strict=True):
        if not one.hollow and points:
            thin = _extremes([y for _, y, _ in points], POINT_LIMIT)
            path = "L".join(
                f"{rounded(frame.x(points[i][0]) + one.shift)} {frame.y(points[i][1])}"
                for i in thin
            )
            parts.append(Markup('<path class="line {}" d="M{}"/>').format(one.style, path))
        parts += [_error_bar(frame, one, *point) for point in points if point[2] > 0]
    for one, points in zip(series, kept, strict=True):
        if one.marked or one.hollow:
            parts += [_mark(frame, one, x, y, spread, x_label) for x, y, spread in points]
    return svg(frame.width, frame.height, label, parts)


def _ticks_of(xs: Sequence[float]) -> list[float]:
    """The value itself where there is one only; else round numbers among them."""
    alone = len(set(xs)) == 1
    return [xs[0]] if alone else round_ticks(min(xs), max(xs), 5, inside=True)


def _with_margin(low: float, high: float, margin: float) -> tuple[float, float]:
    free = margin * (high - low)
    if high - free <= low:
        free = abs(high) / 20 or 1.0
    return low - free, high + free


def _error_bar(frame: Frame, series: Points, x: float, y: float, spread: float) -> Markup:
    middle = rounded(frame.x(x) + series.shift)
    top, bottom = frame.y(y + spread), frame.y(max(y - spread, frame.y_range[0]))
    left, right = rounded(middle - 4), rounded(middle + 4)
    path = f"M{middle} {top}V{bottom}M{left} {top}H{right}M{left} {bottom}H{right}"
    return Markup('<path class="line spread {}" d="{}"/>').format(series.style, path)


def _mark(frame: Frame, series: Points, x: float, y: float, spread: float, x_label: str) -> Markup:
    shape = "ring" if series.hollow else "dot"
    return Markup('<circle class="{} {}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
        shape,
        series.style,
        rounded(frame.x(x) + series.shift),
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
    ticks = round_ticks(0.0, max([*before, *after]) or 1.0, 4)
    frame = Frame(WIDE, 300, (record.edges[0], record.edges[-1]), (0.0, ticks[-1]))
    parts = [
        y_axis(frame, ticks, lambda value: f"{wording.number(value)}%"),
        x_axis(frame, round_ticks(*frame.x_range, 9, inside=True), unit),
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
        parts.append(hover_column(left, right, frame, words))
    label = "Weights near zero before and after; exact zeros are left out"
    return svg(frame.width, frame.height, label, parts, "wide")


def profile(tensors: Sequence[TensorRecord], achieved: float) -> Markup | None:
    """Sparsity of each tensor in file order, as columns; None for so few that a table tells all."""
    if len(tensors) < PROFILE_LEAST:
        return None
    frame = Frame(WIDE, 250, (0, len(tensors)), (0.0, 1.0), bottom=28)
    parts = [
        y_axis(frame, [0.0, 0.25, 0.5, 0.75, 1.0], lambda value: wording.percent(value, 0)),
        x_axis(frame, [], f"{len(tensors):,} tensors, in file order"),
    ]
    pitch = frame.x(1) - frame.x(0)
    gap = max(2 if pitch >= 7 else 1 if pitch >= 4 else 0, pitch - COLUMN_WIDTH)
    for index, tensor in enumerate(tensors):
        left, top = frame.x(index), frame.y(tensor.sparsity)
        parts.append(
            Markup(
                '<g class="hit"><rect class="strip" x="{}" y="{}" width="{}" height="{}"/>'
            ).format(left, frame.top, rounded(pitch), frame.base - frame.top)
            + Markup('<rect class="column" x="{}" y="{}" width="{}" height="{}"/>').format(
                rounded(left + gap / 2), top, rounded(pitch - gap), rounded(frame.base - top)
            )
            + Markup("<title>{}</title></g>").format(_tensor_words(tensor))
        )
    parts.append(reference_line(frame, achieved))
    return svg(frame.width, frame.height, "Sparsity of each tensor", parts, "wide")


def _tensor_words(tensor: TensorRecord) -> str:
    return (
        f"{wording.name(tensor.name)}\n{wording.percent(tensor.sparsity)} zeros: "
        f"{tensor.zeros:,} of {tensor.total:,}"
    )


def _path(frame: Frame, step: Sequence[int], line: Line, log: bool) -> Markup:
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


def _steps(frame: Frame, edges: Sequence[float], values: Sequence[float], style: str) -> Markup:
    points = [f"M{frame.x(edges[0])} {frame.base}"]
    for index, value in enumerate(values):
        points.append(f"V{frame.y(value)}H{frame.x(edges[index + 1])}")
    return Markup('<path class="area {}" d="{}V{}Z"/>').format(style, "".join(points), frame.base)


def _hover(
    frame: Frame, step: Sequence[int], lines: Sequence[Line], show: Callable[[Number], str]
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
        parts.append(hover_column(left, right, frame, words, middles[place]))
    return Markup("").join(parts)


def _drawable(value: Number, log: bool) -> TypeGuard[float]:
    return value is not None and (value > 0 or not log)


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

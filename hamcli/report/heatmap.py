"""Sparsity by kind of tensor and layer, as inline SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hamcli.report import wording
from hamcli.report.axes import (
    WIDE,
    rounded,
    svg,
)
from hamcli.report.records import TensorRecord

HEATMAP_ROWS = 40
HEATMAP_COLUMNS = 128


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
    low, high = shade_range(grid)
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
            x = rounded(label_width + (column + 0.5) * cell)
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
    return svg(width, height, "Sparsity by kind of tensor and layer", parts, "wide")


def shade_range(grid: Grid) -> tuple[float, float]:
    """The sparsities at which the heatmap's lightest and deepest colours stand."""
    found = [zeros / total for zeros, total in grid.cells.values() if total]
    if not found:
        return 0.0, 1.0
    low, high = math.floor(20 * min(found)) / 20, math.ceil(20 * max(found)) / 20
    if high - low < 0.09:  # nearly equal tensors must not look far apart
        low = max(0.0, high - 0.1)
        high = low + 0.1
    return round(low, 2), round(high, 2)


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
            rounded(x + (width - gap) / 2),
            rounded(y + 15.5),
            f"{100 * sparsity:.0f}" if width < 40 else f"{100 * sparsity:.1f}",
        )
    return Markup(
        '<g class="hit"><rect class="cell-back" x="{0}" y="{1}" width="{2}" height="{3}" rx="3"/>'
        '<rect class="cell" x="{0}" y="{1}" width="{2}" height="{3}" rx="3" fill-opacity="{4}"/>'
        "{5}<title>{6}</title></g>"
    ).format(
        rounded(x),
        y,
        rounded(width - gap),
        height - gap,
        round(0.08 + 0.92 * depth, 3),
        text,
        words,
    )


def _without_common_words(kinds: Sequence[str]) -> list[str]:
    """The kinds without the dotted words that all of them begin with, the last word kept."""
    words = [kind.split(".") for kind in kinds]
    shared = 0
    while all(len(row) > shared + 1 for row in words) and len({row[shared] for row in words}) == 1:
        shared += 1
    return [".".join(row[shared:]) for row in words]

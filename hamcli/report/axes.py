"""What every chart stands on: the frame of a plot, its axes and ticks, as inline SVG.

Colours are left to the page's style sheet.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hamcli.report import wording

WIDE = 990
TINY = 1e-200  # far below any number of a run; products of smaller ones would vanish
NARROW = 460
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
class Frame:
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
        """Where a value of the x axis stands, in pixels from the left."""
        low, high = self.x_range
        if self.log_x:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        share = (value - low) / (high - low)
        return round(self.left + share * (self.width - self.left - self.right), 2)

    def y(self, value: float) -> float:
        """Where a value of the y axis stands, in pixels from the top."""
        low, high = self.y_range
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        share = (value - low) / (high - low)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 2)

    @property
    def base(self) -> int:
        """Where the x axis stands, in pixels from the top."""
        return self.height - self.bottom


def svg(
    width: int, height: int, label: str, parts: Iterable[Markup], style: str = "small"
) -> Markup:
    """The whole chart; `label` is for those who hear the page."""
    return Markup(
        '<svg class="chart {0}" viewBox="0 0 {1} {2}" style="--width:{1}px" role="img" '
        'aria-label="{3}">{4}</svg>'
    ).format(style, width, height, label, Markup("").join(parts))


def y_axis(frame: Frame, ticks: Sequence[float], show: Callable[[Number], str]) -> Markup:
    """Lines across the plot at the ticks, with their words."""
    right = frame.width - frame.right
    return Markup("").join(
        Markup(
            '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>'
            '<text class="tick end" x="{3}" y="{4}">{5}</text>'
        ).format(
            frame.left, right, frame.y(tick), frame.left - 8, rounded(frame.y(tick) + 4), show(tick)
        )
        for tick in ticks
    )


def x_axis(
    frame: Frame,
    ticks: Sequence[float],
    unit: str,
    show: Callable[[Number], str] | None = None,
) -> Markup:
    """The axis, the words of its ticks and its unit."""
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
        rounded((frame.left + right) / 2), frame.height - 6, unit
    )
    return line + marks + name


ROOM = 16  # pixels that words above a line take


def reference_line(frame: Frame, value: float, words: str = "") -> Markup:
    """A dashed line at a value of the y axis, with its words if there are any."""
    y = frame.y(value)
    line = Markup('<line class="reference" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(
        frame.left, frame.width - frame.right, y
    )
    text_y = y - 5 if y > ROOM else y + 14
    text = Markup('<text class="reference-name end" x="{}" y="{}">{}</text>').format(
        frame.width - frame.right, rounded(text_y), words
    )
    return line + text if words else line


def hover_column(
    left: float, right: float, frame: Frame, words: str, middle: float | None = None
) -> Markup:
    """A column of the plot that tells `words` to a pointer."""
    middle = (left + right) / 2 if middle is None else middle
    return Markup(
        '<g class="hit"><rect class="strip" x="{0}" y="{1}" width="{2}" height="{3}"/>'
        '<line class="cross" x1="{4}" x2="{4}" y1="{1}" y2="{5}"/><title>{6}</title></g>'
    ).format(
        rounded(left),
        frame.top,
        rounded(right - left),
        frame.base - frame.top,
        rounded(middle),
        frame.base,
        words,
    )


def power_of_ten(value: Number) -> str:
    """A power of ten as people write it: 0.1 as 10 with a raised -1, 100 as 100."""
    exponent = round(math.log10(value or 1.0))
    return str(10**exponent) if 0 <= exponent < 4 else f"10{str(exponent).translate(RAISED)}"


def rounded(value: float) -> float:
    """To a hundredth of a pixel."""
    return round(value, 2)


def round_ticks(low: float, high: float, about: int, *, inside: bool = False) -> list[float]:
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


def log_range(low: float, high: float) -> tuple[float, float]:
    """Powers of ten that enclose `low` to `high`."""
    low, high = max(low, TINY), max(high, TINY)
    return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high * 1.0001))


def decades(low: float, high: float) -> tuple[float, float]:
    """As `log_range`, but ending at a `high` that is a power of ten, where a line may end too."""
    bottom = math.floor(math.log10(low) + 1e-9)
    top = math.ceil(math.log10(high) - 1e-9)
    return 10.0**bottom, 10.0 ** max(top, bottom + 1)


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Powers of ten that enclose `low` to `high`, some `about` of them."""
    bottom, top = (round(math.log10(value)) for value in log_range(low, high))
    every = max(1, math.ceil((top - bottom) / about))
    return [10.0**power for power in range(bottom, top + 1, every)]

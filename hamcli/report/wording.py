"""Numbers and names as people read them: no rounding that flatters, no character that deceives."""

from collections.abc import Sequence

from hamcli.errors import printable
from hamcli.report.records import GateCondition, QualityRecord, SizeRecord, SparsityRecord

UNKNOWN = "\N{EN DASH}"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
MINUS = "\N{MINUS SIGN}"
NAME_LIMIT = 120
TEXT_LIMIT = 600

# Metrics that are fractions of examples, read in percent; others are read as they are.
FRACTIONS = frozenset({"accuracy", "agreement", "token accuracy", "masked accuracy"})


def name(text: str, limit: int = NAME_LIMIT) -> str:
    """A name from a file, printable, its middle left out where it is long: both ends tell most."""
    shown = printable(text[: 2 * limit] + text[-2 * limit :] if len(text) > 4 * limit else text)
    if len(shown) <= limit:
        return shown
    head = limit // 3
    return shown[:head] + ELLIPSIS + shown[-(limit - head - 1) :]


def sentence(text: str, limit: int = TEXT_LIMIT) -> str:
    """Prose that may quote names: printable, cut at the end."""
    shown = printable(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + ELLIPSIS


def percent(fraction: float | None, digits: int = 2) -> str:
    """`0.9` as `90.00%`; what is not all or nothing is never shown as all or nothing."""
    if fraction is None:
        return UNKNOWN
    text = f"{100 * fraction:.{digits}f}%"
    least = 10.0**-digits
    if fraction < 1 and text == f"{100:.{digits}f}%":
        return f">{100 - least:.{digits}f}%"
    if fraction > 0 and text == f"{0:.{digits}f}%":
        return f"<{least:.{digits}f}%"
    return text


def count(number: int | None) -> str:
    """`22713216` as `22,713,216`."""
    return UNKNOWN if number is None else f"{number:,}"


def short_count(number: int) -> str:
    """`22713216` as `22.7 M`."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number:,}"
    return str(number)


def megabytes(size_bytes: int | None) -> str:
    """`90864192` as `90.9 MB`, in powers of ten as file managers and the hub count."""
    if size_bytes is None:
        return UNKNOWN
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size_bytes >= size:
            value = size_bytes / size
            return f"{value:.{1 if value >= 10 else 2}f} {unit}"
    return f"{size_bytes} B"


def number(value: float | None, digits: int = 4) -> str:
    """A measured value to `digits` significant digits."""
    if value is None:
        return UNKNOWN
    text = f"{value:,.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        if 0 <= int(exponent) < 7:
            return f"{value:,.0f}".replace("-", MINUS)
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", MINUS)


def metric_value(metric: str, value: float | None) -> str:
    """A value of a metric: fractions of examples in percent, the rest to four digits."""
    if value is None:
        return UNKNOWN
    if metric in FRACTIONS:
        return percent(value)
    return f"{value:.4f}".replace("-", MINUS) if abs(value) <= 1 else number(value)


def drop(quality: QualityRecord) -> str:
    """What was lost, in words: `0.62 points lower than dense`, `3.10% higher than dense`."""
    lost = quality.drop
    if lost is None:
        return "change not measured"
    if lost == 0:
        return "no change from dense"
    if not quality.higher_is_better:
        return f"{percent(abs(lost))} {'higher' if lost > 0 else 'lower'} than dense"
    way = "lower" if lost > 0 else "higher"
    size = f"{100 * abs(lost):.2f} points" if quality.metric in FRACTIONS else f"{abs(lost):.4f}"
    return f"{size} {way} than dense"


def exactness(sparsity: SparsityRecord) -> str:
    """How the zeros found compare with those asked for."""
    over = sparsity.zeros - sparsity.asked_zeros
    if over == 0:
        return "exactly as asked"
    return f"{count(abs(over))} {'more' if over > 0 else 'fewer'} than asked"


def size_line(size: SizeRecord) -> str:
    """What the zeros do to the bytes on disk, claiming no more than was measured."""
    if size.format == "packed":
        first = f"Packed, for {megabytes(size.dense_bytes)} of dense weights"
    elif size.input_bytes is None:
        first = "A dense file stores its zeros"
    elif size.input_bytes == size.dense_bytes:
        first = "File size unchanged: a dense file stores its zeros"
    else:
        way = "smaller" if size.dense_bytes < size.input_bytes else "larger"
        change = abs(size.dense_bytes - size.input_bytes)
        first = f"File {megabytes(change)} {way} than the input's"
    others = []
    made = "if they were compressed" if size.format == "packed" else "if compressed"
    if size.packed_bytes is not None and size.format != "packed":
        others.append(f"{megabytes(size.packed_bytes)} in the packed form")
    if size.gzip_bytes is not None:
        others.append(f"{megabytes(size.gzip_bytes)} {made} with gzip")
    return f"{'; '.join([first, ', '.join(others)]) if others else first}."


def shape(sizes: Sequence[int]) -> str:
    """`(384, 1536)` with a sign of multiplication between the sizes; a scalar as it is named."""
    return " \N{MULTIPLICATION SIGN} ".join(str(size) for size in sizes) or "scalar"


def condition(gate: GateCondition) -> str:
    """A gate's condition: `drop 0.0062, at most 0.01`."""
    what, bound = {
        "max_drop": ("drop", "at most"),
        "min_sparsity": ("sparsity", "at least"),
    }.get(gate.name, (name(gate.name), "limit"))
    if gate.value is None:
        return f"{what} not measured, {bound} {number(gate.limit, 6)}"
    digits = 6
    # a failure shows as many digits as tell the value from its limit
    while not gate.passed and digits < 17 and _same(gate.value, gate.limit, digits):
        digits += 1
    return f"{what} {number(gate.value, digits)}, {bound} {number(gate.limit, digits)}"


def _same(first: float, second: float, digits: int) -> bool:
    return number(first, digits) == number(second, digits)

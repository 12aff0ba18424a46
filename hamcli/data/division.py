"""Which rows are trained on and which are held out, by their content.

Rows are ordered by a digest of what they hold. So the same rows are held out for every seed of a
run and every order of the file, equal rows stand on one side, and rows added later move few others.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hamcli.data.table import Table
from hamcli.errors import InputRefused


def divide(table: Table, values: Iterable[Any], fraction: float) -> tuple[Table, Table]:
    """Rows to train on, and rows held out; both in the order of the table.

    Args:
        table: The rows.
        values: The content of each.
        fraction: Share held out, rounded, at least one row; more where equal rows stand at the cut.

    Raises:
        InputRefused: E453, one side would be empty.
    """
    marks = digests(values)
    order = _order(marks)
    number = max(1, round(fraction * len(order)))
    while number < len(order) and marks[order[number]] == marks[order[number - 1]]:
        number += 1
    if number >= len(order):
        raise InputRefused(
            "E453",
            "too few rows to hold some out",
            table.name,
            f"{len(set(marks))} different rows",
            "more rows, or data.evaluation with rows of its own",
        )
    return table.take(sorted(order[number:])), table.take(sorted(order[:number]))


def capped(table: Table, column: str, most: int | None) -> Table:
    """At most `most` rows, as good as drawn at random, in the order of the table."""
    if most is None or most >= len(table):
        return table
    return table.take(sorted(content_order(table.columns[column])[:most]))


def content_order(values: Iterable[Any]) -> list[int]:
    """Places of values in the order of their digests: as good as shuffled, and always the same."""
    return _order(digests(values))


def digests(values: Iterable[Any]) -> list[bytes]:
    """A digest of each value; equal values have equal ones."""
    return [hashlib.blake2b(_content(value), digest_size=16).digest() for value in values]


def _order(marks: Sequence[bytes]) -> list[int]:
    return sorted(range(len(marks)), key=lambda place: (marks[place], place))


def _content(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):  # an image as bytes and path
        return _content(value.get("bytes") or value.get("path") or "")
    return str(value).encode("utf-8", "surrogatepass")

"""Rows with named columns, whatever file they came from. What the columns mean it does not know."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one source or split.

    Attributes:
        name: The source as shown to people, without the folders that lead to it.
        unit: What a row is, in the plural: lines, paragraphs, rows, images.
        columns: Name to values; all of one length. Values may be read when they are asked for.
        place: Row to the words that find it, `train.jsonl:17`.
        class_names: Column of class ids to the names of the classes, where the source has them.
        folder: What relative paths of images start from.
        digest: Of the content; the same bytes give the same digest.
    """

    name: str
    unit: str
    columns: Mapping[str, Sequence[Any]]
    place: Callable[[int], str]
    digest: str
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def take(self, rows: Sequence[int]) -> "Table":
        """The rows at these places, in this order; nothing is copied."""
        place = self.place
        return replace(self, columns=_Columns(self.columns, rows), place=lambda i: place(rows[i]))


class Picked(Sequence[Any]):
    """Some items of a sequence, in an order of their own, read when asked for."""

    def __init__(self, items: Sequence[Any], places: Sequence[int]) -> None:
        self.items, self.places = items, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self.items[place] for place in self.places[index]]
        return self.items[self.places[index]]

    def __iter__(self) -> Iterator[Any]:
        items = self.items
        return (items[place] for place in self.places)


class _Columns(Mapping[str, Sequence[Any]]):
    def __init__(self, columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> None:
        self.columns, self.rows = columns, rows

    def __getitem__(self, name: str) -> Sequence[Any]:
        return Picked(self.columns[name], self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


def digest_of(*tables: Table) -> str:
    """A digest of the content of several tables."""
    return hashlib.sha256("".join(table.digest for table in tables).encode()).hexdigest()

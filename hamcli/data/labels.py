"""Labels of data → class ids of a model.

A label is the name of a class (as in the config's label2id, letter case aside) or its number. Where
the data says which name a number has, the name decides.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hamcli.data.columns import brief
from hamcli.data.table import Table
from hamcli.errors import InputRefused

MAX_CLASSES = 10_000
IGNORED = -100


class ClassIds:
    """The classes of a model, by name and number."""

    def __init__(self, id2label: Mapping[Any, Any]) -> None:
        self.names = {int(index): str(name) for index, name in id2label.items()}
        self.ids = {name: index for index, name in self.names.items()}
        folded: dict[str, set[int]] = {}
        for name, index in self.ids.items():
            folded.setdefault(name.casefold(), set()).add(index)
        self.folded = {name: found.pop() for name, found in folded.items() if len(found) == 1}

    def of_column(self, table: Table, column: str) -> list[int]:
        """The class ids of a column of labels.

        Raises:
            InputRefused: E460, a label is none of the model's; E461, a row has none.
        """
        names = self._common(table.class_names.get(column, ()))
        known: dict[Any, int] = {}
        made = []
        for row, value in enumerate(table.columns[column]):
            if isinstance(value, list | dict):
                raise self._refusal(table, row, column, value)
            key = (type(value), value)
            if key not in known:
                known[key] = self._one(table, row, column, value, names)
            made.append(known[key])
        return made

    def of_tags(self, table: Table, row: int, column: str, tags: Iterable[Any]) -> list[int]:
        """The class ids of one row of tags; a tag of -100 or none stays out of the loss."""
        names = self._common(table.class_names.get(column, ()))
        return [
            IGNORED
            if tag is None or (isinstance(tag, int) and tag == IGNORED)
            else self._one(table, row, column, tag, names)
            for tag in tags
        ]

    def _common(self, names: Sequence[str]) -> Sequence[str]:
        """The data's own names, where the model knows them all; else its numbers count."""
        return names if names and all(self._by_name(name) is not None for name in names) else ()

    def _by_name(self, name: str) -> int | None:
        return self.ids.get(name, self.folded.get(name.casefold()))

    def _one(self, table: Table, row: int, column: str, value: Any, names: Sequence[str]) -> int:
        number = whole_number(value)
        if isinstance(value, str) and (found := self._by_name(value.strip())) is not None:
            return found
        if number is not None and names and 0 <= number < len(names):
            found = self._by_name(names[number])
            assert found is not None  # _common has looked
            return found
        if number is not None and number in self.names:
            return number
        raise self._refusal(table, row, column, value)

    def _refusal(self, table: Table, row: int, column: str, value: Any) -> InputRefused:
        place = f"{table.place(row)}: {column}"
        shown = ", ".join(list(self.names.values())[:8]) + (", ..." if len(self.names) > 8 else "")
        right = f"0 to {len(self.names) - 1}, or one of {shown}"
        if value is None or value == "":
            return InputRefused("E461", "row without a label", place, "others have one", right)
        why = f"{brief(value)} is no class of the model"
        return InputRefused("E460", "label unknown", place, why, right)


def whole_number(value: Any) -> int | None:
    """A label as a number: 3, True, 3.0 and "3" are numbers, 3.5 is none."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdecimal():
        return int(value) if len(value) < 19 else None
    return None


def names_of(table: Table, column: str, values: Iterable[Any]) -> list[str]:
    """The classes of data, for a head that is still to be made.

    The names that the data itself has for its numbers; else, where all labels are numbers, one
    class each from 0 to the highest; else the distinct labels, sorted.

    Args:
        table: Where the labels stand, for messages.
        column: Its column of labels.
        values: Labels, one by one.

    Raises:
        InputRefused: E462, these are no classes.
    """
    if column in table.class_names:
        return list(table.class_names[column])
    distinct: set[Any] = set()
    for value in values:
        if isinstance(value, list | dict):
            raise _no_classes(table, column, f"a {type(value).__name__}, {brief(value)}")
        if value is not None and value != "":
            distinct.add(value)
        if len(distinct) > MAX_CLASSES:
            raise _no_classes(table, column, f"over {MAX_CLASSES:,} different values")
    numbers = [whole_number(value) for value in distinct]
    whole = [number for number in numbers if number is not None]
    if distinct and len(whole) == len(distinct):
        if min(whole) < 0 or max(whole) >= MAX_CLASSES:
            worst = min(whole) if min(whole) < 0 else max(whole)
            raise _no_classes(table, column, f"the number {worst}")
        return [str(number) for number in range(max(whole) + 1)]
    if floats := [value for value in distinct if isinstance(value, float)]:
        raise _no_classes(table, column, f"the fraction {floats[0]}")
    return sorted({str(value).strip() for value in distinct})


def _no_classes(table: Table, column: str, why: str) -> InputRefused:
    right = "names, or numbers from 0"
    return InputRefused("E462", "labels are no classes", f"{table.name}: {column}", why, right)

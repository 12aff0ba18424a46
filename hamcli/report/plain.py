"""Records as plain JSON values and as canonical text, and back, by the types of their fields."""

import dataclasses
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hamcli.errors import InputRefused

# A list without nested lists, objects or strings. JSON strings hold no raw line break, so that the
# one after the bracket proves that the match is no part of a string.
_NUMBER_LIST = re.compile(r'\[\n[^\[\]{}"]*\]')


def canonical(document: Any) -> str:
    """ASCII text with sorted keys, a list of numbers on one line."""
    text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False)
    return _NUMBER_LIST.sub(_on_one_line, text) + "\n"


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + " ".join(match.group()[1:-1].split()) + "]"


def finite(value: Any) -> float | None:
    """A number as JSON may hold it: None where it is NaN or infinite, or was None."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def to_plain(value: Any) -> Any:
    """Records, mappings, sequences and numbers as dicts, lists, strings and finite numbers."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    return int(value) if isinstance(value, numbers.Integral) else finite(value)


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, as the type that a record's field declares.

    Args:
        kind: A record, a type of one of its fields, or that of an item.
        value: From JSON.
        where: Its key, for the error.

    Raises:
        InputRefused: A key is missing, or a value has the wrong type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else from_plain(inner, value, where)
    if origin is tuple:
        items = _expect(list, value, where)
        return tuple(
            from_plain(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items)
        )
    if origin is dict:
        entries = _expect(dict, value, where)
        return {
            key: from_plain(arguments[1], item, f"{where}.{key}") for key, item in entries.items()
        }
    if dataclasses.is_dataclass(kind):
        return _read_record(cast(type[Any], kind), _expect(dict, value, where), where)
    return _read_scalar(kind, value, where)


def _read_record(kind: type[Any], value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {}
    for field in dataclasses.fields(kind):
        key = f"{where}.{field.name}" if where else field.name
        if field.name in value:
            fields[field.name] = from_plain(hints[field.name], value[field.name], key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise no_report(key, "is missing", "every key of the schema")
    return kind(**fields)


def _read_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is not bool and isinstance(value, bool):
        raise no_report(where, "is a bool", kind.__name__)
    return _expect(kind, value, where)


def _expect(kind: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise no_report(where, f"is a {type(value).__name__}", kind.__name__)
    return value


def no_report(where: str | Path, why: str, right: str) -> InputRefused:
    """The error of a document that is no report, E447."""
    return InputRefused("E447", "not a report", where, why, right)

"""YAML text to plain data with a position for every key: nothing but data gets through.

PyYAML alone reads `1e-3` as text, `no` as false, a duplicate key silently, and can be hung by a
document of 342 bytes. So each of the parser's events is looked at before anything is made of it (no
anchors, aliases, tags; limits on depth, length and number), and scalars are resolved by the few
forms of YAML 1.2's core schema that a recipe needs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from hamcli.errors import RecipeError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_EVENTS = 3_000  # PyYAML takes 0.06 s for that much; shipped recipes have under 200
MAX_DIGITS = 40
ECHO_LIMIT = 80

_WORDS = {"None": "null", "True": "true", "False": "false"}

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Parsed:
    """Plain data, and where each of its keys and values stands (`file:line:column`)."""

    data: dict[str, Any]
    places: dict[KeyPath, str]


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader of plain data: numbers mean numbers, everything else stays text.

    An anchor, alias, tag, second document or a document beyond the limits is refused at its event,
    before a node is made of it.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)

    def __init__(self, document: str, name: str) -> None:
        super().__init__(document)
        self._document_name = name
        self._num_events = self._num_documents = self._depth = 0

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        """A bracket or brace opens; PyYAML would read a thousand more before it tells the first."""
        if self.flow_level >= MAX_DEPTH:
            where = _place(self._document_name, self.get_mark())
            raise RecipeError("E202", "recipe is nested too deep", where)
        super().fetch_flow_collection_start(token_class)

    def get_event(self) -> Any:
        """The next event, if it is one that a recipe may hold."""
        event = super().get_event()  # type: ignore[no-untyped-call]  # PyYAML's
        where = _place(self._document_name, event.start_mark)
        self._num_events += 1
        if self._num_events > MAX_EVENTS:
            raise RecipeError("E202", "recipe is too long", where, f"over {MAX_EVENTS:,} items")
        if isinstance(event, yaml.DocumentStartEvent):
            self._num_documents += 1
            if self._num_documents > 1:
                raise RecipeError("E202", "recipe holds a second document", where)
        if isinstance(event, yaml.CollectionStartEvent):
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise RecipeError("E202", "recipe is nested too deep", where)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._depth -= 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(
                "E203", "anchors and aliases are refused", where, "", "write the value out"
            )
        if getattr(event, "tag", None):
            raise RecipeError("E203", "tags are refused", where, "", "plain values only")
        return event


SCALARS = [
    (f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    for tag, pattern, first in (
        ("null", r"~|null|", [*"~n", ""]),
        ("bool", r"true|false", [*"tf"]),
        ("int", r"[-+]?(0|[1-9][0-9]*)", [*"-+0123456789"]),
        (
            "float",
            r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
            [*"-+.0123456789"],
        ),
    )
]
for _tag, _pattern, _first in SCALARS:
    RecipeLoader.add_implicit_resolver(_tag, _pattern, _first)


def parse(text: str | bytes, name: str) -> Parsed:
    """Read one YAML mapping.

    Args:
        text: The document; bytes must be UTF-8.
        name: What to call it in messages: a file name.

    Raises:
        RecipeError: It is not one plain mapping of limited size, or a key stands twice.
    """
    document = _decoded(text, name)
    try:
        loader = RecipeLoader(document, name)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        _refuse_syntax(error, document, name)
    except RecursionError:
        raise RecipeError("E202", "recipe is nested too deep", name) from None
    if node is None:
        return Parsed({}, {})
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            "E202", "recipe is not a mapping", name, "", "sections with keys, such as `sparsity:`"
        )
    places: dict[KeyPath, str] = {}
    data = dict(_mapping(loader, node, (), name, places))
    return Parsed(data, places)


def is_number(text: str) -> bool:
    """Whether a recipe would read this text as a number."""
    return any(pattern.match(text) for tag, pattern, _ in SCALARS if tag.endswith(("int", "float")))


def parse_value(text: str, name: str) -> Any:
    """Read one value as it would stand behind a key of a recipe."""
    return parse(f"value: {text}", name).data["value"]


def _decoded(text: str | bytes, name: str) -> str:
    if len(text) > MAX_BYTES:
        raise RecipeError("E202", "recipe is too large", name, f"over {MAX_BYTES // 1024} KiB")
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            "E202", "recipe is not UTF-8 text", name, f"byte {error.start}", "save it as UTF-8"
        ) from None


def _refuse_syntax(error: yaml.YAMLError, document: str, name: str) -> NoReturn:
    mark = getattr(error, "problem_mark", None)
    where = _place(name, mark) if mark is not None else name
    if isinstance(error, yaml.reader.ReaderError):  # knows a position only
        before = document[: error.position].split("\n")
        where = f"{name}:{len(before)}:{len(before[-1]) + 1}"
    why = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML")
    raise RecipeError("E202", "recipe is not YAML", where, shown(why)) from None


def _place(name: str, mark: Any) -> str:  # yaml.Mark, which PyYAML types in two ways
    return f"{name}:{mark.line + 1}:{mark.column + 1}"


def _mapping(
    loader: RecipeLoader,
    node: yaml.MappingNode,
    path: KeyPath,
    name: str,
    places: dict[KeyPath, str],
) -> Iterator[tuple[str, Any]]:
    seen: dict[str, yaml.Mark] = {}
    for key_node, value_node in node.value:
        where = _place(name, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError("E202", "a key is not plain text", where)
        key = str(key_node.value)
        if key in seen:
            raise RecipeError(
                "E204",
                "key stands twice",
                f"{where}: {shown(key)}",
                f"first on line {seen[key].line + 1}",
                "keep one",
            )
        seen[key] = key_node.start_mark
        places[(*path, key)] = where
        yield key, _value(loader, value_node, (*path, key), name, places)


def _value(
    loader: RecipeLoader, node: yaml.Node, path: KeyPath, name: str, places: dict[KeyPath, str]
) -> Any:
    if isinstance(node, yaml.MappingNode):
        return dict(_mapping(loader, node, path, name, places))
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            places[(*path, index)] = _place(name, item.start_mark)
            items.append(_value(loader, item, (*path, index), name, places))
        return items
    return _scalar(loader, node, name)


def _scalar(loader: RecipeLoader, node: yaml.Node, name: str) -> Any:
    text = str(node.value)
    if node.tag.endswith((":int", ":float")) and len(text) > MAX_DIGITS:
        raise RecipeError("E202", "a number is too long", _place(name, node.start_mark))
    if node.tag.endswith(":float"):
        return float(text)
    if node.tag.endswith(":int"):
        return int(text)
    return loader.construct_object(node, deep=True)


def shown(value: object) -> str:
    """A value as messages echo it: at most 80 characters, spelt as in YAML."""
    text = value if isinstance(value, str) else _WORDS.get(repr(value), repr(value))
    return text if len(text) <= ECHO_LIMIT else text[: ECHO_LIMIT - 1] + "…"

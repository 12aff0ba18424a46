"""Layers of plain data to a checked Recipe, and each fault back to the place it stands at."""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hamcli.errors import RecipeError, UsageError
from hamcli.recipe.schema import Recipe
from hamcli.recipe.text import MAX_BYTES, KeyPath, Parsed, is_number, parse, parse_value, shown

SECRET_KEY = re.compile(r"(?i)token$|^token|secret|password|api_?key")
NOT_SECRET = {"tokens"}
WORDS = {
    "model": "model.id",
    "config": "model.config",
    "task": "model.task",
    "data": "data.source",
    "target": "sparsity.target",
    "method": "sparsity.method",
    "pattern": "sparsity.pattern",
    "steps": "training.steps",
    "seed": "training.seed",
    "device": "training.device",
    "parallel": "training.parallel",
    "format": "export.format",
    "max_drop": "gate.max_drop",
}
"""Short words for keys: flags of commands and arguments of `sparsify`, in the order of faults."""

FAULT_LIMIT = 20  # a file of ten thousand wrong keys is no recipe; nobody reads further


@dataclass(frozen=True, slots=True)
class ReadRecipe:
    """A checked recipe and where each of its keys was said."""

    recipe: Recipe
    places: Mapping[KeyPath, str] = field(default_factory=dict)

    def place(self, *path: str | int) -> str:
        """Where a key was said: `quick.yaml:3:13: targets.include`, or the key alone."""
        key = dotted(path)
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return f"{self.places[path[:length]]}: {key}"
        return key


def read_recipe(layers: Iterable[Parsed]) -> ReadRecipe:
    """Merge layers, the later over the earlier, and check the whole.

    Raises:
        RecipeError: With every fault, each at its own place.
    """
    merged: dict[str, Any] = {}
    places: dict[KeyPath, str] = {}
    for layer in layers:
        _merge(merged, layer.data, places, ())
        places.update(layer.places)
    secrets = list(_secret_paths(merged, ()))
    if secrets:
        faults = [_secret_fault(path, places) for path in secrets[:FAULT_LIMIT]]
        raise _joined(faults, len(secrets))
    try:
        return ReadRecipe(Recipe.model_validate(merged), places)
    except ValidationError as error:
        details = error.errors(include_input=True, include_url=False)
        told: dict[str, RecipeError] = {}
        for detail in details:  # members of a union tell the same fault twice
            fault = _fault(detail, places)
            told[fault.line()] = fault
            if len(told) == FAULT_LIMIT:
                break
        raise _joined(list(told.values()), max(len(details), len(told))) from None


def recipe_layer(name_or_path: str) -> Parsed:
    """A shipped recipe by name, or a recipe file by path.

    Raises:
        RecipeError: There is no such recipe, or it is not plain YAML.
    """
    if name_or_path in shipped_names():
        return parse(shipped_text(name_or_path), f"{name_or_path}.yaml")
    path = Path(name_or_path)
    looks_like_path = path.suffix in {".yaml", ".yml"} or len(path.parts) > 1
    if not looks_like_path and not _is_file(path):
        near = difflib.get_close_matches(name_or_path, shipped_names(), n=1)
        right = f'did you mean "{near[0]}"?' if near else "ham recipe list shows the shipped ones"
        raise RecipeError("E201", "no such recipe", shown(name_or_path), "", right)
    return parse(_file_bytes(path), path.name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name
        return False


def _file_bytes(path: Path) -> bytes:
    if not _is_file(path):  # a FIFO or a device would hang or never end
        raise RecipeError("E201", "no such recipe file", path, "not a regular file")
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError("E201", "recipe cannot be read", path, error.strerror or "") from None


def words_layer(words: Iterable[str]) -> Parsed:
    """`section.key=value` words of the command line as a layer of their own.

    Raises:
        UsageError: A word has another form.
    """
    data: dict[str, Any] = {}
    places: dict[KeyPath, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path):
            raise UsageError(
                "E102", "not a setting", f"--set {shown(word)}", "", "--set section.key=value"
            )
        put(data, path, parse_value(value, f"--set {shown(key)}"))
        places[path] = "--set"
    return Parsed(data, places)


def values_layer(values: Mapping[str, Any], origin: str) -> Parsed:
    """Values under dotted keys, as flags and keyword arguments give them; None says nothing."""
    data: dict[str, Any] = {}
    places: dict[KeyPath, str] = {}
    for key, value in values.items():
        if value is not None:
            path = tuple(key.split("."))
            put(data, path, value)
            places[path] = origin
    return Parsed(data, places)


def put(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set `data[path[0]][path[1]]... = value`, making the mappings on the way."""
    for key in path[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = data[key] = {}
        data = inner
    data[path[-1]] = value


def dotted(path: Iterable[str | int]) -> str:
    """`("a", "b", 0)` as `a.b[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def shipped_names() -> list[str]:
    """Names of the recipes inside the package."""
    names = [item.name for item in _shipped_folder().iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    """Text of a shipped recipe."""
    return (_shipped_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def shipped_summary(name: str) -> str:
    """What a shipped recipe is for: the first sentence of its comment, up to a colon."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), shipped_text(name).splitlines())
    text = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"[:.](?: |$)", text)[0]


def _shipped_folder() -> Traversable:
    try:
        return resources.files("hamcli.recipes")
    except ModuleNotFoundError:  # run from a checkout, not installed
        return Path(__file__).parents[2] / "recipes"


def _merge(
    into: dict[str, Any], layer: Mapping[str, Any], places: dict[KeyPath, str], path: KeyPath
) -> None:
    for key, value in layer.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, places, here)
        else:
            for old in [known for known in places if known[: len(here)] == here]:
                del places[old]
            into[key] = value


def _secret_paths(data: Mapping[str, Any], path: KeyPath) -> Iterable[KeyPath]:
    for key, value in data.items():
        if SECRET_KEY.search(str(key)) and key not in NOT_SECRET:
            yield (*path, key)
        elif isinstance(value, dict):
            yield from _secret_paths(value, (*path, key))


def _secret_fault(path: KeyPath, places: Mapping[KeyPath, str]) -> RecipeError:
    return RecipeError(
        "E205",
        "a recipe holds no secrets",
        _where(path, places),
        "recipes are written beside the weights",
        "the hub reads HF_TOKEN from the environment",
    )


def _joined(faults: list[RecipeError], num_faults: int) -> RecipeError:
    first, *others = faults
    hints = first.hints
    if len(faults) == FAULT_LIMIT < num_faults:
        hints = (*hints, f"these are the first {FAULT_LIMIT} faults of about {num_faults}")
    return RecipeError(first.code, first.what, first.where, first.why, first.right, hints, others)


def _where(path: KeyPath, places: Mapping[KeyPath, str]) -> str:
    return ReadRecipe(Recipe.model_construct(), places).place(*path)


def _fault(detail: ErrorDetails, places: Mapping[KeyPath, str]) -> RecipeError:
    path = _key_path(detail["loc"])
    kind, value, limits = detail["type"], detail.get("input"), detail.get("ctx", {})
    where = _where(path, places)
    if kind == "extra_forbidden":
        return RecipeError("E206", "unknown key", where, "", _near_key(path))
    if kind in {"ramp", "clamps", "pattern", "levels", "score", "precision"}:
        return RecipeError("E209", "values do not fit together", where, detail["msg"])
    if kind in _RANGES:
        return RecipeError(
            "E208", "value out of range", where, shown(value), _range_text(path, value)
        )
    if kind == "string_pattern_mismatch":
        return RecipeError(
            "E208", "value out of range", where, shown(value), f"must match {limits['pattern']}"
        )
    if kind == "literal_error":
        return RecipeError("E208", "no such choice", where, shown(value), _near_choice(path, value))
    return RecipeError("E207", "wrong type", where, shown(value), _type_text(path, value))


_RANGES = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
    "too_short",
    "too_long",
}


def _key_path(loc: tuple[int | str, ...]) -> KeyPath:
    """The place without the names of union members, which pydantic puts among the keys."""
    path: list[str | int] = []
    fields: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            path.append(part)
        elif isinstance(fields, type) and issubclass(fields, BaseModel):
            path.append(part)
            info = fields.model_fields.get(part)
            fields = info.annotation if info is not None else None
        # else: a member of a union such as "float" or "literal['auto']"
    return tuple(path)


def _schema_at(path: KeyPath) -> dict[str, Any]:
    """JSON Schema of the key at `path`; empty where there is none."""
    schema = _schema()
    here = schema
    for part in path:
        if isinstance(part, int):
            here = here.get("items", {})
            continue
        while "$ref" in here:
            here = schema["$defs"][here["$ref"].rpartition("/")[2]]
        here = here.get("properties", {}).get(part, {})
    while "$ref" in here:
        here = schema["$defs"][here["$ref"].rpartition("/")[2]]
    return here


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _members(path: KeyPath) -> list[dict[str, Any]]:
    here = _schema_at(path)
    members: list[dict[str, Any]] = here.get("anyOf", [here])
    return members


def _near_key(path: KeyPath) -> str:
    *parent, key = path
    known = list(_schema_at(tuple(parent)).get("properties", {}))
    near = difflib.get_close_matches(shown(key), known, n=1)
    if near:
        return f'did you mean "{near[0]}"?'
    elsewhere = [
        name for name in Recipe.model_fields if key in _schema_at((name,)).get("properties", {})
    ]
    if elsewhere:
        return f'did you mean "{elsewhere[0]}.{key}"?'
    return "known: " + ", ".join(known) if known else "no keys here"


def _choices(path: KeyPath) -> list[str]:
    found: list[str] = []
    for member in _members(path):
        found += member.get("enum", [member["const"]] if "const" in member else [])
    return found


def _near_choice(path: KeyPath, value: object) -> str:
    choices = _choices(path)
    near = difflib.get_close_matches(shown(value), choices, n=1)
    listed = "one of " + ", ".join(choices)
    return f'did you mean "{near[0]}"? {listed}' if near else listed


def _range_text(path: KeyPath, value: object) -> str:
    if path[-1] in {"target", "min_sparsity", "max_sparsity"} and _is_percent(value):
        return f"a fraction from 0 to 1: did you mean {round(float(str(value)) / 100, 6):g}?"
    return "must be " + _allowed(path)


def _allowed(path: KeyPath) -> str:
    texts = []
    for member in _members(path):
        low = member.get("minimum", member.get("exclusiveMinimum"))
        high = member.get("maximum", member.get("exclusiveMaximum"))
        parts = []
        if low is not None:
            parts.append(f"{'above' if 'exclusiveMinimum' in member else 'at least'} {low:g}")
        if high is not None:
            parts.append(f"{'below' if 'exclusiveMaximum' in member else 'at most'} {high:g}")
        if "enum" in member or "const" in member:
            parts.append(" or ".join(member.get("enum", [member.get("const")])))
        elif member.get("type") in _TYPE_WORDS:
            parts.insert(0, _TYPE_WORDS[member["type"]])
        if "minItems" in member:
            parts.append(f"of at least {member['minItems']}")
        if parts:
            texts.append(" ".join(parts))
    return ", or ".join(texts) or "another value"


_TYPE_WORDS = {
    "number": "a finite number",
    "integer": "a whole number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a section with keys",
    "null": "null",
}


def _type_text(path: KeyPath, value: object) -> str:
    text = "must be " + _allowed(path)
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+ ?%", value):
        return f"{text}: did you mean {float(value.rstrip('% ')) / 100:g}?"
    if isinstance(value, str) and is_number(value):
        return f"{text}: remove the quotes"
    return text


def _is_percent(value: object) -> bool:
    return isinstance(value, int | float) and 1 < value <= 100

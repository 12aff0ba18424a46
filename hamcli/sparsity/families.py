"""Which tensors of a file may become zero, told from names and shapes: no network is built.

For architectures whose modules are written down here the answer is that of `targets`, in the same
order, and tests hold both together. For every other one it is `Undecided`, with the reason. A file
without a config goes by the usual names.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hamcli.sparsity.architectures import FAMILIES, Family, Line
from hamcli.sparsity.choice import choose, is_dense_by_name, module_of

Shape = tuple[int, ...]

_HEADS = (
    "ForMaskedLM",
    "ForCausalLM",
    "LMHeadModel",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
)
_LANGUAGE_HEADS = _HEADS[:3]
_STATISTICS = ("running_mean", "running_var", "inv_freq", "num_batches_tracked")


class Undecided(Exception):
    """Names and shapes do not tell; the text says why, in a few words."""


@dataclass(frozen=True, slots=True)
class FileTarget:
    """A tensor of the model that may become sparse, as it lies in files.

    Attributes:
        names: Its names in the model, the first one first; several where it is tied.
        shape: In the model.
        input_dim: Axis that the layer sums over; see `targets.Target`.
        is_stacked: Whether axis 0 counts matrices (fused experts).
        pieces: The tensors of the files that hold it, one after the other, row-major.
    """

    names: tuple[str, ...]
    shape: Shape
    input_dim: int
    is_stacked: bool
    pieces: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def piece_axis(self) -> int:
        """The input axis within a piece, which lacks the axis of the experts."""
        return self.input_dim - int(self.is_stacked and len(self.pieces) > 1)


@dataclass(frozen=True, slots=True)
class FileTargets:
    """The targets among the tensors of files, in the model's order."""

    items: tuple[FileTarget, ...]
    exclude: tuple[str, ...]
    parameters: frozenset[str]
    """The tensors of the files that are parameters and no buffers."""

    def __iter__(self) -> Any:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(_size(one.shape) for one in self.items)


def _size(shape: Iterable[int]) -> int:
    return functools.reduce(lambda one, other: one * other, shape, 1)


def by_names(
    shapes: Mapping[str, Shape], include: Sequence[str], exclude: Sequence[str] | None
) -> FileTargets:
    """The targets of files without a config: all matrices but those with usual dense names.

    Args:
        shapes: Name → shape of each floating-point tensor.
        include: As for `choice.choose`.
        exclude: As for `choice.choose`.

    Raises:
        RecipeError: As `choice.choose`.
    """
    candidates = [
        FileTarget((name,), shape, 2 if len(shape) == 3 else 1, len(shape) == 3, (name,))
        for name, shape in sorted(shapes.items(), key=lambda one: _natural(one[0]))
        if _is_prunable(shape)
    ]
    found = [one for one in candidates if is_dense_by_name(one.name)]
    every_name = [*shapes, *map(module_of, shapes)]
    chosen, globs = choose(candidates, every_name, found, include, exclude)
    return FileTargets(tuple(chosen), globs, frozenset(shapes))


def by_family(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    include: Sequence[str],
    exclude: Sequence[str] | None,
) -> FileTargets:
    """The targets that the network of `config` would have, by its file's names and shapes.

    Args:
        config: The model's config.json.
        shapes: Name → shape of each floating-point tensor of the files.
        include: As for `choice.choose`.
        exclude: As for `choice.choose`.

    Raises:
        Undecided: The architecture is not known here, or the files are not as it writes them.
        RecipeError: As `choice.choose`.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise Undecided(f"the architecture {str(config.get('model_type'))[:40]!r} is not known")
    placed = _Placed(family, config, shapes)
    chosen, globs = choose(placed.candidates, placed.every_name, placed.dense, include, exclude)
    placed.refuse_doubtful(chosen)
    return FileTargets(tuple(chosen), globs, placed.parameters())


class _Placed:
    """The tensors of files as the parameters that they are in the model.

    Attributes:
        candidates: Those of two or more dimensions, in the model's order, the head's last.
        dense: Those of them that stay dense unless asked for.
        every_name: Names of parameters and modules.
    """

    def __init__(
        self, family: Family, config: Mapping[str, Any], shapes: Mapping[str, Shape]
    ) -> None:
        self.family, self.shapes = family, shapes
        self.class_name = _class_name(config)
        self.has_head = self.class_name.endswith(_HEADS)
        said = config.get("tie_word_embeddings")
        is_tied = family.is_tied if said is None else bool(said)
        self.is_tied = is_tied and self.class_name.endswith(_LANGUAGE_HEADS)
        self.patterns = {_key(name): line for line in family.lines for name in line.files}
        self.head_names: list[str] = []
        self.body: dict[str, dict[tuple[int, ...], str]] = {}
        for name, shape in shapes.items():
            if _is_prunable(shape):
                self._place(name)
        body = self._body_candidates()
        heads = [
            FileTarget((self._head_name(name),), shapes[name], 1, False, (name,))
            for name in self.head_names
            if not (self.is_tied and self._head_name(name) == family.head)
        ]
        self.heads = heads
        self.candidates = [one for _, one in body] + heads
        self.dense = [one for line, one in body if line.axis is None] + heads
        self.every_name = self._every_name()

    def _place(self, name: str) -> None:
        inner = name.removeprefix(f"{self.family.prefix}.")
        key = _key(inner)
        if key in self.patterns:
            numbers = tuple(int(word) for word in inner.split(".") if word.isdigit())
            places = self.body.setdefault(key, {})
            if numbers in places:
                raise Undecided(f"{name} stands there with and without {self.family.prefix}")
            places[numbers] = name
        elif self.has_head and inner == name:
            self.head_names.append(name)
        else:
            raise Undecided(f"{name[:80]} is no tensor of {self.class_name} that is known here")

    def _head_name(self, name: str) -> str:
        return self.family.head if name == self.family.stored_head else name

    def _body_candidates(self) -> list[tuple[Line, FileTarget]]:
        made = []
        for line in self.family.lines:
            if not line.is_buffer:
                made += [(line, one) for one in self._of_line(line)]
        order = _Order(line.model for line in self.family.lines)
        return sorted(made, key=lambda one: order.key(self._inner(one[1].name)))

    def _inner(self, name: str) -> str:
        return name.removeprefix(f"{self.family.prefix}.") if self.has_head else name

    def _of_line(self, line: Line) -> list[FileTarget]:
        depth = line.model.split(".").count("#")
        groups: dict[tuple[int, ...], list[str]] = {}
        places = [self.body.get(_key(name), {}) for name in line.files]
        for numbers in sorted({numbers for one in places for numbers in one}):
            for of_file in places:
                if numbers not in of_file:
                    raise Undecided(f"{line.model} lacks a part at {numbers}")
                groups.setdefault(numbers[:depth], []).append(of_file[numbers])
        return [self._target(line, numbers, pieces) for numbers, pieces in groups.items()]

    def _target(self, line: Line, numbers: tuple[int, ...], pieces: list[str]) -> FileTarget:
        words = iter(numbers)
        inner = ".".join(
            str(next(words)) if word == "#" else word for word in line.model.split(".")
        )
        name = f"{self.family.prefix}.{inner}" if self.has_head else inner
        names: tuple[str, ...] = (name,)
        if self.is_tied and inner == self.family.embedding:
            names = (name, self.family.head)
        first = self.shapes[pieces[0]]
        is_fused = line.files[0].count("#") > line.model.count("#")
        shape = first
        if is_fused:
            count = len(pieces) // len(line.files)
            rows = sum(self.shapes[piece][0] for piece in pieces[: len(line.files)])
            shape = (count, rows, *first[1:])
            if any(self.shapes[piece][1:] != first[1:] for piece in pieces):
                raise Undecided(f"the parts of {name} differ in shape")
        # a free tensor of three axes is taken for stacked matrices, as `targets` takes it
        is_stacked = is_fused or (len(shape) == 3 and not inner.endswith(".weight"))
        axis = line.axis if line.axis is not None else 2 if is_stacked else 1
        return FileTarget(names, shape, axis, is_stacked, tuple(pieces))

    def _every_name(self) -> list[str]:
        names = [name for one in self.candidates for name in one.names]
        for name in self.shapes:
            inner = name.removeprefix(f"{self.family.prefix}.")
            names += [inner, f"{self.family.prefix}.{inner}"] if self.has_head else [inner]
        modules = []
        for name in names:
            words = name.split(".")
            modules += [".".join(words[:end]) for end in range(1, len(words))]
        return list(dict.fromkeys([*modules, *names]))

    def parameters(self) -> frozenset[str]:
        """The tensors of the files that are parameters of the model, each once."""
        kinds = {_key(line.files[0]) for line in self.family.lines if line.is_buffer}
        prefix = f"{self.family.prefix}."
        buffers = {name for name in self.shapes if _key(name.removeprefix(prefix)) in kinds}
        twice = {
            name
            for name in self.head_names
            if self.is_tied and self._head_name(name) == self.family.head
        }
        statistics = {name for name in self.shapes if name.endswith(_STATISTICS)}
        return frozenset(self.shapes) - buffers - twice - statistics

    def refuse_doubtful(self, chosen: Sequence[FileTarget]) -> None:
        """Refuse to tell what the order of several heads or a tensor stored twice is."""
        ids = {id(one) for one in chosen}
        if sum(id(one) in ids for one in self.heads) > 1:
            raise Undecided("several tensors of the head are targets, and their order is not known")
        if self.is_tied and self.family.head in map(self._head_name, self.head_names):
            tied = [one for one in chosen if len(one.names) > 1]
            if tied:
                raise Undecided(f"{tied[0].name} is tied, yet stored twice")


def _class_name(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str) or not name.endswith((*_HEADS, "Model")):
        raise Undecided("the config names no class that is known here")
    return name


def _key(name: str) -> str:
    return ".".join("#" if word.isdigit() else word for word in name.split("."))


def _is_prunable(shape: Shape) -> bool:
    return len(shape) >= 2 and _size(shape) > 0


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts `layers.10` after `layers.9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


class _Order:
    """The order in which a network walks through its modules, from patterns in that order."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.root: dict[str, Any] = {}
        for pattern in patterns:
            node = self.root
            for word in pattern.split("."):
                node = node.setdefault(word, {})

    def key(self, name: str) -> tuple[tuple[int, int], ...]:
        """Sorts names that fit the patterns."""
        node, key = self.root, []
        for word in name.split("."):
            known = "#" if word.isdigit() else word
            key.append((list(node).index(known), int(word) if known == "#" else 0))
            node = node[known]
        return tuple(key)

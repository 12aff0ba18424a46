"""Targets of files whose architecture names alone do not tell: from its network without weights.

The network is built as shapes only, so that memory does not grow with the model, but torch and
transformers are loaded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hamcli.checkpoint.loading import build_skeleton
from hamcli.checkpoint.source import Source
from hamcli.sparsity.families import FileTarget, FileTargets, Undecided
from hamcli.sparsity.targets import select_targets

Shape = tuple[int, ...]


def by_skeleton(
    source: Source,
    shapes: Mapping[str, Shape],
    include: Sequence[str],
    exclude: Sequence[str] | None,
) -> FileTargets:
    """The targets of the network that the config describes, each in one tensor of the files.

    Args:
        source: The model.
        shapes: Name → shape of each floating-point tensor of its files.
        include: As for `targets.select_targets`.
        exclude: As for `targets.select_targets`.

    Raises:
        Undecided: A parameter is stored in parts or under another name, or a tensor is none.
        RecipeError: As `targets.select_targets`.
        InputRefused: transformers does not know the architecture, or refuses the config.
    """
    model: Any = build_skeleton(source)
    places = _places(model, shapes)
    chosen = select_targets(model, include, exclude)
    items = tuple(
        FileTarget(
            (one.name,),
            tuple(one.param.shape),
            one.input_dim,
            one.is_stacked,
            (places[id(one.param)],),
        )
        for one in chosen
    )
    return FileTargets(items, chosen.exclude, frozenset(places.values()))


def _places(model: Any, shapes: Mapping[str, Shape]) -> dict[int, str]:
    """Id of each parameter → its tensor in the files."""
    prefix = f"{model.base_model_prefix}."
    shape_of: dict[int, Shape] = {}
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        shape_of[id(param)] = tuple(param.shape)
        names.setdefault(id(param), []).append(name)
    places = {}
    for key, own in names.items():
        spelled = [
            form for name in own for form in (name, prefix + name, name.removeprefix(prefix))
        ]
        found = [form for form in spelled if shapes.get(form) == shape_of[key]]
        if not found:
            raise Undecided(f"{own[0]} is not stored as one tensor of this name")
        places[key] = found[0]
    buffers = {name for name, _ in model.named_buffers()}
    buffers |= {name.removeprefix(prefix) for name in buffers}
    stored_twice = {form for own in names.values() for form in own} - set(places.values())
    if stored_twice & shapes.keys():
        raise Undecided(f"{min(stored_twice & shapes.keys())} is tied, yet stored too")
    others = shapes.keys() - set(places.values()) - buffers
    if others:
        raise Undecided(f"{min(others)} is no parameter of {type(model).__name__}")
    return places

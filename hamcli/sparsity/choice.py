"""Which tensors globs choose, by their names alone: with a model or without, without torch."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from hamcli.errors import RecipeError
from hamcli.sparsity.globs import is_literal, literal, matches, nearest

AUTO = "auto"  # among the excluded globs it stands for those found in the model

ROUTERS = ("gate", "router", "shared_expert_gate")
_DENSE_WORDS = ("wte", "wpe", "lm_head", "pooler", "cls", "score")
_DENSE_PARTS = ("embed", "position", "token", "bias", "classifier")


class Candidate(Protocol):
    """A tensor of two or more dimensions, with all the names it goes by."""

    @property
    def names(self) -> tuple[str, ...]:
        """The first is the one it is told by."""


C = TypeVar("C", bound=Candidate)


def module_of(name: str) -> str:
    """Dotted name of the module that owns a parameter; empty for the model itself."""
    return name.rpartition(".")[0]


def is_dense_by_name(name: str) -> bool:
    """Whether a name is a usual one of embeddings, heads, poolers, routers or biases."""
    words = name.split(".")
    if any(part in word for word in words for part in _DENSE_PARTS):
        return True
    return any(word in (*ROUTERS, *_DENSE_WORDS) for word in words)


def choose(
    candidates: Sequence[C],
    every_name: Sequence[str],
    found: Sequence[C],
    include: Sequence[str],
    exclude: Sequence[str] | None,
) -> tuple[list[C], tuple[str, ...]]:
    """The candidates that globs choose, and the globs that leave the same ones when given back.

    Args:
        candidates: All tensors that may become zero, in the model's order.
        every_name: What a glob of `exclude` may match: modules and parameters of any kind.
        found: Those that stay dense unless asked for by a literal name.
        include: Globs over module names, or parameter names.
        exclude: Globs too; "auto" among them, or None, stands for `found`.

    Raises:
        RecipeError: E214, E215, a glob matches nothing. E216, nothing is left. E217, a tied tensor
            is reached by some of its names only.
    """
    if not candidates:
        raise RecipeError(
            "E216",
            "no weights are left to prune",
            "targets.include",
            "the model has no floating-point tensor of two or more dimensions",
            "a model with linear or convolutional layers",
        )
    given = [AUTO] if exclude is None else list(exclude)
    _refuse_idle_globs(candidates, every_name, include, given)
    automatic = _automatic_globs(candidates, found, include) if AUTO in given else []
    globs = tuple(dict.fromkeys([*(glob for glob in given if glob != AUTO), *automatic]))
    chosen = [candidate for candidate in candidates if _is_chosen(candidate, include, globs)]
    if not chosen:
        raise RecipeError(
            "E216",
            "no weights are left to prune",
            "targets.exclude",
            f"all {len(candidates)} tensors that may be pruned are excluded or not included",
            "exclude fewer, or name a layer in targets.include to override the automatic list",
        )
    return chosen, globs


def _automatic_globs(
    candidates: Sequence[Candidate], found: Sequence[Candidate], include: Sequence[str]
) -> list[str]:
    """Globs for what was found and is not asked for by a literal name; modules where that will do.

    A tied tensor is excluded by every one of its names.
    """
    excluded = [candidate for candidate in found if not _is_asked_for(candidate, include)]
    ids = {id(candidate) for candidate in excluded}
    # a module's name must not take along what stays a target; the model itself has none
    kept_modules = {""} | {
        module_of(name)
        for candidate in candidates
        if id(candidate) not in ids
        for name in candidate.names
    }
    return [
        literal(name if module_of(name) in kept_modules else module_of(name))
        for candidate in excluded
        for name in candidate.names
    ]


def _is_asked_for(candidate: Candidate, include: Sequence[str]) -> bool:
    return any(
        glob in _spellings(name) for glob in include for name in candidate.names if is_literal(glob)
    )


def _is_chosen(candidate: Candidate, include: Sequence[str], exclude: Sequence[str]) -> bool:
    reached = [
        name
        for name in candidate.names
        if any(matches(glob, _spellings(name)) for glob in include)
        and not any(matches(glob, _spellings(name)) for glob in exclude)
    ]
    if not reached:
        return False
    if len(reached) < len(candidate.names) and not _is_asked_for(candidate, include):
        other = next(name for name in candidate.names if name not in reached)
        raise RecipeError(
            "E217",
            "a tied tensor is a target by one of its names only",
            "targets",
            f'"{reached[0]}" is the same tensor as "{other}", which is not a target',
            f'exclude "{module_of(reached[0])}" too, or include it by its full name',
        )
    return True


def _refuse_idle_globs(
    candidates: Sequence[Candidate],
    every_name: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> None:
    """Every glob that matches nothing, in one error."""
    spellings = [_spellings(name) for candidate in candidates for name in candidate.names]
    modules = list(dict.fromkeys(module for module, _ in spellings))
    names = list(dict.fromkeys([*modules, *(name for _, name in spellings)]))
    faults = [
        _idle("E214", "include", glob, len(modules), nearest(glob, names))
        for glob in include
        if not matches(glob, names)
    ]
    every_name = list(dict.fromkeys(every_name))
    faults += [
        _idle("E215", "exclude", glob, len(every_name), nearest(glob, every_name))
        for glob in exclude
        if glob != AUTO and not matches(glob, every_name)
    ]
    if faults:
        first = faults[0]
        raise RecipeError(
            first.code, first.what, first.where, first.why, first.right, others=faults[1:]
        )


def _idle(code: str, key: str, glob: str, total: int, close: Sequence[str]) -> RecipeError:
    shown = ", ".join(f'"{name}"' for name in close)
    return RecipeError(
        code,
        "no module matches",
        f"targets.{key}",
        f'"{glob}" names 0 of {total}',
        f"nearest: {shown}" if shown else "globs over module names, as ham inspect lists them",
    )


def _spellings(name: str) -> tuple[str, str]:
    """What a glob may name: the module and the parameter."""
    return module_of(name), name

"""Whether a file's tensors are those of its config: none missing, none over, sound, one head.

transformers warns of what does not fit and goes on with random weights; here it is refused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hamcli.checkpoint.config import infer_task
from hamcli.checkpoint.headers import FLOATS
from hamcli.checkpoint.reading import LazyTensor
from hamcli.checkpoint.source import Source
from hamcli.errors import InputRefused

_NEW_HEAD_TASKS = ("text-classification", "token-classification", "image-classification")


def has_head(source: Source, task: str) -> bool:
    """Whether the checkpoint was saved with the head of `task`."""
    try:
        return infer_task(source.config) == task
    except InputRefused:
        return False


class Body:
    """Which names belong to the base model, and which to a head on it."""

    def __init__(self, skeleton: Any) -> None:
        self.class_name = type(skeleton).__name__
        self.prefix: str = skeleton.base_model_prefix
        base = getattr(skeleton, self.prefix, None) if self.prefix else None
        body = base if isinstance(base, nn.Module) else skeleton
        self.inside = _first_names(body)
        self.heads = _first_names(skeleton) - {self.prefix} if body is not skeleton else set()

    def is_head(self, name: str) -> bool:
        """Whether `name`, in the file's or the model's naming, belongs to a task."""
        first = name.partition(".")[0]
        # a pooler lies inside the base model, and still only some tasks train it
        return is_pooler(name) or (first != self.prefix and first not in self.inside)


def _first_names(module: nn.Module) -> set[str]:
    names = {name for name, _ in module.named_children()}
    return names | {name for name, _ in module.named_parameters(recurse=False)}


def is_pooler(name: str) -> bool:
    """Whether a tensor belongs to a pooler, inside the base model yet of some tasks alone."""
    return "pooler" in name.split(".")


def refuse_twins(source: Source, tensors: Mapping[str, Any], prefix: str) -> None:
    """See that no tensor has two names, with and without the base model's prefix: which counts?

    Raises:
        InputRefused: E412.
    """
    for name in tensors:
        if prefix and f"{prefix}.{name}" in tensors:
            raise InputRefused(
                "E412", "one tensor under two names", source.id, f"{name} and {prefix}.{name}"
            )


def check_missing(
    source: Source,
    task: str,
    body: Body,
    model: Any,
    info: dict[str, Any],
    allow_new_head: bool,
    replace_head: bool,
) -> bool:
    """Whether the head is new; every other missing tensor is refused.

    Args:
        source: A checked model.
        task: What the model is built for.
        body: Of that model.
        model: As it was loaded.
        info: What transformers found while loading.
        allow_new_head: Whether a head may be made where the file has none for `task`.
        replace_head: Whether the head of the file was left out, since it has another size.

    Raises:
        InputRefused: E425, E426.
    """
    missing = set(info["missing_keys"])
    if not missing:
        return False
    inside = sorted(name for name in missing if not body.is_head(name))
    if inside or (has_head(source, task) and not replace_head):
        name = (inside or sorted(missing))[0]
        raise InputRefused(
            "E425",
            "tensor missing",
            f"{source.id}: {name}",
            f"the config describes it, the file lacks it ({len(missing)} in all)",
            "the weights that belong to this config.json",
        )
    if task == "feature-extraction" and all(is_pooler(name) for name in missing):
        return False
    if not allow_new_head or task not in _NEW_HEAD_TASKS:
        trained = "train a head by giving labelled --data"
        raise InputRefused(
            "E426",
            f"no head for {task}",
            source.id,
            f"the file has no {min(missing)}",
            trained if task in _NEW_HEAD_TASKS else "--task of the head that it has",
            ["--task feature-extraction keeps the body of any model and drops its head"],
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    head = {name for name, _ in model.named_parameters() if body.is_head(name)}
    if kept := sorted(name for name in head - missing - tied if not is_pooler(name)):
        raise InputRefused(
            "E425",
            "tensor missing",
            f"{source.id}: {min(missing)}",
            f"a part of the head is there, {kept[0]}",
            "all of the head or none",
        )
    return True


def check_unexpected(source: Source, body: Body, info: dict[str, Any]) -> tuple[str, ...]:
    """The tensors of another head; every other that the model has no place for is refused.

    Raises:
        InputRefused: E427.
    """
    unexpected = sorted(info["unexpected_keys"])
    inside = [name for name in unexpected if not _may_drop(source, body, name)]
    if inside:
        raise InputRefused(
            "E427",
            "tensor that the config does not describe",
            f"{source.id}: {inside[0]}",
            f"{len(inside)} in all",
            "the config.json that belongs to these weights",
        )
    return tuple(unexpected)


def _may_drop(source: Source, body: Body, name: str) -> bool:
    """Whether `name` is of another head.

    A model of the same class as the file may still lack a pooler, or a second head beside its own:
    plain BERT comes with both. Anything else there is an extra tensor.
    """
    is_same = body.class_name in (source.config.get("architectures") or ())
    first = name.partition(".")[0]
    return body.is_head(name) and (not is_same or is_pooler(name) or first in body.heads)


def check_mismatched(source: Source, info: dict[str, Any]) -> None:
    """See that shapes are those of the config.

    Raises:
        InputRefused: E429.
    """
    mismatched = sorted(info["mismatched_keys"], key=str)
    if mismatched:
        name, in_file, in_model = (*mismatched[0], None, None)[:3]
        raise InputRefused(
            "E429",
            "tensor of the wrong shape",
            f"{source.id}: {name}",
            f"{_shape(in_file)} in the file, {_shape(in_model)} by the config",
            "the config.json that belongs to these weights",
        )


def _shape(shape: Any) -> str:
    return "?" if shape is None else str(list(shape))


def check_dtypes(source: Source, model: Any, tensors: Mapping[str, LazyTensor]) -> None:
    """See that no integers and 8-bit floats were cast into a floating-point weight.

    Raises:
        InputRefused: E428.
    """
    integer_slots = {
        name.rpartition(".")[2]
        for name, tensor in model.state_dict().items()
        if not tensor.is_floating_point()
    }
    for name, tensor in tensors.items():
        is_float = tensor.info.dtype in FLOATS
        if tensor.was_read and not is_float and name.rpartition(".")[2] not in integer_slots:
            raise InputRefused(
                "E428",
                "tensor of the wrong dtype",
                f"{source.id}: {name}",
                f"{tensor.info.dtype} where the model has a floating-point weight",
                "the model before it was quantised",
            )


def check_finite(source: Source, model: Any) -> None:
    """See that all floating-point tensors of the model are finite.

    Raises:
        InputRefused: E430.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise InputRefused(
                "E430",
                "tensor that is not finite",
                f"{source.id}: {name}",
                f"{count} of {tensor.numel()} values are NaN or infinite as {tensor.dtype}",
                "a sound checkpoint, or a wider --set model.dtype",
            )

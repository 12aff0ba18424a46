"""What a run is when the user says little: the recipe of its task, the name of its folder."""

import os
from pathlib import Path
from typing import Any

RECIPES_OF_TASK = {
    "feature-extraction": {0.0: "text-encoder-90"},
    "causal-lm": {0.0: "causal-lm-50"},
    "masked-lm": {0.0: "masked-lm-80", 0.9: "masked-lm-95"},
    "text-classification": {0.0: "text-classifier-90"},
    "token-classification": {0.0: "text-classifier-90"},
    "image-classification": {0.0: "image-classifier-95"},
}
"""Task -> sparsity from which a shipped recipe is the one for it, ascending."""


def recipe_of(task: str | None, target: Any) -> str | None:
    """Name of the shipped recipe for a task at a sparsity; None for a task without one.

    Args:
        task: As transformers names it.
        target: As the user wrote it, unchecked; the lowest recipe where it is no number.
    """
    name = None
    for start, recipe in RECIPES_OF_TASK.get(task or "", {}).items():
        if name is None or (isinstance(target, int | float) and target >= start):
            name = recipe
    return name


def compare_folder(model: str) -> Path:
    """`minilm-compare` in the working directory for `builtin:minilm`."""
    return Path(f"{_short_name(model)}-compare")


def out_folder(model: str, target: float) -> Path:
    """`minilm-ham-90` in the working directory for `builtin:minilm` at 0.9."""
    return Path(f"{_short_name(model)}-ham-{target * 100:g}")


def export_path(path: Path, form: str) -> Path:
    """`NAME-packed` beside a folder, `NAME-packed.safetensors` beside a file."""
    place = _named(path)
    suffix = path.suffix if path.is_file() else ""
    return place.with_name(f"{place.name.removesuffix(suffix)}-{form}{suffix}")


def _named(path: Path) -> Path:
    """A path with a name of its own: what `.` and `..` stand for."""
    return Path(os.path.abspath(path)) if path.name in ("", "..") else path


def _short_name(model: str) -> str:
    name = (
        str(_named(Path(model))).partition("@")[0].rstrip("/").replace(":", "/").rpartition("/")[2]
    )
    return name.removesuffix(".safetensors") or "model"

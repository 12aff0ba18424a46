"""What a run is when the user says little: the recipe of its task, the name of its folder."""

from pathlib import Path
from typing import Any

RECIPE_OF_TASK = {
    "feature-extraction": "text-encoder-90",
    "causal-lm": "causal-lm-50",
    "masked-lm": "masked-lm-80",
    "text-classification": "text-classifier-90",
    "token-classification": "text-classifier-90",
    "image-classification": "image-classifier-95",
}

MASKED_LM_STRONGER_FROM = 0.9
"""Sparsity from which a masked language model gains by the recipe for 95 %."""


def recipe_of(task: str | None, target: Any) -> str | None:
    """Name of the shipped recipe for a task at a sparsity; None for a task without one.

    Args:
        task: As transformers names it.
        target: As the user wrote it, unchecked; None where nothing was said.
    """
    if (
        task == "masked-lm"
        and isinstance(target, int | float)
        and target >= MASKED_LM_STRONGER_FROM
    ):
        return "masked-lm-95"
    return RECIPE_OF_TASK.get(task or "")


def compare_folder(model: str) -> Path:
    """`minilm-compare` in the working directory for `builtin:minilm`."""
    return Path(f"{_short_name(model)}-compare")


def out_folder(model: str, target: float) -> Path:
    """`minilm-ham-90` in the working directory for `builtin:minilm` at 0.9."""
    return Path(f"{_short_name(model)}-ham-{target * 100:g}")


def _short_name(model: str) -> str:
    name = model.partition("@")[0].rstrip("/").replace(":", "/").rpartition("/")[2]
    return name.removesuffix(".safetensors") or "model"

"""What a run is when the user says little: the recipe of its task, the name of its folder."""

from pathlib import Path

RECIPE_OF_TASK = {
    "feature-extraction": "text-encoder-90",
    "causal-lm": "causal-lm-50",
    "masked-lm": "masked-lm-80",
    "text-classification": "text-classifier-90",
    "token-classification": "text-classifier-90",
    "image-classification": "image-classifier-95",
}


def compare_folder(model: str) -> Path:
    """`minilm-compare` in the working directory for `builtin:minilm`."""
    return Path(f"{_short_name(model)}-compare")


def out_folder(model: str, target: float) -> Path:
    """`minilm-ham-90` in the working directory for `builtin:minilm` at 0.9."""
    return Path(f"{_short_name(model)}-ham-{target * 100:g}")


def _short_name(model: str) -> str:
    name = model.partition("@")[0].rstrip("/").replace(":", "/").rpartition("/")[2]
    return name.removesuffix(".safetensors") or "model"

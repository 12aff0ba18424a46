"""What images a model takes, by its config and its image processor."""

from typing import Any

EDGE = 32  # pixels, where neither config nor processor says


def num_channels(config: Any) -> int:
    """Of an image; 3 where nothing is said."""
    return int(_said(config, "num_channels") or 3)


def image_size(config: Any, processor: Any | None = None) -> tuple[int, int] | None:
    """Height and width of the images; None where neither config nor processor says.

    Args:
        config: Of the model; what it says of its vision tower counts too.
        processor: Image processor, asked only where the config is silent: it may say to what
            size images are scaled, the config what the network is built for.
    """
    size = _said(config, "image_size")
    if size is None and processor is not None:
        size = _of_processor(processor)
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _said(config: Any, key: str) -> Any | None:
    """By the config itself, or by that of its vision tower, as in CLIP."""
    own = getattr(config, key, None)
    return own if own is not None else getattr(getattr(config, "vision_config", None), key, None)


def _of_processor(processor: Any) -> tuple[int, int] | None:
    said = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    wanted = dict(said)
    edge = wanted.get("shortest_edge") or wanted.get("longest_edge")
    height, width = wanted.get("height") or edge, wanted.get("width") or edge
    return None if height is None or width is None else (height, width)

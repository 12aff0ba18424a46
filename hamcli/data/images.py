"""Images to normalised pixel tensors the way the model expects them."""

import io
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hamcli.checkpoint.pixels import EDGE, image_size, num_channels
from hamcli.errors import InputRefused

MEMORY_LIMIT = 256 * 2**20
SAMPLE_IMAGES = 1024
STATISTICS_IMAGES = 10_000

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ImageForm:
    """What the model takes: channels, height, width, and the normalisation of values in 0..1."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images and their labels (None without); decoded once where they fit in memory."""

    images: Sequence[Any]
    labels: Sequence[int] | None
    form: ImageForm
    decoded: Pixels | None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int], seed: int, evaluating: bool) -> dict[str, Tensor]:
        """`pixel_values` [batch, channels, height, width] float32, and `labels` [batch] int64."""
        if self.decoded is not None:
            pixels = self.decoded[list(indices)]
        else:
            pixels = np.stack([decode(self.images[i], self.form) for i in indices])
        values = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
        mean = torch.tensor(self.form.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.form.std).view(1, -1, 1, 1)
        made = {"pixel_values": ((values - mean) / std).contiguous()}
        if self.labels is not None:
            made["labels"] = torch.tensor([self.labels[i] for i in indices])
        return made


def image_form(
    config: Any,
    processor: Any,
    images: Sequence[Any],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[ImageForm, str]:
    """The form, and a note on where the normalisation came from when it was measured.

    The recipe's mean and std win, then the model's processor, then the training images' own.
    """
    channels = num_channels(config)
    height, width = _size(config, processor, images)
    note = ""
    if mean is None and processor is not None and getattr(processor, "image_mean", None):
        mean, std = processor.image_mean, processor.image_std
    if mean is None or std is None:
        form = ImageForm(channels, height, width, (0.0,) * channels, (1.0,) * channels)
        mean, std = _measure(images, form)
        shown = ", ".join(f"{value:.4f}" for value in (*mean, *std))
        note = (
            "the model has no image processor: pixels are normalised by this data's own "
            f"mean and std ({shown})"
        )
    if len(mean) != channels or len(std) != channels:
        raise InputRefused(
            "E458",
            "wrong number of channels",
            "data.mean and data.std",
            str(len(mean)),
            str(channels),
        )
    if any(value <= 0 for value in std):
        raise InputRefused(
            "E458", "not a standard deviation", "data.std", str(list(std)), "above 0"
        )
    return ImageForm(channels, height, width, tuple(map(float, mean)), tuple(map(float, std))), note


def _size(config: Any, processor: Any, images: Sequence[Any]) -> tuple[int, int]:
    known = image_size(config, processor)
    if known is not None:
        return known
    sizes = Counter(_open(image).size for image in images[:256])
    width, height = sizes.most_common(1)[0][0]
    return height, width


def _open(image: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, np.ndarray):
        return Image.fromarray(image.squeeze() if image.shape[-1] == 1 else image)
    raw = image
    if isinstance(image, dict):
        raw = image.get("bytes") or image.get("path")
    try:
        content = raw if isinstance(raw, bytes) else Path(str(raw)).read_bytes()
        return Image.open(io.BytesIO(content))
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        AttributeError,
        ValueError,
        TypeError,
    ) as error:
        raise InputRefused("E457", "not an image", _name(image), str(error)) from None


def _name(image: Any) -> str:
    """An image as messages name it; empty for one that has no path."""
    path = image.get("path") if isinstance(image, dict) else image
    return path if isinstance(path, str) else ""


def decode(image: Any, form: ImageForm) -> Pixels:
    """One image as [height, width, channels] uint8 in the form's size."""
    from PIL import Image

    opened = _open(image)
    try:
        opened = opened.convert({1: "L", 3: "RGB", 4: "RGBA"}.get(form.channels, "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputRefused("E457", "not an image", _name(image), str(error)) from None
    if opened.size != (form.width, form.height):
        opened = opened.resize((form.width, form.height), Image.Resampling.BILINEAR)
    return np.asarray(opened, dtype=np.uint8).reshape(form.height, form.width, form.channels)


def decode_all(images: Sequence[Any], form: ImageForm) -> Pixels | None:
    """All images at once, or None where they would need too much memory."""
    if len(images) * form.height * form.width * form.channels > MEMORY_LIMIT:
        return None
    made = np.empty((len(images), form.height, form.width, form.channels), dtype=np.uint8)
    for index, image in enumerate(images):
        made[index] = decode(image, form)
    return made


def _measure(images: Sequence[Any], form: ImageForm) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel of values in 0..1, over evenly spread images."""
    stride = max(1, len(images) // STATISTICS_IMAGES)
    total = np.zeros(form.channels)
    square = np.zeros(form.channels)
    chosen = range(0, len(images), stride)
    for index in chosen:
        values = decode(images[index], form).reshape(-1, form.channels) / 255
        total += values.mean(axis=0)
        square += (values**2).mean(axis=0)
    mean = total / len(chosen)
    std = np.sqrt(np.maximum(square / len(chosen) - mean**2, 1e-12))
    return [float(value) for value in mean], [max(float(value), 1e-3) for value in std]


def sample_images(config: Any, count: int = SAMPLE_IMAGES) -> list[Pixels]:
    """Dead-leaves images: overlapping discs and boxes of power-law sizes with shading.

    Their edges and scales resemble natural images enough for a network to learn its dense self's
    outputs from them (Baradad et al. 2021, "Learning to See by Looking at Noise").
    """
    channels = num_channels(config)
    edge = max(image_size(config) or (EDGE,))
    return [_dead_leaves(random.Random(index), edge, channels) for index in range(count)]


def _dead_leaves(draw: random.Random, edge: int, channels: int) -> Pixels:
    rows, cols = np.mgrid[0:edge, 0:edge] / edge
    image = np.full((edge, edge, channels), [draw.random() for _ in range(channels)])
    for _ in range(draw.randint(4, 40)):
        radius = min(0.5, 0.04 * draw.random() ** (-0.7))
        y, x = draw.random(), draw.random()
        if draw.random() < 0.5:
            inside = (rows - y) ** 2 + (cols - x) ** 2 < radius**2
        else:
            inside = (abs(rows - y) < radius) & (abs(cols - x) < radius * (0.3 + draw.random()))
        angle, depth = draw.random() * 2 * math.pi, draw.random() * 0.5
        shade = 1 + depth * ((rows - y) * math.sin(angle) + (cols - x) * math.cos(angle)) / radius
        colour = np.array([draw.random() for _ in range(channels)])
        image[inside] = (colour * shade[..., None])[inside]
    made: Pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    return made

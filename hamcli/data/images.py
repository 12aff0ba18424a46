"""Images → batches of pixels: decoding, resizing, normalising.

How a model wants its images is its image processor's word. The steps of most processors (resize,
centre crop, rescale, normalise) are done here, where pixels can be kept as bytes; whether that is
the same is tried on two pictures when data is opened, and a processor that gives other pixels is
asked itself. Without a processor: values in 0..1, normalised by the recipe's mean and std or else
those of the training images, resized to the config's image_size or else to the size that most have.

Small data (256 MiB of pixels) is decoded once and kept.
"""

import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hamcli.data.table import Table
from hamcli.errors import InputRefused

KEPT_BYTES = 256 * 2**20
MAX_PIXELS = 100_000_000

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_PROBED_SIZES = 512
_STATISTICS_IMAGES = 4096
_SLICE = 256
_BILINEAR = 2  # PIL's number

Pixels = np.ndarray[Any, np.dtype[Any]]  # [channels, height, width], uint8 or ready float32


@dataclass(frozen=True, slots=True)
class ImageForm:
    """How an image becomes pixels of a model.

    Attributes:
        channels: 1, 3 or 4.
        resize: Decoded width and height to those wanted; None to keep them.
        crop: Height and width cut from the centre, padded with black where there is less.
        resample: PIL's number of a filter.
        scale: Factor on bytes; 1/255 to get values in 0..1.
        mean: A channel, of scaled values; None to leave them.
        std: A channel.
        processor: Asked instead, where its steps are not these.
    """

    channels: int
    resize: Callable[[int, int], tuple[int, int]] | None
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    processor: Any | None = None

    def pixels(self, image: Any) -> Pixels:
        """Pixels of a decoded PIL image."""
        if self.processor is not None:
            return _by_processor(self.processor, image)
        if self.resize is not None:
            size = self.resize(*image.size)
            image = image if size == image.size else image.resize(size, self.resample)
        values = np.asarray(image)
        values = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
        return _centre(values, *self.crop) if self.crop is not None else values

    def ready(self, pixels: Tensor) -> Tensor:
        """Bytes [batch, channels, height, width] as the model wants them, float32."""
        if pixels.dtype != torch.uint8:
            return pixels
        made = pixels.float() * self.scale
        if self.mean is None or self.std is None:
            return made
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (made - mean) / std


class ImageExamples:
    """Images that make batches of any of them.

    Args:
        images: Path, bytes, struct of both, or uint8 array [height, width, channels] each.
        labels: A class an image, or None.
        form: How they become pixels.
        table: Where they stand, for messages and relative paths.
    """

    def __init__(
        self, images: Sequence[Any], labels: Sequence[int] | None, form: ImageForm, table: Table
    ) -> None:
        self.images, self.form, self.table = images, form, table
        self.labels = None if labels is None else torch.tensor(labels)
        self.shape = self._decoded(0).shape
        self.kept: Tensor | None = None
        self.is_kept = torch.zeros(len(images), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fits(self) -> bool:
        """Whether all pixels may stay in memory."""
        itemsize = 1 if self.form.processor is None else 4
        return len(self.images) * int(np.prod(self.shape)) * itemsize <= KEPT_BYTES

    def batch(self, places: Sequence[int], draw: np.random.Generator | None) -> dict[str, Tensor]:
        """The images at `places`; `draw` changes nothing, images are taken as they are."""
        made = {"pixel_values": self.form.ready(self.raw(places))}
        if self.labels is not None:
            made["labels"] = self.labels[torch.tensor(places)]
        return made

    def raw(self, places: Sequence[int]) -> Tensor:
        """Pixels before they are normalised."""
        if not self.fits:
            return torch.stack([torch.from_numpy(self._pixels(place)) for place in places])
        if self.kept is None:
            dtype = torch.uint8 if self.form.processor is None else torch.float32
            self.kept = torch.empty((len(self.images), *self.shape), dtype=dtype)
        index = torch.tensor(places)
        for place in index[~self.is_kept[index]].tolist():
            self.kept[place] = torch.from_numpy(self._pixels(place))
            self.is_kept[place] = True
        return self.kept[index]

    def _pixels(self, place: int) -> Pixels:
        pixels = self._decoded(place)
        if pixels.shape != self.shape:
            raise InputRefused(
                "E463",
                "images of different sizes",
                self.table.place(place),
                f"{pixels.shape[2]}x{pixels.shape[1]} where others are "
                f"{self.shape[2]}x{self.shape[1]}",
                "images of one size for this image processor",
            )
        return pixels

    def _decoded(self, place: int) -> Pixels:
        image = decode(self.images[place], self.form.channels, self.table, place)
        # a copy of its own: what PIL hands out may not be written to
        return np.array(self.form.pixels(image), order="C")


# ---- decoding ----


def decode(value: Any, channels: int, table: Table, row: int) -> Any:
    """A PIL image with these channels.

    Raises:
        InputRefused: E466, it is missing, broken or too large.
    """
    from PIL import Image

    if isinstance(value, np.ndarray):
        return Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)
    content = _content(value, table, row)
    try:
        with warnings.catch_warnings():
            # PIL warns of a bomb; the limit below is ours
            warnings.simplefilter("ignore")
            image = Image.open(content, formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return _in_mode(image, channels)
    except Image.DecompressionBombError as error:
        right = f"at most {MAX_PIXELS // 10**6} million pixels"
        raise _refusal(table, row, "too large", right) from error
    except Exception as error:
        why = "missing" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}"
        raise _refusal(table, row, why) from error


def _refusal(table: Table, row: int, why: str, right: str = "") -> InputRefused:
    right = right or "png, jpeg, webp, bmp, gif, tiff or ppm"
    return InputRefused("E466", "image cannot be read", table.place(row), why, right)


def _content(value: Any, table: Table, row: int) -> Any:
    """What PIL opens: bytes or a path inside the data's folder."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise _refusal(table, row, "no image" if value is None else f"a {type(value).__name__}")
    inside = PurePosixPath(value)
    if inside.is_absolute() or ".." in inside.parts or table.folder is None:
        raise _refusal(table, row, "a path that leads out of the data's folder", "a relative path")
    return table.folder / inside


def _in_mode(image: Any, channels: int) -> Any:
    from PIL import Image, ImageOps

    if image.format in ("JPEG", "WEBP", "TIFF"):
        image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode.startswith("I;16"):
        # convert() would clip to 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("no 8 or 16 bit image")
    mode = _MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def _centre(values: Pixels, height: int, width: int) -> Pixels:
    """Cut from the centre; black where the image is smaller."""
    tall, wide = values.shape[1:]
    if height > tall or width > wide:
        padded = np.zeros((len(values), max(height, tall), max(width, wide)), dtype=values.dtype)
        # as transformers does it: the odd row goes on top, the odd column to the left
        top, left = -(-(padded.shape[1] - tall) // 2), -(-(padded.shape[2] - wide) // 2)
        padded[:, top : top + tall, left : left + wide] = values
        values, (tall, wide) = padded, padded.shape[1:]
    top, left = (tall - height) // 2, (wide - width) // 2
    return values[:, top : top + height, left : left + width]


# ---- the form ----


def form_of_processor(processor: Any, channels: int) -> ImageForm:
    """The form that an image processor describes, checked against the processor itself."""
    told = _told(processor)
    form = _standard_form(told, channels)
    asked = ImageForm(channels, None, None, _BILINEAR, 1.0, None, None, processor)
    return form if form is not None and _same_pixels(form, asked) else asked


def form_of_config(
    config: Any, channels: int, table: Table, column: str
) -> tuple[ImageForm, list[str]]:
    """The form of a model without an image processor, and what was decided.

    Normalising is left open: the recipe's word, or `with_statistics`.
    """
    notes = []
    size = config_size(config)
    if size is None:
        size, differ = _usual_size(table.columns[column], channels, table)
        if differ:
            notes.append(f"images are resized to {size[1]}x{size[0]}, the size that most have")
    exact = (size[1], size[0])
    return ImageForm(channels, lambda *_: exact, None, _BILINEAR, 1 / 255, None, None), notes


def with_statistics(examples: ImageExamples) -> tuple[ImageForm, str]:
    """The form with the mean and standard deviation of these images themselves.

    Over all of them where they are kept anyway, else over 4,096 spread evenly.
    """
    size = len(examples)
    places = range(size)
    if not examples.fits and size > _STATISTICS_IMAGES:
        places = range(0, size, -(-size // _STATISTICS_IMAGES))
    mean, std = _statistics(examples, list(places))
    form = replace(examples.form, mean=mean, std=std)
    shown = f"{_shown(mean)} and {_shown(std)}"
    return form, (
        "the model has no image processor: images are normalised by the mean and standard "
        f"deviation of the training images, {shown}; data.mean and data.std say otherwise"
    )


def _statistics(
    examples: ImageExamples, places: Sequence[int]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel of values in 0..1, by exact sums of bytes."""
    count = 0
    total = square = torch.zeros(1, dtype=torch.int64)
    for begin in range(0, len(places), _SLICE):
        values = examples.raw(places[begin : begin + _SLICE]).movedim(1, 0).flatten(1).long()
        count += values.shape[1]
        total = total + values.sum(1)
        square = square + values.square().sum(1)
    mean = total.double() / count
    std = (square.double() / count - mean.square()).clamp(min=0).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).clamp(min=1e-3).tolist())


def _shown(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"


def num_channels(config: Any) -> int:
    """Channels that the model takes.

    Raises:
        InputRefused: E465, no image has as many.
    """
    channels = getattr(config, "num_channels", None) or getattr(config, "in_chans", None) or 3
    if channels not in _MODES:
        raise InputRefused(
            "E465",
            "model of unusual images",
            "config.json: num_channels",
            f"{channels}",
            "1, 3 or 4",
        )
    return int(channels)


def config_size(config: Any) -> tuple[int, int] | None:
    """Height and width of the config's image_size."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _usual_size(images: Sequence[Any], channels: int, table: Table) -> tuple[tuple[int, int], bool]:
    """Height and width of most images, by 512 of them spread evenly, and whether others differ."""
    stride = -(-len(images) // _PROBED_SIZES)
    seen = Counter(
        decode(images[row], channels, table, row).size for row in range(0, len(images), stride)
    )
    # the most frequent; of two equally frequent the larger, so that the order of rows is no matter
    (width, height), _ = max(seen.items(), key=lambda item: (item[1], item[0]))
    return (height, width), len(seen) > 1


def per_channel(key: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number a channel; a single one counts for all.

    Raises:
        InputRefused: E468, there are more or fewer, or a standard deviation of 0.
    """
    if key == "std" and min(values) <= 0:
        raise InputRefused("E468", "standard deviation of no use", "data.std", right="above 0")
    if len(values) == 1:
        return (float(values[0]),) * channels
    if len(values) != channels:
        raise InputRefused(
            "E468",
            "wrong number of channels",
            f"data.{key}",
            f"{len(values)} values, the model takes {channels} channels",
            f"{channels} values or one",
        )
    return tuple(float(value) for value in values)


# ---- processors ----


def processor_size(processor: Any) -> tuple[int, int] | None:
    """Height and width that images have after the processor; None where it keeps their own."""
    told = _told(processor)
    if told["do_center_crop"] and (crop := _height_width(told["crop_size"])):
        return crop
    if not told["do_resize"]:
        return None
    edge = _field(told["size"], "shortest_edge")
    return _height_width(told["size"]) or ((edge, edge) if edge else None)


def _told(processor: Any) -> dict[str, Any]:
    names = (
        *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"),
        *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad"),
    )
    return {name: getattr(processor, name, None) for name in names}


def _standard_form(told: dict[str, Any], channels: int) -> ImageForm | None:
    if told["do_pad"] or not told["do_rescale"]:
        return None
    resize = None
    if told["do_resize"]:
        resize = _resize_of(told["size"])
        if resize is None:
            return None
    crop = None
    if told["do_center_crop"]:
        crop = _height_width(told["crop_size"])
        if crop is None:
            return None
    mean = std = None
    if told["do_normalize"]:
        mean, std = (_floats(told[name], channels) for name in ("image_mean", "image_std"))
        if mean is None or std is None:
            return None
    resample = told["resample"]
    return ImageForm(
        channels,
        resize,
        crop,
        int(resample) if resample is not None else _BILINEAR,
        float(told["rescale_factor"] or 1 / 255),
        mean,
        std,
    )


def _floats(values: Any, channels: int) -> tuple[float, ...] | None:
    if isinstance(values, int | float):
        return (float(values),) * channels
    if isinstance(values, list | tuple) and len(values) == channels:
        return tuple(float(value) for value in values)
    return None


def _field(size: Any, name: str) -> int | None:
    value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
    return int(value) if value is not None else None


def _height_width(size: Any) -> tuple[int, int] | None:
    height, width = _field(size, "height"), _field(size, "width")
    return (height, width) if height and width else None


def _resize_of(size: Any) -> Callable[[int, int], tuple[int, int]] | None:
    if (exact := _height_width(size)) is not None:
        return lambda *_: (exact[1], exact[0])
    edge = _field(size, "shortest_edge")
    if edge is None or _field(size, "longest_edge"):
        return None

    def shortest(width: int, height: int) -> tuple[int, int]:
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge

    return shortest


def _by_processor(processor: Any, image: Any) -> Pixels:
    made = processor(images=[image], return_tensors="np")["pixel_values"][0]
    return np.asarray(made, dtype=np.float32)


def _same_pixels(form: ImageForm, asked: ImageForm) -> bool:
    """Whether both give the same on a broad and a tall picture, to half a step of a byte."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for height, width in ((43, 61), (300, 210)):
        shape = (height, width) if form.channels == 1 else (height, width, form.channels)
        image = Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))
        theirs = asked.pixels(image)
        ours = form.ready(torch.from_numpy(np.ascontiguousarray(form.pixels(image)))[None])[0]
        smallest = form.scale / max(form.std) if form.std else form.scale
        if (
            theirs.shape != tuple(ours.shape)
            or float(np.abs(theirs - ours.numpy()).max()) > smallest / 2
        ):
            return False
    return True

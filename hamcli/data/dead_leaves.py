"""The built-in images: procedural, for models whose user brings no data.

Dead leaves: discs and boxes of power-law sizes that cover one another, each shaded by a gradient.
Their edges and scales resemble those of photographs well enough for a network to learn its dense
self's outputs from them (Baradad et al. 2021, "Learning to See by Looking at Noise",
arXiv 2106.05963).
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

_SMALLEST, _LARGEST = 0.04, 0.7  # radius as a share of the image's edge
_LEAVES = 40


class DeadLeaves(Sequence[Any]):
    """Images made when asked for; each is a pure function of its number.

    Args:
        count: How many.
        height: Of each.
        width: Of each.
        channels: Of each; they come as uint8 [height, width, channels].
    """

    def __init__(self, count: int, height: int, width: int, channels: int) -> None:
        self.number, self.height, self.width, self.channels = count, height, width, channels

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self.number))]
        if not 0 <= index < self.number:
            raise IndexError(index)
        draw = np.random.default_rng((0x1EAF, index))
        image = _paint(draw, self.height, self.width, self.channels)
        return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _paint(
    draw: np.random.Generator, height: int, width: int, channels: int
) -> np.ndarray[Any, Any]:
    """Values in 0..1 and a little above, [height, width, channels]."""
    edge = min(height, width)
    # radii with density r^-3 between the bounds; the first leaf lies under all and covers all
    low, high = _LARGEST**-2, _SMALLEST**-2
    wide = edge / np.sqrt(low + (high - low) * draw.random(_LEAVES))
    is_disc = draw.random(_LEAVES) < 0.5
    tall = np.where(is_disc, wide, wide * (0.4 + 0.6 * draw.random(_LEAVES)))
    y, x = draw.random((2, _LEAVES)) * [[height], [width]]
    wide[0] = tall[0] = 2 * (height + width)
    down = ((np.arange(height) - y[:, None]) / tall[:, None])[:, :, None]
    right = ((np.arange(width) - x[:, None]) / wide[:, None])[:, None, :]
    reach = np.where(
        is_disc[:, None, None], down**2 + right**2, np.maximum(np.abs(down), np.abs(right))
    )
    top = _LEAVES - 1 - (reach < 1)[::-1].argmax(0)
    colours = draw.random((_LEAVES, channels))
    angle, depth = draw.random(_LEAVES) * 2 * math.pi, draw.random(_LEAVES) * 0.6
    # each leaf grows darker in one direction
    slope = (np.arange(height)[:, None] - y[top]) / tall[top] * np.sin(angle)[top]
    slope += (np.arange(width)[None, :] - x[top]) / wide[top] * np.cos(angle)[top]
    return colours[top] * (1 + depth[top] * slope)[..., None]

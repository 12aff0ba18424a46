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

_SMALLEST, _LARGEST = 0.03, 0.6  # radius as a share of the image's edge
_LEAVES = 80


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
        image = np.empty((self.height, self.width, self.channels))
        self._shade(image, draw, draw.random(self.channels), slice(None), slice(None), None)
        for _ in range(_LEAVES):
            self._leaf(image, draw)
        return (image.clip(0, 1) * 255).round().astype(np.uint8)

    def _leaf(self, image: np.ndarray[Any, Any], draw: np.random.Generator) -> None:
        edge = min(self.height, self.width)
        # radii with density r^-3 between the bounds
        low, high = _SMALLEST**-2, _LARGEST**-2
        radius = edge / math.sqrt(low + (high - low) * draw.random())
        y, x = draw.random() * self.height, draw.random() * self.width
        tall = radius * (1 if draw.random() < 0.5 else 0.4 + 0.6 * draw.random())
        is_disc = draw.random() < 0.5
        tall = radius if is_disc else tall
        rows = slice(max(0, int(y - tall)), min(self.height, int(y + tall) + 2))
        cols = slice(max(0, int(x - radius)), min(self.width, int(x + radius) + 2))
        inside = None
        if is_disc:
            down = np.arange(rows.start, rows.stop)[:, None] - y
            right = np.arange(cols.start, cols.stop)[None, :] - x
            inside = down**2 + right**2 < radius**2
        self._shade(image, draw, draw.random(self.channels), rows, cols, inside)

    def _shade(
        self,
        image: np.ndarray[Any, Any],
        draw: np.random.Generator,
        colour: np.ndarray[Any, Any],
        rows: slice,
        cols: slice,
        inside: np.ndarray[Any, Any] | None,
    ) -> None:
        """Paint a part of the image in one colour that grows darker in one direction."""
        part = image[rows, cols]
        if part.size == 0:
            return
        angle, depth = draw.random() * 2 * math.pi, draw.random() * 0.6
        down = np.linspace(-1, 1, part.shape[0])[:, None] * math.sin(angle)
        right = np.linspace(-1, 1, part.shape[1])[None, :] * math.cos(angle)
        painted = colour * (1 + depth * (down + right) / math.sqrt(2))[..., None]
        part[...] = painted if inside is None else np.where(inside[..., None], painted, part)

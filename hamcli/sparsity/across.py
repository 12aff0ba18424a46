"""Tensors that are cut over processes: what a selection must be told by the others."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Counts = npt.NDArray[np.int64]


class Across(Protocol):
    """The processes that each hold some rows of every tensor, process 0 the first ones.

    Every process must call the same methods in the same order.
    """

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def add(self, counts: Sequence[int] | Counts) -> Counts:
        """Sums of integers over the processes."""

    def gather(self, counts: Sequence[int] | Counts) -> Counts:
        """The integers of all processes, [processes, ...]."""

    def whole(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one after the other; those of one may be none."""


def total(count: int, across: Across | None) -> int:
    """A count over all processes."""
    return count if across is None else int(across.add([count])[0])


def totals(counts: Sequence[int], across: Across | None) -> list[int]:
    """Counts over all processes."""
    if across is None or not counts:
        return list(counts)
    return [int(count) for count in across.add(counts)]

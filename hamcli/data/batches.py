"""Which examples are in which batch: pure functions of numbers, so that a run resumes exactly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from torch import Tensor

_ORDER, _DRAW, _EVALUATION = 1, 2, 3  # streams of random numbers


class Examples(Protocol):
    """A set of examples that makes batches of any of them."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, places: Sequence[int], draw: np.random.Generator | None) -> dict[str, Tensor]:
        """The examples at `places` in the keys of a model's forward; `draw` is None to measure."""


@dataclass(frozen=True, slots=True)
class Data:
    """Training and held-out examples.

    Attributes:
        train: Examples to learn from.
        evaluation: Examples held out.
        has_labels: Whether batches bring `labels`.
        description: What is trained on, in words.
        evaluation_description: What is held out, in words.
        digest: Of all content; another digest is other data.
        notes: What a user should hear.
    """

    train: Examples
    evaluation: Examples
    has_labels: bool
    description: str
    evaluation_description: str
    digest: str
    notes: tuple[str, ...] = ()


def batch(
    data: Data, micro_step: int, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
) -> dict[str, Tensor]:
    """The training batch of a micro-step, counted from 0: a pure function of its arguments.

    Each epoch is a permutation of its own; a batch may span two epochs, so every one is full.

    Args:
        data: What to take it from.
        micro_step: Of the whole run, not since a restart.
        batch_size: Examples of one process.
        seed: Of the run.
        rank: Which process this is.
        world: Number of processes; together they see each example once an epoch.
    """
    size = len(data.train)
    begin = (micro_step * world + rank) * batch_size
    places = [
        int(_order(size, seed, place // size)[place % size])
        for place in range(begin, begin + batch_size)
    ]
    draw = np.random.default_rng((_DRAW, seed, micro_step, rank))
    return data.train.batch(places, draw)


def evaluation_batches(
    data: Data, *, batch_size: int, examples: int
) -> Iterator[dict[str, Tensor]]:
    """Held-out examples, always the same: all, or `examples` of them chosen by a fixed shuffle."""
    size = len(data.evaluation)
    chosen = list(range(size))
    if examples < size:
        chosen = sorted(np.random.default_rng(_EVALUATION).permutation(size)[:examples].tolist())
    for begin in range(0, len(chosen), batch_size):
        yield data.evaluation.batch(chosen[begin : begin + batch_size], None)


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng((_ORDER, seed, epoch)).permutation(size)

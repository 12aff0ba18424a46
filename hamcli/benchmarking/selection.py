"""What exact selection costs: the choice of a threshold and of masks, beside the bare count.

radix              the two counting passes of a radix search over the bits of |w|, alone
threshold          where to cut the weights, as pruning finds it
threshold, masked  the same where half of the zeros lie in masks already
masks              threshold, and a mask of each tensor
masks, masked      the same where half of the zeros lie in masks already
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hamcli.benchmarking.measuring import (
    Clock,
    Job,
    VariantCost,
    cost_of,
    extra_peak_bytes,
    time_rounds,
)
from hamcli.native import selection
from hamcli.sparsity.counting import num_zeros
from hamcli.sparsity.score import Scores
from hamcli.sparsity.select import find_threshold, global_masks

SPARSITY = 0.9


@dataclass(frozen=True, slots=True)
class SelectionCost:
    """What a selection costs here.

    Attributes:
        num_weights: Number of weights chosen from.
        dtype: Theirs.
        threads: Threads of torch.
        clock: wall or cpu.
        mask_bytes: Of the masks that a selection leaves.
        variants: One for each form.
    """

    num_weights: int
    dtype: str
    threads: int
    clock: str
    mask_bytes: int
    variants: tuple[VariantCost, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_selection(
    shapes: Sequence[tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    rounds: int = 15,
    clock: Clock = "wall",
) -> SelectionCost:
    """Time the selection of 90 % of the weights by magnitude, over all tensors together.

    Args:
        shapes: Of the tensors; only those of two or more dimensions are chosen from.
        dtype: Of the weights.
        rounds: How often each form is timed.
        clock: "cpu" where torch has one thread and other processes disturb.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator).mul_(0.05).to(dtype)
        for shape in shapes
        if len(shape) >= 2
    ]
    total = sum(weight.numel() for weight in weights)
    zeros = num_zeros(SPARSITY, total)
    masks = global_masks(Scores(weights), num_zeros(SPARSITY / 2, total))
    free, masked = Scores(weights), Scores(weights, masks=masks)
    jobs: dict[str, Job] = {
        "radix": lambda: selection.kth_magnitude(weights, zeros),
        "threshold": lambda: find_threshold(free, zeros),
        "threshold, masked": lambda: find_threshold(masked, zeros),
        "masks": lambda: global_masks(free, zeros),
        "masks, masked": lambda: global_masks(masked, zeros),
    }
    extra = {name: extra_peak_bytes(job) for name, job in jobs.items()}
    times = time_rounds(jobs, rounds=rounds, clock=clock)
    return SelectionCost(
        num_weights=total,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        clock=clock,
        mask_bytes=sum(math.prod(weight.shape) for weight in weights),
        variants=tuple(cost_of(name, times, "radix", extra[name]) for name in times),
    )

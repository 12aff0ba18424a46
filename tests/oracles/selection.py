"""Slow trusted twins of selection and allocation: one stable sort of everything, in float64.

float64 holds every value of the smaller dtypes, so the order is that of the values; a stable sort
puts equal scores in the order of their positions, so the first ones go first.
"""

import itertools

import torch
from torch import Tensor


def sorted_positions(scores: list[Tensor]) -> list[tuple[int, int]]:
    """(tensor, flat index) of every score, the smallest first."""
    flat = [
        (value + 0.0, tensor, index)
        for tensor, score in enumerate(scores)
        for index, value in enumerate(score.detach().to(torch.float64).flatten().tolist())
    ]
    flat.sort(key=lambda entry: entry[0])
    return [(tensor, index) for _, tensor, index in flat]


def global_masks(scores: list[Tensor], num_zeros: int) -> list[Tensor]:
    masks = [torch.ones(score.numel(), dtype=torch.bool) for score in scores]
    for tensor, index in sorted_positions(scores)[:num_zeros]:
        masks[tensor][index] = False
    return [mask.view(score.shape) for mask, score in zip(masks, scores, strict=True)]


def zeros_of(masks: list[Tensor]) -> list[int]:
    return [mask.numel() - int(mask.sum()) for mask in masks]


def bounded_counts(
    scores: list[Tensor], num_zeros: int, lower: list[int], upper: list[int]
) -> list[int]:
    """Walk the threshold up, one score at a time, until the clamped counts sum to `num_zeros`."""
    below = [0] * len(scores)
    for step in itertools.chain([None], sorted_positions(scores)):
        if step is not None:
            below[step[0]] += 1
        counts = [
            min(max(count, low), high) for count, low, high in zip(below, lower, upper, strict=True)
        ]
        if sum(counts) == num_zeros:
            return counts
    raise AssertionError("the bounds cannot be met")


def n_m_mask(score: Tensor, n: int, m: int, input_dim: int) -> Tensor:
    """Each group on its own, in plain Python."""
    mask = torch.ones(score.shape, dtype=torch.bool)
    others = [range(size) for axis, size in enumerate(score.shape) if axis != input_dim]
    for place in itertools.product(*others):
        for begin in range(0, score.shape[input_dim], m):
            group = [
                (*place[:input_dim], begin + offset, *place[input_dim:]) for offset in range(m)
            ]
            for cell in sorted(group, key=lambda cell: score[cell].item())[: m - n]:
                mask[cell] = False
    return mask

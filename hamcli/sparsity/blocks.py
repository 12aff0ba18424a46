"""Blocks of R outputs by C inputs that live or die together, as a smaller problem of selection."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hamcli.sparsity.rules import Prunable
from hamcli.sparsity.targets import Target

Block = tuple[int, int]


def axes(target: Prunable) -> tuple[int, int]:
    """The output axis and the input axis of a target."""
    first = 1 if target.is_stacked else 0
    outputs = next(axis for axis in range(first, len(target.shape)) if axis != target.input_dim)
    return outputs, target.input_dim


def fits(target: Prunable, block: Block) -> bool:
    """Whether the target can be cut into whole blocks."""
    outputs, inputs = axes(target)
    return target.shape[outputs] % block[0] == 0 and target.shape[inputs] % block[1] == 0


def shape_of(target: Target, block: Block) -> tuple[int, ...]:
    """Shape of `block_sums` of the whole tensor."""
    moved = torch.empty(target.shape, device="meta").movedim(axes(target), (-2, -1)).shape
    return (*moved[:-2], moved[-2] // block[0], moved[-1] // block[1])


def is_in_rows(target: Target) -> bool:
    """Whether the order of the blocks is that of the rows of the tensor: matrices and stacks."""
    return axes(target) == ((1, 2) if target.is_stacked else (0, 1)) and target.param.dim() == (
        3 if target.is_stacked else 2
    )


def block_sums(score: Tensor, target: Target, block: Block) -> Tensor:
    """Sum of the scores of each block, fp32: [..., outputs / R, inputs / C].

    The axes in front are those that are neither outputs nor inputs: experts, places of a kernel.
    """
    return _cut(score.float(), target, block).sum(dim=(-3, -1))


def block_any(mask: Tensor, target: Target, block: Block) -> Tensor:
    """Whether anything of each block is kept, bool."""
    return _cut(mask, target, block).any(dim=-1).any(dim=-2)


def spread(keep: Tensor, target: Target, block: Block) -> Tensor:
    """A mask of blocks as a mask of weights."""
    wide = keep.repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return wide.movedim((-2, -1), axes(target)).contiguous()


def _cut(tensor: Tensor, target: Target, block: Block) -> Tensor:
    moved = tensor.movedim(axes(target), (-2, -1))
    *front, outputs, inputs = moved.shape
    return moved.reshape(*front, outputs // block[0], block[0], inputs // block[1], block[1])


def spread_all(keeps: Sequence[Tensor], targets: Sequence[Target], block: Block) -> list[Tensor]:
    """`spread` of each."""
    return [spread(keep, target, block) for keep, target in zip(keeps, targets, strict=True)]


@torch.no_grad()
def sums_of(scores: Sequence[Tensor], targets: Sequence[Target], block: Block) -> list[Tensor]:
    """`block_sums` of each."""
    return [block_sums(one, target, block) for one, target in zip(scores, targets, strict=True)]

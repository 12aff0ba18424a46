"""Blocks of R outputs by C inputs that live or die together, as a smaller problem of selection."""

from collections.abc import Callable

import torch
from torch import Tensor

from hamcli.sparsity.cuts import across_groups
from hamcli.sparsity.rules import Prunable
from hamcli.sparsity.targets import Target, Targets

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


class Blocks:
    """The blocks of all targets, of which each process takes some, in the order of the processes.

    It takes those of its rows. Of a tensor with blocks that lie in several processes, or in another
    order than its rows, it takes an even run of all blocks, made of the tensor as a whole.

    Every process must call the same methods in the same order.

    Args:
        targets: What may become zero.
        block: Outputs and inputs of one.
    """

    def __init__(self, targets: Targets, block: Block) -> None:
        self._targets, self._block = targets, block
        self._across = across_groups(targets, [_rows(one, block) for one in targets])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the blocks of each whole tensor."""
        return [shape_of(target, self._block) for target in self._targets]

    @torch.no_grad()
    def sums(self, index: int, score: Tensor) -> Tensor:
        """`block_sums` of one target's scores: of the blocks that this process takes."""
        return self._taken(index, score, block_sums)

    def any(self, index: int, mask: Tensor) -> Tensor:
        """`block_any` of one target's mask: of the blocks that this process takes."""
        return self._taken(index, mask, block_any)

    def spread(self, index: int, keep: Tensor) -> Tensor:
        """A mask of the blocks that this process takes as one of the weights that lie here."""
        target, across = self._targets[index], self._across[index]
        if across is None:
            return spread(keep, target, self._block)
        every = across.whole(keep).view(shape_of(target, self._block))
        return target.own(spread(every, target, self._block))

    def _taken(
        self, index: int, rows: Tensor, made: Callable[[Tensor, Target, Block], Tensor]
    ) -> Tensor:
        target, across = self._targets[index], self._across[index]
        if across is None:
            return made(rows, target, self._block)
        every = made(across.whole(rows), target, self._block).flatten()
        each = -(-len(every) // across.size)
        return every[across.rank * each : (across.rank + 1) * each].clone()


def _rows(target: Target, block: Block) -> int | None:
    """Rows of a tensor that hold a row of blocks; None where the blocks lie in another order."""
    if target.is_stacked:
        return 1
    return block[0] if len(target.shape) == 2 and target.input_dim == 1 else None

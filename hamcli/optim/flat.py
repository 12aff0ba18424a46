"""Lists of tensors as the forms of one pass take them: one dtype a call, flat in memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hamcli.optim.cpu import flat_input, flat_output, storage_order

Copies = list[tuple[Tensor, Tensor]]


def sort_out(
    params: Sequence[Tensor], grads: Sequence[Tensor], rounded: Sequence[Tensor | None]
) -> Iterator[tuple[list[int], bool]]:
    """Places in the lists that one call can take, and whether one pass takes them."""
    kinds: dict[torch.dtype | None, list[int]] = {}
    for index, (param, grad, low) in enumerate(zip(params, grads, rounded, strict=True)):
        dtype = torch.float32 if low is None else low.dtype
        is_native = param.dtype == torch.float32 and grad.dtype == dtype
        kinds.setdefault(dtype if is_native else None, []).append(index)
    for kind, at in kinds.items():
        yield at, kind is not None


def pick(row: Sequence[Any], at: Sequence[int]) -> list[Any]:
    """The entries at these places."""
    return list(row) if len(at) == len(row) else [row[index] for index in at]


def lay_flat(rows: list[list[Any]], written: Sequence[int], copies: Copies) -> list[list[Any]]:
    """The lists with every tensor flat in memory, in the order of its weights.

    Args:
        rows: Lists of tensors and None; the first is the weights.
        written: Which of the lists are written.
        copies: Receives what is to be put back.
    """
    for index, param in enumerate(rows[0]):
        own = [row[index] for row in rows]
        if all(tensor is None or tensor.is_contiguous() for tensor in own):
            continue
        order = storage_order(param)
        for number, tensor in enumerate(own):
            if tensor is not None:
                rows[number][index] = (
                    flat_output(tensor, order, copies)
                    if number in written
                    else flat_input(tensor, order)
                )
    return rows


def put_back(copies: Copies) -> None:
    """Write what `lay_flat` had to copy to where it came from."""
    for original, copy in copies:
        original.copy_(copy)

"""The step of `rule` over lists of tensors on a CPU in one pass, by the C++ extension.

The same two functions as in `cpu`, with the same arguments and, without a mirror step, the same
bits. What the extension does not take (fp64; gradients of another dtype than the weights) goes to
`cpu`. Tensors that do not lie flat in memory are copied there and back.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hamcli.native import operators
from hamcli.optim import cpu
from hamcli.optim.cpu import flat_input, flat_output, storage_order

Copies = list[tuple[Tensor, Tensor]]


def is_usable() -> bool:
    """Whether the extension is there; the first call in a process may build it."""
    return operators() is not None


def adam_ham_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None],
    rounded: Sequence[Tensor | None],
    a: Sequence[float],
    b: float,
    clamp: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    sums: Tensor | None = None,
) -> None:
    """As `cpu.adam_ham_`."""
    numbers: dict[str, Any] = {
        "b": b,
        "clamp": clamp,
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled": decoupled,
        "sums": sums,
    }
    for at, is_native in _kinds(params, grads, rounded):
        rows = [_of(row, at) for row in (params, grads, exp_avgs, exp_avg_sqs, masks, rounded)]
        counts, strengths = _of(steps, at), _of(a, at)
        if not is_native:
            w, g, m, v, mask, low = rows
            cpu.adam_ham_(w, g, m, v, counts, masks=mask, rounded=low, a=strengths, **numbers)
            continue
        copies: Copies = []
        w, g, m, v, mask, low = _lay_flat(rows, (0, 2, 3, 5), copies)
        extension = operators()
        assert extension is not None
        extension.adam_ham_(w, g, m, v, counts, mask, low, strengths, **numbers)
        _put_back(copies)


def sgd_ham_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    masks: Sequence[Tensor | None],
    rounded: Sequence[Tensor | None],
    a: Sequence[float],
    b: float,
    clamp: float,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    is_first_step: bool,
    sums: Tensor | None = None,
) -> None:
    """As `cpu.sgd_ham_`."""
    numbers: dict[str, Any] = {
        "b": b,
        "clamp": clamp,
        "lr": lr,
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "is_first_step": is_first_step,
        "sums": sums,
    }
    for at, is_native in _kinds(params, grads, rounded):
        rows = [_of(row, at) for row in (params, grads, momentum_buffers, masks, rounded)]
        strengths = _of(a, at)
        if not is_native:
            w, g, m, mask, low = rows
            cpu.sgd_ham_(w, g, m, masks=mask, rounded=low, a=strengths, **numbers)
            continue
        copies: Copies = []
        w, g, m, mask, low = _lay_flat(rows, (0, 2, 4), copies)
        extension = operators()
        assert extension is not None
        extension.sgd_ham_(w, g, m, mask, low, strengths, **numbers)
        _put_back(copies)


def kept_norms(
    grads: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[tuple[float, float, int]]:
    """As `cpu.kept_norms`."""
    extension = operators()
    if extension is None or not grads or any(g.dtype == torch.float64 for g in grads):
        return cpu.kept_norms(grads, masks)
    laid = _lay_flat([list(grads), list(masks)], (), [])
    norms = extension.kept_norms(*laid).tolist()
    return [(magnitudes, squares, int(count)) for magnitudes, squares, count in norms]


def _kinds(
    params: Sequence[Tensor], grads: Sequence[Tensor], rounded: Sequence[Tensor | None]
) -> Iterator[tuple[list[int], bool]]:
    """Places in the lists that one call can take, and whether the extension is what takes them."""
    kinds: dict[torch.dtype | None, list[int]] = {}
    for index, (param, grad, low) in enumerate(zip(params, grads, rounded, strict=True)):
        dtype = torch.float32 if low is None else low.dtype
        is_native = param.dtype == torch.float32 and grad.dtype == dtype
        kinds.setdefault(dtype if is_native else None, []).append(index)
    for kind, at in kinds.items():
        yield at, kind is not None


def _of(row: Sequence[Any], at: Sequence[int]) -> list[Any]:
    return list(row) if len(at) == len(row) else [row[index] for index in at]


def _lay_flat(rows: list[list[Any]], written: Sequence[int], copies: Copies) -> list[list[Any]]:
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


def _put_back(copies: Copies) -> None:
    for original, copy in copies:
        original.copy_(copy)

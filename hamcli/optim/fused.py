"""The step of `rule` over lists of tensors on a CPU in one pass, by the C++ extension.

The same two functions as in `cpu`, with the same arguments and, without a mirror step, the same
bits. What the extension does not take (fp64; gradients of another dtype than the weights) goes to
`cpu`. Tensors that do not lie flat in memory are copied there and back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hamcli.native import operators
from hamcli.optim import cpu
from hamcli.optim.flat import Copies, lay_flat, pick, put_back, sort_out


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
    for at, is_native in sort_out(params, grads, rounded):
        rows = [pick(row, at) for row in (params, grads, exp_avgs, exp_avg_sqs, masks, rounded)]
        counts, pulls = pick(steps, at), pick(a, at)
        if not is_native:
            w, g, m, v, mask, low = rows
            cpu.adam_ham_(w, g, m, v, counts, masks=mask, rounded=low, a=pulls, **numbers)
            continue
        copies: Copies = []
        w, g, m, v, mask, low = lay_flat(rows, (0, 2, 3, 5), copies)
        extension = operators()
        assert extension is not None
        extension.adam_ham_(w, g, m, v, counts, mask, low, pulls, **numbers)
        put_back(copies)


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
    for at, is_native in sort_out(params, grads, rounded):
        rows = [pick(row, at) for row in (params, grads, momentum_buffers, masks, rounded)]
        pulls = pick(a, at)
        if not is_native:
            w, g, m, mask, low = rows
            cpu.sgd_ham_(w, g, m, masks=mask, rounded=low, a=pulls, **numbers)
            continue
        copies: Copies = []
        w, g, m, mask, low = lay_flat(rows, (0, 2, 4), copies)
        extension = operators()
        assert extension is not None
        extension.sgd_ham_(w, g, m, mask, low, pulls, **numbers)
        put_back(copies)


def kept_norms(
    grads: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[tuple[float, float, int]]:
    """As `cpu.kept_norms`."""
    extension = operators()
    if extension is None or not grads or any(g.dtype == torch.float64 for g in grads):
        return cpu.kept_norms(grads, masks)
    laid = lay_flat([list(grads), list(masks)], (), [])
    norms = extension.kept_norms(*laid).tolist()
    return [(magnitudes, squares, int(count)) for magnitudes, squares, count in norms]

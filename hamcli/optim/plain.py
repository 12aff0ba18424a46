"""The step of `rule` over lists of tensors, one after the other: for any device, and the slowest.

The same two functions as in `cpu`, with the same arguments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hamcli.optim import cpu, rule

kept_norms = cpu.kept_norms


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
    for index, param in enumerate(params):
        grad = grads[index].to(param.dtype)
        made, exp_avg, exp_avg_sq = rule.adam_step(
            param,
            grad,
            exp_avgs[index],
            exp_avg_sqs[index],
            step=int(steps[index]),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
        )
        exp_avgs[index].copy_(rule.masked(exp_avg, masks[index]))
        exp_avg_sqs[index].copy_(exp_avg_sq)
        made = _mirrored(made, grad, masks[index], a[index], b, clamp, sums)
        _write_(made, param, rounded[index])


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
    for index, param in enumerate(params):
        grad = grads[index].to(param.dtype)
        held = momentum_buffers[index]
        made, buffer = rule.sgd_step(
            param,
            grad,
            None if is_first_step else held,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
        )
        if held is not None and buffer is not None:
            held.copy_(rule.masked(buffer, masks[index]))
        made = _mirrored(made, grad, masks[index], a[index], b, clamp, sums)
        _write_(made, param, rounded[index])


def _mirrored(
    w: Tensor,
    g: Tensor,
    mask: Tensor | None,
    a: float,
    b: float,
    clamp: float,
    sums: Tensor | None,
) -> Tensor:
    """The weights after mirror step and mask."""
    if a == 0 and b == 0:
        return rule.masked(w, mask)
    e = rule.exponent(w, g, a=a, b=b, clamp=clamp)
    made = rule.multiply(w, e)
    if sums is not None:
        _measure_(sums, w, made, e.abs(), clamp, mask)
    return rule.masked(made, mask)


def _measure_(
    sums: Tensor, w: Tensor, made: Tensor, sizes: Tensor, clamp: float, mask: Tensor | None
) -> None:
    """Add to `sums` what `cpu.NUM_SUMS` says."""
    counted = w != 0 if mask is None else (w != 0) & mask
    sizes, moved = sizes[counted], (made != w)[counted]
    if sizes.numel() == 0:
        return
    clamped = sizes >= sizes.new_tensor(clamp)
    sums[0] += float(sizes.sum(dtype=torch.float64))
    sums[1] += int(moved.sum())
    sums[2] += int(clamped.sum())
    sums[3] += sizes.numel()
    sums[4] = max(float(sums[4]), float(sizes.max()))


def _write_(made: Tensor, param: Tensor, rounded: Tensor | None) -> None:
    param.copy_(made)
    if rounded is not None:
        rounded.copy_(made)

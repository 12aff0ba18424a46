"""The step of `rule.py` over lists of tensors on a CPU, without temporaries of their size.

Plain torch, block by block: torch's fused base step and the passes of the mirror step meet each
block while it lies in the cache. The base step is torch's fused one in bits as well.

Legend: w weights in fp32 or fp64, g gradients, a = lr * alpha (one number per tensor),
b = lr * beta, e exponents. All lists have one entry per tensor.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hamcli.optim import rule

# Elements per thread and block: w, g, two moments and two scratch blocks stay in a 1 MiB cache,
# and torch gives a thread no less than this.
BLOCK = 1 << 15

# What a measured step adds up, in this order, in float64: the sum of |e|, the number of weights
# that the mirror step changed, of clamped exponents and of all, over the weights that the mask
# keeps; the fifth is the greatest |e|.
NUM_SUMS = 5


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
    """One step of AdamW (`decoupled`) or Adam, then the mirror step, then the mask, in place.

    Where the mask drops a weight, its first moment becomes zero too.

    Args:
        params: Weights, or the masters of low-precision ones; fp32 or fp64. Written.
        grads: Of the same shapes, any float dtype. Read.
        exp_avgs: First moments, dtype of `params`. Written.
        exp_avg_sqs: Second moments, dtype of `params`. Written.
        steps: Number of this step, from 1, as 0-d fp32 tensors. Read.
        masks: bool, True where kept; None for no mask.
        rounded: Low-precision weights that receive the rounded `params`; None where `params` are
            the weights themselves.
        a: lr * alpha of each tensor.
        b: lr * beta of all. With `a` and `b` zero there is no mirror step at all.
        clamp: Greatest |exponent|.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled or added to the gradient.
        decoupled: Which of the two.
        sums: float64 of `NUM_SUMS`, added to if given; see there.
    """
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    for index, param in enumerate(params):
        written = [param, exp_avgs[index], exp_avg_sqs[index]]

        def base_step_(
            w: Tensor, g: Tensor, *state: Tensor, step: Tensor = steps[index]
        ) -> None:
            fused(
                [w], [g], [state[0]], [state[1]], [], [step],
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip

        _step_blocks_(
            base_step_, written, grads[index], masks[index], rounded[index],
            a=a[index], b=b, clamp=clamp, sums=sums,
        )  # fmt: skip


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
    """One step of SGD, then the mirror step, then the mask, in place.

    Where the mask drops a weight, its momentum becomes zero too.

    Args:
        params: As in `adam_ham_`.
        grads: As in `adam_ham_`.
        momentum_buffers: Dtype of `params`, written; None if and only if `momentum` is 0.
        masks: As in `adam_ham_`.
        rounded: As in `adam_ham_`.
        a: As in `adam_ham_`.
        b: As in `adam_ham_`.
        clamp: As in `adam_ham_`.
        lr: Learning rate.
        momentum: 0 for none.
        nesterov: Whether the step looks ahead along the momentum.
        weight_decay: Added to the gradient.
        is_first_step: The buffers are filled, their contents are not read.
        sums: As in `adam_ham_`.
    """

    def base_step_(w: Tensor, g: Tensor, *state: Tensor) -> None:
        torch._fused_sgd_(
            [w], [g], list(state),
            weight_decay=weight_decay, momentum=momentum, lr=lr, dampening=0.0,
            nesterov=nesterov, maximize=False, is_first_step=is_first_step,
        )  # fmt: skip

    for index, param in enumerate(params):
        buffer = momentum_buffers[index]
        _step_blocks_(
            base_step_, [param] if buffer is None else [param, buffer],
            grads[index], masks[index], rounded[index],
            a=a[index], b=b, clamp=clamp, sums=sums,
        )  # fmt: skip


def mirror_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None],
    a: Sequence[float],
    b: float,
    clamp: float,
) -> None:
    """The mirror step and the mask alone, in place, for weights of any float dtype and device.

    fp16 and bf16 weights are lifted to fp32 and rounded once on the way back.

    Args:
        params: Weights after the base step. Written.
        grads: What the base step saw. Read.
        masks: As in `adam_ham_`.
        a: As in `adam_ham_`.
        b: As in `adam_ham_`.
        clamp: As in `adam_ham_`.
    """
    for index, param in enumerate(params):
        if param.dtype in (torch.float32, torch.float64):
            written, rounded = [param], None
        else:
            written, rounded = [], param
        _step_blocks_(
            None, written, grads[index], masks[index], rounded,
            a=a[index], b=b, clamp=clamp, sums=None,
        )  # fmt: skip


def masked_square_sum(grad: Tensor, mask: Tensor | None) -> tuple[float, int]:
    """Sum of the squares of the entries that `mask` keeps, and their number."""
    if mask is None:
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        return float(norm) ** 2, grad.numel()
    flat, kept = flat_input(grad, None), flat_input(mask, None)
    block = block_elements()
    total, count = 0.0, 0
    for start in range(0, flat.numel(), block):
        part = torch.where(kept[start : start + block], flat[start : start + block], 0.0)
        total += float(torch.linalg.vector_norm(part, dtype=torch.float32)) ** 2
        count += int(kept[start : start + block].sum())
    return total, count


def masked_abs_sum(grad: Tensor, mask: Tensor | None) -> tuple[float, int]:
    """Sum of the magnitudes of the entries that `mask` keeps, and their number."""
    if mask is None:
        return float(torch.linalg.vector_norm(grad, 1, dtype=torch.float32)), grad.numel()
    flat, kept = flat_input(grad, None), flat_input(mask, None)
    block = block_elements()
    total, count = 0.0, 0
    for start in range(0, flat.numel(), block):
        part = torch.where(kept[start : start + block], flat[start : start + block], 0.0)
        total += float(torch.linalg.vector_norm(part, 1, dtype=torch.float32))
        count += int(kept[start : start + block].sum())
    return total, count


def block_elements() -> int:
    """Elements of a block: enough that every thread has its share."""
    return BLOCK * torch.get_num_threads()


def _step_blocks_(
    base_step_: Callable[..., None] | None,
    written: list[Tensor],
    grad: Tensor,
    mask: Tensor | None,
    rounded: Tensor | None,
    *,
    a: float,
    b: float,
    clamp: float,
    sums: Tensor | None,
) -> None:
    """One tensor, block by block. `written` is the weights and their state; empty: only `rounded`."""
    shaped = written[0] if written else rounded
    assert shaped is not None
    order = storage_order(shaped)
    copied: list[tuple[Tensor, Tensor]] = []
    outputs = [flat_output(tensor, order, copied) for tensor in written]
    low = None if rounded is None else flat_output(rounded, order, copied)
    g = flat_input(grad, order)
    kept = None if mask is None else flat_input(mask, order)
    size = min(block_elements(), g.numel())
    dtype = written[0].dtype if written else torch.float32
    scratch = g.new_empty(size, dtype=dtype)
    lifted = g.new_empty(size, dtype=dtype) if g.dtype != dtype else None
    lifted_w = None if written else g.new_empty(size, dtype=dtype)
    zero = torch.zeros((), dtype=dtype, device=g.device)
    mirrors = a != 0 or b != 0
    for start in range(0, g.numel(), max(size, 1)):
        end = min(start + size, g.numel())
        parts = [output[start:end] for output in outputs]
        g_part = g[start:end]
        if lifted is not None:
            g_part = lifted[: end - start].copy_(g_part)
        if lifted_w is not None:
            assert low is not None
            parts = [lifted_w[: end - start].copy_(low[start:end])]
        if base_step_ is not None:
            base_step_(parts[0], g_part, *parts[1:])
        kept_part = None if kept is None else kept[start:end]
        if mirrors:
            e = scratch[: end - start]
            if sums is None:
                _mirror_block_(parts[0], g_part, e, a=a, b=b, clamp=clamp)
            else:
                _measured_mirror_block_(
                    parts[0], g_part, e, kept_part, a=a, b=b, clamp=clamp, sums=sums
                )
        if kept_part is not None:
            # the weights, and the first moment or the momentum; a second moment stays
            for part in parts[:2]:
                torch.where(kept_part, part, zero, out=part)
        if low is not None:
            low[start:end].copy_(parts[0])
    for original, copy in copied:
        original.copy_(copy)


def _mirror_block_(w: Tensor, g: Tensor, e: Tensor, *, a: float, b: float, clamp: float) -> None:
    """w <- w * exp(clamp(-(a * sign(w) * g + b))); `e` is scratch and ends as what was added."""
    torch.sign(w, out=e)
    e.mul_(g).mul_(-a).sub_(b) if b else e.mul_(g).mul_(-a)
    e.clamp_(-clamp, clamp)
    if clamp > -rule.CANCELS and bool((e < rule.CANCELS).any()):
        w.copy_(rule.multiply(w, e))
    else:
        w.addcmul_(w, e.expm1_())


def _measured_mirror_block_(
    w: Tensor,
    g: Tensor,
    e: Tensor,
    kept: Tensor | None,
    *,
    a: float,
    b: float,
    clamp: float,
    sums: Tensor,
) -> None:
    """The same in bits, with the sums of `NUM_SUMS` taken on the way."""
    before = w.clone()
    magnitude = rule.exponent(w, g, a=a, b=b, clamp=clamp).abs_()
    _mirror_block_(w, g, e, a=a, b=b, clamp=clamp)
    moved = w != before
    if kept is not None:
        magnitude, moved = magnitude[kept], moved[kept]
    if magnitude.numel() == 0:
        return
    # in double on the host: fp32 cannot count beyond 2^24
    sums[0] += magnitude.sum(dtype=torch.float64)
    sums[1] += moved.sum()
    sums[2] += (magnitude >= clamp).sum()
    sums[3] += magnitude.numel()
    sums[4] = torch.maximum(sums[4], magnitude.max().double())


def storage_order(tensor: Tensor) -> list[int] | None:
    """Dimensions from the slowest to the fastest in memory; None if that is their own order."""
    if tensor.is_contiguous():
        return None
    return sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))


def flat_input(tensor: Tensor, order: list[int] | None) -> Tensor:
    """The elements in the given order, as one dimension; copied only if they do not lie so."""
    return (tensor if order is None else tensor.permute(order)).reshape(-1)


def flat_output(
    tensor: Tensor, order: list[int] | None, copied: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """As `flat_input`, for writing; a copy that was needed is noted in `copied` to be put back."""
    ordered = tensor if order is None else tensor.permute(order)
    if ordered.is_contiguous():
        return ordered.view(-1)
    flat = ordered.reshape(-1)
    copied.append((ordered, flat.view(ordered.shape)))
    return flat

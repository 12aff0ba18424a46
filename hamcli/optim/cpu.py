"""The step of `rule` over lists of tensors on a CPU, without temporaries of their size.

Plain torch, block by block: torch's fused base step and the passes of the mirror step meet each
block while it lies in the cache. The base step is torch's fused one in bits as well.

Legend: w weights in fp32 or fp64, g gradients, a = lr * alpha (one number per tensor),
b = lr * beta, e exponents. All lists have one entry per tensor. Tensors may lie in memory in any
way; those that do not fill one stretch of it, in the order of the weights, are copied.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hamcli.optim import rule

# Elements per thread and block: weights, gradient, two moments and scratch stay in a 4 MiB share of
# the cache. Of 2^14 to 2^18 the fastest: smaller ones wait for Python.
BLOCK = 1 << 17

# What a measured step adds up, in float64, over the weights that are kept and not zero: the sum of
# |e|, the number that the mirror step changed, the number of clamped exponents, the number of all,
# and (not a sum) the greatest |e|.
NUM_SUMS = 5

# Taylor polynomials of expm1(e) / e: up to which |e| one is exact to 5e-9 of the weight, a tenth of
# an fp32 digit, and its coefficients. A third of the time of torch.expm1 or less.
POLYNOMIALS: tuple[tuple[float, tuple[float, ...]], ...] = (
    (2.0**-14, (1.0,)),
    (2.0**-9, (1 / 2, 1.0)),
    (2.0**-6, (1 / 6, 1 / 2, 1.0)),
    (2.0**-3, (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0)),
)

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

BaseStep = Callable[..., None]


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
            the weights themselves. Written.
        a: lr * alpha of each tensor.
        b: lr * beta of all. Where `a` and `b` are zero there is no mirror step.
        clamp: Greatest |exponent|.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled or added to the gradient.
        decoupled: Which of the two.
        sums: `NUM_SUMS` in float64, added to if given; see there.
    """
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    scratch = _Scratch()
    for index, param in enumerate(params):

        def base_step_(w: Tensor, g: Tensor, m: Tensor, v: Tensor, *, at: int = index) -> None:
            fused(
                [w],
                [g],
                [m],
                [v],
                [],
                [steps[at]],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
            )

        _step_blocks_(
            base_step_,
            (param, exp_avgs[index], exp_avg_sqs[index]),
            grads[index],
            masks[index],
            rounded[index],
            (a[index], b, clamp),
            scratch,
            sums,
        )


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

    def base_step_(w: Tensor, g: Tensor, *buffer: Tensor) -> None:
        torch._fused_sgd_(
            [w],
            [g],
            list(buffer),
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=is_first_step,
        )

    scratch = _Scratch()
    for index, param in enumerate(params):
        buffer = momentum_buffers[index]
        _step_blocks_(
            base_step_,
            (param,) if buffer is None else (param, buffer),
            grads[index],
            masks[index],
            rounded[index],
            (a[index], b, clamp),
            scratch,
            sums,
        )


def mirror_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None],
    a: Sequence[float],
    b: float,
    clamp: float,
) -> None:
    """The mirror step and the mask alone, in place, on any device and in any float dtype.

    fp16 and bf16 weights are lifted to fp32 and rounded once on the way back.

    Args:
        params: Weights after the base step. Written.
        grads: What the base step saw. Read.
        masks: As in `adam_ham_`.
        a: As in `adam_ham_`.
        b: As in `adam_ham_`.
        clamp: As in `adam_ham_`.
    """
    scratch = _Scratch()
    for index, param in enumerate(params):
        is_wide = param.dtype in (torch.float32, torch.float64)
        _step_blocks_(
            None,
            (param,) if is_wide else (),
            grads[index],
            masks[index],
            None if is_wide else param,
            (a[index], b, clamp),
            scratch,
            None,
        )


def kept_norms(
    grads: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[tuple[float, float, int]]:
    """Of each gradient: sum of |g|, sum of g squared, and how many, over what its mask keeps."""
    return [_kept_norms(grad, mask) for grad, mask in zip(grads, masks, strict=True)]


def _kept_norms(grad: Tensor, mask: Tensor | None) -> tuple[float, float, int]:
    order = storage_order(grad)
    g = flat_input(grad, order)
    kept = None if mask is None else flat_input(mask, order)
    magnitudes = squares = 0.0
    count = g.numel() if kept is None else int(kept.sum())
    wide = torch.promote_types(g.dtype, torch.float32)
    scratch = _Scratch()
    for block in _blocks(g):
        part = scratch.get("gradient", g[block], wide).copy_(g[block])
        if kept is not None:
            _drop_(part, kept[block], scratch)
        squares += float(torch.linalg.vector_norm(part)) ** 2
        magnitudes += float(part.abs_().sum())
    return magnitudes, squares, count


def _step_blocks_(
    base_step_: BaseStep | None,
    written: Sequence[Tensor],
    grad: Tensor,
    mask: Tensor | None,
    rounded: Tensor | None,
    exponents: tuple[float, float, float],
    scratch: "_Scratch",
    sums: Tensor | None,
) -> None:
    """One tensor. `written` is the weights and their state; if empty, only `rounded` is there."""
    shaped = written[0] if written else rounded
    assert shaped is not None
    dtype = written[0].dtype if written else torch.float32
    order = storage_order(shaped)
    copied: list[tuple[Tensor, Tensor]] = []
    outputs = [flat_output(tensor, order, copied) for tensor in written]
    low = None if rounded is None else flat_output(rounded, order, copied)
    g = flat_input(grad, order)
    kept = None if mask is None else flat_input(mask, order)
    a, b, clamp = exponents
    for block in _blocks(g):
        g_part = g[block]
        if g.dtype != dtype:
            g_part = scratch.get("gradient", g_part, dtype).copy_(g_part)
        parts = [output[block] for output in outputs]
        if not parts:
            assert low is not None
            parts = [scratch.get("weight", g_part, dtype).copy_(low[block])]
        if base_step_ is not None:
            base_step_(parts[0], g_part, *parts[1:])
        kept_part = None if kept is None else kept[block]
        if a != 0 or b != 0:
            e = scratch.get("exponent", g_part, dtype)
            extremes = _exponent_(parts[0], g_part, e, (a, b, clamp), scratch)
            if sums is None:
                _multiply_(parts[0], e, extremes, scratch)
            else:
                _multiply_and_measure_(parts[0], e, extremes, clamp, kept_part, scratch, sums)
        if kept_part is not None:
            # the weights, and the first moment or the momentum; a second moment stays
            for part in parts[:2]:
                _drop_(part, kept_part, scratch)
        if low is not None:
            low[block].copy_(parts[0])
    for original, copy in copied:
        original.copy_(copy)


def _exponent_(
    w: Tensor,
    g: Tensor,
    e: Tensor,
    exponents: tuple[float, float, float],
    scratch: "_Scratch",
) -> tuple[float, float]:
    """Write clamp(-(a * sign(w) * g + b)) to `e`; `exponents` are a, b and the clamp.

    Returns:
        The least and the greatest, of which either is NaN if any is.
    """
    a, b, clamp = exponents
    torch.sign(w, out=e)
    torch.addcmul(scratch.constant(-b, e), e, g, value=-a, out=e)
    lowest, highest = (float(extreme) for extreme in e.aminmax())
    if not (-clamp <= lowest and highest <= clamp):
        e.clamp_(-clamp, clamp)
    return max(lowest, -clamp), min(highest, clamp)


def _multiply_(w: Tensor, e: Tensor, extremes: tuple[float, float], scratch: "_Scratch") -> None:
    """Multiply `w` by exp(e); `e` may be used up."""
    lowest, highest = extremes
    if w.dtype == torch.float32:
        for limit, coefficients in POLYNOMIALS:
            if -limit <= lowest and highest <= limit:
                w.addcmul_(w, _expm1(e, coefficients, scratch))
                return
    if lowest < rule.CANCELS:
        w.copy_(rule.multiply(w, e))
    else:
        w.addcmul_(w, e.expm1_())


def _expm1(e: Tensor, coefficients: Sequence[float], scratch: "_Scratch") -> Tensor:
    """The polynomial with these coefficients, times `e`."""
    if len(coefficients) == 1:
        return e
    first, second, *others = coefficients
    factor = scratch.get("polynomial", e, e.dtype)
    # not addcmul: with two numbers among its tensors it takes four times as long
    torch.add(scratch.constant(second, e), e, alpha=first, out=factor)
    for other in others:
        torch.addcmul(scratch.constant(other, e), factor, e, out=factor)
    return factor.mul_(e)


def _drop_(values: Tensor, kept: Tensor, scratch: "_Scratch") -> None:
    """Write +0.0 to `values` where `kept` is False."""
    # the bits times 0 or 1: also NaN becomes +0.0, in a seventh of the time of torch.where
    bits = values.view(BITS[values.element_size()])
    bits.mul_(scratch.get("kept", bits, bits.dtype).copy_(kept))


def _multiply_and_measure_(
    w: Tensor,
    e: Tensor,
    extremes: tuple[float, float],
    clamp: float,
    kept: Tensor | None,
    scratch: "_Scratch",
    sums: Tensor,
) -> None:
    """The same in bits, and what `NUM_SUMS` says is added to `sums`."""
    before = scratch.get("before", w, w.dtype).copy_(w)
    sizes = torch.abs(e, out=scratch.get("sizes", e, e.dtype))
    _multiply_(w, e, extremes, scratch)
    counted = before != 0 if kept is None else (before != 0) & kept
    moved = w != before if kept is None else (w != before) & kept
    _drop_(sizes, counted, scratch)
    sums[0] += sizes.sum(dtype=torch.float64)
    sums[1] += moved.sum()
    sums[2] += (sizes >= sizes.new_tensor(clamp)).sum()
    sums[3] += counted.sum()
    sums[4] = torch.maximum(sums[4], sizes.max().double())


class _Scratch:
    """Block-sized memory, made once in a call and used again for every block."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def get(self, use: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory of the length of `like`; the same for the same `use`."""
        key = (use, dtype, like.device)
        held = self._held.get(key)
        if held is None or held.numel() < like.numel():
            held = self._held[key] = like.new_empty(like.numel(), dtype=dtype)
        return held[: like.numel()]

    def constant(self, value: float, like: Tensor) -> Tensor:
        """A 0-d tensor of the dtype of `like`."""
        key = (str(value), like.dtype, like.device)
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = like.new_full((), value)
        return held


def _blocks(flat: Tensor) -> list[slice]:
    """Slices that cut `flat` into blocks."""
    # a device other than the CPU has no cache to hit, and its launches cost
    size = BLOCK * torch.get_num_threads() if flat.device.type == "cpu" else 1 << 24
    return [slice(start, start + size) for start in range(0, flat.numel(), size)]


def storage_order(tensor: Tensor) -> list[int] | None:
    """Dimensions from the slowest to the fastest in memory; None if that is their own order."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def flat_input(tensor: Tensor, order: list[int] | None) -> Tensor:
    """The elements in the given order, as one dimension; copied if they do not lie so."""
    return (tensor if order is None else tensor.permute(order)).contiguous().view(-1)


def flat_output(
    tensor: Tensor, order: list[int] | None, copied: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """As `flat_input`, for writing; a copy that was needed is noted in `copied` to be put back."""
    ordered = tensor if order is None else tensor.permute(order)
    if ordered.is_contiguous():
        return ordered.view(-1)
    copy = ordered.contiguous()
    copied.append((ordered, copy))
    return copy.view(-1)

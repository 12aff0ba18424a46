"""The program of the GPU step, in Triton: one launch steps all tensors of a table of addresses.

Plain functions, which `compiled` hands to Triton with its language as `tl`: Triton is imported only
once a GPU steps. Legend: w weights, g gradients, m and v first and second moments, a = lr * alpha,
b = lr * beta, e exponents.
"""

# Kernels name Triton's types, but Triton is there only once one runs; it types their arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton.language as tl


def _two_to_the(k):
    """2**k for whole k in [-126, 127], exactly, by the bits of fp32."""
    return ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


def _exp_parts(x):
    """Parts of exp(x) = 2**k * (1 + p), |p| < 0.42, |x| <= 87; p keeps its digits for small x."""
    k = tl.floor(x * 1.44269504088896341 + 0.5)
    r = tl.fma(k, -0.693359375, x)  # ln 2 in two parts; the product with the first is exact
    r = tl.fma(k, 2.12194440e-4, r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)  # these six: expf of Cephes, S. Moshier
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    return k, tl.fma(p, r * r, r)


def _one_minus_power(log_beta, step):
    """1 - beta**step, without the cancellation of beta near 1."""
    k, p = _exp_parts(tl.maximum(log_beta * step, -87.0))
    scale = _two_to_the(k)
    return -tl.fma(scale, p, scale - 1.0)


def _exponent(w, g, a, b, clamp):
    """clamp(-(a * sign(w) * g + b)); NaN stays NaN."""
    along = tl.where(w > 0.0, g, tl.where(w < 0.0, -g, g * 0.0))
    e = -tl.fma(along, a, b)
    return tl.where(e > clamp, clamp, tl.where(e < -clamp, -clamp, e))


def _multiply(w, e):
    """The product w * exp(e), rounded about once for any e."""
    is_number = e == e
    k, p = _exp_parts(tl.where(is_number, e, 0.0))
    return tl.where(is_number, tl.fma(w, p, w) * _two_to_the(k), e)


def _lift(raw, dtype: tl.constexpr):
    """What was loaded, as fp32; bf16 travels as the upper half of an fp32 number's bits."""
    if dtype == tl.uint16:
        return (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


def _lower(x, dtype: tl.constexpr):
    """Round to nearest-even; by bits for bf16, where Triton's interpreter truncates."""
    if dtype == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return tl.where(x == x, bits >> 16, 0x7FC0).to(tl.uint16)
    else:
        return x.to(dtype)


def _lower_by_chance(x, noise):
    """Round to bf16, away from zero with the probability of what is cut off; `noise` is uint32."""
    bits = x.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
    return tl.where(x == x, bits >> 16, 0x7FC0).to(tl.uint16)


def _pointer(address_at, start, dtype: tl.constexpr, aligned: tl.constexpr):
    """The address that stands at `address_at`, `start` elements on."""
    pointer = tl.load(address_at).to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


def _step_block(
    row,
    grad,
    index,
    start,
    inside,  # [BLOCK] bool: the elements that exist
    sums_at,
    lr,
    a,
    b,
    step,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    momentum,
    clamp,
    seed,
    KIND: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROUNDED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    R_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one tensor: base step, mirror step, mask."""
    offsets = tl.arange(0, BLOCK)
    w_at = _pointer(row, start, W_DTYPE, ALIGNED) + offsets
    g_at = _pointer(grad, start, G_DTYPE, ALIGNED) + offsets
    w = _lift(tl.load(w_at, mask=inside, other=0), W_DTYPE)
    g = _lift(tl.load(g_at, mask=inside, other=0), G_DTYPE)
    if HAS_MOMENTUM:
        m_at = _pointer(row + 1, start, tl.float32, ALIGNED) + offsets
        if not FIRST_STEP:
            m = tl.load(m_at, mask=inside, other=0.0)
    keep = inside
    if HAS_MASK:
        mask_at = _pointer(row + 3, start, tl.uint8, ALIGNED) + offsets
        # a tensor without a mask, among others that have one, has address 0 there
        has_mask = tl.load(row + 3) != 0
        # where, not &: Triton 3.9's interpreter makes integers of two bools
        keep = tl.load(mask_at, mask=tl.where(has_mask, inside, False), other=1) != 0

    slope = g  # what the base step descends; the mirror step sees g
    if HAS_DECAY:
        if KIND == "adamw":
            w = tl.fma(w, -(lr * weight_decay), w)
        else:
            slope = tl.fma(w, weight_decay, g)
    if KIND == "sgd":
        if HAS_MOMENTUM:
            m = slope if FIRST_STEP else tl.fma(m, momentum, slope)
            slope = tl.fma(m, momentum, slope) if NESTEROV else m
        w = tl.fma(slope, -lr, w)
    else:
        v_at = _pointer(row + 2, start, tl.float32, ALIGNED) + offsets
        v = tl.load(v_at, mask=inside, other=0.0)
        m = tl.fma(slope - m, one_minus_beta1, m)
        v = tl.fma(tl.fma(slope, slope, -v), one_minus_beta2, v)
        tl.store(v_at, v, mask=inside)
        step_size = tl.div_rn(lr, _one_minus_power(log_beta1, step))
        correction = tl.sqrt_rn(_one_minus_power(log_beta2, step))
        w = tl.fma(tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction) + eps), -step_size, w)

    if (a != 0.0) | (b != 0.0):
        e = _exponent(w, g, a, b, clamp)
        moved = _multiply(w, e)
        if HAS_SUMS:
            counts = inside & keep & (w != 0.0)
            size = tl.where(counts, tl.abs(e), 0.0)
            tl.store(sums_at, tl.sum(size))
            tl.store(sums_at + 1, tl.sum((counts & (moved != w)).to(tl.float32)))
            tl.store(sums_at + 2, tl.sum((counts & (size >= clamp)).to(tl.float32)))
            tl.store(sums_at + 3, tl.sum(counts.to(tl.float32)))
            tl.store(sums_at + 4, tl.max(size))
        w = moved

    if HAS_MASK:
        # where, not a product: 0 * nan is nan, and -w * 0 is -0.0
        w = tl.where(keep, w, 0.0)
        if HAS_MOMENTUM:
            m = tl.where(keep, m, 0.0)
    if HAS_MOMENTUM:
        tl.store(m_at, m, mask=inside)
    if HAS_ROUNDED:
        rounded_at = _pointer(row + 4, start, R_DTYPE, ALIGNED) + offsets
        tl.store(rounded_at, _lower(w, R_DTYPE), mask=inside)
    if BY_CHANCE:
        place = (start + offsets).to(tl.int32)
        noise, _, _, _ = tl.philox(seed, place, index.to(tl.int32), step.to(tl.int32), 0)
        tl.store(w_at, _lower_by_chance(w, noise), mask=inside)
    else:
        tl.store(w_at, _lower(w, W_DTYPE), mask=inside)


def _step_all(
    table,  # [tensors, 8] int64, read: see `_Launch.rows`
    grads,  # [tensors] int64, read: addresses
    places,  # [blocks, 2] int32, read
    sums,  # [blocks, 5] fp32, written if HAS_SUMS: as `cpu.NUM_SUMS`, of each block
    lr_at,  # number, read
    a_at,  # number, or one a tensor, read
    b_at,  # number, or one a tensor, read
    step_at,  # number, or one a tensor, read unless STEP_STRIDE is negative
    one_minus_beta1,  # formed in double: 1 - 0.999 in fp32 has four digits
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    momentum,
    clamp,
    seed,
    A_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    STEP_STRIDE: tl.constexpr,  # -1: the table has the addresses
    KIND: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROUNDED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    R_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block. Whole blocks have code of their own: without bounds, loads are wide."""
    place = places + 2 * tl.program_id(0)
    sums_at = sums + 5 * tl.program_id(0)
    tensor = tl.load(place)
    start = tl.load(place + 1).to(tl.int64) * BLOCK
    row = table + tensor * 8
    grad = grads + tensor
    left = tl.load(row + 6) - start
    index = tl.load(row + 7)  # in the caller's lists, which several launches may share
    lr = tl.load(lr_at).to(tl.float32)
    a = tl.load(a_at + index * A_STRIDE).to(tl.float32)
    b = tl.load(b_at + index * B_STRIDE).to(tl.float32)
    if STEP_STRIDE < 0:
        step = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32)))
    else:
        step = tl.load(step_at + index * STEP_STRIDE).to(tl.float32)
    if left >= BLOCK:
        inside = tl.full((BLOCK,), True, tl.int1)
        _step_block(
            row, grad, index, start, inside, sums_at, lr, a, b, step, one_minus_beta1,
            one_minus_beta2, log_beta1, log_beta2, eps, weight_decay, momentum, clamp, seed, KIND,
            NESTEROV, FIRST_STEP, HAS_DECAY, HAS_MOMENTUM, HAS_MASK, HAS_ROUNDED, HAS_SUMS,
            BY_CHANCE, W_DTYPE, G_DTYPE, R_DTYPE, ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        inside = tl.arange(0, BLOCK) < left
        _step_block(
            row, grad, index, start, inside, sums_at, lr, a, b, step, one_minus_beta1,
            one_minus_beta2, log_beta1, log_beta2, eps, weight_decay, momentum, clamp, seed, KIND,
            NESTEROV, FIRST_STEP, HAS_DECAY, HAS_MOMENTUM, HAS_MASK, HAS_ROUNDED, HAS_SUMS,
            BY_CHANCE, W_DTYPE, G_DTYPE, R_DTYPE, ALIGNED, BLOCK,
        )  # fmt: skip


KERNEL_PARTS = (
    _two_to_the, _exp_parts, _one_minus_power, _exponent, _multiply, _lift, _lower,
    _lower_by_chance, _pointer, _step_block, _step_all,
)  # fmt: skip
UNSPECIALISED = ("momentum", "seed")  # Triton compiles anew for numbers it takes for special


@functools.cache
def compiled() -> tuple[Any, dict[torch.dtype, Any]]:
    """The kernel, and dtypes by the names it knows them; Triton is imported at the first call."""
    import triton
    import triton.language

    # Triton resolves names in the module: what it compiles must stand there as it knows it.
    module = globals()
    module["tl"] = tl = triton.language
    for part in KERNEL_PARTS:
        names = [name for name in UNSPECIALISED if name in part.__annotations__]
        module[part.__name__] = triton.jit(part, do_not_specialize=names)
    dtypes = {torch.float32: tl.float32, torch.bfloat16: tl.uint16, torch.float16: tl.float16}
    return module["_step_all"], dtypes

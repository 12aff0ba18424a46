"""The step of `rule` over lists of tensors on a GPU: one Triton launch for all of the same dtypes.

Every weight is read and written once: base step, mirror step and mask meet it in registers, as
fp32. The kernel finds its tensors through a table of addresses. It reads learning rate, exponents
and step counts on the device, so that nothing waits for it and a captured CUDA graph follows their
changes. There is no autotuning: a tuner runs a kernel many times, and this one changes its inputs.

Legend: w weights, g gradients, m and v first and second moments, a = lr * alpha, b = lr * beta, e
exponents. All lists have one entry per tensor.
"""

# Kernels name Triton's types, but Triton is there only once one runs; it types their arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hamcli.optim.cpu import NUM_SUMS

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of gradients and of rounded weights
CLAMP_LIMIT = 87.0  # exp of it, and of minus it, is a normal fp32 number
VECTOR_BYTES = 16  # the widest load of one thread
INTERPRETED_BLOCK = 1 << 16  # the interpreter takes milliseconds a program, however small
TABLES_KEPT = 256  # a few for each parameter group of each optimizer
NUMBERS_KEPT = 64

Numbers = float | Sequence[float] | Tensor
Integers = np.ndarray[Any, np.dtype[np.int64]]

# --- the kernel: plain functions, which `_kernel` hands to Triton with its language as `tl`


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


def _pointer(row, column, start, dtype: tl.constexpr, aligned: tl.constexpr):
    """The address in a column of the row, `start` elements on."""
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


def _step_block(
    row,
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
    w_at = _pointer(row, 0, start, W_DTYPE, ALIGNED) + offsets
    g_at = _pointer(row, 1, start, G_DTYPE, ALIGNED) + offsets
    w = _lift(tl.load(w_at, mask=inside, other=0), W_DTYPE)
    g = _lift(tl.load(g_at, mask=inside, other=0), G_DTYPE)
    if HAS_MOMENTUM:
        m_at = _pointer(row, 2, start, tl.float32, ALIGNED) + offsets
        if not FIRST_STEP:
            m = tl.load(m_at, mask=inside, other=0.0)
    keep = inside
    if HAS_MASK:
        mask_at = _pointer(row, 4, start, tl.uint8, ALIGNED) + offsets
        # a tensor without a mask, among others that have one, has address 0 there
        has_mask = tl.load(row + 4) != 0
        keep = tl.load(mask_at, mask=inside & has_mask, other=1) != 0

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
        v_at = _pointer(row, 3, start, tl.float32, ALIGNED) + offsets
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
        rounded_at = _pointer(row, 5, start, R_DTYPE, ALIGNED) + offsets
        tl.store(rounded_at, _lower(w, R_DTYPE), mask=inside)
    if BY_CHANCE:
        place = (start + offsets).to(tl.int32)
        noise, _, _, _ = tl.philox(seed, place, index.to(tl.int32), step.to(tl.int32), 0)
        tl.store(w_at, _lower_by_chance(w, noise), mask=inside)
    else:
        tl.store(w_at, _lower(w, W_DTYPE), mask=inside)


def _step_all(
    table,  # [tensors, 9] int64, read: a row is `_Weight.row`
    places,  # [blocks, 2] int32, read: tensor, block within it
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
    row = table + tensor * 9
    left = tl.load(row + 7) - start
    index = tl.load(row + 8)  # in the caller's lists, which several launches may share
    lr = tl.load(lr_at).to(tl.float32)
    a = tl.load(a_at + index * A_STRIDE).to(tl.float32)
    b = tl.load(b_at + index * B_STRIDE).to(tl.float32)
    if STEP_STRIDE < 0:
        step = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float32)))
    else:
        step = tl.load(step_at + index * STEP_STRIDE).to(tl.float32)
    if left >= BLOCK:
        inside = tl.full((BLOCK,), True, tl.int1)
        _step_block(
            row, index, start, inside, sums_at, lr, a, b, step, one_minus_beta1, one_minus_beta2,
            log_beta1, log_beta2, eps, weight_decay, momentum, clamp, seed, KIND, NESTEROV,
            FIRST_STEP, HAS_DECAY, HAS_MOMENTUM, HAS_MASK, HAS_ROUNDED, HAS_SUMS, BY_CHANCE,
            W_DTYPE, G_DTYPE, R_DTYPE, ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        inside = tl.arange(0, BLOCK) < left
        _step_block(
            row, index, start, inside, sums_at, lr, a, b, step, one_minus_beta1, one_minus_beta2,
            log_beta1, log_beta2, eps, weight_decay, momentum, clamp, seed, KIND, NESTEROV,
            FIRST_STEP, HAS_DECAY, HAS_MOMENTUM, HAS_MASK, HAS_ROUNDED, HAS_SUMS, BY_CHANCE,
            W_DTYPE, G_DTYPE, R_DTYPE, ALIGNED, BLOCK,
        )  # fmt: skip


KERNEL_PARTS = (
    _two_to_the, _exp_parts, _one_minus_power, _exponent, _multiply, _lift, _lower,
    _lower_by_chance, _pointer, _step_block, _step_all,
)  # fmt: skip
UNSPECIALISED = ("momentum", "seed")  # Triton compiles anew for numbers it takes for special


@functools.cache
def _kernel() -> tuple[Any, dict[torch.dtype, Any]]:
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


# --- the step


def is_usable(weight: Tensor) -> bool:
    """Whether this backend steps `weight` (or the master of a low-precision one)."""
    is_here = weight.device.type == "cuda" or (weight.device.type == "cpu" and _is_interpreted())
    is_taken = weight.dtype in DTYPES and _is_dense(weight)
    return is_here and is_taken and importlib.util.find_spec("triton") is not None


def adam_ham_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None],
    rounded: Sequence[Tensor | None],
    a: Numbers,
    b: Numbers,
    clamp: float,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    sums: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """One step of AdamW (`decoupled`) or Adam, then the mirror step, then the mask, in place.

    As `cpu.adam_ham_`, with what belongs to a GPU. Nothing waits for the device, unless `sums` is
    elsewhere. A captured CUDA graph reads tensors anew at every replay and keeps numbers as they
    were at the capture; one step must have run before a capture, to compile.

    Args:
        params: Weights, or the masters of low-precision ones: fp32; or bf16 and fp16 weights
            without a master. Dense, in any memory order; what is written has the same. Written.
        grads: Of the same shapes, fp32, bf16 or fp16. Read.
        exp_avgs: First moments, fp32. Written.
        exp_avg_sqs: Second moments, fp32. Written.
        steps: Number of this step, from 1, as 0-d fp32 tensors, on the device or a CPU. Read.
        masks: bool, True where kept; None for no mask.
        rounded: Low-precision weights that receive the rounded `params`; None where `params` are
            the weights themselves. Written.
        a: lr * alpha: of all tensors, or of each; numbers, or a tensor on the device.
        b: lr * beta: likewise. Where `a` and `b` are zero there is no mirror step.
        clamp: Greatest |exponent|; more than 87 is 87.
        lr: Learning rate; a number, or a 0-d tensor on the device.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled or added to the gradient.
        decoupled: Which of the two.
        sums: `cpu.NUM_SUMS` in float64, added to if given.
        seed: Rounds bf16 `params` stochastically, alike for the same seed, step and place; None
            rounds to nearest-even.
    """
    rows = zip(params, grads, exp_avgs, exp_avg_sqs, masks, rounded, steps, strict=True)
    base = _Base("adamw" if decoupled else "adam", beta1, beta2, eps, weight_decay)
    _step_(rows, base, (lr, a, b), clamp, sums, seed)


def sgd_ham_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    masks: Sequence[Tensor | None],
    rounded: Sequence[Tensor | None],
    a: Numbers,
    b: Numbers,
    clamp: float,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    is_first_step: bool,
    sums: Tensor | None = None,
    seed: int | None = None,
    steps: Sequence[Tensor] | None = None,
) -> None:
    """One step of SGD, then the mirror step, then the mask, in place.

    Args:
        params: As in `adam_ham_`.
        grads: As in `adam_ham_`.
        momentum_buffers: fp32, written; None if and only if `momentum` is 0.
        masks: As in `adam_ham_`.
        rounded: As in `adam_ham_`.
        a: As in `adam_ham_`.
        b: As in `adam_ham_`.
        clamp: As in `adam_ham_`.
        lr: Learning rate; a number, or a 0-d tensor on the device.
        momentum: 0 for none.
        nesterov: Whether the step looks ahead along the momentum.
        weight_decay: Added to the gradient.
        is_first_step: The buffers are filled, their contents are not read.
        sums: As in `adam_ham_`.
        seed: As in `adam_ham_`.
        steps: As in `adam_ham_`; needed with `seed` only.
    """
    absent = [None] * len(params)
    counts = absent if steps is None else steps
    assert seed is None or steps is not None, "each step must draw other random numbers"
    rows = zip(params, grads, momentum_buffers, absent, masks, rounded, counts, strict=True)
    base = _Base(
        "sgd",
        weight_decay=weight_decay,
        momentum=momentum,
        is_nesterov=nesterov,
        is_first_step=is_first_step,
    )
    _step_(rows, base, (lr, a, b), clamp, sums, seed)


# --- from lists to launches


@dataclass(frozen=True, slots=True)
class _Base:
    """The base optimizer and its constants."""

    kind: str
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    is_nesterov: bool = False
    is_first_step: bool = False


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight and what belongs to it, in the order of the table."""

    w: Tensor
    g: Tensor
    m: Tensor | None
    v: Tensor | None
    mask: Tensor | None
    rounded: Tensor | None
    step: Tensor | None

    def kind(self) -> tuple[torch.device, torch.dtype, torch.dtype, torch.dtype | None]:
        """What the weights of one launch have in common."""
        rounded = None if self.rounded is None else self.rounded.dtype
        return (self.w.device, self.w.dtype, self.g.dtype, rounded)

    def row(self, index: int) -> list[int]:
        """The row of the table; address 0 stands for what is not there, or not on the device."""
        tensors = (self.w, self.g, self.m, self.v, self.mask, self.rounded)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        has_step = self.step is not None and self.step.device == self.w.device
        step = self.step.data_ptr() if self.step is not None and has_step else 0
        return [*addresses, step, self.w.numel(), index]

    def check(self) -> None:
        """The kernel believes addresses: another dtype or layout would garble, or crash."""
        assert self.w.dtype in DTYPES
        assert self.g.dtype in DTYPES
        assert self.rounded is None or self.w.dtype == torch.float32
        assert _is_dense(self.w)
        assert self.step is None or self.step.dtype == torch.float32
        rounded = None if self.rounded is None else self.rounded.dtype
        dtypes = (self.g.dtype, torch.float32, torch.float32, torch.bool, rounded)
        tensors = (self.g, self.m, self.v, self.mask, self.rounded)
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            if tensor is not None:
                assert tensor.dtype == dtype, f"{tensor.dtype}, not {dtype}"
                assert tensor.device == self.w.device
                assert tensor.shape == self.w.shape
                assert _has_order(tensor, self.w)


@dataclass(frozen=True, slots=True)
class _Table:
    """What a launch reads, and the host's copy, which shows whether a tensor has moved."""

    host: Integers
    rows: Tensor  # [tensors, 9] int64
    places: Tensor  # [blocks, 2] int32
    block: int
    is_aligned: bool
    has_mask: bool


class _Held:
    """What is on the device already and need not be sent again.

    While a CUDA graph is captured, what is sent reaches the device at each replay, not now: it is
    of no use outside of the graph, and is held for as long as the graph may live, the process.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[Any, _Table] = OrderedDict()
        self._numbers: OrderedDict[Any, Tensor] = OrderedDict()
        self._captured: list[Any] = []

    def table(self, kind: tuple[Any, ...], weights: Sequence[tuple[int, _Weight]]) -> _Table:
        """The table of `weights`: the one of the last step, unless a tensor has moved."""
        host = np.array([weight.row(index) for index, weight in weights], dtype=np.int64)
        key = (kind, host[:, 0].tobytes())
        held = self._tables.get(key)
        is_capturing = _is_capturing(kind[0])
        if held is None or not np.array_equal(held.host, host):
            for _, weight in weights:
                weight.check()
            # a new one beside the old, which a graph may still read
            held = self._make_table(host, held, kind[0])
            if not is_capturing:
                _keep(self._tables, key, held, TABLES_KEPT)
        if is_capturing:
            self._captured.append(held)
        return held

    def _make_table(self, host: Integers, old: _Table | None, device: torch.device) -> _Table:
        sizes = host[:, 7]
        if old is not None and np.array_equal(old.host[:, 7], sizes):
            block, places = old.block, old.places
        else:
            block = _block_size(int(sizes.sum()))
            places = self._send(_places(sizes, block), device)
        is_aligned = not (host[:, :6] % VECTOR_BYTES).any()
        has_mask = bool(host[:, 4].any())
        return _Table(host, self._send(host, device), places, block, is_aligned, has_mask)

    def numbers(self, x: Numbers, device: torch.device) -> Tensor:
        """`x` on the device: 0-d, or 1-d with one number a tensor of the caller's lists."""
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=True).contiguous()
        if not isinstance(x, (int, float)):
            x = x[0] if len(set(x)) == 1 else tuple(x)
        is_capturing = _is_capturing(device)
        key = (device, x)
        held = None if is_capturing else self._numbers.get(key)
        if held is not None:
            return held
        if isinstance(x, tuple):
            held = self._send(np.array(x, dtype=np.float32), device)
        else:
            held = torch.full((), float(x), dtype=torch.float32, device=device)
        if is_capturing:
            self._captured.append(held)
        else:
            _keep(self._numbers, key, held, NUMBERS_KEPT)
        return held

    def _send(self, array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
        host = torch.from_numpy(array)
        if device.type == "cpu":
            return host
        host = host.pin_memory()  # from memory that is not pinned the copy would wait
        if _is_capturing(device):
            self._captured.append(host)
        return host.to(device, non_blocking=True)


_held = _Held()


def _keep(held: OrderedDict[Any, Any], key: Any, value: Any, number: int) -> None:
    """Put `value` into `held`, and drop the oldest above `number`."""
    held[key] = value
    held.move_to_end(key)
    while len(held) > number:
        held.popitem(last=False)


@torch.no_grad()
def _step_(
    rows: Any,
    base: _Base,
    numbers: tuple[Numbers, Numbers, Numbers],
    clamp: float,
    sums: Tensor | None,
    seed: int | None,
) -> None:
    """One launch for every combination of dtypes among the weights."""
    launches: dict[tuple[Any, ...], list[tuple[int, _Weight]]] = {}
    steps: list[Tensor] = []
    for index, (w, g, m, v, mask, rounded, step) in enumerate(rows):
        if step is not None:
            steps.append(step)
        if w.numel() > 0:
            mask = None if mask is None else _in_order(mask, w)
            weight = _Weight(w, _in_order(g, w), m, v, mask, rounded, step)
            launches.setdefault(weight.kind(), []).append((index, weight))
    for kind, weights in launches.items():
        table = _held.table(kind, weights)
        on_device = [_held.numbers(x, kind[0]) for x in numbers]
        # without an address in the table, step counts come from the host, or nobody reads them
        are_sent = bool(steps) and not table.host[:, 6].all()
        counts = _held.numbers([float(s) for s in steps], kind[0]) if are_sent else None
        part = None
        if sums is not None:
            part = torch.zeros((len(table.places), NUM_SUMS), dtype=torch.float32, device=kind[0])
        _launch(table, kind, base, on_device, counts, clamp, part, seed)
        if part is not None and sums is not None:
            _add_up_(sums, part)


def _add_up_(sums: Tensor, part: Tensor) -> None:
    """Add what the blocks of a launch found to `sums`; the last of the numbers is a maximum."""
    total = part.sum(dim=0, dtype=torch.float64)
    total[-1] = part[:, -1].max()
    total = total.to(sums.device)
    sums[:-1] += total[:-1]
    sums[-1] = torch.maximum(sums[-1], total[-1])


def _launch(
    table: _Table,
    kind: tuple[Any, ...],
    base: _Base,
    numbers: Sequence[Tensor],
    counts: Tensor | None,
    clamp: float,
    part: Tensor | None,
    seed: int | None,
) -> None:
    kernel, kernel_dtypes = _kernel()
    device, w_dtype, g_dtype, r_dtype = kind
    lr, a, b = numbers
    has_addresses = counts is None and bool(table.host[:, 6].all())
    # Triton launches on the current device, and takes pointers of another one for a CPU's
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(len(table.places),)](
            table.rows,
            table.places,
            table.rows if part is None else part,
            lr,
            a,
            b,
            lr if counts is None else counts,
            1 - base.beta1,
            1 - base.beta2,
            math.log(base.beta1) if base.beta1 > 0 else -math.inf,
            math.log(base.beta2) if base.beta2 > 0 else -math.inf,
            base.eps,
            base.weight_decay,
            base.momentum,
            min(clamp, CLAMP_LIMIT),
            0 if seed is None else seed,
            A_STRIDE=a.ndim,
            B_STRIDE=b.ndim,
            STEP_STRIDE=-1 if has_addresses else 0 if counts is None else counts.ndim,
            KIND=base.kind,
            NESTEROV=base.is_nesterov,
            FIRST_STEP=base.is_first_step,
            HAS_DECAY=base.weight_decay != 0,
            HAS_MOMENTUM=base.kind != "sgd" or base.momentum != 0,
            HAS_MASK=table.has_mask,
            HAS_ROUNDED=r_dtype is not None,
            HAS_SUMS=part is not None,
            BY_CHANCE=seed is not None and w_dtype == torch.bfloat16,
            W_DTYPE=kernel_dtypes[w_dtype],
            G_DTYPE=kernel_dtypes[g_dtype],
            R_DTYPE=kernel_dtypes[w_dtype if r_dtype is None else r_dtype],
            ALIGNED=table.is_aligned,
            BLOCK=table.block,
        )


def _places(sizes: Integers, block: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """[blocks, 2]: which block of which tensor each program does."""
    counts = (sizes + block - 1) // block
    tensors = np.repeat(np.arange(len(sizes)), counts)
    begins = np.cumsum(counts) - counts
    blocks = np.arange(len(tensors)) - begins[tensors]
    return np.stack([tensors, blocks], axis=1).astype(np.int32)


def _block_size(num_elements: int) -> int:
    """Elements a program: few where there is little to share out among the processors."""
    if _is_interpreted():
        return INTERPRETED_BLOCK
    return 512 if num_elements < 1 << 22 else 1024


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    return tensor.permute(order).is_contiguous()


def _has_order(tensor: Tensor, like: Tensor) -> bool:
    """Whether elements at the same place in memory are the same elements; `like` is dense."""
    if tensor.is_contiguous() and like.is_contiguous():
        return True
    # the stride of a dimension of one element is never used
    strides = zip(tensor.stride(), like.stride(), like.shape, strict=True)
    return all(one == other or size == 1 for one, other, size in strides)


def _in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, or its copy in the memory order of `like`."""
    if _has_order(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

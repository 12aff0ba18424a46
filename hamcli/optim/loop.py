"""The loop of the numba step: one pass over the weights, compiled when first asked for.

The operations, their order and their rounding are those of `native/step.cpp`: torch's fused base
steps, then the mirror step, then the mask. LLVM makes vectors of the loop. It contracts nothing:
every fused multiply-add is written out. Imports numba: import this inside a function.

Legend: w weights (fp32), g gradients, m and v first and second moments, e exponents.
"""

# numba types the functions that it compiles
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated, attr-defined"
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import NumbaError
from numba.extending import intrinsic

from hamcli.native.building import CannotBuild

BLOCK = 1 << 13  # weights
SMALL = 0.125  # up to this |e| a short polynomial suffices
CLAMP_LIMIT = 87.0  # exp of it, and of minus it, is a normal fp32 number

# Columns of a table of addresses, with a row for each tensor, and of the numbers of each.
W, G, M, V, MASK, ROUNDED, NUMEL, FIRST_BLOCK, NUM_COLUMNS = range(9)
A, B, CLAMP, DECAY, LERP, BETA2, REST2, STEP_SIZE, CORRECTION, EPS, NUM_NUMBERS = range(11)
MOMENTUM, LR = BETA2, STEP_SIZE

ADAMW, ADAM, SGD, MOMENTUM_SGD, NESTEROV = range(5)
FP32, BF16, FP16 = range(3)


class Kind(NamedTuple):
    """What is fixed when the loop is compiled, so that it has no branch to take.

    Attributes:
        base: ADAMW, ADAM, SGD, MOMENTUM_SGD or NESTEROV.
        low: FP32; or what the gradients and the rounded weights are, BF16 or FP16.
        mirrors: Whether there is a mirror step.
        is_small: Whether no exponent is above `SMALL`.
        is_masked: Whether there are masks.
        is_measured: Whether exponents are added up.
        is_near: Adam: the first moment is taken from its own end, as for beta1 above a half.
        is_first: Momentum: the buffers are filled, not read.
        lanes: Length of torch's vectors: it rounds what they leave over in another order.
    """

    base: int
    low: int
    mirrors: bool
    is_small: bool
    is_masked: bool
    is_measured: bool
    is_near: bool
    is_first: bool
    lanes: int


# --- what numba has no name for: memory by address, fused multiply-add, bits

F32, F16, I32, I16, I8 = ir.FloatType(), ir.HalfType(), *map(ir.IntType, (32, 16, 8))
LOW = {FP32: F32, BF16: I16, FP16: F16}
MEMORY = {
    **{row * 3: F32 for row in (W, M, V)},
    MASK * 3: I8,
    **{row * 3 + low: kind for row in (G, ROUNDED) for low, kind in LOW.items()},
}


def _lies_apart(builder, access, row):
    """Tell LLVM that each column has memory of its own, so that it need not compare addresses."""
    module = builder.module
    domain = module.add_metadata(["ham"])
    scopes = {
        one: module.add_metadata([f"row {one}", domain]) for one in (W, G, M, V, MASK, ROUNDED)
    }
    access.set_metadata("alias.scope", module.add_metadata([scopes.pop(row)]))
    access.set_metadata("noalias", module.add_metadata(list(scopes.values())))


def _place(builder, kind, address, index):
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


@intrinsic(prefer_literal=True)
def load(typing, which, address, index):
    """The element at an index, as fp32, or as a bool from a mask. `which`: column * 3 + dtype."""
    code = which.literal_value
    kind = MEMORY[code]

    def generate(context, builder, signature, arguments):
        raw = builder.load(_place(builder, kind, *arguments[1:]))
        _lies_apart(builder, raw, code // 3)
        if kind == I16:  # bf16 is the upper half of the bits of fp32
            return builder.bitcast(builder.shl(builder.zext(raw, I32), I32(16)), F32)
        if kind == F16:
            return builder.fpext(raw, F32)
        return builder.icmp_unsigned("!=", raw, I8(0)) if kind == I8 else raw

    result = types.boolean if kind == I8 else types.float32
    return result(which, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def store(typing, which, address, index, value):
    """Write an fp32 number, rounded to nearest-even where the column is of another dtype."""
    code = which.literal_value
    kind = MEMORY[code]

    def generate(context, builder, signature, arguments):
        _, address, index, raw = arguments
        if kind == I16:
            bits = builder.bitcast(raw, I32)
            odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
            bits = builder.lshr(builder.add(bits, builder.add(odd, I32(0x7FFF))), I32(16))
            is_number = builder.fcmp_ordered("ord", raw, raw)
            raw = builder.trunc(builder.select(is_number, bits, I32(0x7FC0)), I16)
        elif kind == F16:
            raw = builder.fptrunc(raw, F16)
        written = builder.store(raw, _place(builder, kind, address, index))
        _lies_apart(builder, written, code // 3)
        return context.get_dummy_value()

    return types.void(which, types.int64, types.int64, types.float32), generate


@intrinsic
def fma(typing, x, y, z):
    """The sum x * y + z, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def add_in_any_order(typing, x, y):
    """The sum x + y, which LLVM may regroup, and so take in vectors."""

    def generate(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def bits_of(typing, x):
    """The bits of an fp32 number, as int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def float_of(typing, bits):
    """The fp32 number that has these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


# --- the mirror step: constants and bounds are those of `native/step.cpp`


def _hex(*digits: str) -> list[np.float32]:
    return [np.float32(float.fromhex(one)) for one in digits]


ZERO = np.float32(0)
S0, S1, S2, S3 = _hex("0x1.fffff6p-2", "0x1.555550p-3", "0x1.559498p-5", "0x1.113e1ap-7")
P0, P1, P2 = _hex("0x1.000000p-1", "0x1.555556p-3", "0x1.555480p-5")
P3, P4, P5 = _hex("0x1.11107cp-7", "0x1.6d96b8p-10", "0x1.a1b83ep-13")
SHIFT, LOG2_E = _hex("0x1.8p+23", "0x1.715476p+0")
LN2_HIGH, LN2_LOW = _hex("0x1.62e430p-1", "-0x1.05c610p-29")
SIGN = np.int32(-(2**31))
MAGNITUDE = np.int32(2**31 - 1)
ONE_BITS = np.int32(0x3F800000)

inlined = numba.njit(error_model="numpy", inline="always")


@inlined
def times_exp_small(w, e):
    """The product w * exp(e), |e| at most `SMALL`."""
    p = fma(fma(fma(S3, e, S2), e, S1), e, S0)
    return fma(w, fma(e * e, p, e), w)


@inlined
def times_exp(w, e):
    """The product w * 2^k * exp(r), e = k ln 2 + r: rounded once, and no digit cancels."""
    shifted = fma(e, LOG2_E, SHIFT)
    k = shifted - SHIFT
    r = fma(k, -LN2_LOW, fma(k, -LN2_HIGH, e))
    p = fma(fma(fma(fma(fma(P5, r, P4), r, P3), r, P2), r, P1), r, P0)
    power = np.int32(np.int32(bits_of(shifted) << np.int32(23)) + ONE_BITS)
    scaled = w * float_of(power)
    return fma(scaled, fma(r * r, p, r), scaled)


# --- the loop


SIGNATURE = "void(int64[:,::1], float32[:,::1], int64, int64, float64[:,::1])"


@functools.cache
def compiled(kind: Kind, folder: Path | None) -> Any:
    """The loop of a kind: `loop(rows, numbers, first block, end of blocks, sums of each block)`.

    Args:
        kind: See there.
        folder: Where numba keeps it for later processes; None to keep nothing. It must be private:
            what numba reads from there it trusts.

    Raises:
        CannotBuild: Numba cannot compile it.
    """
    try:
        try:
            return _compile(kind, folder)
        except Exception:  # noqa: BLE001 - a full disk; a file cut short makes numba raise anything
            return _compile(kind, None)
    except NumbaError as error:
        raise CannotBuild(f"numba cannot compile it: {error}") from error


def _compile(kind: Kind, folder: Path | None) -> Any:
    with _cache_in(folder):
        jit = numba.njit(SIGNATURE, error_model="numpy", nogil=True, cache=folder is not None)
        return jit(_make_loop(kind))


@contextlib.contextmanager
def _cache_in(folder: Path | None) -> Iterator[None]:
    """Numba's own setting, which holds for all that is compiled meanwhile."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = before if folder is None else str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def _make_loop(kind: Kind) -> Any:
    base, low, mirrors, is_small, is_masked, is_measured, is_near, is_first, lanes = kind
    is_adam = base in (ADAMW, ADAM)
    is_decoupled = base == ADAMW
    has_momentum = base in (MOMENTUM_SGD, NESTEROV)
    looks_ahead = base == NESTEROV
    is_low = low != FP32
    gradient, rounded = G * 3 + low, ROUNDED * 3 + low
    weight, moment, second, kept_at = W * 3, M * 3, V * 3, MASK * 3

    def step_blocks(rows, numbers, first, last, sums):
        index = 0
        for block in range(first, last):
            while index + 1 < len(rows) and rows[index + 1, FIRST_BLOCK] <= block:
                index += 1
            w_at, g_at, m_at, v_at = rows[index, W], rows[index, G], rows[index, M], rows[index, V]
            mask_at, rounded_at = rows[index, MASK], rows[index, ROUNDED]
            a, b, clamp = numbers[index, A], numbers[index, B], numbers[index, CLAMP]
            decay, lerp = numbers[index, DECAY], numbers[index, LERP]
            beta2, rest2 = numbers[index, BETA2], numbers[index, REST2]
            step_size, correction = numbers[index, STEP_SIZE], numbers[index, CORRECTION]
            eps = numbers[index, EPS]
            begin = (block - rows[index, FIRST_BLOCK]) * BLOCK
            size, moved, clamped, count, greatest = ZERO, 0, 0, 0, np.int32(0)
            end = min(begin + BLOCK, rows[index, NUMEL])
            whole = end - (end - begin) % lanes
            # twice: what fills torch's vectors, and the rest
            for is_rest in (False, True):
                for i in range(whole if is_rest else begin, end if is_rest else whole):
                    w, g = load(weight, w_at, i), load(gradient, g_at, i)
                    m = v = ZERO
                    slope = g
                    if is_decoupled:
                        w = w * decay
                    else:
                        slope = fma(w, decay, g)
                    if is_adam:
                        m, v = load(moment, m_at, i), load(second, v_at, i)
                        m = fma(slope - m, lerp, m if is_near else slope)
                        if is_rest:
                            v = fma(v, beta2, rest2 * slope * slope)
                        else:
                            v = fma(slope, slope * rest2, v * beta2)
                        w = w - step_size * m / (np.sqrt(v) / correction + eps)
                    else:
                        if has_momentum:
                            m = slope
                            if not is_first:
                                m = load(moment, m_at, i)
                                m = fma(m, beta2, slope) if is_rest else m * beta2 + slope
                            slope = fma(m, beta2, slope) if looks_ahead else m
                        w = fma(slope, -step_size, w)
                    kept = True
                    if is_masked:
                        kept = load(kept_at, mask_at, i)
                    if mirrors:
                        along = float_of(bits_of(g) ^ (bits_of(w) & SIGN))
                        e = fma(along, -a, -b)
                        e = clamp if e > clamp else e
                        e = -clamp if e < -clamp else e
                        made = times_exp_small(w, e) if is_small else times_exp(w, e)
                        if is_measured:
                            counts = kept and w != ZERO
                            magnitude = bits_of(e) & MAGNITUDE if counts else np.int32(0)
                            size = add_in_any_order(size, float_of(magnitude))
                            # as integers: order is that of the numbers, and NaN is above all
                            greatest = max(greatest, magnitude)
                            moved += counts and made != w
                            clamped += counts and magnitude >= bits_of(clamp)
                            count += counts
                        w = made
                    if is_masked:
                        w = w if kept else ZERO
                        m = m if kept else ZERO
                    store(weight, w_at, i, w)
                    if is_adam or has_momentum:
                        store(moment, m_at, i, m)
                    if is_adam:
                        store(second, v_at, i, v)
                    if is_low:
                        store(rounded, rounded_at, i, w)
            if is_measured:
                sums[block, 0] = size
                sums[block, 1] = moved
                sums[block, 2] = clamped
                sums[block, 3] = count
                sums[block, 4] = float_of(greatest)

    return step_blocks

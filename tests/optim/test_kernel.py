"""The arithmetic of the Triton kernel without Triton: its own functions, run in rounded fp32."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from hamcli.optim import kernel


class Fp32:
    """Numbers of fp32 that round after every operation, as the kernel's do."""

    def __init__(self, values):
        self.values = np.asarray(values, dtype=np.float32)

    def _with(self, other, operation):
        other = other.values if isinstance(other, Fp32) else np.float32(other)
        return Fp32(operation(self.values, other))

    def __mul__(self, other):
        return self._with(other, np.multiply)

    def __add__(self, other):
        return self._with(other, np.add)

    def __sub__(self, other):
        return self._with(other, np.subtract)

    def __neg__(self):
        return Fp32(-self.values)


def wide(x):
    """In float64: what fp32 holds, constants rounded to it."""
    return (x.values if isinstance(x, Fp32) else np.float32(x)).astype(np.float64)


@pytest.fixture(autouse=True)
def language(monkeypatch):
    """What the kernel takes of Triton's language."""
    language = SimpleNamespace(
        floor=lambda x: Fp32(np.floor(x.values)),
        # the product of two fp32 numbers is exact in float64
        fma=lambda x, y, z: Fp32(wide(x) * wide(y) + wide(z)),
        maximum=lambda x, y: Fp32(np.maximum(x.values, np.float32(y))),
    )
    monkeypatch.setattr(kernel, "tl", language, raising=False)
    for part in kernel.KERNEL_PARTS:  # where Triton has not put its own in their place
        monkeypatch.setattr(kernel, part.__name__, part)
    monkeypatch.setattr(kernel, "_two_to_the", lambda k: Fp32(np.exp2(k.values)))


def exponents(greatest):
    """All binary orders from 2^-30 up, both signs, 2^12 steps in each; up to `greatest`."""
    orders = 2.0 ** np.arange(-30, math.ceil(math.log2(greatest)) + 1)
    grid = np.outer(orders, 1 + np.arange(4096) / 4096).ravel()
    grid = grid[grid <= greatest].astype(np.float32)
    return np.concatenate([grid, -grid])


def parts(x):
    k, p = kernel._exp_parts(Fp32(x))
    return k.values.astype(np.float64), p.values.astype(np.float64)


def test_the_parts_of_the_exponential_are_within_one_ulp_of_it():
    x = exponents(87.0)
    k, p = parts(x)
    exact = np.exp(x.astype(np.float64))
    # the polynomial gives 1 + p to half an ulp of p, and r carries the rounding of its last step
    assert np.max(np.abs(np.exp2(k) * (1 + p) - exact) / exact) < 2.0**-24
    assert np.max(np.abs(p)) < 0.42


def test_small_exponents_keep_their_digits():
    x = exponents(0.125)
    k, p = parts(x)
    exact = np.expm1(x.astype(np.float64))
    assert not k.any()
    # relative to exp(x) - 1 itself: half an ulp for the last sum, and less for what is added to x
    assert np.max(np.abs(p - exact) / np.abs(exact)) < 1.2 * 2.0**-24


def test_the_high_part_of_ln_2_times_a_power_is_exact_and_both_parts_are_ln_2():
    high, low = np.float32(-0.693359375), np.float32(2.12194440e-4)
    source = kernel._exp_parts.__code__.co_consts
    assert {-0.693359375, 2.12194440e-4} <= {one for one in source if isinstance(one, float)}
    # nine bits, so that k * high has at most sixteen for |k| up to 127
    assert float(high) * 2**9 == round(float(high) * 2**9)
    assert abs(float(high) + float(low) + math.log(2)) < 1e-11
    k = np.arange(-127, 128, dtype=np.float32)
    assert np.array_equal((k * high).astype(np.float64), k.astype(np.float64) * float(high))


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999, 0.9999])
def test_one_minus_a_power_has_no_cancellation(beta):
    steps = np.array([1, 2, 3, 10, 100, 1000, 10_000, 1_000_000], dtype=np.float32)
    found = kernel._one_minus_power(Fp32(math.log(beta)), Fp32(steps)).values
    exact = -np.expm1(steps.astype(np.float64) * float(np.float32(math.log(beta))))
    assert np.max(np.abs(found - exact) / exact) < 2.0**-22

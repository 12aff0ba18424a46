"""Bits of magnitudes counted and cut, in C++ and in numpy, against one stable sort in float64."""

import numpy as np
import pytest

from hamcli.native import bits as magnitudes
from hamcli.native.bits import Cut

DTYPES = ["F16", "BF16", "F32", "F64"]
PAIRS = [(one, one) for one in DTYPES] + [("F16", "F32"), ("BF16", "F32"), ("F32", "F64")]


@pytest.fixture(params=["native", "numpy"])
def form(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(magnitudes, "_library", None)
    elif not magnitudes.prepare():
        pytest.skip("no C++ compiler")
    return request.param


def stored(values, dtype):
    """The bits of values in a dtype, as unsigned integers, and their magnitudes in float64."""
    if dtype == "BF16":
        wide = np.asarray(values, np.float32).view(np.uint32)
        bits = (wide >> 16).astype(np.uint16)
        return bits, np.abs((bits.astype(np.uint32) << 16).view(np.float32)).astype(np.float64)
    kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    floats = np.asarray(values).astype(kind)
    bits = floats.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[floats.itemsize]).copy()
    return bits, np.abs(floats).astype(np.float64)


def sample(size=3001):
    generator = np.random.default_rng(0)
    values = generator.standard_normal(size)
    values[::7] = 0.25  # ties
    values[1::7] = -0.25
    values[::11] = 0.0
    values[3::11] = -0.0
    values[5::301] = 1e-7
    values[-1] = 0.0  # behind the last whole group
    return values


def cut_of(bits, dtype, common, count):
    counts = np.zeros(magnitudes.TOP_DIGITS, np.int64)
    zeros = magnitudes.count_top(bits, dtype, common, counts)
    key, left = magnitudes.find_digit(counts, count)
    for place in range(1, magnitudes.digits_of(common)):
        inside = np.zeros(magnitudes.DIGITS, np.int64)
        magnitudes.count_next(bits, dtype, common, place, key, inside)
        digit, left = magnitudes.find_digit(inside, left)
        key = key << 16 | digit
    return zeros, Cut(key, left)


@pytest.mark.parametrize(("dtype", "common"), PAIRS)
@pytest.mark.parametrize("count", [1, 700, 1500, 2999, 3001])
def test_a_cut_drops_what_a_stable_sort_puts_first(form, dtype, common, count):
    bits, sizes = stored(sample(), dtype)
    first = np.argsort(sizes, kind="stable")[:count]
    zeros, cut = cut_of(bits, dtype, common, count)
    assert zeros == np.count_nonzero(sizes == 0)
    assert magnitudes.value_of(cut.key, common) == sizes[first[-1]]
    wanted = bits.copy()
    wanted[first] = 0
    # in two halves, as chunks come
    left = magnitudes.cut_(bits[:1400], dtype, common, cut)
    assert magnitudes.cut_(bits[1400:], dtype, common, Cut(cut.key, left)) == 0
    assert np.array_equal(bits, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "size", "inner"), [(2, 4, 1), (1, 4, 1), (4, 8, 1), (2, 4, 9), (1, 3, 5)])  # fmt: skip # noqa: E501
def test_groups_keep_their_largest_and_drop_the_first_of_equals(form, dtype, kept, size, inner):
    bits, sizes = stored(sample(size * inner * 37), dtype)
    wanted = bits.copy()
    cells, ranked = wanted.reshape(-1, size, inner), sizes.reshape(-1, size, inner)
    order = np.argsort(ranked, axis=1, kind="stable")
    np.put_along_axis(cells, order[:, : size - kept], 0, axis=1)
    cells[ranked == 0] = 0
    magnitudes.keep_n_of_m_(bits, dtype, kept, size, inner)
    assert np.array_equal(bits, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_the_greatest_magnitude(form, dtype):
    bits, sizes = stored(sample(70_001), dtype)
    zeros, greatest = magnitudes.count_zeros(bits, dtype)
    assert zeros == np.count_nonzero(sizes == 0)
    assert magnitudes.value_of(greatest, dtype) == sizes.max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_has_a_digit_of_its_own(form, dtype):
    for value, is_finite in ((65504.0, True), (np.inf, False), (np.nan, False)):
        bits, _ = stored([value], dtype)
        counts = np.zeros(magnitudes.TOP_DIGITS, np.int64)
        magnitudes.count_top(bits, dtype, dtype, counts)
        assert counts[magnitudes.infinite_digit(dtype) :].any() != is_finite


def test_common_dtype_holds_all_exactly():
    assert magnitudes.common_dtype({"BF16"}) == "BF16"
    assert magnitudes.common_dtype({"BF16", "F16"}) == "F32"
    assert magnitudes.common_dtype({"F32", "F64", "F16"}) == "F64"

"""Magnitudes of weights as bits: counts of their digits, cuts and N:M in place; without torch.

A weight's magnitude is its bits without the sign, an unsigned integer; of floats of one dtype, bit
order is value order. Where dtypes differ, the magnitudes are those of their common dtype. The C++
of `plain` does it where a process has asked for it with `prepare`, numpy where not.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hamcli.native import plain

Bits = npt.NDArray[Any]
"""Unsigned integers of the width of the weights, flat, which may be written."""
Counts = npt.NDArray[np.int64]

TOP_DIGITS = 1 << 15
DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS

_UNSIGNED = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32, "F64": np.uint64}
_WIDTHS = {"F16": 16, "BF16": 16, "F32": 32, "F64": 64}
_INFINITE = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80, "F64": 0x7FF0}
_ROWS = 1 << 18  # elements of which numpy makes keys at a time

_library: ctypes.CDLL | None = None


def prepare() -> bool:
    """Use the C++ library from now on, building it if need be; whether it is there."""
    global _library
    _library = plain.load_bits()
    return _library is not None


def common_dtype(dtypes: set[str]) -> str:
    """The dtype in which magnitudes of several compare exactly."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "F64" if "F64" in dtypes else "F32"


def infinite_digit(dtype: str) -> int:
    """The first digit from which magnitudes are not finite."""
    return _INFINITE[dtype]


def digits_of(dtype: str) -> int:
    """How many digits a magnitude has, the first of 15 bits and the others of 16."""
    return _WIDTHS[dtype] // DIGIT_BITS


@dataclass(frozen=True, slots=True)
class Cut:
    """What goes: magnitudes below `key`, and the first `ties` of those at it."""

    key: int
    ties: int


def value_of(key: int, dtype: str) -> float:
    """The magnitude that a key stands for."""
    bits = np.array([key], dtype=_UNSIGNED[dtype])
    return float(_floats(bits, dtype)[0])


def count_top(bits: Bits, dtype: str, common: str, counts: Counts) -> int:
    """Add to `counts` how often each first digit occurs; the number of zeros.

    Args:
        bits: Weights of `dtype`.
        dtype: As safetensors spells it.
        common: From `common_dtype`.
        counts: `TOP_DIGITS` of them.
    """
    if _library is not None and dtype == common and bits.itemsize < 8:
        count = getattr(_library, f"ham_count_top_{8 * bits.itemsize}")
        return int(count(*_span(bits), _address(counts)))
    zeros = 0
    shift = _WIDTHS[common] - DIGIT_BITS
    for part in _parts(bits):
        keys = _keys(part, dtype, common)
        zeros += keys.size - int(np.count_nonzero(keys))
        counts += np.bincount((keys >> shift).astype(np.int64), minlength=TOP_DIGITS)
    return zeros


def count_next(bits: Bits, dtype: str, common: str, place: int, begins: int, into: Counts) -> None:
    """Add to `into` how often each digit occurs at `place` among magnitudes that begin so.

    Args:
        bits: Weights of `dtype`.
        dtype: As safetensors spells it.
        common: From `common_dtype`.
        place: 1 for the digit after the first.
        begins: All digits before it, as one number.
        into: `DIGITS` of them.
    """
    if _library is not None and dtype == common == "F32":
        _library.ham_count_low_32(*_span(bits), ctypes.c_uint32(begins), _address(into))
        return
    shift = _WIDTHS[common] - DIGIT_BITS * (place + 1)
    for part in _parts(bits):
        keys = _keys(part, dtype, common)
        inside = keys[keys >> (shift + DIGIT_BITS) == begins]
        into += np.bincount(((inside >> shift) & (DIGITS - 1)).astype(np.int64), minlength=DIGITS)


def count_zeros(bits: Bits, dtype: str) -> tuple[int, int]:
    """How many weights are zero, and the greatest magnitude's key."""
    if _library is not None and bits.itemsize < 8:
        greatest = ctypes.c_uint64()
        count = getattr(_library, f"ham_zeros_{8 * bits.itemsize}")
        return int(count(*_span(bits), ctypes.byref(greatest))), greatest.value
    keys = _keys(bits, dtype, dtype)
    return keys.size - int(np.count_nonzero(keys)), int(keys.max(initial=0))


def cut_(bits: Bits, dtype: str, common: str, cut: Cut) -> int:
    """Zero, in place, what the cut drops; the ties left over for the weights that follow."""
    if _library is not None and dtype == common and bits.itemsize < 8:
        drop = getattr(_library, f"ham_cut_{8 * bits.itemsize}")
        key = (ctypes.c_uint16 if bits.itemsize == 2 else ctypes.c_uint32)(cut.key)
        return int(drop(*_span(bits), key, ctypes.c_int64(cut.ties)))
    ties = cut.ties
    for part in _parts(bits):
        keys = _keys(part, dtype, common)
        drop = keys < cut.key
        if ties:
            tied = np.flatnonzero(keys == cut.key)[:ties]
            drop[tied] = True
            ties -= len(tied)
        part[drop] = 0
    return ties


def keep_n_of_m_(bits: Bits, dtype: str, kept: int, size: int, inner: int) -> None:
    """Of each `size` weights at a distance of `inner`, zero, in place, all but the `kept` largest.

    Of equal ones the first go; what is zero already becomes a plain zero.
    """
    groups = bits.size // (size * inner)
    if _library is not None and bits.itemsize < 8:
        keep = getattr(_library, f"ham_n_of_m_{8 * bits.itemsize}")
        keep(_address(bits), *map(ctypes.c_int64, (groups, size, inner, kept)))
        return
    cells = bits.reshape(groups, size, inner)
    for start in range(0, groups, max(1, _ROWS // (size * inner))):
        part = cells[start : start + max(1, _ROWS // (size * inner))]
        keys = _keys(part, dtype, dtype)
        order = keys.argsort(axis=1, kind="stable")[:, : size - kept]
        np.put_along_axis(part, order, 0, axis=1)
        part[keys == 0] = 0


def find_digit(counts: Counts, rank: int) -> tuple[int, int]:
    """The digit that holds the weight of this rank (from 1), and the rank inside that digit."""
    reached = np.cumsum(counts)
    assert 1 <= rank <= reached[-1], "more zeros asked for than there are weights"
    digit = int(np.searchsorted(reached, rank))
    return digit, rank - (int(reached[digit - 1]) if digit else 0)


def _parts(bits: Bits) -> list[Bits]:
    return [bits[start : start + _ROWS] for start in range(0, bits.size, _ROWS)]


def _keys(bits: Bits, dtype: str, common: str) -> Bits:
    """Magnitudes in the common dtype."""
    if dtype != common:
        floats = _floats(bits, dtype)
        wide = np.float64 if common == "F64" else np.float32
        bits = floats.astype(wide).view(_UNSIGNED[common])
    keys: Bits = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return keys


def _floats(bits: Bits, dtype: str) -> npt.NDArray[Any]:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


def _span(bits: Bits) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return _address(bits), ctypes.c_int64(bits.size)


def _address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.__array_interface__["data"][0])

"""How many weights a target means, on the number that a person wrote; imports no torch."""

from fractions import Fraction


def exact(fraction: float) -> Fraction:
    """The number a person wrote: 0.9 is nine tenths, not the double nearest to them."""
    return Fraction(repr(float(fraction)))


def num_zeros(target: float, total: int) -> int:
    """round(target * total), half to even, computed on the decimal that was written.

    Args:
        target: Sparsity, 0 to 1.
        total: Number of weights.
    """
    return min(max(round(exact(target) * total), 0), total)

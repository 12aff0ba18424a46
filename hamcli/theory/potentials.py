"""The functions that HAM minimises without being told to, elementwise in float64.

    R(w)   = ((1 + alpha |w|) log(1 + alpha |w|) - alpha |w|) / alpha^2    potential of the flow
    R'(w)  = sign(w) log(1 + alpha |w|) / alpha
    R''(w) = 1 / (1 + alpha |w|)
    M(w)   = |w| / alpha - log(1 + alpha |w|) / alpha^2                    what beta adds
    M'(w)  = w / (1 + alpha |w|)
    M''(w) = 1 / (1 + alpha |w|)^2

Both tend to w^2 / 2 as alpha -> 0, and at alpha = 0 are just that; for large alpha R grows as
|w| log|w|, M as |w| / alpha: from L2 towards L1. Theorem 4.2 of arXiv 2506.02630.
"""

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def potential(weights: Vector, alpha: float) -> Vector:
    """R(w) of each weight."""
    size = np.abs(weights)
    if alpha == 0:
        return size**2 / 2
    return ((1 + alpha * size) * np.log1p(alpha * size) - alpha * size) / alpha**2


def mirrored(weights: Vector, alpha: float) -> Vector:
    """R'(w) of each weight: the coordinates in which the flow is plain gradient descent."""
    if alpha == 0:
        return weights.copy()
    return np.sign(weights) * np.log1p(alpha * np.abs(weights)) / alpha


def metric(weights: Vector, alpha: float) -> Vector:
    """R''(w) of each weight, between 0 and 1."""
    return 1 / (1 + alpha * np.abs(weights))


def penalty(weights: Vector, alpha: float) -> Vector:
    """M(w) of each weight."""
    size = np.abs(weights)
    if alpha == 0:
        return size**2 / 2
    return size / alpha - np.log1p(alpha * size) / alpha**2


def penalty_slope(weights: Vector, alpha: float) -> Vector:
    """M'(w) of each weight."""
    return weights / (1 + alpha * np.abs(weights))

"""Where HAM should end, and when: by SciPy from the convex problems and the flow, no step in here.

Every solution is checked by its own gradient, so that a solver that stopped early cannot pass
for an answer.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hamcli.errors import UsageError
from hamcli.theory import potentials
from hamcli.theory.potentials import Vector

GRADIENT_LIMIT = 1e-6  # of the solver's last point, relative to the first
ATTEMPTS = 2000  # iterations

Matrix = NDArray[np.float64]


def require_scipy() -> None:
    """Refuse to begin where SciPy is missing.

    Raises:
        UsageError: SciPy is not installed.
    """
    try:
        import scipy.optimize  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise UsageError(
            "E120", "SciPy is not installed", "ham theory", "", 'pip install "hamcli[theory]"'
        ) from error


def bregman_minimiser(features: Matrix, labels: Vector, start: Vector, alpha: float) -> Vector:
    """Argmin D_R(w, start) over the w with features @ w = labels.

    A trust-region Newton method on the null space of the features, where the problem has no
    constraint left. D_R(w, v) = R(w) - R(v) - R'(v) (w - v), summed; `potentials` has R.

    Args:
        features: [rows, weights], fewer rows than weights, of full rank.
        labels: [rows].
        start: [weights], where the descent began.
        alpha: HAM's; 0 gives the nearest point in L2.
    """
    from scipy.linalg import null_space

    free: Matrix = null_space(features)  # [weights, weights - rows], orthonormal columns
    fitted = np.linalg.lstsq(features, labels, rcond=None)[0]
    pull = potentials.mirrored(start, alpha)

    def divergence(point: Vector) -> float:
        weights = fitted + free @ point
        return float(np.sum(potentials.potential(weights, alpha) - pull * weights))

    def slope(point: Vector) -> Vector:
        moved: Vector = free.T @ (potentials.mirrored(fitted + free @ point, alpha) - pull)
        return moved

    def curvature(point: Vector) -> Matrix:
        shaped: Matrix = (free.T * potentials.metric(fitted + free @ point, alpha)) @ free
        return shaped

    found = _minimised(divergence, slope, curvature, free.T @ (start - fitted))
    solution: Vector = fitted + free @ found
    return solution


def stationary_point(
    features: Matrix, labels: Vector, alpha: float, beta: float, start: Vector | None = None
) -> Vector:
    """Argmin |features @ w - labels|^2 / 2 + beta * sum M(w), by a trust-region Newton method.

    Args:
        features: [rows, weights].
        labels: [rows].
        alpha: HAM's; 0 is ridge regression.
        beta: HAM's, above 0: the minimum is then the only stationary point.
        start: [weights], where the solver begins; the answer does not depend on it.
    """
    gram = features.T @ features

    def objective(weights: Vector) -> float:
        error = features @ weights - labels
        return float(error @ error / 2 + beta * np.sum(potentials.penalty(weights, alpha)))

    def slope(weights: Vector) -> Vector:
        pull = beta * potentials.penalty_slope(weights, alpha)
        return features.T @ (features @ weights - labels) + pull

    def curvature(weights: Vector) -> Matrix:
        return gram + beta * np.diag(potentials.metric(weights, alpha) ** 2)

    begin = np.zeros(features.shape[1]) if start is None else start
    return _minimised(objective, slope, curvature, begin)


def ridge(features: Matrix, labels: Vector, weight: float) -> Vector:
    """Argmin |features @ w - labels|^2 / 2 + weight * |w|^2 / 2, in closed form."""
    gram = features.T @ features
    found = np.linalg.solve(gram + weight * np.eye(len(gram)), features.T @ labels)
    return np.asarray(found, dtype=np.float64)


def lasso(features: Matrix, labels: Vector, weight: float) -> Vector:
    """Argmin |features @ w - labels|^2 / 2 + weight * |w|_1.

    As a smooth problem with bounds, w = p - q with p, q >= 0, by L-BFGS-B.
    """
    from scipy.optimize import minimize

    count = features.shape[1]

    def objective(parts: Vector) -> tuple[float, Vector]:
        error = features @ (parts[:count] - parts[count:]) - labels
        slope = features.T @ error
        value = float(error @ error / 2 + weight * parts.sum())
        return value, np.concatenate([slope + weight, weight - slope])

    found = minimize(
        objective,
        np.zeros(2 * count),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * (2 * count),
        options={"ftol": 0.0, "gtol": 1e-9 * weight, "maxiter": 20 * ATTEMPTS, "maxfun": 10**6},
    )
    weights: Vector = found.x[:count] - found.x[count:]
    slope = features.T @ (features @ weights - labels)
    excess = np.where(
        weights == 0, np.abs(slope) - weight, np.abs(slope + weight * np.sign(weights))
    )
    assert float(excess.max()) <= 1e-5 * weight, "the lasso was not solved"
    return weights


def crossing_time(start: float, target: float, alpha: float) -> float:
    """Time at which the flow dw = -(1 + alpha |w|) (w - target) dt from `start` < 0 is at zero.

    The integral of dw / speed, by SciPy's quadrature; arXiv 2506.02630, Theorem 4.2 for one weight.
    """
    from scipy.integrate import quad

    def slowness(size: float) -> float:
        return 1 / ((target + size) * (1 + alpha * size))

    return float(quad(slowness, 0.0, -start, epsabs=0.0, epsrel=1e-10)[0])


def _minimised(
    value: Callable[[Vector], float],
    slope: Callable[[Vector], Vector],
    curvature: Callable[[Vector], Matrix],
    start: Vector,
) -> Vector:
    from scipy.optimize import minimize

    first = float(np.linalg.norm(slope(start)))
    limit = GRADIENT_LIMIT * max(first, 1e-12)
    options: dict[str, Any] = {"gtol": limit / 100, "maxiter": ATTEMPTS}
    found = minimize(value, start, jac=slope, hess=curvature, method="trust-exact", options=options)
    point: Vector = found.x
    # its own verdict is no help: below the last digit of the value it gives up, though it is there
    assert float(np.linalg.norm(slope(point))) <= max(limit, 1e-12), "the solver stopped early"
    return point

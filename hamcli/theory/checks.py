"""The four checks: run HAM, run the reference, compare.

    bregman    with beta = 0 HAM interpolates at argmin D_R(w, start), and R'(w) - R'(start) lies in
               the row space of the features
    path       with beta > 0 it stops at the minimum of loss + beta * M, which goes from ridge
               regression (alpha -> 0) to the lasso (alpha -> infinity)
    flip       a weight crosses zero sooner the larger alpha; a balanced m * w never does
    recovery   the larger alpha, the better a sparse truth is found from fewer rows than weights

All by arXiv 2506.02630; `potentials` has R and M.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from hamcli.theory import potentials, references
from hamcli.theory.descent import (
    MakeOptimizer,
    Trail,
    cross_zero,
    cross_zero_factored,
    descend,
    ham_sgd,
)
from hamcli.theory.potentials import Vector
from hamcli.theory.records import Check, Curve, Plot, Results, claim
from hamcli.theory.references import Matrix

DISTANCE_LIMIT = 1e-3  # to the Bregman minimiser, and of the row-space residual
PATH_LIMIT = 2e-2  # to the stationary point, to ridge and to the lasso
FLIP_LIMIT = 1e-2  # of a crossing time, relative
ERROR_LIMIT = 0.05  # recovery at the largest alpha
LASSO_WEIGHT = 0.05  # of |w|_1 at the end of the path
START_SIZE = 0.1  # standard deviation of the weights where the Bregman descents begin
FLIP_START, FLIP_TARGET = -0.1, 1.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the problems are.

    Attributes:
        rows: Of the least-squares problem.
        weights: Of it; more than rows.
        nonzero: Of the truth.
        bregman: Alphas of the first check.
        path: Alphas of the second, the first 0, the last large enough to stand for infinity.
        flip: Alphas of the third.
        recovery: Alphas of the fourth, the first 0.
    """

    rows: int = 120
    weights: int = 300
    nonzero: int = 10
    bregman: tuple[float, ...] = (1, 10, 100)
    path: tuple[float, ...] = (0, 0.1, 1, 10, 100, 1e3, 1e4)
    flip: tuple[float, ...] = (10, 100, 200)
    recovery: tuple[float, ...] = (0, 1, 10, 100, 1e3, 1e4)


@dataclass(frozen=True, slots=True)
class Problem:
    """Least squares with fewer rows than weights, and the sparse weights that made the labels."""

    features: Matrix  # [rows, weights], normal with variance 1 / rows
    labels: Vector  # [rows], without noise
    truth: Vector = field(repr=False)  # [weights]


def make_problem(sizes: Sizes, seed: int) -> Problem:
    """A random problem whose truth has `nonzero` weights of size 0.5 to 1.5 and either sign."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((sizes.rows, sizes.weights)) / np.sqrt(sizes.rows)
    truth = np.zeros(sizes.weights)
    chosen = random.choice(sizes.weights, sizes.nonzero, replace=False)
    truth[chosen] = random.choice([-1.0, 1.0], sizes.nonzero) * random.uniform(
        0.5, 1.5, sizes.nonzero
    )
    return Problem(features, features @ truth, truth)


def run_checks(
    seed: int = 0,
    *,
    sizes: Sizes | None = None,
    make: MakeOptimizer = ham_sgd,
    stage: Callable[[str], None] = lambda text: None,
) -> Results:
    """Run all four checks.

    Args:
        seed: Of the random problem; the third check has none.
        sizes: How large the problems are.
        make: Makes the optimizer under test.
        stage: Told what begins.

    Raises:
        UsageError: SciPy is not installed.
    """
    references.require_scipy()
    sizes = sizes or Sizes()
    problem = make_problem(sizes, seed)
    stage("Bregman minimiser")
    bregman = check_bregman(problem, sizes, seed, make)
    stage("path from L2 to L1")
    path = check_path(problem, sizes, make)
    stage("sign flip")
    flip = check_flip(sizes, make)
    stage("recovery")
    recovery = check_recovery(problem, sizes, make)
    return Results(seed, (bregman, path, flip, recovery))


def check_bregman(
    problem: Problem, sizes: Sizes, seed: int, make: MakeOptimizer = ham_sgd
) -> Check:
    """HAM with beta = 0 ends at the Bregman minimiser, and its mirrored move is in the row space.

    Args:
        problem: What to fit.
        sizes: Which alphas.
        seed: Of the weights where the descents begin.
        make: Makes the optimizer under test.
    """
    random = np.random.default_rng([seed, 1])
    start = START_SIZE * random.standard_normal(len(problem.truth))
    rows, curves = [], []
    for alpha, style in zip(sizes.bregman, _shades(len(sizes.bregman)), strict=True):
        trail, solution = _descent_and_minimiser(problem, start, alpha, make, 3e-3, 3e-5)
        moved = potentials.mirrored(trail.weights, alpha) - potentials.mirrored(start, alpha)
        residual = _outside_rows(problem.features, moved)
        rows.append((alpha, _distance(trail.weights, solution), residual, trail.steps[-1]))
        curves.append(_approach(trail, solution, f"α = {alpha:g}", style))
    worst, residual = (_max([row[index] for row in rows]) for index in (1, 2))
    return Check(
        "bregman",
        "With β = 0 HAM ends at the Bregman minimiser",
        (
            claim("distance to the Bregman minimiser, largest", worst, DISTANCE_LIMIT),
            claim("part of R'(w) − R'(w₀) outside the row space", residual, DISTANCE_LIMIT),
        ),
        ("α", "distance", "outside rows", "steps"),
        tuple(rows),
        Plot(
            "Distance to the Bregman minimiser",
            "step",
            "relative distance",
            tuple(curves),
            log_x=True,
            log_y=True,
            level=(DISTANCE_LIMIT, "limit"),
        ),
    )


def check_path(problem: Problem, sizes: Sizes, make: MakeOptimizer = ham_sgd) -> Check:
    """HAM with beta > 0 stops at the minimum of loss + beta * M, from ridge to lasso.

    beta = LASSO_WEIGHT * (1 + alpha) holds the pull on weights of size one about the same.

    Args:
        problem: What to fit.
        sizes: Which alphas.
        make: Makes the optimizer under test.
    """
    ridge = references.ridge(problem.features, problem.labels, LASSO_WEIGHT)
    lasso = references.lasso(problem.features, problem.labels, LASSO_WEIGHT)
    rows = []
    for alpha in sizes.path:
        beta = LASSO_WEIGHT * (1 + alpha)
        found = descend(
            problem.features,
            problem.labels,
            np.zeros_like(problem.truth),
            alpha=alpha,
            beta=beta,
            exponent_limit=1e-2,
            tolerance=2e-4,
            stability=0.5,
            make=make,
        ).weights
        solution = references.stationary_point(problem.features, problem.labels, alpha, beta)
        near_zero = float(np.mean(np.abs(found) < 1e-3))
        distances = [_distance(found, point) for point in (solution, ridge, lasso)]
        rows.append((alpha, beta, *distances, near_zero))
    shown = [row for row in rows if row[0] > 0]
    lines = (("stationary point", 2, "first"), ("ridge", 3, "second"), ("lasso", 4, "third"))
    return Check(
        "path",
        "With β > 0 HAM stops at the minimum of L + β·M, on a path from L2 to L1",
        (
            claim(
                "distance to the minimum of L + β·M, largest",
                _max([row[2] for row in rows]),
                PATH_LIMIT,
            ),
            claim(f"distance to ridge at α = {rows[0][0]:g}", rows[0][3], PATH_LIMIT),
            claim(f"distance to the lasso at α = {rows[-1][0]:g}", rows[-1][4], PATH_LIMIT),
        ),
        ("α", "β", "to minimum", "to ridge", "to lasso", "|w| < 1e-3"),
        tuple(rows),
        Plot(
            "Distance from where HAM stops",
            "α",
            "relative distance",
            tuple(
                Curve(
                    f"to the {label}" if label != "ridge" else "to ridge",
                    tuple(row[0] for row in shown),
                    tuple(row[index] for row in shown),
                    style,
                    marked=True,
                )
                for label, index, style in lines
            ),
            log_x=True,
            log_y=True,
            level=(PATH_LIMIT, "limit"),
        ),
    )


def check_flip(sizes: Sizes, make: MakeOptimizer = ham_sgd) -> Check:
    """A weight on the wrong side of zero crosses it at the flow's time, which falls with alpha.

    Args:
        sizes: Which alphas.
        make: Makes the optimizer under test.
    """
    lr, until = 1e-4, 0.12
    rows: list[tuple[float | str | None, ...]] = []
    curves, deviations, times = [], [], []
    styles = ("quiet", *_shades(len(sizes.flip)))
    for alpha, style in zip((0.0, *sizes.flip), styles, strict=True):
        path, time = cross_zero(FLIP_START, FLIP_TARGET, alpha=alpha, lr=lr, until=until, make=make)
        exact = references.crossing_time(FLIP_START, FLIP_TARGET, alpha)
        label = f"HAM, α = {alpha:g}" if alpha else "gradient flow"
        times.append(np.nan if time is None else time)
        deviations.append(abs(times[-1] / exact - 1))
        rows.append((label, time, exact))
        curves.append(_path(path, lr, label, style, shown=until))
    factored_lr, factored_until = 1e-3, 20 * until
    path, time = cross_zero_factored(FLIP_START, FLIP_TARGET, lr=factored_lr, until=factored_until)
    rows.append(("m ⊙ w, balanced", time, "never"))
    curves.append(_path(path, factored_lr, "m ⊙ w, balanced", "second", shown=until))
    return Check(
        "flip",
        "A weight crosses zero sooner with HAM, and never as a balanced product m ⊙ w",
        (
            claim(
                "crossing time against the flow's, relative, largest", _max(deviations), FLIP_LIMIT
            ),
            claim(
                f"times sooner than gradient flow at α = {sizes.flip[-1]:g}",
                times[0] / times[-1],
                5.0,
                "at least",
            ),
            claim(f"greatest m ⊙ w up to time {factored_until:g}", float(path.max()), 0.0),
        ),
        ("from −0.1 towards 1", "crosses at", "flow"),
        tuple(rows),
        Plot(
            "A weight on its way from −0.1 to 1",
            "time, in units of the flow",
            "weight",
            tuple(curves),
            level=(0.0, ""),
        ),
    )


def check_recovery(problem: Problem, sizes: Sizes, make: MakeOptimizer = ham_sgd) -> Check:
    """From zero, HAM finds a sparse truth the better the larger alpha; as the convex problem says.

    Args:
        problem: What to fit.
        sizes: Which alphas.
        make: Makes the optimizer under test.
    """
    zero = np.zeros_like(problem.truth)
    rows = []
    for alpha in sizes.recovery:
        trail, solution = _descent_and_minimiser(problem, zero, alpha, make, 1e-2, 1e-4)
        error, convex = (_distance(point, problem.truth) for point in (trail.weights, solution))
        rows.append((alpha, error, convex, trail.steps[-1]))
    errors = [row[1] for row in rows]
    ratios = [after / before for before, after in pairwise(errors)]
    shown = [row for row in rows if row[0] > 0]
    alphas = tuple(row[0] for row in shown)
    return Check(
        "recovery",
        "The larger α, the better HAM finds a sparse truth",
        (
            claim("error over the error at the α before, largest", _max(ratios), 0.99),
            claim(f"error at α = {alphas[-1]:g}", errors[-1], ERROR_LIMIT),
            claim(
                "error against the convex solution's, largest difference",
                _max([abs(row[1] - row[2]) for row in rows]),
                DISTANCE_LIMIT,
            ),
        ),
        ("α", "error", "convex", "steps"),
        tuple(rows),
        Plot(
            "Error of the recovered weights",
            "α",
            "relative error",
            (
                Curve("HAM", alphas, tuple(row[1] for row in shown), "first", marked=True),
                Curve(
                    "convex solution",
                    alphas,
                    tuple(row[2] for row in shown),
                    "second",
                    hollow=True,
                ),
            ),
            log_x=True,
            level=(errors[0], "gradient descent"),
        ),
    )


def _distance(found: Vector, solution: Vector) -> float:
    return float(np.linalg.norm(found - solution) / np.linalg.norm(solution))


def _max(values: list[float]) -> float:
    """The largest, or NaN where one is: max() would hide it."""
    return float(np.max(values))


def _descent_and_minimiser(
    problem: Problem,
    start: Vector,
    alpha: float,
    make: MakeOptimizer,
    exponent_limit: float,
    tolerance: float,
) -> tuple[Trail, Vector]:
    """Where HAM goes from `start` with beta = 0, and where the convex problem says it ends."""
    trail = descend(
        problem.features,
        problem.labels,
        start,
        alpha=alpha,
        exponent_limit=exponent_limit,
        tolerance=tolerance,
        make=make,
    )
    return trail, references.bregman_minimiser(problem.features, problem.labels, start, alpha)


def _outside_rows(features: Matrix, moved: Vector) -> float:
    """Share of the norm of `moved` that no combination of the features' rows gives."""
    inside = features.T @ np.linalg.lstsq(features.T, moved, rcond=None)[0]
    return float(np.linalg.norm(moved - inside) / np.linalg.norm(moved))


def _shades(count: int) -> tuple[str, ...]:
    """Styles for growing alphas, the deepest for the largest."""
    return ("pale", "middle", "first")[-count:]


def _approach(trail: Trail, solution: Vector, label: str, style: str) -> Curve:
    distances = tuple(_distance(point, solution) for point in trail.points)
    return Curve(label, tuple(map(float, trail.steps)), distances, style)


def _path(path: Vector, lr: float, label: str, style: str, *, shown: float) -> Curve:
    """The weight over time, up to as far beyond zero as it began below it."""
    count = round(shown / lr) + 1
    kept = [step for step in range(0, count, max(1, count // 400)) if path[step] <= -FLIP_START]
    return Curve(label, tuple(lr * step for step in kept), tuple(path[kept]), style)

"""The references against closed forms and conditions of optimality, which know no solver."""

import sys

import numpy as np
import pytest

from hamcli.errors import UsageError
from hamcli.theory import potentials, references


def problem(seed=0, rows=12, weights=30):
    random = np.random.default_rng(seed)
    features = random.standard_normal((rows, weights)) / np.sqrt(rows)
    return features, random.standard_normal(rows), 0.1 * random.standard_normal(weights)


@pytest.mark.parametrize("alpha", [0.0, 1e-4, 1.0, 200.0])
def test_derivatives_are_those_of_the_functions(alpha):
    weights, step = np.array([-2.0, -0.3, -0.01, 0.02, 0.5, 3.0]), 1e-6
    for function, slope in (
        (potentials.potential, potentials.mirrored),
        (potentials.penalty, potentials.penalty_slope),
        (potentials.mirrored, potentials.metric),
    ):
        ahead, behind = function(weights + step, alpha), function(weights - step, alpha)
        # alpha = 1e-4 takes differences of nearly equal numbers: eight digits lost of sixteen
        assert (ahead - behind) / (2 * step) == pytest.approx(
            slope(weights, alpha), rel=1e-2 if alpha == 1e-4 else 1e-6
        )


def test_bregman_minimiser_at_alpha_0_is_the_nearest_point():
    features, labels, start = problem()
    nearest = start + np.linalg.pinv(features) @ (labels - features @ start)
    assert references.bregman_minimiser(features, labels, start, 0.0) == pytest.approx(
        nearest, abs=1e-9
    )


@pytest.mark.parametrize("alpha", [1.0, 100.0, 1e4])
def test_bregman_minimiser_interpolates_and_moves_in_the_row_space(alpha):
    features, labels, start = problem()
    found = references.bregman_minimiser(features, labels, start, alpha)
    assert features @ found == pytest.approx(labels, abs=1e-9)
    moved = potentials.mirrored(found, alpha) - potentials.mirrored(start, alpha)
    inside = np.linalg.pinv(features) @ (features @ moved)
    assert np.linalg.norm(moved - inside) <= 1e-6 * np.linalg.norm(moved)


@pytest.mark.parametrize("alpha", [0.0, 3.0, 1e3])
def test_stationary_point_is_one_from_any_start(alpha):
    features, labels, start = problem()
    found = references.stationary_point(features, labels, alpha, 0.5)
    slope = features.T @ (features @ found - labels) + 0.5 * found / (1 + alpha * np.abs(found))
    assert np.abs(slope).max() < 1e-5
    again = references.stationary_point(features, labels, alpha, 0.5, start=10 * start)
    assert again == pytest.approx(found, abs=1e-4)


def test_stationary_point_at_alpha_0_is_ridge():
    features, labels, _ = problem()
    assert references.stationary_point(features, labels, 0.0, 0.3) == pytest.approx(
        references.ridge(features, labels, 0.3), abs=1e-6
    )


def test_lasso_of_an_orthonormal_problem_is_the_soft_threshold():
    labels = np.array([3.0, -2.0, 0.4, -0.1])
    found = references.lasso(np.eye(4), labels, 0.5)
    assert found == pytest.approx([2.5, -1.5, 0.0, 0.0], abs=1e-5)
    assert (found[2:] == 0).all()


@pytest.mark.parametrize(
    ("alpha", "time"), [(0, 0.0953), (10, 0.0664), (100, 0.0233), (200, 0.0148)]
)
def test_crossing_time_is_the_closed_form(alpha, time):
    exact = np.log((1 + 0.1 * alpha) / 1.1) / (alpha - 1)
    assert references.crossing_time(-0.1, 1.0, alpha) == pytest.approx(exact, rel=1e-9)
    assert exact == pytest.approx(time, abs=5e-5)


def test_a_solver_that_stops_early_is_no_answer(monkeypatch):
    monkeypatch.setattr(references, "ATTEMPTS", 1)
    with pytest.raises(AssertionError, match="early"):
        references.bregman_minimiser(*problem(), 1e4)


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UsageError) as caught:
        references.require_scipy()
    assert caught.value.line() == (
        'ham: error[HAM-E120]: SciPy is not installed: ham theory (pip install "hamcli[theory]")'
    )

"""Means, standard errors, pairs and the choice of a learning rate, against numpy and by hand."""

import numpy as np
import pytest

from hamcli.comparison.grid import Arm, Cell, Grid
from hamcli.comparison.records import Outcome, Row
from hamcli.comparison.summary import means, pairs, spread
from hamcli.comparison.tuning import choose, learning_rates

SEEDS = (3, 1, 4, 5)
GRID = Grid(("gradual", "rigl"), (0.9, 0.95), SEEDS)


def row(method, ham, target, seed, value, loss=None, *, lr=1e-3, higher=True):
    status = "diverged" if value is None else "done"
    outcome = Outcome(status, metric="m", higher_is_better=higher, value=value, loss=loss)
    return Row(Cell(Arm(method, ham), target, seed, lr), "key", outcome)


def rows_of(values, losses, higher=True):
    """Rows of a whole grid from arrays [method, ham, target, seed]."""
    return [
        row(method, bool(h), target, seed, values[m, h, t, s], losses[m, h, t, s], higher=higher)
        for m, method in enumerate(GRID.methods)
        for h in (0, 1)
        for t, target in enumerate(GRID.targets)
        for s, seed in enumerate(SEEDS)
    ]


@pytest.mark.parametrize("higher", [True, False])
def test_pairs_and_means_are_those_of_numpy(higher):
    draw = np.random.default_rng(0)
    values, losses = draw.normal(size=(2, 2, 2, 2, 4))
    rows = rows_of(values, losses, higher)
    draw.shuffle(rows)  # a pair is made by its seed, not by its place
    difference = values[:, 1] - values[:, 0]
    found = pairs(GRID, rows)
    assert [(one.method, one.target) for one in found] == [
        ("gradual", 0.9), ("gradual", 0.95), ("rigl", 0.9), ("rigl", 0.95),
    ]  # fmt: skip
    got = [(one.value.mean, one.value.standard_error, one.gain) for one in found]
    mean = difference.mean(-1).ravel()
    error = difference.std(-1, ddof=1).ravel() / np.sqrt(4)
    assert np.allclose(got, np.stack([mean, error, mean if higher else -mean], 1), rtol=1e-12)
    loss = (losses[:, 1] - losses[:, 0]).mean(-1).ravel()
    assert np.allclose([one.loss.mean for one in found], loss, rtol=1e-12)
    for one in means(GRID, rows):
        inner = values[GRID.methods.index(one.arm.method), int(one.arm.ham)]
        assert one.value.mean == pytest.approx(inner[GRID.targets.index(one.target)].mean())


def test_a_lost_seed_drops_out_of_both_sides_of_its_pair_only():
    grid = Grid(("gradual",), (0.9,), (0, 1, 2))
    off, on = [1.0, 2.0, 4.0], [2.0, None, 7.0]
    rows = [row("gradual", False, 0.9, seed, value) for seed, value in enumerate(off)]
    rows += [row("gradual", True, 0.9, seed, value) for seed, value in enumerate(on)]
    (pair,) = pairs(grid, rows)
    assert (pair.value.mean, pair.value.standard_error, pair.value.n) == (2.0, 1.0, 2)
    assert pair.lost == 1
    plain, ham = means(grid, rows)
    assert (plain.value.n, plain.lost, plain.value.mean) == (3, 0, pytest.approx(7 / 3))
    assert (ham.value.n, ham.lost, ham.value.mean) == (2, 1, 4.5)


@pytest.mark.parametrize(
    ("differences", "higher", "verdict"),
    [
        ([1.0, 1.1], True, "HAM ahead"),
        ([1.0, 1.1], False, "HAM behind"),
        ([-1.0, -1.1], False, "HAM ahead"),
        ([1.0, -1.1], True, "within one standard error"),
        ([1.0], True, "one seed"),
        ([None], True, "no pair"),
    ],
)
def test_the_verdict_knows_which_way_is_better(differences, higher, verdict):
    grid = Grid(("gradual",), (0.9,), tuple(range(len(differences))))
    rows = []
    for seed, value in enumerate(differences):
        rows += [row("gradual", False, 0.9, seed, 0.0, higher=higher)]
        rows += [row("gradual", True, 0.9, seed, value, higher=higher)]
    assert pairs(grid, rows)[0].verdict == verdict


def test_one_value_has_no_standard_error_and_none_has_no_mean():
    assert (spread([2.0]).mean, spread([2.0]).standard_error) == (2.0, None)
    assert (spread([]).mean, spread([]).n) == (None, 0)


@pytest.mark.parametrize(
    ("trials", "rates"),
    [
        (1, [1e-3]),
        (2, [3.2e-4, 1e-3]),
        (3, [3.2e-4, 1e-3, 3.2e-3]),
        (5, [1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2]),
    ],
)
def test_learning_rates_lie_half_a_decade_apart_around_the_recipes(trials, rates):
    assert learning_rates(1e-3, trials) == pytest.approx(rates)


def tried(values, higher=True, losses=None):
    losses = losses or [None] * len(values)
    rates = [10.0**index for index in range(len(values))]
    return [
        row("gradual", True, 0.9, 0, value, loss, lr=lr, higher=higher)
        for value, loss, lr in zip(values, losses, rates, strict=True)
    ]


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        (tried([0.1, 0.3, 0.2]), (10.0, False)),
        (tried([0.1, 0.3, 0.2], higher=False), (1.0, True)),
        (tried([0.1, 0.3, 0.3]), (10.0, False)),
        (tried([0.1, 0.3, 0.3], losses=[1.0, 2.0, 1.5]), (100.0, True)),
        (tried([None, None, 0.3]), (100.0, True)),
        (tried([None, None, None]), (1.0, True)),
    ],
)
def test_the_best_trial_gives_the_lr_and_an_edge_is_told(trials, chosen):
    assert choose(trials) == chosen


def test_every_arm_gets_as_many_trials():
    grid = Grid(("dense", "gradual", "rigl"), (0.9, 0.95), (0, 1, 2), trials=4)
    assert [one.label for one in grid.arms] == [
        "dense", "gradual", "gradual + HAM", "rigl", "rigl + HAM",
    ]  # fmt: skip
    assert grid.num_trials == 5 * 4
    assert grid.num_cells == 3 + 4 * 2 * 3
    assert sum(len(list(grid.cells(arm, 1e-3))) for arm in grid.arms) == grid.num_cells

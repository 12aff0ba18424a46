"""Each check passes with the project's step, and fails with a broken one."""

import pytest

from hamcli.theory import checks
from tests.theory import broken

pytestmark = pytest.mark.slow

SMALL = checks.Sizes(
    rows=30,
    weights=60,
    nonzero=2,
    bregman=(1, 30),
    path=(0, 10, 1e4),
    flip=(10, 200),
    recovery=(0, 10, 1e3),
)


def run(name, make=checks.ham_sgd, seed=0):
    problem = checks.make_problem(SMALL, seed)
    if name == "bregman":
        return checks.check_bregman(problem, SMALL, seed, make)
    if name == "flip":
        return checks.check_flip(SMALL, make)
    return getattr(checks, f"check_{name}")(problem, SMALL, make)


@pytest.mark.parametrize("name", ["bregman", "path", "flip", "recovery"])
@pytest.mark.parametrize("make", [checks.ham_sgd, broken.right])
def test_the_rule_passes(name, make):
    found = run(name, make)
    assert [one.line for one in found.claims if not one.passed] == []


@pytest.mark.parametrize(
    ("name", "make", "failing"),
    [
        ("bregman", broken.faulty("no sign"), "minimiser"),
        ("bregman", broken.faulty("turned"), "minimiser"),
        ("bregman", broken.faulty("adds"), "row space"),
        ("bregman", broken.no_mirror, "row space"),
        ("bregman", broken.other_alpha, "row space"),
        ("path", broken.faulty("no sign"), "minimum"),
        ("path", broken.faulty("no beta"), "minimum"),
        ("path", broken.no_mirror, "lasso"),
        ("path", broken.other_alpha, "minimum"),
        ("flip", broken.faulty("no sign"), "crossing time"),
        ("flip", broken.faulty("turned"), "times sooner"),
        ("flip", broken.no_mirror, "times sooner"),
        ("flip", broken.other_alpha, "crossing time"),
        ("recovery", broken.faulty("no sign"), "difference"),
        ("recovery", broken.no_mirror, "before, largest"),
        ("recovery", broken.other_alpha, "difference"),
    ],
)
def test_a_broken_rule_fails(name, make, failing):
    found = run(name, make)
    assert not found.passed
    assert any(failing in one.name for one in found.claims if not one.passed), [
        one.line for one in found.claims
    ]


def test_a_wrong_alpha_in_the_reference_fails(monkeypatch):
    real = checks.references.bregman_minimiser
    monkeypatch.setattr(
        checks.references,
        "bregman_minimiser",
        lambda x, y, start, alpha: real(x, y, start, alpha / 2),
    )
    assert not run("bregman").claims[0].passed


def test_the_problem_is_what_it_says():
    problem = checks.make_problem(SMALL, 7)
    assert (problem.truth != 0).sum() == SMALL.nonzero
    assert problem.features.shape == (SMALL.rows, SMALL.weights)
    assert (problem.features @ problem.truth == problem.labels).all()
    assert (checks.make_problem(SMALL, 7).features == problem.features).all()
    assert (checks.make_problem(SMALL, 8).features != problem.features).all()

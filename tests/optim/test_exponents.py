"""How alpha is found, guarded and measured."""

import math

import pytest
import torch
from torch import nn

from hamcli.optim import HAM
from hamcli.optim.exponents import (
    CALIBRATION_STEPS,
    alpha_now,
    calibrate,
    decay_now,
    is_guarded,
    mirrors,
    scaled_alphas,
)
from hamcli.optim.ham import GUARD_EVERY
from tests.optim.networks import SCALINGS, make, network, run, weights
from tests.optim.numbers import normal


def group_of(**options):
    (group,) = HAM([nn.Parameter(torch.ones(2, 2))], lr=1e-2, **options).param_groups
    return group


@pytest.mark.parametrize(
    ("options", "settled"),
    [
        ({}, ("calibrated", "auto", 0.004, 1e-3, 0.1)),
        ({"scaling": "raw"}, ("raw", 200.0, None, 1e-3, 5.0)),
        ({"alpha": 7.0}, ("raw", 7.0, None, 1e-3, 5.0)),
        ({"scaling": "tracked"}, ("tracked", "auto", 0.01, 1e-3, 0.1)),
        ({"scaling": "normalised"}, ("normalised", "auto", 0.008, 1e-3, 0.1)),
        ({"eta": 0.1, "clamp": 0.2, "beta": 0.0}, ("calibrated", "auto", 0.1, 0.0, 0.2)),
    ],
)
def test_what_is_not_said_is_as_published_or_found(options, settled):
    group = group_of(**options)
    assert tuple(group[key] for key in ("scaling", "alpha", "eta", "beta", "clamp")) == settled


def test_vectors_take_no_mirror_step_and_alpha_that_is_given_no_guard():
    group = group_of()
    assert mirrors(group, torch.ones(1, 2))
    assert not mirrors(group, torch.ones(2))
    assert not mirrors({**group, "mirror": False}, torch.ones(1, 2))
    assert is_guarded(group)
    assert is_guarded(group_of(scaling="tracked"))
    assert not is_guarded(group_of(scaling="raw"))
    assert not is_guarded(group_of(scaling="normalised"))


def test_alpha_is_the_mean_of_the_first_steps_at_the_peak():
    group = group_of(eta=0.02)
    group["lr"] = 1e-5  # a warm-up is under way; the peak stays
    assert alpha_now(group) == 0.0
    for step in range(CALIBRATION_STEPS + 3):
        seen = range(1, min(step + 1, CALIBRATION_STEPS) + 1)
        calibrate([group], [[[(4.0 * (step + 1), 0.0, 4)]]])
        mean = sum(seen) / len(seen)
        assert group["ham_grad_mean"] == pytest.approx(mean, rel=1e-12)
        assert alpha_now(group) == pytest.approx(0.02 / (1e-2 * mean), rel=1e-12)


def test_tracked_alpha_looks_every_tenth_step_and_falls_at_once_but_rises_half_of_the_way():
    group = group_of(scaling="tracked", eta=0.02)
    sizes = [4.0] * 10 + [9.0] * 10 + [1.0] * 20
    means = []
    for size in sizes:
        calibrate([group], [[[(4 * size, 0.0, 4)]]])
        group["ham_step"] += 1
        means.append(group["ham_grad_mean"])
    assert means == pytest.approx([4.0] * 19 + [9.0] * 10 + [3.0] * 10 + [math.sqrt(3)], rel=1e-12)
    assert alpha_now(group) == pytest.approx(0.02 / (1e-2 * math.sqrt(3)), rel=1e-12)


@pytest.mark.parametrize("growth", [100.0, 0.01])
def test_tracked_exponents_stay_what_was_asked_for_when_gradients_change(growth):
    def mean_exponent(scaling):
        model = network()
        optimizer = make(model.parameters(), "sgd", scaling=scaling, eta=0.01, beta=0.0, clamp=9.0)
        run(model, optimizer, 10)
        run(model, optimizer, 100, first=10, scale=1e-2 * growth)
        optimizer.measure_next_step()
        run(model, optimizer, 1, first=110, scale=1e-2 * growth)
        return optimizer.exponent_statistics().mean

    # 272 normal gradients of this step, against those of ten other steps
    assert mean_exponent("tracked") == pytest.approx(0.01, rel=0.1)
    assert not 0.005 < mean_exponent("calibrated") < 0.02


@pytest.mark.parametrize("total", [0.0, math.inf, math.nan])
def test_a_step_without_a_mean_does_not_calibrate(total):
    group = group_of()
    calibrate([group], [[[(1.0, 0.0, 4)]]])
    before = dict(group)
    calibrate([group], [[[(total, 0.0, 4)]]])
    assert group == before


def test_normalised_alphas_follow_the_learning_rate_and_the_gradients_size():
    group = group_of(scaling="normalised", eta=0.5)
    norms = [(0.0, 16.0, 4), (0.0, 0.0, 4), (0.0, math.inf, 4), (0.0, math.nan, 4)]
    assert scaled_alphas(group, norms) == [0.25, 0.0, 0.0, 0.0]
    group["lr"] /= 4
    assert scaled_alphas(group, norms)[0] == 0.0625
    group["lr_peak"] = 0.0
    assert scaled_alphas(group, norms)[0] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shaken_decay_sums_to_the_plain_one(dtype):
    eps = torch.finfo(dtype).eps
    group, decays = group_of(beta=1e-3), []
    for step in range(1, 1_001):
        group["ham_step"] = step
        decays.append(decay_now(group, dtype) - 1e-2 * 1e-3)
    assert max(map(abs, decays)) < eps
    assert abs(math.fsum(decays)) < eps
    assert math.sqrt(sum(one**2 for one in decays) / 1_000) == pytest.approx(eps / 6**0.5, rel=0.1)
    assert decay_now({**group, "beta": 0.0}, dtype) == 0.0


def test_calibration_finds_the_exponent_asked_for():
    model = network()
    optimizer = make(model.parameters(), "sgd", scaling="calibrated", eta=0.02, beta=0.0)
    run(model, optimizer, 12)
    optimizer.measure_next_step()
    run(model, optimizer, 1, first=12)
    found = optimizer.exponent_statistics()
    # 272 normal gradients of this step, against the mean of ten other steps
    assert found.mean == pytest.approx(0.02, rel=0.1)
    assert found.moved_fraction == 1.0
    assert found.alpha == pytest.approx(0.02 / (1e-2 * 1e-2 * math.sqrt(2 / math.pi)), rel=0.05)


def test_calibration_refers_to_the_peak_learning_rate():
    def alpha(lr):
        model = network()
        optimizer = make([{"params": list(model.parameters()), "lr_peak": 1e-2}], lr=lr)
        run(model, optimizer, 1)
        optimizer.measure_next_step()
        run(model, optimizer, 1)
        return optimizer.exponent_statistics().alpha

    assert alpha(1e-5) == pytest.approx(alpha(1e-2), rel=1e-12)


def test_calibration_ends_after_ten_steps():
    model = network()
    optimizer = make(model.parameters(), eta=1e-6)
    run(model, optimizer, 10)
    mean = optimizer.param_groups[0]["ham_grad_mean"]
    run(model, optimizer, 5, scale=1.0)
    assert optimizer.param_groups[0]["ham_grad_mean"] == mean


def test_a_group_added_later_calibrates_alone():
    model, late = network(), nn.Parameter(normal(5, 5, seed=0))
    optimizer = make(model.parameters(), eta=1e-6)
    run(model, optimizer, 10)
    mean = optimizer.param_groups[0]["ham_grad_mean"]
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.full_like(late, 3.0)
    optimizer.step()
    assert [group["ham_grad_mean"] for group in optimizer.param_groups] == [mean, 3.0]


def test_gradients_of_zero_do_not_calibrate():
    model = network()
    optimizer = make(model.parameters())
    run(model, optimizer, 3, scale=0.0)
    assert optimizer.param_groups[0]["ham_calibration_steps"] == 0


def test_the_guard_halves_alpha_when_exponents_are_large():
    model = network()
    optimizer = make(model.parameters(), "sgd", lr=1e-3, scaling="calibrated", eta=0.02)
    run(model, optimizer, GUARD_EVERY)
    assert optimizer.exponent_statistics().guard_events == 0
    run(model, optimizer, GUARD_EVERY, scale=1.0)
    assert optimizer.param_groups[0]["ham_alpha_factor"] == 0.5
    run(model, optimizer, GUARD_EVERY)
    assert optimizer.exponent_statistics().guard_events == 1


def test_the_guard_halves_alpha_when_exponents_are_not_finite():
    model = network()
    optimizer = make(model.parameters(), "sgd", lr=1e-3, scaling="calibrated")
    run(model, optimizer, GUARD_EVERY - 1)
    run(model, optimizer, 1, scale=math.nan)
    assert optimizer.param_groups[0]["ham_alpha_factor"] == 0.5


def test_a_scaled_gradient_leaves_the_normalised_mirror_step_unchanged():
    def moved(factor):
        model = network()
        # the base step of a learning rate of 1e-30 does nothing
        group = {"params": list(model.parameters()), "lr_peak": 1e-30}
        optimizer = HAM([group], base="sgd", lr=1e-30, scaling="normalised", beta=0.0)
        run(model, optimizer, 1, scale=factor)
        return weights(model)

    assert torch.equal(moved(1.0), moved(1024.0))
    assert not torch.equal(moved(1.0), weights(network()))


@pytest.mark.parametrize("dropped", [0.0, 0.5])
def test_normalised_exponents_are_over_the_root_mean_square_of_what_is_kept(dropped):
    w = nn.Parameter(torch.full((40, 50), 0.5))
    optimizer = HAM([w], base="sgd", lr=1e-30, scaling="normalised", eta=0.01, beta=0.0)
    mask = torch.arange(2_000).reshape(40, 50) >= 2_000 * dropped
    optimizer.set_masks({w: mask})
    w.grad = torch.where(mask, normal(40, 50, seed=0), 1e6)
    optimizer.step()
    g = w.grad.double()[mask]
    expected = 0.5 * torch.exp((-0.01 * g / g.square().mean().sqrt()).clamp(-0.1, 0.1))
    assert (w.detach().double()[mask] - expected).abs().max() < 2**-25 * 1.1


# --- statistics


def test_statistics_are_of_the_exponents():
    w = nn.Parameter(torch.tensor([[1.0, -1.0, 0.0, 2.0]]))
    w.grad = torch.tensor([[0.1, 0.1, 0.1, -3.0]])
    optimizer = HAM([w], base="sgd", lr=1e-3, alpha=1e3, beta=0.0, clamp=0.2)
    optimizer.measure_next_step()
    optimizer.step()
    found = optimizer.exponent_statistics()
    # the zero becomes -1e-4 in the base step, and counts
    assert found.mean == pytest.approx((0.1 + 0.1 + 0.1 + 0.2) / 4, rel=1e-6)
    assert found.max == pytest.approx(0.2, rel=1e-6)
    assert (found.moved_fraction, found.clamped_fraction) == (1.0, 0.25)
    assert (found.alpha, found.guard_events) == (1e3, 0)


def test_a_step_that_moves_nothing_shows():
    model = network()
    optimizer = make(model.parameters(), lr=1e-5, alpha=1e-3, beta=0.0)
    optimizer.measure_next_step()
    run(model, optimizer, 1)
    assert optimizer.exponent_statistics().moved_fraction == 0.0


@pytest.mark.parametrize("scaling", SCALINGS)
def test_measuring_changes_no_bit(scaling):
    measured, plain = network(), network()
    optimizer = make(measured.parameters(), scaling=scaling)
    for step in range(12):
        optimizer.measure_next_step()
        run(measured, optimizer, 1, first=step)
    run(plain, make(plain.parameters(), scaling=scaling), 12)
    assert torch.equal(weights(measured), weights(plain))


def test_before_a_measurement_there_are_no_statistics():
    assert make(network().parameters()).exponent_statistics() is None

"""The eta and clamp that a model gets where nobody said."""

import pytest
import torch
from torch import nn

from hamcli.optim import HAM
from hamcli.optim.eta import choose_eta_and_clamp, mean_magnitude
from tests.optim.numbers import normal


def chosen(size, **options):
    weights = [torch.full((3, 4), size), torch.full((2, 2), -size)]
    said = {"base": "adamw", "lr": 1e-3, "alpha": "auto", "scaling": "auto", "eta": None}
    return choose_eta_and_clamp(weights, **{**said, "clamp": None, **options})


@pytest.mark.parametrize(
    ("size", "options", "found"),
    [
        (0.05, {}, (0.004, 0.1)),  # lr / (4 mean|w|) is 0.005
        (0.05, {"scaling": "tracked"}, (0.005, 0.1)),
        (0.05, {"lr": 1e-1, "scaling": "tracked"}, (0.01, 0.1)),
        (0.15, {"lr": 1.2e-4}, (0.0002, 0.005)),
        (0.15, {"lr": 1.2e-4, "base": "adam"}, (0.0002, 0.005)),
        (0.15, {"lr": 1.2e-4, "base": "sgd"}, (0.004, 0.1)),
        (0.0, {"lr": 1.2e-4}, (0.004, 0.1)),
        (0.15, {"lr": 1.2e-4, "eta": 0.003}, (0.003, 0.075)),
        (0.15, {"lr": 1.2e-4, "clamp": 0.07}, (0.0002, 0.07)),
        (0.15, {"lr": 1.2e-4, "eta": 0.5}, (0.5, 0.1)),
        (0.15, {"alpha": 3.0}, (None, None)),
        (0.15, {"alpha": 0.0}, (None, None)),
        (0.15, {"scaling": "raw"}, (None, None)),
        (0.15, {"scaling": "normalised", "eta": 0.2}, (0.2, None)),
    ],
)
def test_what_is_not_said_fits_the_weights_and_the_learning_rate(size, options, found):
    assert chosen(size, **options) == found


def test_the_mean_magnitude_is_that_of_float64():
    weights = [normal(57, 91, seed=seed, scale=10.0**-seed) for seed in range(4)]
    exact = torch.cat([weight.double().abs().flatten() for weight in weights]).mean()
    assert mean_magnitude(weights) == pytest.approx(float(exact), rel=1e-6)
    assert mean_magnitude([]) == 0.0


def test_the_mirror_step_moves_weights_no_further_than_adam_and_outliers_little():
    weight = nn.Parameter(normal(64, 64, seed=0, scale=0.2))
    start = weight.detach().clone()
    said = {"base": "adamw", "lr": 1.2e-4}
    eta, clamp = choose_eta_and_clamp(
        [weight], alpha="auto", scaling="auto", eta=None, clamp=None, **said
    )
    optimizer = HAM([weight], weight_decay=0.0, beta=0.0, eta=eta, clamp=clamp, **said)
    weight.grad = normal(64, 64, seed=1, scale=1e-4)
    weight.grad[3, 5] = 10.0  # as in the value projections of language models
    optimizer.measure_next_step()
    optimizer.step()
    moved = (weight.detach() - start).abs()
    assert float(moved.mean()) < 1.25 * said["lr"]  # the base step's own is lr
    assert float(moved[3, 5]) < said["lr"] + 1.01 * clamp * float(start[3, 5].abs())
    assert clamp < 0.01
    assert optimizer.exponent_statistics().clamped_fraction == 1 / 64**2

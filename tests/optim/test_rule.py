"""The equations: against arithmetic done by hand, and the base steps against torch's own."""

import math

import pytest
import torch

from hamcli.optim import rule
from tests.optim.numbers import bits, normal, ulps

ADAM = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def test_mirror_step_is_the_equation():
    w = torch.tensor([0.5, -0.5, 2.0, 0.0], dtype=torch.float64)
    g = torch.tensor([0.1, 0.1, -0.3, 7.0], dtype=torch.float64)
    made = rule.mirror_step(w, g, lr=0.1, alpha=20.0, beta=0.5)
    by_hand = [0.5 * math.exp(-0.25), -0.5 * math.exp(0.15), 2.0 * math.exp(0.55), 0.0]
    assert made.tolist() == pytest.approx(by_hand, rel=1e-15)


@pytest.mark.parametrize(("g", "exponent"), [(1e9, -5.0), (-1e9, 5.0)])
def test_exponent_keeps_its_clamp(g, exponent):
    w = torch.ones(1, dtype=torch.float64)
    made = rule.mirror_step(w, torch.full_like(w, g), lr=1.0, alpha=1.0, beta=0.0)
    assert float(made) == pytest.approx(math.exp(exponent), rel=1e-15)


def test_product_rounds_about_once_at_every_exponent():
    e = torch.linspace(-5, 5, 100_001)
    exact = torch.exp(e.double())
    # half an ulp for the sum, half for the exponential; w + w * expm1(e) alone is off by 70 at -5
    assert ulps(rule.multiply(torch.ones_like(e), e), exact).max() < 1.6
    small = e * 1e-6
    assert ulps(rule.multiply(torch.ones_like(small), small), torch.exp(small.double())).max() < 0.6


def test_mask_leaves_plain_zeros_even_of_nan():
    w = torch.tensor([-1.0, math.nan, -math.inf, 3.0])
    made = rule.masked(w, torch.tensor([False, False, False, True]))
    assert bits(made).tolist() == bits(torch.tensor([0.0, 0.0, 0.0, 3.0])).tolist()


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_step_is_torch_bit_for_bit(decoupled, weight_decay):
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    w = normal(7, 11, seed=0)
    theirs = torch.nn.Parameter(w.clone())
    optimizer = kind([theirs], lr=1e-2, weight_decay=weight_decay, foreach=False)
    state = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 31):
        theirs.grad = normal(7, 11, seed=step, scale=1e-3)
        w, *state = rule.adam_step(
            w,
            theirs.grad,
            *state,
            step=step,
            weight_decay=weight_decay,
            decoupled=decoupled,
            **ADAM,
        )
        optimizer.step()
        assert torch.equal(w, theirs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_step_is_torch_bit_for_bit(momentum, nesterov, weight_decay):
    w, buffer = normal(7, 11, seed=0), None
    theirs = torch.nn.Parameter(w.clone())
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = torch.optim.SGD([theirs], lr=0.1, foreach=False, **options)
    for step in range(1, 31):
        theirs.grad = normal(7, 11, seed=step)
        w, buffer = rule.sgd_step(w, theirs.grad, buffer, lr=0.1, **options)
        optimizer.step()
        assert torch.equal(w, theirs)

"""When a loss counts as astray: `FACTOR` times that of a bare model, `PATIENCE` steps long."""

import math

import pytest
import torch
from torch import nn

from hamcli.divergence import (
    FACTOR,
    PATIENCE,
    first_non_finite,
    refuse_high_loss,
    refuse_non_finite,
)
from hamcli.errors import Diverged
from hamcli.progress import StepRecord


def records(*losses):
    return [StepRecord(step, loss, 0.0, 1e-3, 1.0) for step, loss in enumerate(losses, 1)]


def test_a_loss_far_above_a_bare_models_for_long_is_refused():
    high = records(1.0, *[2 * FACTOR + 0.1] * PATIENCE)
    with pytest.raises(Diverged, match=rf"E703.*steps 2 to {PATIENCE + 1}.*loss 20.1.*it is 2\b"):
        refuse_high_loss(high, 2.0)
    refuse_high_loss(high[:-1], 2.0)  # a sound step is among the last
    refuse_high_loss(high[2:], 2.0)  # a step too few


def test_the_least_of_the_last_losses_decides():
    losses = [100.0] * PATIENCE
    losses[PATIENCE // 2] = FACTOR  # not above
    refuse_high_loss(records(*losses), 1.0)
    refuse_high_loss(records(*[100.0] * PATIENCE, *losses), 1.0)


@pytest.mark.parametrize("bare", [0.0, -1.0, math.inf, math.nan])
def test_a_bare_loss_without_meaning_refuses_nothing(bare):
    refuse_high_loss(records(*[1e9] * PATIENCE), bare)


def layer(gradient):
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.tensor([gradient])
    return model


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_or_gradient_that_is_no_number_is_refused_by_name(bad):
    refuse_non_finite(3, 1.0, 2.0, layer(1.0))
    with pytest.raises(
        Diverged, match=r"E701.*step 3: loss (nan|inf), gradient norm 2 \("
    ) as caught:
        refuse_non_finite(3, bad, 2.0, layer(1.0))
    assert caught.value.exit_code == 7
    with pytest.raises(Diverged, match="first non-finite gradient in bias"):
        refuse_non_finite(3, 1.0, bad, layer(bad))


def test_a_gradient_scaler_may_skip_a_step_but_not_a_loss():
    refuse_non_finite(3, 1.0, math.inf, layer(math.inf), may_skip=True)
    with pytest.raises(Diverged, match="E701"):
        refuse_non_finite(3, math.nan, 1.0, layer(1.0), may_skip=True)


def test_the_first_tensor_that_is_no_number_is_named():
    good, bad = torch.ones(2), torch.tensor([1.0, -math.inf])
    assert first_non_finite([("none", None), ("good", good)]) is None
    assert first_non_finite([("good", good), ("bad", bad), ("worse", bad)]) == "bad"

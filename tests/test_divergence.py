"""When a loss counts as astray: `FACTOR` times that of a bare model, `PATIENCE` steps long."""

import math

import pytest
import torch
from torch import nn

from hamcli.divergence import (
    FACTOR,
    MEASURES,
    PATIENCE,
    VANISHED,
    describe_collapse,
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


def measured(*sizes_and_losses):
    """Records of which every second one was measured, at ever lower learning rates."""
    made = []
    for step, (size, loss) in enumerate(sizes_and_losses, 1):
        lr = 1e-3 / step
        made.append(StepRecord(2 * step - 1, 100.0, 0.0, lr, 1.0))
        made.append(StepRecord(2 * step, loss, 0.0, lr, 1.0, size * lr))
    return made


SOUND = [(1.0, 0.5), *[(1.0, 11.0)] * (MEASURES - 1)]


def test_a_network_whose_gradients_vanished_at_a_high_loss_has_collapsed():
    dead = measured(*SOUND, *[(VANISHED / 1.1, 9.5)] * MEASURES)
    assert "a loss of 9.5, 0.5 at the start" in describe_collapse(dead)
    assert describe_collapse(dead[:-6]) is None  # as many measures are sound yet
    after = [(1.0, 0.7)] * MEASURES
    assert describe_collapse(
        measured(*SOUND, *[(0.0, 9.5)] * MEASURES, *after)
    ) == describe_collapse(dead)


@pytest.mark.parametrize(
    "later",
    [
        [(VANISHED * 1.1, 9.5)] * 20,  # it still learns
        [(0.0, 0.4)] * 20,  # it has learnt
        [(1.0, 9.5), (0.0, 0.4)] * 10,
    ],
)
def test_a_network_that_learns_or_has_learnt_has_not_collapsed(later):
    assert describe_collapse(measured(*SOUND, *later)) is None
    assert describe_collapse(records(*[1.0] * 20, *[9.0] * 200)) is None  # nothing was measured


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

"""SAM's ascent and BAR against their formulas."""

import pytest
import torch
from torch import nn

from hamcli.sharpness import adapter_pairs, balance_, uphill


def test_the_gradient_is_taken_uphill_and_the_weights_come_back_to_the_bit():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(5, 3)

    def loss():
        return model(x).square().sum()

    loss().backward()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    grads = {name: one.grad.clone() for name, one in model.named_parameters()}
    norm = torch.sqrt(sum(grad.square().sum() for grad in grads.values()))
    with uphill(model, 0.05):
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.data, before[name] + 0.05 * grads[name] / norm)
            assert param.grad is None
        loss().backward()
    state = {name: (before[name] + 0.05 * grads[name] / norm).requires_grad_() for name in before}
    torch.func.functional_call(model, state, (x,)).square().sum().backward()
    for name, param in model.named_parameters():
        assert torch.equal(param.data, before[name])
        torch.testing.assert_close(param.grad, state[name].grad)


def test_zeros_stay_and_batch_norm_counts_once():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[0].weight[0] = 0.0
    x = torch.randn(8, 3)
    model(x).pow(3).sum().backward()
    statistics = model[1].running_mean.clone()
    with uphill(model, 1.0, [model[0].weight]):
        assert (model[0].weight[0] == 0).all()
        assert (model[0].weight[1] != 0).all()
        model(x + 5).pow(3).sum().backward()
    assert torch.equal(model[1].running_mean, statistics)
    assert model[1].momentum == 0.1


@pytest.mark.parametrize("first", [True, False])
def test_the_factor_with_the_greater_gradient_grows(first):
    x, y = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([3.0]))
    x.grad, y.grad = torch.tensor([2.0 if first else 1.0]), torch.tensor([1.5])
    balance_([(x, y)], 0.1)
    x, y = x.detach(), y.detach()
    up, down = (x / 2, y / 3) if first else (y / 3, x / 2)
    assert float(up) == pytest.approx(1.1)
    assert float(down) == pytest.approx(0.9)


def test_adapters_are_found_by_name():
    model = nn.Module()
    model.q = nn.Module()
    model.q.lora_A, model.q.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
    model.dense = nn.Linear(4, 4)
    ((a, b),) = adapter_pairs(model)
    assert a is model.q.lora_A.weight
    assert b is model.q.lora_B.weight

"""`ham_step_` in a post-step hook of torch's own optimizers."""

import copy

import pytest
import torch
from torch import nn

from hamcli import ham_step_
from hamcli.optim import rule

ALPHA, BETA = 20.0, 1e-2


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def backward(model, step):
    draw = torch.Generator().manual_seed(step)
    model(torch.randn(4, 8, generator=draw, dtype=torch.float64)).square().mean().backward()


def mirror(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.dim() >= 2]
        assert all(param.grad is not None for param in params)
        ham_step_(params, [param.grad for param in params], lr=group["lr"], alpha=ALPHA, beta=BETA)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_the_hook_adds_the_mirror_step_of_the_gradient_that_the_base_step_saw(base, fused):
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer = base(model.parameters(), lr=0.1, fused=fused)
    plain = base(twin.parameters(), lr=0.1, fused=fused)
    optimizer.register_step_post_hook(mirror)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (optimizer, plain)]
    for step in range(4):
        lr = optimizer.param_groups[0]["lr"]
        for each in (model, twin):
            backward(each, step)
            nn.utils.clip_grad_norm_(each.parameters(), 0.1)
        optimizer.step()
        plain.step()
        with torch.no_grad():
            for param in twin.parameters():
                if param.dim() >= 2:
                    param.copy_(rule.mirror_step(param, param.grad, lr=lr, alpha=ALPHA, beta=BETA))
        for each in (optimizer, plain, *schedules):
            each.zero_grad() if each in (optimizer, plain) else each.step()
        for left, right in zip(model.parameters(), twin.parameters(), strict=True):
            # two orders of operations in float64
            torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-15)


def test_under_accumulation_by_accelerate_the_hook_runs_on_whole_steps_only():
    from accelerate import Accelerator

    model, calls = make_model(), []
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(mirror)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, stepper = accelerator.prepare(model, optimizer)
    for step in range(6):
        with accelerator.accumulate(wrapped):
            backward(wrapped, step)
            stepper.step()
            stepper.zero_grad()
    assert len(calls) == 3

"""How large gradients are: on a device as on a CPU, and one wait a step."""

import pytest
import torch
from torch import nn

from hamcli.optim import HAM, cpu, gpu
from hamcli.optim.exponents import CALIBRATION_STEPS, TRACKED_EVERY
from hamcli.optim.norms import Asked, norms_of
from tests.optim.numbers import normal

WAITS = ("tolist", "item", "numpy", "__float__", "__int__", "__bool__", "__index__", "cpu")


def gradients(dtype):
    grads = [normal(40, 50, seed=0), normal(7, 3, seed=1).t(), normal(0, 4, seed=2)]
    return [one.to(dtype) for one in grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("power", [1, 2])
def test_sums_on_a_device_are_those_on_a_cpu(dtype, power):
    grads = gradients(dtype)
    masks = [normal(40, 50, seed=3) > 0, None, None]
    grads[0][~masks[0]] = torch.nan  # what a mask drops is not looked at
    params = [nn.Parameter(torch.ones_like(one)) for one in grads]
    here, there = (
        norms_of([Asked(params, grads, masks, power, count)])[0] for count in (cpu.kept_norms, None)
    )
    rel = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other in zip(here, there, strict=True):
        assert other[power - 1] == pytest.approx(one[power - 1], rel=rel)
        assert other[2 - power] == 0.0
        assert other[2] == one[2]


def test_nobody_asks_for_nothing():
    assert norms_of([Asked([torch.ones(2)], [torch.full((2,), torch.nan)], [None], 0, None)]) == [
        [(0.0, 0.0, 0)]
    ]
    assert norms_of([]) == []


@pytest.mark.parametrize(
    ("scaling", "steps_before", "waits"),
    [("normalised", 0, 1), ("normalised", 3, 1), ("calibrated", 0, 1),
     ("calibrated", CALIBRATION_STEPS, 0), ("tracked", CALIBRATION_STEPS, 0),
     ("tracked", 2 * TRACKED_EVERY, 0), ("raw", 0, 0),
     # the guard looks at the same step, once for each group
     ("tracked", 2 * TRACKED_EVERY - 1, 3)],
)  # fmt: skip
def test_a_step_on_a_gpu_waits_once_at_most_however_many_tensors(
    scaling, steps_before, waits, monkeypatch
):
    """The kernel itself, which never waits, does nothing here."""
    monkeypatch.setattr(gpu, "is_usable", lambda weight: True)
    monkeypatch.setattr(gpu, "adam_ham_", lambda *_, **__: None)
    params = [nn.Parameter(normal(8, 9, seed=i)) for i in range(6)]
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    optimizer = HAM(groups, lr=1e-3, scaling=scaling, backend="gpu")
    optimizer.set_masks({params[1]: params[1] > 0, params[4]: params[4] > 0})
    for param in params:
        param.grad = normal(8, 9, seed=20)
    for _ in range(steps_before):
        optimizer.step()
    found = []

    def watched(name):
        original = getattr(torch.Tensor, name)

        def watch(self, *given):
            found.append(name)
            return original(self, *given)

        return watch

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    optimizer.step()
    monkeypatch.undo()
    assert len(found) == waits, found

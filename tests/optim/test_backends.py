"""Every backend against the rule in float64 and against each other, on a CPU.

The Triton kernel runs in its interpreter, if Triton is installed.
"""

import copy
import importlib.util
import itertools

import pytest
import torch

from hamcli import native
from hamcli.optim import HAM, cpu, fused, gpu, jit, plain
from tests.optim import test_gpu as gpu_tests
from tests.optim.numbers import normal

FORMS = {"rule": plain, "blocks": cpu, "native": fused, "numba": jit, "triton": gpu}
BASES = gpu_tests.BASES
OPTIONS = {
    "adamw": {"base": "adamw", "weight_decay": 0.1},
    "adam": {"base": "adam", "weight_decay": 0.05},
    "sgd": {"base": "sgd", "weight_decay": 0.05},
    "momentum": {"base": "sgd", "momentum": 0.9, "weight_decay": 0.05},
    "nesterov": {"base": "sgd", "momentum": 0.9, "nesterov": True},
}

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py compares there"),
    # the interpreter is NumPy, which warns of NaN and infinity where a GPU computes
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def require(*names):
    if "native" in names and not fused.is_usable():
        pytest.skip(native.status().reason)
    if "numba" in names and not jit.is_usable():
        pytest.skip(jit.status().reason)
    if "triton" in names and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")


def shares_beyond(distances, limits):
    """The histogram of `distances` from above: the share beyond each of the limits."""
    return [float((distances > limit).double().mean()) for limit in limits]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("a", [0.02, 2.0])
def test_ulps_of_a_step_are_few_and_outliers_lie_next_to_sign_changes(form, base, a):
    require(form)
    lists = gpu_tests.make_lists(1 << 18)
    exact = gpu_tests.copy(lists)
    before = exact.weights[0].double()
    lr = 2e-5 if base.startswith("adam") else 1e-2
    options = {"lr": lr, "a": a, "b": 1e-7}
    lists.step_(base, module=FORMS[form], **(options | {"a": [a]}))
    gpu_tests.by_rule(exact, base, dtype=torch.float64, **options)
    distances = gpu_tests.ulps(lists.weights[0], exact.weights[0])
    half, one, four = shares_beyond(distances, [0.5, 1.0, 4.0])
    # two roundings of the weight, after the base step and after the mirror step, and that of the
    # decay before them
    assert half < 0.4
    assert one < 0.1
    assert four <= 1e-4
    outliers = distances > 4
    # fp32 gives the step to within its own ulp: that much is many ulps of what nearly vanishes
    step = (exact.weights[0] - before).abs()
    assert (exact.weights[0].abs()[outliers] < 2 * step[outliers]).all()


# numba compiles a loop for each kind of step
PAIRS = [
    pytest.param(*pair, marks=pytest.mark.slow) if "numba" in pair else pair
    for pair in itertools.permutations(FORMS, 2)
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_saved_by_one_backend_goes_on_with_another(first, second, name, dtype, monkeypatch):
    require(first, second)
    now = [first]
    monkeypatch.setattr(HAM, "_backend_for", lambda self, weight: FORMS[now[0]])

    def begin():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(37, 65), torch.nn.Linear(65, 9)).to(dtype)
        return model, HAM(model.parameters(), lr=1e-3, scaling="calibrated", **OPTIONS[name])

    def run(model, optimizer, steps):
        for step in steps:
            for i, param in enumerate(model.parameters()):
                param.grad = normal(*param.shape, seed=100 * step + i, scale=1e-2, dtype=dtype)
            optimizer.step()

    whole, optimizer = begin()
    optimizer.set_masks({whole[0].weight: normal(65, 37, seed=1) > 0})
    run(whole, optimizer, range(6))
    half, fresh = begin()
    half.load_state_dict(whole.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(whole, optimizer, range(6, 12))
    now[0] = second
    run(half, fresh, range(6, 12))
    for param, other in zip(whole.parameters(), half.parameters(), strict=True):
        masters = [
            opt.state[p].get("ham_master", p).detach().double()
            for opt, p in ((optimizer, param), (fresh, other))
        ]
        # six steps, each rounded to half an ulp a few times, of weights up to a sixth
        assert (masters[0] - masters[1]).abs().max() < 30 * 2.0**-26
    assert torch.equal(whole[0].weight == 0, half[0].weight == 0)
    pairs = zip(optimizer.param_groups, fresh.param_groups, strict=True)
    for group, of_fresh in pairs:
        assert of_fresh["ham_step"] == group["ham_step"] == 12
        assert of_fresh["ham_grad_mean"] == pytest.approx(group["ham_grad_mean"], rel=1e-6)

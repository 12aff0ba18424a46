"""Sparse modules against dense ones in float64."""

import copy

import pytest
import torch
from torch import nn

from hamcli import native
from hamcli.errors import UsageError
from hamcli.runtime import dense_inside, use_runtime_
from hamcli.runtime.calibrating import fastest
from hamcli.runtime.kernels import make_kernel
from hamcli.runtime.modules import SparseLinear
from tests.optim.numbers import bits, normal


def network():
    model = nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 24, bias=False)).eval()
    with torch.no_grad():
        for seed, weight in enumerate((model[0].weight, model[2].weight)):
            weight.copy_(normal(*weight.shape, seed=seed))
            weight[normal(*weight.shape, seed=seed + 7).abs() < 1.6] = 0.0
        model[0].weight[3:9] = 0.0
        model[0].weight[0, 0] = -0.0
    return model


@pytest.mark.parametrize("runtime", ["csr", "native"])
@pytest.mark.parametrize("rows", [1, 2, 33, 130])
def test_output_is_the_dense_one_and_the_weights_come_back(runtime, rows):
    if runtime == "native" and not native.status().is_available:
        pytest.skip(native.status().reason)
    model = network()
    before = copy.deepcopy(model)
    assert use_runtime_(model, runtime) == ("0", "2")
    x = normal(rows, 48, seed=9)
    expected = copy.deepcopy(before).double()(x.double())
    with torch.inference_mode():
        found = model(x)
        with dense_inside(model):
            assert torch.equal(model(x), before(x))
    assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    saved, wanted = model.state_dict(), before.state_dict()
    assert list(saved) == list(wanted)
    assert all(torch.equal(bits(saved[name]), bits(wanted[name])) for name in wanted)


def test_a_changed_weight_runs_dense():
    model = network()
    use_runtime_(model, "csr")
    assert isinstance(model[0], SparseLinear)
    with torch.no_grad():
        model[0].weight[5] = 1.0
    x = normal(4, 48, seed=1)
    with torch.inference_mode():
        assert torch.equal(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_too_many_columns_have_no_native_kernel_and_wrong_words_are_refused():
    assert make_kernel("native", torch.zeros(1, 65_537)) is None
    with pytest.raises(UsageError, match="E123"):
        use_runtime_(network(), "fast")


def test_dense_stays_where_the_gain_is_small():
    assert fastest({"dense": 1.0, "native": 0.95}) == "dense"
    assert fastest({"dense": 1.0, "native": 0.5, "csr": 0.4}) == "csr"

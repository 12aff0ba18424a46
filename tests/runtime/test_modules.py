"""Sparse modules against dense ones in float64."""

import copy

import pytest
import torch
from torch import nn

from hamcli import native
from hamcli.errors import UsageError
from hamcli.runtime import dense_inside, use_runtime_
from hamcli.runtime.calibrating import Calibration, fastest
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


def test_no_parameter_wants_a_gradient_and_one_of_the_input_comes_from_the_dense_product():
    model = network()
    before = copy.deepcopy(model)
    use_runtime_(model, "csr")
    assert not any(param.requires_grad for param in model.parameters())
    x, y = (normal(4, 48, seed=2).requires_grad_() for _ in range(2))
    model(x).sum().backward()
    before(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    with torch.no_grad():  # asks for none, though the input has one
        found = model(x)
    assert not found.requires_grad
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, before(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_choice_is_made_for_each_number_of_rows_and_threads(monkeypatch):
    model = network()
    asked = []

    def times(self, module, rows):
        asked.append((rows, torch.get_num_threads()))
        is_fast = rows < 64 and torch.get_num_threads() == 1
        return {"dense": 1.0, "csr": 0.5 if is_fast else 0.95, "native": 2.0}

    monkeypatch.setattr(Calibration, "times", times)
    assert use_runtime_(model, "auto", rows=(8,)) == ("0", "2")
    module = model[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert module._kernel_for(8) is module._kernels["csr"]
        assert module._kernel_for(100) is None
        torch.set_num_threads(2)
        assert module._kernel_for(8) is None
    finally:
        torch.set_num_threads(before)
    assert {(8, 1), (128, 1), (8, 2)} <= set(asked)
    calls = len(asked)
    module._kernel_for(8)
    assert len(asked) == calls


def test_a_module_that_pays_nowhere_stays_what_it_was(monkeypatch):
    model = network()
    kept = model[0]
    monkeypatch.setattr(
        Calibration, "times", lambda *_: {"dense": 1.0, "csr": 0.95, "native": 0.92}
    )
    assert use_runtime_(model, "auto", rows=(1, 8, 1024)) == ()
    assert model[0] is kept


def test_what_is_measured_is_the_whole_call():
    """The times of a kernel hold the module's own checks, those of dense do not."""
    model = network()
    use_runtime_(model, "csr")
    seen = []
    module = model[0]
    kernel = module._kernels["csr"]
    module._kernels["csr"] = lambda x, bias: (
        seen.append(module._state_was_checked) or kernel(x, bias)
    )
    check = module._may_be_sparse

    def noted(x):
        module._state_was_checked = True
        return check(x)

    module._may_be_sparse = noted
    module._state_was_checked = False
    assert set(Calibration().times(module, 4)) == {"dense", "csr"}
    assert all(seen)


# ---- when dense runs ----


def counted(calls):
    """A module whose only kernel counts its calls."""
    model = network()
    use_runtime_(model, "csr")
    module = model[0]
    kernel = module._kernels["csr"]

    def noted(x, bias):
        assert x.is_contiguous()
        calls.append(tuple(x.shape))
        return kernel(x, bias)

    module._kernels["csr"] = noted
    return module


def test_inputs_of_any_shape_and_layout_take_the_kernel():
    calls = []
    module = counted(calls)
    x = normal(48, 5, 3, seed=1).permute(2, 1, 0)
    with torch.inference_mode():
        found = module(x)
        expected = module.multiply_dense(x)
    assert calls == [(15, 48)]
    assert found.shape == (3, 5, 40)
    assert found.is_contiguous()
    turned = normal(48, 7, seed=2).T
    with torch.inference_mode():
        torch.testing.assert_close(
            module(turned), module.multiply_dense(turned), rtol=1e-5, atol=1e-5
        )
    assert len(calls) == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_runs_only_for_what_it_was_made_for():
    calls = []
    module = counted(calls)
    x = normal(4, 48, seed=1)
    with torch.inference_mode():
        assert module(x[:0]).shape == (0, 40)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):  # as the dense module
            module(x.double())
    wanting = x.clone().requires_grad_()
    assert module(wanting).requires_grad
    module.bias.requires_grad_(True)
    assert module(x).requires_grad
    module.bias.requires_grad_(False)
    assert calls == []
    with torch.inference_mode():
        module(x)
    assert len(calls) == 1
    module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    with torch.inference_mode():
        module(x)
    assert len(calls) == 1


def test_dense_inside_ends_with_its_block():
    calls = []
    module = counted(calls)
    x = normal(4, 48, seed=1)
    with torch.inference_mode():
        with dense_inside(module):
            module(x)
        assert calls == []
        module(x)
    assert len(calls) == 1


def test_plans_do_not_grow_without_end(monkeypatch):
    from hamcli.runtime import modules

    monkeypatch.setattr(modules, "MOST_PLANS", 3)
    module = counted([])
    for rows in range(1, 9):
        with torch.inference_mode():
            module(normal(rows, 48, seed=1))
        assert len(module._plans) <= 3


def test_subclasses_of_linear_are_left_alone():
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(Other(8, 8))
    with torch.no_grad():
        model[0].weight[:4] = 0.0
    assert use_runtime_(model, "csr") == ()


def test_auto_asks_only_of_modules_that_are_half_zeros(monkeypatch):
    monkeypatch.setattr(Calibration, "times", lambda *_: {"dense": 1.0, "csr": 0.1, "native": 1.0})
    for zeros, auto, csr in ((31, (), ("0",)), (32, ("0",), ("0",)), (0, (), ())):
        for runtime, replaced in (("auto", auto), ("csr", csr)):
            model = nn.Sequential(nn.Linear(8, 8))
            with torch.no_grad():
                model[0].weight.fill_(1.0).view(-1)[:zeros] = 0.0
            assert use_runtime_(model, runtime) == replaced


def test_one_number_of_rows_that_gains_is_enough(monkeypatch):
    monkeypatch.setattr(
        Calibration, "times", lambda _, module, rows: {"dense": 1.0, "csr": 1.0 / rows}
    )
    assert use_runtime_(network(), "auto", rows=(1, 64)) == ("0", "2")
    assert use_runtime_(network(), "auto", rows=(1,)) == ()


def test_times_that_were_measured_are_kept(tmp_path):
    calibration = Calibration(tmp_path / "times.json")
    use_runtime_(network(), "auto", rows=(1,), calibration=calibration)
    assert len((tmp_path / "times.json").read_text()) > 2

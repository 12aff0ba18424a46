"""HAM against torch's optimizers and the rule, and what is asked of any torch optimizer."""

import copy
import math

import pytest
import torch
from torch import nn

from hamcli.optim import HAM, exponents, rule
from tests.optim.networks import BASES, SCALINGS, make, network, run, set_grads, some_mask, weights
from tests.optim.numbers import bits, normal

# --- against torch and the rule


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("scaling", ["auto", *SCALINGS])
def test_without_alpha_and_beta_it_is_the_base_optimizer_bit_for_bit(name, scaling):
    ours, theirs = network(), network()
    kind, options = BASES[name]
    run(ours, make(ours.parameters(), name, alpha=0.0, beta=0.0, scaling=scaling), 25)
    run(theirs, kind(theirs.parameters(), lr=1e-2, fused=True, **options), 25)
    assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("name", BASES)
def test_by_the_rule_it_is_the_for_loop_form_bit_for_bit(name):
    ours, theirs = network(), network()
    kind, options = BASES[name]
    run(ours, make(ours.parameters(), name, alpha=0.0, beta=0.0, backend="rule"), 25)
    run(theirs, kind(theirs.parameters(), lr=1e-2, foreach=False, **options), 25)
    assert torch.equal(weights(ours), weights(theirs))


def test_arguments_of_the_base_default_as_torchs():
    for name in ("adamw", "adam", "sgd"):
        theirs = BASES[name][0]([nn.Parameter(torch.ones(1))]).defaults
        ours = HAM([nn.Parameter(torch.ones(1))], base=name).defaults
        shared = ours.keys() & theirs.keys()
        assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


@pytest.mark.parametrize("backend", ["rule", "cpu"])
@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_matrices_are_mirrored_and_vectors_are_not(name, backend):
    model, plain = network(), network()
    run(model, make(model.parameters(), name, alpha=50.0, beta=0.0, backend=backend), 1)
    run(plain, make(plain.parameters(), name, alpha=0.0, beta=0.0, backend=backend), 1)
    for param, base in zip(model.parameters(), plain.parameters(), strict=True):
        expected = base.detach().double()
        if base.dim() >= 2:
            expected = rule.mirror_step(expected, base.grad.double(), lr=1e-2, alpha=50.0, beta=0.0)
        # one rounding of the product, and half an ulp of a weight below a half
        assert (param.double() - expected).abs().max() < 2**-25 * 1.1


@pytest.mark.parametrize("backend", ["rule", "cpu"])
def test_float64_is_exact(backend):
    w = nn.Parameter(normal(5, 7, seed=0, dtype=torch.float64))
    before, w.grad = w.detach().clone(), normal(5, 7, seed=1, dtype=torch.float64)
    HAM([w], base="sgd", lr=0.1, alpha=2.0, beta=0.5, backend=backend).step()
    expected = rule.mirror_step(before - 0.1 * w.grad, w.grad, lr=0.1, alpha=2.0, beta=0.5)
    assert torch.allclose(w, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_alone_shrinks_by_what_it_says(lr, dtype):
    w = nn.Parameter(torch.linspace(-2, 2, 2_000).reshape(2, -1).to(dtype))
    before = w.detach().double().clone()
    optimizer = HAM([w], base="sgd", lr=lr, alpha=0.0, beta=1e-3)
    w.grad = torch.zeros_like(w)
    for _ in range(1_000):
        optimizer.step()
    held = optimizer.state[w].get("ham_master", w).detach().double()
    # w * exp(-lr * beta) in fp32 errs by all of 1e-3 at lr 1e-3
    assert (held / before - math.exp(-1_000 * lr * 1e-3)).abs().max() < 1e-5


def test_a_learning_rate_of_zero_changes_nothing():
    model = network()
    optimizer = make(model.parameters(), lr=0.0, alpha=200.0, beta=1.0)
    before = weights(model)
    run(model, optimizer, 3)
    assert torch.equal(weights(model), before)
    # torch steps so to look at the state; it must not count
    assert optimizer.param_groups[0]["ham_step"] == 0


def test_what_shakes_the_decay_cancels_in_its_sum():
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = HAM([w], base="sgd", lr=1e-3, alpha=0.0, beta=1e-3)
    (group,) = optimizer.param_groups
    total = 0.0
    for step in range(1, 10_001):
        group["ham_step"] = step
        total += exponents.decay_now(group, torch.float32)
    assert abs(total - 10_000 * 1e-6) <= 2**-23


# --- masks


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_masked_weights_are_plain_zero_after_every_step(name, dtype, steps_before):
    model = network(dtype=dtype)
    optimizer = make(model.parameters(), name, lr=0.1)
    run(model, optimizer, steps_before)
    param = model[0].weight
    mask = some_mask(param)
    optimizer.set_masks({param: mask})
    assert_masked(optimizer, param, mask)
    for step in range(5):
        run(model, optimizer, 1, first=step)
        assert_masked(optimizer, param, mask)
    assert param.count_nonzero() == mask.count_nonzero()


def assert_masked(optimizer, param, mask):
    state = optimizer.state[param]
    keys = {"exp_avg", "momentum_buffer", "ham_master"} & state.keys()
    for tensor in (param, *(state[key] for key in keys)):
        assert not bits(tensor)[~mask].any()


def test_a_mask_holds_without_a_gradient():
    model = network()
    optimizer = make(model.parameters())
    optimizer.set_masks({model[0].weight: some_mask(model[0].weight)})
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    optimizer.step()
    assert model[0].weight.count_nonzero() == some_mask(model[0].weight).count_nonzero()


def test_a_lifted_mask_lets_weights_return():
    model = network()
    optimizer = make(model.parameters())
    mask = some_mask(model[0].weight)
    optimizer.set_masks({model[0].weight: mask})
    assert torch.equal(optimizer.masks()[model[0].weight], mask)
    optimizer.set_masks({model[0].weight: None})
    assert optimizer.masks() == {}
    run(model, optimizer, 1)
    assert model[0].weight.count_nonzero() == model[0].weight.numel()


def test_masks_are_copied():
    model = network()
    optimizer = make(model.parameters())
    mask = some_mask(model[0].weight)
    optimizer.set_masks({model[0].weight: mask})
    mask.fill_(True)
    assert not optimizer.masks()[model[0].weight].all()


@pytest.mark.parametrize("wrong", ["foreign", "shape", "dtype"])
def test_a_mask_that_does_not_fit_is_refused_and_nothing_is_done(wrong):
    model = network()
    optimizer = make(model.parameters())
    good = {model[2].weight: some_mask(model[2].weight)}
    bad = {
        "foreign": {nn.Parameter(torch.ones(2)): torch.ones(2, dtype=torch.bool)},
        "shape": {model[0].weight: torch.ones(3, dtype=torch.bool)},
        "dtype": {model[0].weight: torch.ones_like(model[0].weight)},
    }[wrong]
    with pytest.raises(ValueError, match="a mask"):
        optimizer.set_masks({**good, **bad})
    assert optimizer.masks() == {}


# --- low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_move_through_their_masters(dtype):
    w = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    optimizer = HAM([w], base="sgd", lr=1e-4, alpha=0.0, beta=0.0)
    for _ in range(300):
        w.grad = torch.ones_like(w)
        optimizer.step()
    # a step of 1e-4 is far below the resolution of either at 1; three hundred are not
    assert torch.equal(w, torch.full_like(w, 0.97))
    assert optimizer.state[w]["ham_master"].dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "rule"])
def test_weights_that_have_become_wide_move_without_a_master(backend):
    narrow = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    first = HAM([narrow], base="sgd", lr=1e-3, alpha=0.0, beta=0.0)
    narrow.grad = torch.ones_like(narrow)
    first.step()
    wide = nn.Parameter(narrow.detach().float())
    second = HAM([wide], base="sgd", lr=1e-3, alpha=0.0, beta=0.0, backend=backend)
    second.load_state_dict(first.state_dict())
    wide.grad = torch.ones_like(wide)
    second.step()
    assert torch.equal(wide, narrow.float() - 1e-3)
    assert "ham_master" not in second.state[wide]


# --- what is asked of an optimizer


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 7, 10])
def test_reloading_in_mid_run_equals_never_stopping(scaling, name, dtype, stop):
    whole = network(dtype=dtype)
    optimizer = make(whole.parameters(), name, scaling=scaling)
    optimizer.set_masks({whole[0].weight: some_mask(whole[0].weight)})
    run(whole, optimizer, stop)
    half = copy.deepcopy(whole)
    fresh = make(half.parameters(), name, scaling=scaling)
    fresh.load_state_dict(state_dict=copy.deepcopy(optimizer.state_dict()))
    assert all(mask.dtype == torch.bool for mask in fresh.masks().values())
    run(whole, optimizer, 14, first=stop)
    run(half, fresh, 14, first=stop)
    assert torch.equal(weights(whole), weights(half))
    assert optimizer.param_groups[0]["ham_step"] == fresh.param_groups[0]["ham_step"]


def test_state_is_tensors_and_groups_are_plain_values():
    model = network(dtype=torch.bfloat16)
    optimizer = make(model.parameters())
    optimizer.set_masks({model[0].weight: some_mask(model[0].weight)})
    run(model, optimizer, 2)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    for group in saved["param_groups"]:
        assert all(
            value is None or isinstance(value, (bool, int, float, str, tuple, list))
            for value in group.values()
        )


def test_state_of_another_base_is_refused():
    saved = make(network().parameters(), "adamw").state_dict()
    with pytest.raises(ValueError, match="base adamw"):
        make(network().parameters(), "sgd").load_state_dict(saved)


def test_a_backend_may_change_in_mid_run():
    whole, half = network(), network()
    optimizer = make(whole.parameters(), alpha=50.0)
    run(whole, optimizer, 5)
    run(half, make(half.parameters(), alpha=50.0), 5)
    fresh = make(half.parameters(), alpha=50.0, backend="rule")
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(whole, optimizer, 5, first=5)
    run(half, fresh, 5, first=5)
    assert (weights(whole) - weights(half)).abs().max() < 1e-6


def test_a_copy_goes_on_as_the_original():
    model = network()
    optimizer = make(model.parameters(), scaling="normalised")
    run(model, optimizer, 3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    run(model, optimizer, 3)
    run(twin, twin_optimizer, 3)
    assert torch.equal(weights(model), weights(twin))


def test_hooks_fire_once_and_the_closure_is_called_once():
    model, calls = network(), []
    optimizer = make(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure" if torch.is_grad_enabled() else "no gradients")
        set_grads(model, 0)
        return torch.tensor(3.0)

    assert float(optimizer.step(closure)) == 3.0
    assert calls == ["before", "closure", "after"]


def test_a_missing_gradient_leaves_its_weight_alone():
    model = network()
    optimizer = make(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    set_grads(model, 0)
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_splitting_groups_changes_nothing(scaling):
    one, two = network(), network()
    # strong enough that the guard acts
    options = {"scaling": scaling} if scaling == "raw" else {"scaling": scaling, "eta": 0.09}
    run(one, make(one.parameters(), **options), 25)
    run(two, make([{"params": [p]} for p in two.parameters()], **options), 25)
    assert torch.equal(weights(one), weights(two))


def test_groups_have_their_own_options():
    model, plain = network(), network()
    optimizer = HAM(
        [
            {"params": [model[0].weight], "alpha": 5.0},
            {"params": [model[2].weight], "mirror": False, "lr": 0.2},
        ],
        base="sgd",
        lr=0.1,
    )
    first, second = optimizer.param_groups
    assert (first["alpha"], first["scaling"], first["clamp"], first["lr_peak"]) == (
        5,
        "raw",
        5,
        0.1,
    )
    assert (second["scaling"], second["clamp"], second["lr_peak"]) == ("calibrated", 0.1, 0.2)
    run(model, optimizer, 3)
    run(plain, torch.optim.SGD([plain[2].weight], lr=0.2), 3)
    assert torch.equal(model[2].weight, plain[2].weight)


def test_a_scheduler_drives_it():
    model, twin = network(), network()
    optimizer, by_hand = make(model.parameters()), make(twin.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(5):
        run(model, optimizer, 1, first=step)
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 1e-2 / (1 + step)
        run(twin, by_hand, 1, first=step)
    assert torch.equal(weights(model), weights(twin))
    assert optimizer.param_groups[0]["lr_peak"] == 1e-2


def test_a_step_that_the_scaler_skips_changes_nothing():
    model = network()
    optimizer = make(model.parameters(), alpha=200.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run(model, optimizer, 2)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    set_grads(model, 2)
    model[0].weight.grad[0, 0] = math.inf
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weights(model), before)
    assert optimizer.param_groups[0]["ham_step"] == state["param_groups"][0]["ham_step"]


def test_scaled_gradients_are_unscaled_before_the_step():
    scaled, plain = network(), network()
    optimizer = make(scaled.parameters(), alpha=200.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    set_grads(scaled, 0)
    for param in scaled.parameters():
        param.grad.mul_(8.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    run(plain, make(plain.parameters(), alpha=200.0), 1)
    assert torch.equal(weights(scaled), weights(plain))


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        make(table.parameters()).step()


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="complex"):
        make([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"beta": math.inf}, "beta"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clamp": 0.0}, "clamp"),
        ({"scaling": "rawr"}, "scaling"),
        ({"eta": -0.1}, "eta"),
        ({"base": "lion"}, "base"),
        ({"backend": "tpu"}, "backend"),
        ({"alpha": 3.0, "scaling": "normalised"}, "alpha"),
        ({"momentum": 0.9}, "momentum"),
        ({"base": "sgd", "nesterov": True}, "nesterov"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        HAM(network().parameters(), **{"lr": 1e-3, **wrong})


def test_a_refused_group_is_not_added():
    optimizer = make([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="alpha"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "alpha": -1.0})
    assert len(optimizer.param_groups) == 1

"""HAM against torch's optimizers, against the rule in float64, and as an optimizer."""

import copy
import math

import pytest
import torch
from torch import nn

from hamcli.optim import HAM, ham_step_, rule

BASES = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.05}),
    "sgd": (torch.optim.SGD, {"weight_decay": 0.05, "momentum": 0.9, "nesterov": True}),
}


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def set_grads(model, step):
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=generator)
        param.grad = (grad * 1e-2).to(param.dtype)


def run(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        set_grads(model, step)
        optimizer.step()


def weights(model):
    return torch.cat([param.detach().flatten().double() for param in model.parameters()])


def ulps(value, exact):
    spacing = torch.nextafter(value.abs(), torch.tensor(torch.inf)) - value.abs()
    return (value.double() - exact).abs() / spacing.double()


@pytest.mark.parametrize("base", BASES)
def test_without_alpha_and_beta_it_is_the_base_optimizer_bit_for_bit(base):
    kind, extra = BASES[base]
    ours, theirs = network(), network()
    run(ours, HAM(ours.parameters(), base=base, lr=1e-2, alpha=0.0, beta=0.0, **extra), 25)
    run(theirs, kind(theirs.parameters(), lr=1e-2, fused=True, **extra), 25)
    assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("backend", ["rule", "cpu"])
def test_twenty_steps_follow_the_rule_in_float64(base, backend):
    extra = BASES[base][1]
    lr, alpha, beta = 1e-2, 50.0, 1e-3
    model = network()
    exact = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    moments = {
        n: rule.AdamMoments(torch.zeros_like(w), torch.zeros_like(w)) for n, w in exact.items()
    }
    buffers = dict.fromkeys(exact)
    decay_due = 0.0
    made = HAM(
        model.parameters(), base=base, lr=lr, alpha=alpha, beta=beta, backend=backend, **extra
    )
    for step in range(40):
        set_grads(model, step)
        made.step()
        decay_due += lr * beta
        b = decay_due if decay_due >= 2**-12 else 0.0
        decay_due -= b
        for name, param in model.named_parameters():
            grad = param.grad.double()
            if base == "sgd":
                w, buffers[name] = rule.sgd_step(
                    exact[name],
                    grad,
                    buffers[name],
                    lr=lr,
                    momentum=0.9,
                    nesterov=True,
                    weight_decay=extra["weight_decay"],
                )
            else:
                w = rule.adam_step(
                    exact[name],
                    grad,
                    moments[name],
                    lr=lr,
                    beta1=0.9,
                    beta2=0.999,
                    eps=1e-8,
                    weight_decay=extra["weight_decay"],
                    decoupled=base == "adamw",
                )
            if w.dim() >= 2:
                w = rule.mirror_step(w, grad, a=lr * alpha, b=b, clamp=5.0)
            exact[name] = w
    error = (weights(model) - torch.cat([w.flatten() for w in exact.values()])).abs()
    # forty fp32 roundings of weights below 1; a wrong order of steps is off by 1e-4
    assert (error > 2e-6).double().mean() <= 0.01
    assert error.median() < 1e-7


def test_float32_mirror_step_rounds_once():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(100_000, generator=generator)
    g = torch.randn(100_000, generator=generator) * 1e-2
    exact = rule.mirror_step(w.double(), g.double(), a=1e-3 * 200.0, b=1e-3 * 1e-3, clamp=5.0)
    ham_step_([w], [g], lr=1e-3, alpha=200.0, beta=1e-3)
    # the write-back costs half an ulp; w * exp(e) would be over one ulp on 2 % of the weights
    assert ulps(w, exact).max() < 0.75


def test_zeros_stay_zero_and_the_mirror_step_flips_no_sign():
    w = torch.tensor([[0.0, -1.0, 2.0, -3e-8]])
    before = w.clone()
    ham_step_([w], [torch.full_like(w, 1e9)], lr=1.0, alpha=200.0, beta=1.0)
    assert torch.equal(torch.sign(w), torch.sign(before))


@pytest.mark.parametrize("base", BASES)
def test_masked_weights_are_plain_zero_after_every_step(base):
    model = network()
    extra = BASES[base][1]
    optimizer = HAM(model.parameters(), base=base, lr=0.1, **extra)
    run(model, optimizer, 3)
    param = model[0].weight
    mask = torch.rand(param.shape) > 0.5
    optimizer.set_masks({param: mask})
    for step in range(5):
        run(model, optimizer, 1, first=step)
        dropped = param.detach()[~mask]
        assert torch.equal(dropped.view(torch.int32), torch.zeros_like(dropped, dtype=torch.int32))
    assert int(param.count_nonzero()) == int(mask.count_nonzero())


def test_a_mask_set_before_the_first_step_holds():
    model = network()
    optimizer = HAM(model.parameters(), lr=0.1)
    mask = torch.zeros_like(model[0].weight, dtype=torch.bool)
    optimizer.set_masks({model[0].weight: mask})
    run(model, optimizer, 2)
    assert int(model[0].weight.count_nonzero()) == 0


@pytest.mark.parametrize("scaling", ["raw", "calibrated", "normalised"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloading_in_mid_run_equals_never_stopping(scaling, base, dtype):
    extra = {**BASES[base][1], "scaling": scaling}
    whole = network(dtype=dtype)
    optimizer = HAM(whole.parameters(), base=base, lr=1e-2, **extra)
    mask = torch.rand(whole[0].weight.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    optimizer.set_masks({whole[0].weight: mask})
    run(whole, optimizer, 7)
    half = copy.deepcopy(whole)
    fresh = HAM(half.parameters(), base=base, lr=1e-2, **extra)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(m.dtype == torch.bool for m in fresh.masks().values())
    run(whole, optimizer, 8, first=7)
    run(half, fresh, 8, first=7)
    assert torch.equal(weights(whole), weights(half))


@pytest.mark.parametrize("lr", [1e-2, 1e-4, 1e-5])
def test_decay_alone_shrinks_as_far_as_it_says(lr):
    w = nn.Parameter(torch.linspace(-2, 2, 2_000).reshape(2, -1).clone())
    before = w.detach().double().clone()
    optimizer = HAM([w], base="sgd", lr=lr, alpha=0.0, beta=1.0)
    w.grad = torch.zeros_like(w)
    for _ in range(1_000):
        optimizer.step()
    left = optimizer.param_groups[0]["ham_decay_due"]
    found = w.detach().double() / before
    assert (found - math.exp(-1_000 * lr + left)).abs().max() < 1e-5


def test_low_precision_weights_move_through_their_masters():
    model = network(dtype=torch.bfloat16)
    optimizer = HAM(model.parameters(), base="sgd", lr=1e-4, alpha=0.0, beta=0.0)
    model[0].weight.data.fill_(1.0)
    for _ in range(300):
        model.zero_grad()
        model[0].weight.grad = torch.full_like(model[0].weight, 1.0)
        optimizer.step()
    # one step of 1e-4 is far below bf16's 2^-8 at 1.0; three hundred are not
    assert torch.allclose(model[0].weight.float(), torch.tensor(0.97), atol=4e-3)


def test_calibration_finds_the_exponent_asked_for():
    model = network()
    optimizer = HAM(model.parameters(), lr=1e-3, scaling="calibrated", strength=0.02)
    run(model, optimizer, 12)
    optimizer.measure_next_step()
    run(model, optimizer, 1, first=12)
    found = optimizer.exponent_statistics()
    assert found.mean == pytest.approx(0.02, rel=0.2)
    assert found.moved_fraction > 0.99


def test_the_guard_halves_alpha_when_gradients_grow():
    model = network()
    optimizer = HAM(model.parameters(), lr=1e-3, scaling="calibrated", strength=0.02)
    run(model, optimizer, 12)
    alpha = optimizer.param_groups[0]["ham_alpha"]
    set_grads(model, 12)
    for param in model.parameters():
        param.grad.mul_(8.0)
    optimizer.step()
    assert optimizer.param_groups[0]["ham_alpha"] == alpha / 4
    assert optimizer.param_groups[0]["ham_guard_events"] == 2


def test_a_scaled_gradient_leaves_the_normalised_mirror_step_unchanged():
    made = []
    for factor in (1.0, 1024.0):
        model = network()
        optimizer = HAM(
            [{"params": list(model.parameters()), "lr_peak": 1e-30}],
            base="sgd",
            lr=1e-30,
            scaling="normalised",
            beta=0.0,
        )
        set_grads(model, 0)
        for param in model.parameters():
            param.grad.mul_(factor)
        optimizer.step()
        made.append(weights(model))
    assert torch.allclose(made[0], made[1], rtol=1e-6, atol=0)
    assert not torch.equal(made[0], weights(network()))


def test_a_step_that_moves_nothing_shows():
    model = network()
    optimizer = HAM(model.parameters(), lr=1e-5, alpha=1e-3, beta=0.0)
    optimizer.measure_next_step()
    run(model, optimizer, 1)
    assert optimizer.exponent_statistics().moved_fraction == 0.0


def test_hooks_fire_once_and_the_closure_is_called():
    model, calls = network(), []
    optimizer = HAM(model.parameters(), lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        set_grads(model, 0)
        return torch.tensor(3.0)

    assert float(optimizer.step(closure)) == 3.0
    assert calls == ["before", "after"]


def test_a_missing_gradient_leaves_its_weight_alone():
    model = network()
    optimizer = HAM(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    set_grads(model, 0)
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_groups_have_their_own_alpha_and_may_go_without():
    model = network()
    optimizer = HAM(
        [
            {"params": [model[0].weight], "alpha": 5.0},
            {"params": [model[2].weight], "mirror": False},
        ],
        base="sgd",
        lr=0.1,
        alpha=1.0,
        beta=0.0,
    )
    plain = network()
    other = torch.optim.SGD([plain[2].weight], lr=0.1)
    run(model, optimizer, 3)
    run(plain, other, 3)
    assert torch.equal(model[2].weight, plain[2].weight)
    assert optimizer.param_groups[0]["alpha"] == 5.0


def test_a_scheduler_drives_it():
    model = network()
    optimizer = HAM(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    run(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["lr_peak"] == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -1.0},
        {"beta": math.nan},
        {"lr": -1.0},
        {"scaling": "rawr"},
        {"base": "lion"},
        {"backend": "tpu"},
        {"alpha": 3.0, "scaling": "normalised"},
        {"nesterov": True},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"."):
        HAM(network().parameters(), **{"lr": 1e-3, **wrong})


def test_non_contiguous_weights_are_stepped_like_others():
    flat = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    turned = nn.Parameter(flat.t().contiguous().t())
    plain = nn.Parameter(flat.clone())
    for w in (turned, plain):
        w.grad = torch.ones_like(w)
        HAM([w], base="sgd", lr=0.1, alpha=1.0, beta=0.1).step()
    assert torch.allclose(turned, plain, rtol=1e-6)

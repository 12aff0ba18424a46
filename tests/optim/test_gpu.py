"""The Triton kernel: on a GPU where there is one, else in Triton's interpreter, on a CPU."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from hamcli.optim import cpu, gpu, rule
from tests.optim.lists import (
    BASES,
    DEVICE,
    assert_same_bits,
    bits,
    by_rule,
    copy,
    make_lists,
    part,
    ulps,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    # the interpreter is NumPy, which warns of NaN and infinity where a GPU computes
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
OUTLIER_ULPS = 4
OUTLIER_RATE = 1e-4
# On a GPU torch's own fused Adam is that far from float64 after five steps, in learning rates.
TORCH_ERROR = 1e-4 if DEVICE == "cuda" else 0.0


# --- the numbers


@pytest.mark.parametrize("base", BASES)
def test_outliers_of_a_step_are_rare_and_next_to_sign_changes(base: str) -> None:
    lists = make_lists(1 << 18)
    exact = copy(lists)
    before = exact.weights[0].double()
    lr = 2e-5 if base.startswith("adam") else 1e-2
    lists.step_(base, lr=lr)
    by_rule(exact, base, dtype=torch.float64, lr=lr, a=0.02, b=1e-7)
    distances = ulps(lists.weights[0], exact.weights[0])
    outliers = distances > OUTLIER_ULPS
    assert outliers.double().mean() <= OUTLIER_RATE
    # fp32 gives the step to within its own ulp: that much is many ulps of what nearly vanishes
    step = (exact.weights[0] - before).abs()
    assert (exact.weights[0].abs()[outliers] < 2 * step[outliers]).all()
    assert distances.median() < 0.5
    if base != "sgd":
        moment = ulps(lists.m[0], exact.m[0])
        assert (moment > OUTLIER_ULPS).double().mean() <= 0.05  # sums of two signs cancel
        assert moment.median() < 1
    if base.startswith("adam"):
        assert (ulps(lists.v[0], exact.v[0]) > OUTLIER_ULPS).double().mean() <= OUTLIER_RATE


@pytest.mark.parametrize("base", ["adamw", "momentum"])
def test_ten_steps_stray_from_float64_no_further_than_the_rule_in_float32(base: str) -> None:
    lists = make_lists(1 << 16)
    exact, plain = copy(lists), copy(lists)
    numbers = {"lr": 1e-3, "a": 0.2, "b": 1e-6}
    for seed in range(10):
        grads = make_lists(1 << 16, seed=seed + 1).grads
        for each in (lists, exact, plain):
            each.grads = grads
        lists.step_(base, **numbers)
        by_rule(exact, base, dtype=torch.float64, **numbers)
        by_rule(plain, base, dtype=torch.float32, **numbers)
    ours = (ulps(lists.weights[0], exact.weights[0]) > OUTLIER_ULPS).double().mean()
    floor = (ulps(plain.weights[0], exact.weights[0]) > OUTLIER_ULPS).double().mean()
    assert ours <= 1.05 * floor


@pytest.mark.parametrize("clamp", [0.1, 5.0, 60.0])
def test_exponents_of_every_size_are_right_to_two_ulps(clamp: float) -> None:
    lists = make_lists(1 << 15)
    size = 10.0 ** torch.linspace(-9, 2, 1 << 15).to(DEVICE)
    lists.grads = [torch.where(lists.grads[0] > 0, size, -size)]
    exact = lists.weights[0].double()
    # without a learning rate the base step is nothing, and the mirror step is alone
    lists.step_("sgd", lr=0.0, weight_decay=0.0, a=1.0, b=1e-5, clamp=clamp)
    b = float(torch.tensor(1e-5))
    e = rule.exponent(exact, lists.grads[0].double(), a=1.0, b=b, clamp=clamp)
    # the exponent itself is rounded, which is e ulps of exp(e)
    limit = 2 + e.abs()
    assert (ulps(lists.weights[0], rule.multiply(exact, e)) <= limit).all()


def test_step_counts_from_first_to_millionth_are_right() -> None:
    for step in (0, 1, 9, 99, 999, 9_999, 999_999):
        lists = make_lists(4096, step=step)
        exact = copy(lists)
        lists.step_("adamw", a=0.0, b=0.0)
        by_rule(exact, "adamw", dtype=torch.float64, lr=1e-4, a=0.0, b=0.0)
        step_size = (exact.weights[0] - 0.04).abs().max()
        assert (lists.weights[0] - exact.weights[0]).abs().max() < 1e-6 * step_size


TORCH = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-2, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=1e-2, momentum=0.9, fused=True),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=1e-3, weight_decay=1e-2, momentum=0.9, nesterov=True, fused=True
    ),
}


@pytest.mark.parametrize("base", BASES)
def test_without_a_mirror_step_it_is_torchs_optimizer(base: str) -> None:
    lr = 1e-3
    lists = make_lists(5000, 77, step=0)
    for tensor in (*lists.m, *lists.v):
        tensor.zero_()
    params = [torch.nn.Parameter(w.clone()) for w in lists.weights]
    begin = [w.clone() for w in lists.weights]
    theirs = TORCH[base](params)
    for seed in range(5):
        lists.grads = make_lists(5000, 77, seed=seed + 1).grads
        for param, grad in zip(params, lists.grads, strict=True):
            param.grad = grad.clone()
        theirs.step()
        first = {} if base.startswith("adam") else {"is_first_step": seed == 0}
        lists.step_(base, lr=lr, a=0.0, b=0.0, **first)
    for w, param, before in zip(lists.weights, params, begin, strict=True):
        # each rounds to half an ulp a step, of what the weight was then
        size = torch.maximum(w.abs(), before.abs()).clamp_min(lr)
        limit = OUTLIER_ULPS * 2.0**-23 * size + TORCH_ERROR * lr
        assert ((w - param.detach()).abs() <= limit).all()


# --- masks


@pytest.mark.parametrize("base", ["adamw", "momentum"])
def test_masked_weights_are_plus_zero_and_have_no_momentum(base: str) -> None:
    lists = make_lists(1000, 300)
    lists.masks = [torch.rand(1000).lt(0.5).to(DEVICE), None]
    lists.grads[0][::7] = float("nan")
    lists.grads[0][1::7] = float("inf")
    free = copy(lists)
    free.masks = [None, None]
    lists.step_(base)
    free.step_(base)
    mask = lists.masks[0]
    assert (bits(lists.weights[0])[~mask] == 0).all()
    assert (bits(lists.m[0])[~mask] == 0).all()
    assert torch.equal(bits(lists.weights[0])[mask], bits(free.weights[0])[mask])
    assert torch.equal(bits(lists.m[0])[mask], bits(free.m[0])[mask])
    assert torch.equal(bits(lists.v[0]), bits(free.v[0]))
    assert torch.equal(bits(lists.weights[1]), bits(free.weights[1]))


def test_a_kept_weight_with_a_gradient_that_is_nan_becomes_nan() -> None:
    lists = make_lists(100)
    lists.grads[0][3] = float("nan")
    lists.step_("sgd", lr=0.0, weight_decay=0.0)
    assert lists.weights[0].isnan().nonzero().tolist() == [[3]]


def test_zeros_stay_zero_in_the_mirror_step_and_no_sign_changes() -> None:
    lists = make_lists(4096)
    lists.weights[0][::2] = 0.0
    signs = lists.weights[0].sign()
    lists.step_("sgd", lr=0.0, weight_decay=0.0, a=5e3)
    assert torch.equal(lists.weights[0].sign(), signs)


# --- shapes and places


@pytest.mark.parametrize("block", [64, 1024])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_odd_sizes_and_places_are_stepped_to_their_ends_and_no_further(
    block: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_block_size", lambda _: block)
    sizes = (1, 3, 16, 63, 64, 65, 0, 129)
    lists = make_lists(*sizes)
    expected = copy(lists)
    buffers = []

    def placed(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 64,), 7.0, device=DEVICE).to(tensor.dtype)
        buffers.append((buffer, tensor.numel()))
        view = buffer[16 + offset : 16 + offset + tensor.numel()]
        return view.copy_(tensor)

    masks = [torch.rand(size).lt(0.5).to(DEVICE) for size in sizes]
    expected.masks = masks
    lists.masks = [placed(mask) for mask in masks]
    for name in ("weights", "grads", "m", "v"):
        setattr(lists, name, [placed(tensor) for tensor in getattr(lists, name)])
    lists.step_("adamw")
    alone = [part(expected, i) for i in range(len(sizes))]
    for i, single in enumerate(alone):
        single.step_("adamw")
        assert_same_bits(part(lists, i), single)
    for buffer, size in buffers:
        outside = torch.cat([buffer[: 16 + offset], buffer[16 + offset + size :]])
        assert (outside == torch.full_like(outside, 7.0)).all()


def test_the_memory_order_of_the_weights_is_kept_whatever_the_gradients_have() -> None:
    lists = make_lists(2 * 3 * 4 * 5)
    expected = copy(lists)
    expected.masks = [torch.rand(120).lt(0.5).to(DEVICE)]
    expected.step_("adamw")
    shape = (2, 3, 4, 5)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.view(shape).contiguous(memory_format=torch.channels_last)

    lists.weights, lists.m, lists.v = ([turned(t[0])] for t in (lists.weights, lists.m, lists.v))
    lists.grads = [lists.grads[0].view(shape)]
    lists.masks = [expected.masks[0].view(shape)]
    lists.step_("adamw")
    assert torch.equal(lists.weights[0], expected.weights[0].view(shape))
    assert torch.equal(lists.m[0], expected.m[0].view(shape))


def test_one_launch_steps_all_tensors_of_the_same_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    run = gpu._run
    monkeypatch.setattr(gpu, "_run", lambda *args: (launches.append(args[0]), run(*args)))
    lists = make_lists(100, 200, 300, 400)
    lists.grads[3] = lists.grads[3].bfloat16()
    lists.step_("adamw")
    assert len(launches) == 2


def test_tensors_that_move_between_steps_are_found_again() -> None:
    lists = make_lists(500, 300)
    expected = copy(lists)
    for _ in range(3):
        lists.grads = [grad.clone() for grad in lists.grads]
        lists.v[0] = lists.v[0].clone()
        lists.step_("adamw")
        expected.step_("adamw")
    assert_same_bits(lists, expected)


# --- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_weight_is_its_master_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    lists = make_lists(3000)
    lists.weights[0][:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3.3e38])
    expected = copy(lists)
    lists.rounded = [torch.zeros(3000, dtype=dtype, device=DEVICE)]
    lists.step_("adamw")
    expected.step_("adamw")
    assert torch.equal(bits(lists.weights[0]), bits(expected.weights[0]))
    wanted = lists.weights[0].to(dtype)
    is_nan = wanted.isnan()
    assert torch.equal(lists.rounded[0].isnan(), is_nan)
    assert torch.equal(bits(lists.rounded[0])[~is_nan], bits(wanted)[~is_nan])


def test_ties_between_bfloat16_numbers_go_to_the_even_one() -> None:
    lists = make_lists(4)
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], dtype=torch.int32)
    lists.weights = [halves.view(torch.float32).to(DEVICE)]
    lists.rounded = [torch.zeros(4, dtype=torch.bfloat16, device=DEVICE)]
    lists.step_("sgd", lr=0.0, weight_decay=0.0, a=0.0, b=0.0)
    assert bits(lists.rounded[0]).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_gradient_counts_as_what_it_says(dtype: torch.dtype) -> None:
    lists = make_lists(3000)
    lists.grads = [lists.grads[0].to(dtype)]
    expected = copy(lists)
    expected.grads = [expected.grads[0].float()]
    lists.step_("adamw")
    expected.step_("adamw")
    assert_same_bits(lists, expected)


def test_stochastic_rounding_keeps_the_mean_and_takes_a_neighbour() -> None:
    lists = make_lists(1 << 14)
    value = 1.0 + 2.0**-7 * 0.3  # between two bf16 numbers, nearer to the lower one
    lists.weights = [torch.ones(1 << 14, dtype=torch.bfloat16, device=DEVICE)]
    lists.grads = [torch.full((1 << 14,), 1.0 - value, device=DEVICE)]
    lists.step_("sgd", lr=1.0, weight_decay=0.0, a=0.0, b=0.0, seed=5)
    assert set(lists.weights[0].tolist()) == {1.0, 1.0 + 2.0**-7}
    share = (lists.weights[0] > 1).double().mean()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / (1 << 14)) ** 0.5


def test_stochastic_rounding_repeats_by_seed_step_and_place() -> None:
    def rounded(seed: int, step: int, tensors: int = 1) -> list[Tensor]:
        lists = make_lists(*[2000] * tensors, step=step)
        lists.weights = [lists.weights[0].bfloat16().clone() for _ in range(tensors)]
        lists.grads = [lists.grads[0]] * tensors
        lists.step_("sgd", seed=seed)
        return lists.weights

    first = rounded(1, 3)[0]
    assert torch.equal(first, rounded(1, 3)[0])
    assert not torch.equal(first, rounded(2, 3)[0])
    assert not torch.equal(first, rounded(1, 4)[0])
    assert not torch.equal(first, rounded(1, 3, tensors=2)[1])


# --- numbers on the device


def test_numbers_mean_the_same_as_floats_lists_and_tensors() -> None:
    sizes = (100, 200, 300)
    lists = make_lists(*sizes)
    lists.grads[1] = lists.grads[1].bfloat16()  # two launches, which share the lists
    tensors, other = copy(lists), copy(lists)

    def on_device(x: Any) -> Tensor:
        return torch.tensor(x, device=DEVICE)

    lists.step_("adamw", lr=1e-3, a=[0.1, 0.2, 0.3], b=1e-4)
    tensors.step_("adamw", lr=on_device(1e-3), a=on_device([0.1, 0.2, 0.3]), b=on_device(1e-4))
    assert_same_bits(tensors, lists)
    for i, a in enumerate([0.1, 0.2, 0.3]):
        alone = copy(other)
        alone.step_("adamw", lr=1e-3, a=a, b=1e-4)
        assert torch.equal(alone.weights[i], lists.weights[i])


def test_step_counts_may_differ_and_lie_on_the_cpu() -> None:
    lists = make_lists(100, 200)
    lists.steps[1] += 7
    expected = copy(lists)
    lists.steps = [step.cpu() for step in lists.steps]
    lists.step_("adamw")
    expected.step_("adamw")
    assert_same_bits(lists, expected)


# --- measuring


def test_measured_sums_are_those_of_the_cpu_backend_and_change_no_bit() -> None:
    lists = make_lists(5000, 300, grad_size=0.1)
    lists.masks = [torch.rand(5000).lt(0.5).to(DEVICE), None]
    lists.weights[0][:50] = 0.0
    lists.grads[0][:50] = 0.0
    lists.m[0][:50] = 0.0
    expected, reference = copy(lists), copy(lists)
    for name in ("weights", "grads", "m", "v", "steps", "masks"):
        setattr(reference, name, [t if t is None else t.cpu() for t in getattr(reference, name)])
    ours = torch.zeros(cpu.NUM_SUMS, dtype=torch.float64)
    theirs = torch.zeros(cpu.NUM_SUMS, dtype=torch.float64)
    numbers: dict[str, Any] = {"a": [1.0, 2.0], "b": 1e-6, "clamp": 0.1}
    lists.step_("adamw", sums=ours, **numbers)
    expected.step_("adamw", **numbers)
    assert_same_bits(lists, expected)
    reference.step_("adamw", module=cpu, sums=theirs, **numbers)
    assert ours[0] == pytest.approx(float(theirs[0]), rel=1e-4)
    assert ours[1] == pytest.approx(float(theirs[1]), abs=3)
    assert ours[2] == pytest.approx(float(theirs[2]), abs=3)
    assert ours[3] == theirs[3]
    assert ours[4] == pytest.approx(float(theirs[4]))


# --- the house


def test_triton_is_imported_by_the_first_step_and_not_before() -> None:
    code = "import sys, hamcli.optim.gpu; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_weight_of_float64_or_with_gaps_is_not_taken() -> None:
    assert gpu.is_usable(torch.zeros(3, 4, device=DEVICE))
    assert gpu.is_usable(torch.zeros(3, 4, device=DEVICE).t())
    assert not gpu.is_usable(torch.zeros(3, 4, device=DEVICE)[:, ::2])
    assert not gpu.is_usable(torch.zeros(3, 4, device=DEVICE, dtype=torch.float64))

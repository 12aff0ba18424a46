"""The benchmark of the step on small shapes: what is there, not how long it takes."""

import json
import math

import pytest
import torch

from hamcli import native
from hamcli.benchmarking import step as benchmark
from hamcli.benchmarking.step import bench_step
from hamcli.optim import fused, jit

SHAPES = [(33, 17), (17,), (4, 3, 3, 3)]
PLAIN = ["torch fused", "blocks", "foreach", "published"]
NATIVE = ["native", "native, masked", "native, large"]
NUMBA = ["numba", "numba, masked", "numba, large"]


def without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "_settled", native.Status(False, "off for a test"))


def without_numba(monkeypatch):
    monkeypatch.setattr(jit, "_settled", native.Status(False, "also off"))


@pytest.mark.parametrize("base", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_that_runs_here_has_finite_ratios(base, dtype):
    found = bench_step(SHAPES, base=base, dtype=dtype, rounds=3)
    names = [one.name for one in found.variants]
    here = (NATIVE if fused.is_usable() else []) + (NUMBA if jit.is_usable() else [])
    assert sorted(names) == sorted(PLAIN + here)
    for one in found.variants:
        assert 0 < one.ratio < math.inf
        assert 0 < one.fastest_ratio < math.inf
        assert 0 < one.ratio_spread[0] <= one.ratio_spread[1] < math.inf
        assert one.spread[0] <= one.seconds <= one.spread[1]
        assert one.extra_bytes is None or one.extra_bytes >= 0
    assert found.ratio("torch fused") == 1.0
    assert found.num_weights == 33 * 17 + 17 + 108
    assert (found.base, found.dtype) == (base, str(dtype).partition(".")[2])
    assert found.training_seconds is found.step_share is None


def test_the_record_is_json_and_comes_back_the_same():
    found = bench_step(SHAPES, rounds=2).as_json()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == json.loads(json.dumps(found))
    assert [one["name"] for one in again["variants"]] == [one["name"] for one in found["variants"]]
    assert again["exponents"]["mean"] == found["exponents"]["mean"]


def test_the_share_of_training_is_that_of_both_together():
    calls = []
    found = bench_step(SHAPES, rounds=3, train=lambda: calls.append(0))
    assert len(calls) == 4  # one to warm up
    ours = found.ours.seconds
    assert found.step_share == pytest.approx(ours / (ours + found.training_seconds))


def test_without_the_extension_numba_is_ours(monkeypatch):
    if not jit.is_usable():
        pytest.skip(jit.status().reason)
    without_the_extension(monkeypatch)
    assert bench_step(SHAPES, rounds=1, only=["numba", "blocks"]).ours.name == "numba"


def test_without_the_extension_and_numba_the_blocks_are_ours(monkeypatch):
    without_the_extension(monkeypatch)
    without_numba(monkeypatch)
    found = bench_step(SHAPES, rounds=1)
    assert [one.name for one in found.variants] == PLAIN
    assert found.ours.name == "blocks"
    assert (found.native, found.numba) == ("off for a test", "also off")


def test_only_the_forms_that_are_asked_for_run():
    found = bench_step(SHAPES, rounds=1, only=["foreach"])
    assert [one.name for one in found.variants] == ["torch fused", "foreach"]
    assert found.ours is None


def test_exponents_are_those_of_matrices_and_move_every_weight():
    found = bench_step(SHAPES, rounds=1, only=[]).exponents
    assert found.moved_fraction == 1.0
    assert 0 < found.mean < found.max
    assert bench_step([(7,)], rounds=1, only=[]).exponents is None


@pytest.mark.parametrize("base", ["adamw", "adam", "sgd"])
def test_every_form_takes_the_same_step(base):
    """What is compared is the same work: equal weights but for the decay that foreach adds."""

    def stepped(how):
        on = benchmark._Weights(SHAPES, base, torch.float32)
        on.g = [g.mul_(1e3) for g in on.g]
        how(on)
        return torch.cat([w.flatten() for w in on.w])

    from hamcli.optim import cpu

    alpha = benchmark.LR * benchmark.ALPHA
    blocks = stepped(lambda on: on.ham_step(cpu, a=alpha))
    bare = stepped(lambda on: on.ham_step(cpu, a=0.0))
    foreach = stepped(lambda on: on.foreach_step())
    published = stepped(lambda on: on.published_step())
    moved = (blocks - bare).abs()
    assert moved.max() > 1e-5
    decay = benchmark.LR * benchmark.BETA * 0.3
    for other in (foreach, published):
        assert (blocks - other).abs().max() < 1e-7 + decay

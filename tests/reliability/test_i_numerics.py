"""I: what is not finite is never saved, and the mirror step does what it says in every dtype."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamcli import HAM
from tests.oracles.safetensors_reader import read_folder
from tests.reliability import judge, tiny
from tests.reliability.assertions import assert_clean_error
from tests.reliability.server import Outcome, Server

HERE = "tests.reliability.test_i_numerics"
STEPS, AT = 20, 7


def long_job(server: Server, out: Path, *more: str) -> list[str]:
    return tiny.sparsify(server.tiny, out, "--set", f"training.steps={STEPS}", *more)


def spoil() -> None:
    """In a case: loss or gradient of one step is spoilt, as SPOIL says."""
    from hamcli import training

    kind, at = os.environ["SPOIL"].split()
    whole = training._accumulate

    def accumulate(engine: Any, hooks: Any, step: int, *args: Any) -> float:
        loss = whole(engine, hooks, step, *args)
        if step != int(at):
            return loss
        last = [param for param in engine.model.parameters() if param.grad is not None][-1]
        if kind == "loss":
            return float("nan")
        last.grad.view(-1)[0] = float(kind)
        return loss

    training._accumulate = accumulate  # type: ignore[assignment]


def assert_diverged(done: Outcome, out: Path, at: int) -> None:
    """Code 7 in that step, told; the checkpoints before it are whole and finite; no OUT."""
    assert_clean_error(done, 7, f"E701.*step {at}.*loss")
    steps, wrong = judge.sound_steps(out)  # finite values are part of what it looks at
    assert wrong == []
    assert max(steps, default=0) <= at - 1
    assert not out.exists()
    assert not list(out.parent.rglob(".stage-*"))


# ---- I1, I2 ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "loss"])
def test_I1_nan_at_step(server: Server, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    done = server.run(long_job(server, out), before=f"{HERE}:spoil", env={"SPOIL": f"{kind} {AT}"})
    assert_diverged(done, out, AT)
    assert judge.sound_steps(out)[0][-1] == AT - 1
    if kind != "loss":
        assert ".weight" in done.stderr
    # the same command goes on once the cause is gone, to the bytes of a run without it
    whole = tmp_path / "whole"
    assert server.run(long_job(server, whole)).code == 0
    assert server.run(long_job(server, out, "--resume")).code == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_I1_a_learning_rate_of_a_million(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--set", "optimizer.lr=1e30", "--set", "optimizer.max_grad_norm=0"]
    done = server.run(long_job(server, out, *more))
    assert_clean_error(done, 7, "E70[12]")
    assert judge.sound_steps(out)[1] == []
    assert not out.exists()


@pytest.mark.slow
def test_I1_a_run_that_does_not_look_is_flagged(server: Server, tmp_path: Path) -> None:
    """The control: with both looks taken out, the judge finds what is not finite."""
    out = tmp_path / "out"
    done = server.run(
        long_job(server, out, "--keep-run"), before=f"{HERE}:blind", env={"SPOIL": f"nan {AT}"}
    )
    with pytest.raises(AssertionError):
        assert_diverged(done, out, AT)


def blind() -> None:
    """In a case: nobody looks whether a gradient is finite."""
    from hamcli import training

    spoil()
    training.refuse_non_finite = lambda *_, **__: None  # type: ignore[assignment]


@pytest.mark.nightly
def test_I2_nan_never_saved(server: Server, tmp_path: Path, figure: Any) -> None:
    draw = np.random.default_rng(0)
    files = values = bad = 0
    for number in range(100):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        kind, at = draw.choice(["nan", "inf", "-inf", "loss"]), int(draw.integers(1, STEPS + 1))
        done = server.run(
            long_job(server, out), before=f"{HERE}:spoil", env={"SPOIL": f"{kind} {at}"}
        )
        assert_diverged(done, out, at)
        for folder in (tmp_path / str(number)).rglob("step-*"):
            for tensor in read_folder(folder).values():
                values += tensor.size
                bad += int(np.count_nonzero(~np.isfinite(tensor.astype("f8"))))
            files += 1
    figure(runs=100, checkpoints=files, values=values, not_finite=bad)
    assert bad == 0


# ---- I3 ----


def raise_loss() -> None:
    """In a case: from step AT on the loss is RAISE times what it is."""
    from hamcli import training

    whole = training._accumulate

    def accumulate(engine: Any, hooks: Any, step: int, *args: Any) -> float:
        return whole(engine, hooks, step, *args) * (float(os.environ["RAISE"]) if step >= AT else 1)

    training._accumulate = accumulate  # type: ignore[assignment]


@pytest.mark.slow
def test_I3_divergence_limit(server: Server, tmp_path: Path) -> None:
    """A finite loss far above that of a model without weights ends the run in its 20th step."""
    out, hook = tmp_path / "out", f"{HERE}:raise_loss"
    job = [*long_job(server, out), "--set", "training.steps=30"]
    end = AT + 20 - 1
    done = server.run(job, before=hook, env={"RAISE": "1e6"})
    assert_clean_error(done, 7, f"E703.*steps {AT} to {end}.*every target weight zero")
    assert judge.sound_steps(out)[1] == []
    assert not out.exists()
    # steps before a stop count as well: a run that goes on is refused at once
    done = server.run([*job, "--resume"], before=hook, env={"RAISE": "1e6"})
    assert_clean_error(done, 7, f"E703.*to {end + 1}")


@pytest.mark.slow
def test_I3_a_loss_within_the_limit_goes_on(server: Server, tmp_path: Path) -> None:
    job = [*long_job(server, tmp_path / "out"), "--set", "training.steps=30"]
    assert server.run(job, before=f"{HERE}:raise_loss", env={"RAISE": "3"}).code == 0


# ---- I4 ----


@pytest.mark.parametrize("lr", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_I4_ham_effective(lr: float, dtype: torch.dtype) -> None:
    """Decay alone for 1,000 steps: |w| falls by exp(-sum of lr * beta), the narrow dtypes too."""
    beta, steps = 1.0, 1000
    param = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64).reshape(8, 8).to(dtype))
    before = param.detach().double().clone()
    optimizer = HAM(
        [param], base="sgd", lr=lr, weight_decay=0.0, alpha=0.0, beta=beta, scaling="raw",
        backend="rule",
    )  # fmt: skip
    for _ in range(steps):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    exact = before * np.exp(-steps * lr * beta)
    found = param.detach().double()
    if dtype is torch.float32:
        assert float((found / exact - 1).abs().max()) < 1e-5
    else:
        # an ulp of the dtype: the steps are gathered in float32, and what is written is rounded
        ulp = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-10
        subnormal = 0.0 if dtype is torch.bfloat16 else 2.0**-24
        assert bool(((found - exact).abs() <= ulp * exact + subnormal).all())


@pytest.mark.slow
def test_I4_the_report_tells_whether_ham_moved_anything(server: Server, tmp_path: Path) -> None:
    done = server.run(tiny.sparsify(server.tiny, tmp_path / "on", "--json"))
    assert json.loads(done.stdout)["training"]["ham_moved_fraction"] > 0.5
    off = ["--set", "optimizer.ham.alpha=0", "--set", "optimizer.ham.beta=0"]
    done = server.run(tiny.sparsify(server.tiny, tmp_path / "off", "--json", *off))
    assert not json.loads(done.stdout)["training"]["ham_moved_fraction"]


# ---- I5 ----


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "ulp"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_I5_cast_out(server: Server, tmp_path: Path, dtype: str, ulp: float) -> None:
    """Zeros stay, no sign flips, half an ulp at most; more zeros only by underflow."""
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    assert server.run(tiny.sparsify(server.tiny, wide)).code == 0
    more = ["--set", f"export.dtype={dtype}", "--json"]
    done = server.run(tiny.sparsify(server.tiny, narrow, *more))
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    before, after = read_folder(wide), read_folder(narrow)
    zeros = 0
    for name, values in before.items():
        cast = after[name].astype("f8")
        assert not cast[values == 0].any(), name
        assert (np.sign(cast) * np.sign(values) >= 0).all(), name
        normal = np.abs(values) > 1e-4
        assert np.abs(cast[normal] / values[normal] - 1).max(initial=0) <= ulp, name
        if name in {one["name"] for one in report["tensors"]}:
            zeros += int((cast == 0).sum())
    assert report["sparsity"]["zeros"] == zeros


# ---- I6 ----


@pytest.mark.nightly
def test_I6_oom(server: Server, tmp_path: Path, figure: Any) -> None:
    """Too little address space, anywhere between none and enough: one line and code 5."""
    more = ["--set", "training.batch_size=2048", "--set", "training.steps=2"]
    codes: list[int] = []
    while codes[-2:] != [0, 0]:
        out = tmp_path / str(len(codes)) / "out"
        out.parent.mkdir()
        limit = len(codes) * 8 * 2**20
        done = server.run(tiny.sparsify(server.tiny, out, *more), limit_bytes=limit)
        codes.append(done.code)
        if done.code:
            assert_clean_error(done, 5, "E543|memory")
            assert judge.sound_steps(out)[1] == []
            assert not out.exists()
    figure(limits=len(codes), refused=codes.count(5), done=codes.count(0))
    assert codes.count(5) >= 10

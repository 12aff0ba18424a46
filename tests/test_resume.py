"""A run that is stopped goes on to the bytes of the run that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hamcli.errors import Preempted, UsageError
from hamcli.pipeline import sparsify
from tests.stopping import StopsAt

RESNET = str(Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny")
SETTINGS = {
    "training.batch_size": 4,
    "training.accumulation": 2,
    "training.checkpoint_every": 4,
    "evaluation.examples": 16,
}


def run(out, **more):
    words = {"model": RESNET, "target": 0.8, "steps": 10, "settings": SETTINGS}
    return sparsify(out=out, **{**words, **more})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "out"
    run(folder)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [1, 5, 9])
def test_going_on_after_any_step_gives_the_same_bytes(reference, tmp_path, step):
    with pytest.raises(Preempted, match=f"saved step {step}"):
        run(tmp_path / "out", progress=StopsAt(step))
    assert not (tmp_path / "out").exists()
    report = run(tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == reference
    assert report.training.curves.step == tuple(range(1, 11))
    assert not (tmp_path / "out.run").exists()


def test_another_seed_gives_other_bytes(reference, tmp_path):
    run(tmp_path / "out", seed=1)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != reference


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, code):
    words = ["sparsify", RESNET, "--target", "0.9", "--out", "out", "--steps", "100000"]
    words += ["--set", "training.batch_size=2", "--set", "evaluation.examples=8"]
    child = subprocess.Popen(
        [sys.executable, "-m", "hamcli", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in child.stderr:
        if "step " in line:
            break
    time.sleep(0.2)
    child.send_signal(number)
    rest = child.communicate(timeout=120)[1]
    assert child.returncode == code
    assert "to go on: ham sparsify" in rest
    assert "--resume" in rest
    assert list((tmp_path / "out.run" / "checkpoints").iterdir())


def test_an_output_in_use_is_locked(tmp_path):
    words = [sys.executable, "-m", "hamcli", "sparsify", RESNET, "--target", "0.9", "--out", "out"]
    words += ["--steps", "100000", "--set", "training.batch_size=2"]
    words += ["--set", "evaluation.examples=8"]
    more = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    first = subprocess.Popen(words, stderr=subprocess.PIPE, **more)
    for line in first.stderr:
        if "step " in line:
            break
    second = subprocess.run(words, capture_output=True, timeout=120, check=False, **more)
    assert second.returncode == 6
    assert second.stdout == ""
    assert "ham: error[HAM-E601]: another run holds the output" in second.stderr
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 75


def test_the_same_run_on_a_finished_folder_changes_nothing(tmp_path):
    run(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    report = run(tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert report.to_json() == (tmp_path / "out" / "report.json").read_text()
    assert not (tmp_path / "out.run").exists()


def test_another_run_on_a_finished_folder_is_refused(tmp_path):
    run(tmp_path / "out", steps=2)
    with pytest.raises(UsageError, match="E112"):
        run(tmp_path / "out", steps=3)

"""What trackers are told; TensorBoard's file is read back."""

from pathlib import Path

import pytest

from hamcli.errors import UsageError
from hamcli.pipeline import sparsify
from hamcli.progress import Silent, StepRecord
from hamcli.tracking import Trackers, flat_settings, refuse_missing

RESNET = str(Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny")
SETTINGS = {
    "training.batch_size": 4,
    "training.trackers": ["tensorboard"],
    "evaluation.examples": 8,
}


class Hears(Silent):
    def __init__(self):
        self.heard = []

    def warn(self, text):
        self.heard.append(text)


def events(folder):
    """Tag to the (step, value) pairs of all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {
        tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_holds_every_step_and_the_result(tmp_path):
    report = sparsify(model=RESNET, target=0.8, steps=3, out=tmp_path / "out", settings=SETTINGS)
    found = events(tmp_path / "out.logs" / "ham")
    curves = report.training.curves
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    assert [value for _, value in found["train/loss"]] == pytest.approx(list(curves.loss))
    assert found["sparsity/masked"][-1] == (3, pytest.approx(0.8))
    assert found["result/zeros"] == [(3, report.sparsity.zeros)]
    assert found["result/sparse"] == [(3, pytest.approx(report.quality.sparse))]
    assert not any("events" in path.name for path in (tmp_path / "out").rglob("*"))


def test_a_tracker_that_is_not_installed_is_one_line():
    refuse_missing(["tensorboard"])
    with pytest.raises(UsageError, match=r"E247.*training.trackers: dvclive .*pip install dvclive"):
        refuse_missing(["tensorboard", "dvclive"])


def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path):
    class Broken:
        def log(self, values, step):
            raise ConnectionError("no network")

    hears = Hears()
    trackers = Trackers((), tmp_path / "out", {}, hears)
    trackers._trackers = [Broken()]
    for step in (1, 2):
        trackers.step(StepRecord(step, 0.5, 0.1, 1e-3, 1.0))
    assert hears.heard == ["a tracker failed and is left out: ConnectionError: no network"]


def test_settings_are_flat_and_plain():
    recipe = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.999], "ham": {"clamp": None}}, "x": True}
    assert flat_settings(recipe) == {
        "optimizer.lr": 0.1, "optimizer.betas": "[0.9, 0.999]", "optimizer.ham.clamp": "None",
        "x": True,
    }  # fmt: skip

"""A finished folder is left as it is. How a stopped run goes on: tests/reliability."""

from pathlib import Path

import pytest

from hamcli.errors import UsageError
from hamcli.pipeline import sparsify

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

"""What a run says at its end of what it made."""

from pathlib import Path

import pytest

from hamcli.pipeline import sparsify
from hamcli.progress import Silent

RESNET = str(Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny")


class Watcher(Silent):
    """Remembers warnings."""

    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


@pytest.mark.parametrize(("alpha", "is_told"), [(1e-12, True), (200.0, False), (0.0, False)])
def test_a_mirror_step_that_moves_nothing_is_told_now_and_in_the_report(alpha, is_told, tmp_path):
    settings = {"training.batch_size": 4, "evaluation.examples": 8, "evaluation.speed": "off"}
    settings |= {"optimizer.ham.alpha": alpha, "optimizer.ham.beta": 0.0}
    watcher = Watcher()
    report = sparsify(
        model=RESNET, target=0.5, steps=1, out=tmp_path / "out", settings=settings, progress=watcher
    )
    for told in (watcher.warnings, report.warnings):
        assert any("HAM did nothing" in line for line in told) == is_told


@pytest.mark.parametrize(("lr", "is_told"), [(1.0, True), (1e-8, False)])
def test_training_that_did_harm_is_told_beside_pruning_alone(lr, is_told, tmp_path):
    settings = {"training.batch_size": 16, "evaluation.examples": 64, "evaluation.speed": "off"}
    settings |= {"optimizer.lr": lr, "optimizer.warmup": 0.0, "optimizer.schedule": "constant"}
    watcher = Watcher()
    report = sparsify(
        model=RESNET, target=0.3, steps=2, out=tmp_path / "out", settings=settings, progress=watcher
    )
    quality = report.quality
    assert (quality.sparse < quality.one_shot - 0.05) == is_told
    for told in (watcher.warnings, report.warnings):
        lines = [line for line in told if line.startswith("training did harm: ")]
        assert len(lines) == is_told
        assert all(f"{quality.one_shot:.4g}" in line for line in lines)

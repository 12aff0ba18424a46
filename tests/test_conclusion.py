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

"""Words about what was measured."""

import pytest

from hamcli.benchmarking.model import warn_if_busy
from hamcli.progress import Silent


class Heard(Silent):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


@pytest.mark.parametrize(
    ("load", "cores", "warns"),
    [(0.2, 2, False), (1.5, 2, True), (3.0, 16, False), (9.0, None, False)],
)
def test_a_busy_machine_is_named(load, cores, warns):
    heard = Heard()
    warn_if_busy(heard, load, cores)
    assert len(heard.warnings) == warns
    assert all(f"load {load}" in text for text in heard.warnings)

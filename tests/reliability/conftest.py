import sys
import tempfile
from pathlib import Path

import pytest

from tests.reliability.server import Server
from tests.runstate.conftest import tmp_path  # noqa: F401  in memory: thousands of fsyncs

if not sys.platform.startswith("linux"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def server():
    """One warm process for every case of the session."""
    with tempfile.TemporaryDirectory(prefix="ham-reliability-") as folder:
        Path(folder).chmod(0o755)  # cases of another user read the tiny models
        with Server(Path(folder)) as started:
            yield started


@pytest.fixture(scope="session")
def tiny_folder(server):
    """Of the tiny models `untied` and `tied`, `data.jsonl` and `recipe.yaml`; never written to."""
    return server.tiny

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.reliability.server import Server
from tests.reliability.trials import Job

if not sys.platform.startswith("linux"):
    collect_ignore_glob = ["test_*.py"]

FIGURES = "HAM_RELIABILITY_FIGURES"  # a file that each named test adds its figure to


def in_memory():
    """A folder in memory where there is one: thousands of fsyncs cost minutes elsewhere."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="ham-reliability-", dir=where)


@pytest.fixture
def tmp_path():
    """In memory."""
    with in_memory() as folder:
        yield Path(folder).resolve()


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


@pytest.fixture(scope="session")
def memory():
    """A folder for jobs."""
    with in_memory() as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="session")
def job(server, memory):
    """The tiny job and the bytes of its uninterrupted run."""
    return Job(server, memory / "tiny")


@pytest.fixture
def figure(request):
    """Call it with what a test has counted; written where `HAM_RELIABILITY_FIGURES` says."""
    began = time.monotonic()
    told = []
    yield lambda **counted: told.append(counted)
    if (path := os.environ.get(FIGURES)) and told:
        name = request.node.name
        found = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        found[name] = {**told[-1], "seconds": round(time.monotonic() - began, 1)}
        Path(path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")

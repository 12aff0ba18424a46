import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path():
    """A folder in memory where there is one: thousands of fsyncs cost minutes elsewhere."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ham-tests-", dir=where) as folder:
        yield Path(folder).resolve()

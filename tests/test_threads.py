"""How threads wait: what the command line sets, and that it reaches libgomp before torch does."""

import os
import subprocess
import sys

import pytest

from hamcli.threads import SPINS, wait_briefly


def test_threads_sleep_soon_where_nobody_said_otherwise():
    environment = {"OTHER": "1"}
    wait_briefly(environment)
    assert environment == {"OTHER": "1", "GOMP_SPINCOUNT": SPINS}


@pytest.mark.parametrize("said", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_a_users_own_word_stands(said):
    environment = dict(said)
    wait_briefly(environment)
    assert environment == said


def test_the_command_line_says_it_before_torch_is_loaded(tmp_path):
    code = (
        "import ctypes, os, sys\n"
        "from hamcli.cli import main\n"
        "try:\n    main(['recipe', 'list'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.getenv.restype = ctypes.c_char_p\n"
        "print(libc.getenv(b'GOMP_SPINCOUNT').decode())"
    )
    known = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=known, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == SPINS

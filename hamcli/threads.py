"""How the threads of one process wait for each other; set before torch is loaded."""

import os
from collections.abc import MutableMapping

SPINS = "5000"
"""Turns that a thread of libgomp waits awake, some microseconds; its own count is 300,000.

Where another process holds a core, a thread that waits awake for one that does not run keeps it
from running: with libgomp's count a step of training took 1.9 times as long there, and alone as
long (benchmarks/thread_waiting.py).
"""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads of OpenMP sleep soon, unless the user has said how they are to wait.

    Args:
        environment: Read by libgomp when torch loads it; no effect after that.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPINS

"""Light forks for cases that need no torch: a status and one JSON answer."""

import json
import os
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[int], None]) -> tuple[int, dict[str, Any]]:
    """Run `work` in a fork; its exit status (minus the signal) and what it told."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        told = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(told) if told else {}

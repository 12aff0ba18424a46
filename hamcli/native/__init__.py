"""The C++ extension: the fused step on a CPU, counts for exact selection, sparse products.

`operators` is the way in. It builds the extension on first use and gives None where that is not
possible, for whatever reason; the callers have slower forms of everything. `operators_if_built` is
for those to whom it is not worth a minute of building. `HAM_NATIVE=0` in the environment turns both
off. Imports nothing else of ours, and torch only when asked for them.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hamcli.native.building import CannotBuild, build, find_built


@dataclass(frozen=True, slots=True)
class Status:
    """Whether the extension is in use.

    Attributes:
        is_available: Whether `operators` gives them.
        reason: One line: what is in use, or why it is not.
    """

    is_available: bool
    reason: str


def operators() -> Any | None:
    """The extension's operators, `torch.ops.ham_native`; None where they cannot be had."""
    if not prepare().is_available:
        return None
    import torch

    return torch.ops.ham_native


def operators_if_built() -> Any | None:
    """The same, if this process or an earlier one has built them."""
    return operators() if _settled is not None or _is_built() else None


@functools.cache
def _is_built() -> bool:
    return os.environ.get("HAM_NATIVE", "1") != "0" and find_built() is not None


def status() -> Status:
    """Whether the extension is in use, and why not; builds it if nobody has asked yet."""
    return prepare()


_settled: Status | None = None


def prepare(note: Callable[[str], None] | None = None) -> Status:
    """Build and load the extension, if that has not been tried in this process.

    Args:
        note: Told in one line when a build begins: it takes about a minute.
    """
    global _settled
    if _settled is None:
        _settled = _settle(note)
    return _settled


def _settle(note: Callable[[str], None] | None) -> Status:
    if os.environ.get("HAM_NATIVE", "1") == "0":
        return Status(False, "native step off: HAM_NATIVE=0")
    import torch

    from hamcli.native.rounding import rounds_as_torch

    try:
        torch.ops.load_library(str(build(note)))  # type: ignore[no-untyped-call]  # torch's own
    except CannotBuild as error:
        return Status(False, f"native step off: {error}")
    except OSError as error:
        return Status(False, f"native step off: the library cannot be loaded: {error}")
    if not rounds_as_torch(torch.ops.ham_native):
        return Status(False, "native step off: its base steps are not torch's here, bit for bit")
    return Status(True, f"native step on: {torch.backends.cpu.get_cpu_capability()}")

"""Faults at the N-th call that changes a folder: a signal, or an error of the disk.

Blind to what makes system calls without libc, as the Rust of safetensors and tokenizers does.
"""

import errno
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
NEVER = 10**9


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at the call number `at`, counted from 1, below a path that begins so.

    With neither `signal` nor `error` calls are only counted and listed.
    """

    below: Path
    at: int = NEVER
    signal: int = 0
    error: int = 0
    lasts: bool = False
    """Whether all later calls that need space fail too."""

    def words(self) -> dict[str, object]:
        """As sent to the fork server."""
        how = 0 if not self.error else 2 if self.lasts else 1
        number = self.error or self.signal or signal.SIGKILL
        return {"below": str(self.below), "at": self.at, "how": how, "number": int(number)}


def killed(below: Path, at: int) -> Fault:
    """SIGKILL just before the call."""
    return Fault(below, at, signal=signal.SIGKILL)


def full(below: Path, at: int) -> Fault:
    """The disk is full from that call on."""
    return Fault(below, at, error=errno.ENOSPC, lasts=True)


def broken(below: Path, at: int) -> Fault:
    """The disk fails in that one call."""
    return Fault(below, at, error=errno.EIO)


def build(folder: Path) -> Path | None:
    """The library to preload; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "faults.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, check=False, capture_output=True)
    return library if done.returncode == 0 else None

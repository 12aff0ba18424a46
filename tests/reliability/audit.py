"""The order of fsync and rename, read from a trace of system calls.

LevelDB's rule: what is renamed into place was synced after its last write, names too, and the
folder that got the name is synced before the next commit.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

CALL = re.compile(r"^(?:\[?\w* ?\d*\]? *)?(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
WRITES = {"write", "pwrite64", "writev", "ftruncate"}
RENAMES = ("rename", "renameat", "renameat2")
TRACED = ("openat", *sorted(WRITES), "fsync", "fdatasync", *RENAMES, "mkdir", "mkdirat")


def traced(command: Sequence[str], trace: Path, *more: str, **options: object) -> int:
    """Run a command under strace; its exit code. Skips where strace is missing or forbidden."""
    import pytest

    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    watch = ["strace", "-f", "-y", "-s", "4096", "-o", str(trace), "-e"]
    done = subprocess.run(
        [*watch, f"trace={','.join(TRACED)}", *more, *command],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]  # those of subprocess.run
    )
    if not trace.exists() or "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    return int(done.returncode)


class Audit:
    """What a trace did below one folder."""

    def __init__(self, below: Path) -> None:
        self.below = str(below)
        self.dirty: set[str] = set()  # files with bytes, folders with names, not synced yet
        self.unsettled: set[str] = set()  # folders that got a committed name, not synced yet
        self.faults: list[str] = []
        self.commits: list[str] = []

    def read(self, line: str) -> None:
        """A line of the trace."""
        found = CALL.match(line)
        if not found or int(found[3]) < 0:
            return
        call, text = found[1], found[2]
        named = [one for one in re.findall(r'"([^"]*)"', text) if one.startswith(self.below)]
        handle = re.match(r"\d+<([^>]*)>", text)
        if call in WRITES and handle and handle[1].startswith(self.below):
            self.dirty.add(handle[1])
        elif call in ("fsync", "fdatasync") and handle:
            self.dirty.discard(handle[1])
            self.unsettled.discard(handle[1])
        elif call in ("mkdir", "mkdirat", "openat") and named:
            if "O_CREAT" in text or call != "openat":
                self.dirty |= {named[0], str(Path(named[0]).parent)}
        elif call in RENAMES and len(named) == 2:
            self.rename(*named)

    def rename(self, old: str, new: str) -> None:
        """Within a stage it moves what is unsynced; out of one it commits; into one it discards."""
        below_old = {path for path in self.dirty if path == old or path.startswith(old + "/")}
        self.dirty -= below_old
        if ".stage-" in new:
            if ".stage-" in old:
                self.dirty |= {new + path.removeprefix(old) for path in below_old}
                self.dirty.add(str(Path(new).parent))
            return
        self.settle()
        self.commits.append(new)
        self.faults += [f"{path} not synced before it became {new}" for path in below_old]
        self.unsettled.add(str(Path(new).parent))

    def settle(self) -> None:
        """A commit must be durable before the next one, and in the end."""
        self.faults += [f"{path} not synced after a rename" for path in self.unsettled]
        self.unsettled.clear()

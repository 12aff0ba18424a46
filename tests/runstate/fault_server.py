"""Lives a tiny run once per line of stdin, in a fork of its own, under a fault of faults.c.

Line: JSON {"out", "at", "error", "overwrite", "mutant"}. Answer: {"status", "calls", "struck",
"notes"}; status is the exit code, or minus the signal.
"""

import ctypes
import json
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

from hamcli.errors import HamError
from hamcli.runstate import checkpoints, disk
from tests.runstate import pico


def write_in_place(self, stage: Path, step: int) -> None:
    """The mutant: a checkpoint's folder appears first, its files one after another."""
    final = self.path(step)
    final.mkdir(parents=True)
    for path in sorted(stage.iterdir()):
        path.rename(final / path.name)
    stage.rmdir()


def rotate_first(self, stage: Path, step: int) -> None:
    """The mutant: old checkpoints go before the new one is there."""
    for old in self.steps()[:-1] if len(self.steps()) > 1 else []:
        self._discard(old)
    COMMIT(self, stage, step)


def swallow(handle: int) -> None:
    """The mutant: a failed fsync is tried no further and called a success."""
    with suppress(OSError):
        FSYNC(handle)


def bytes_at(step: int) -> dict[str, list[bytes]]:
    """What stands for tensors: without torch a fork costs a tenth."""
    return {stem: [b"header", f"{stem} {step}".encode() * 20] for stem in ("model", "masks")}


def write_bytes(path: Path, chunks: list[bytes]) -> tuple[int, str]:
    return disk.write_file(path, chunks)


COMMIT = checkpoints.Checkpoints._commit
FSYNC = os.fsync


def mutate(name: str | None) -> None:
    if name == "in place":
        checkpoints.Checkpoints._commit = write_in_place
    elif name == "rotate first":
        checkpoints.Checkpoints._commit = rotate_first
    elif name == "swallow":
        disk.os = type("os", (), {**vars(os), "fsync": staticmethod(swallow)})


def live(job: dict, shim: ctypes.CDLL, answer: int) -> None:
    mutate(job.get("mutant"))
    notes: list[str] = []
    status = 0
    out = Path(job["out"])
    shim.arm(str(out).encode(), job["at"], job["error"])
    try:
        notes = pico.live(out, overwrite=job.get("overwrite", False), tensors_at=bytes_at)
    except HamError as error:
        status, notes = error.exit_code, [error.line()]
    except BaseException:  # noqa: BLE001  what a bug raises is told by the test
        status, notes = 1, [traceback.format_exc()]
    calls, struck = shim.calls(), shim.struck_at().decode()
    shim.arm(b"", 0, 0)
    os.write(answer, json.dumps({"calls": calls, "struck": struck, "notes": notes}).encode())
    os._exit(status)


def main() -> None:
    checkpoints.write_tensors = write_bytes
    shim = ctypes.CDLL(None)
    shim.struck_at.restype = ctypes.c_char_p
    shim.calls.restype = ctypes.c_long
    with tempfile.TemporaryDirectory() as warm:
        pico.live(Path(warm) / "o", tensors_at=bytes_at)  # what is imported late is imported now
    print("ready", flush=True)
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            live(json.loads(line), shim, writer)
        os.close(writer)
        told = b"".join(iter(lambda: os.read(reader, 65536), b""))  # noqa: B023
        os.close(reader)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status, **json.loads(told or "{}")}), flush=True)


if __name__ == "__main__":
    main()

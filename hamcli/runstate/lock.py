"""One run at a time for one OUT: `OUT.run/lock`.

The kernel frees the lock when its holder dies, so that a stale file means nothing. Where locks do
nothing (some network disks), the holder's mark in the file shows that somebody else came after.
"""

import errno
import json
import os
import socket
import time
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from hamcli.errors import OutputLocked
from hamcli.runstate.disk import umask

LOCK = "lock"

_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_PATIENCE_SECONDS = 0.4


class RunLock:
    """The lock of one run folder, held from construction to `release`.

    Raises:
        OutputLocked: E601, another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._mark = {"pid": os.getpid(), "host": socket.gethostname(), "id": uuid.uuid4().hex}
        self._lock = FileLock(self.path, timeout=0, mode=0o666 & ~umask())
        try:
            self._lock.acquire()
        except Timeout:
            raise _locked(folder, self.path) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        self.path.write_text(json.dumps(self._mark, sort_keys=True) + "\n", encoding="utf-8")

    def check(self) -> None:
        """See that nobody else has taken the folder meanwhile.

        Raises:
            OutputLocked: E602, somebody has.
        """
        found = _read(self.path)
        if found is not None and found != self._mark:
            raise OutputLocked(
                "E602",
                "another process took over the output",
                self.path.parent,
                f"{_name(found)} runs there now",
                "one run at a time for one output",
            )

    def release(self, *, remove: bool = False) -> None:
        """Let go; `remove` takes the file away first.

        Removed while it is still held, not after: whoever opened the old file meanwhile sees that
        it has no name any more, and tries again; whoever comes later makes a new one.
        """
        if remove and _read(self.path) == self._mark:
            self.path.unlink(missing_ok=True)
        self._lock.release()


def _read(path: Path) -> dict[str, object] | None:
    try:
        found = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _name(mark: dict[str, object] | None) -> str:
    if mark is None:
        return "another process"
    return f"process {mark.get('pid')} on {mark.get('host')}"


def _locked(folder: Path, path: Path) -> OutputLocked:
    """Names the holder, who may need a moment to write its mark over that of a dead one."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not _is_plausible(mark := _read(path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return OutputLocked(
        "E601",
        "another run holds the output",
        folder,
        f"{_name(mark)} is at work there",
        "wait for it, or another --out",
    )


def _is_plausible(mark: dict[str, object] | None) -> bool:
    if mark is None or not isinstance(pid := mark.get("pid"), int):
        return False
    if mark.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True

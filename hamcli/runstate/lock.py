"""One run at a time for one OUT: `OUT.run/lock`.

The kernel frees the lock when its holder dies, so a file left behind means nothing. Where locks do
nothing (some network disks), the mark in the file still tells: it names the holder, and a holder
that finds another's mark has been overtaken.
"""

import errno
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hamcli.errors import OutputLocked
from hamcli.runstate.disk import umask

LOCK = "lock"

_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_PATIENCE_SECONDS = 0.4

Mark = dict[str, object]


class RunLock:
    """The lock of one run folder, held from construction to `release`.

    Raises:
        OutputLocked: E601, another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        pid = os.getpid()
        self._mark: Mark = {
            "pid": pid,
            "born": _birth(pid),
            "host": socket.gethostname(),
            "id": uuid.uuid4().hex,
        }
        # Soft locks outlive their holder: none rather than one of those.
        self._lock = FileLock(
            self.path, timeout=0, mode=0o666 & ~umask(), thread_local=False, fallback_to_soft=False
        )
        try:
            self._lock.acquire()
        except Timeout:
            raise _locked(folder, _wait_for_mark(self.path)) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        try:
            self._refuse_living()
            self.path.write_text(json.dumps(self._mark, sort_keys=True) + "\n", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise

    def _refuse_living(self) -> None:
        """The lock was free, yet its last holder may be alive: then locks do nothing here."""
        mark = _read(self.path)
        if mark is not None and mark.get("pid") != os.getpid() and _is_alive(mark):
            raise _locked(self.path.parent, mark)

    def check(self) -> None:
        """See that nobody else has taken the folder meanwhile.

        Raises:
            OutputLocked: E602, somebody has.
        """
        found = _read(self.path)
        if not self._is_mine(found):
            raise OutputLocked(
                "E602",
                "another process took over the output",
                self.path.parent,
                f"{_name(found)} runs there now",
                "one run at a time for one output",
            )

    def is_held(self) -> bool:
        """Whether the folder is still ours."""
        return self._is_mine(_read(self.path))

    def _is_mine(self, found: Mark | None) -> bool:
        return found is None or found == self._mark  # an empty mark is nobody else's

    def release(self, *, remove: bool = False) -> None:
        """Let go; `remove` takes the file away first.

        While it is still held, not after: whoever opened the old file meanwhile sees that it has
        no name any more, and tries again; whoever comes later makes a new one.
        """
        with suppress(OSError):
            if _read(self.path) == self._mark:
                if remove:
                    self.path.unlink()
                else:
                    os.truncate(self.path, 0)  # this process lives on, but not as the holder
        self._lock.release()


def _read(path: Path) -> Mark | None:
    try:
        found = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _name(mark: Mark | None) -> str:
    if mark is None:
        return "another process"
    return f"process {mark.get('pid')} on {mark.get('host')}"


def _locked(folder: Path, mark: Mark | None) -> OutputLocked:
    return OutputLocked(
        "E601",
        "another run holds the output",
        folder,
        f"{_name(mark)} is at work there",
        "wait for it, or another --out",
    )


def _wait_for_mark(path: Path) -> Mark | None:
    """The holder's mark; it may need a moment to write it over that of a dead one."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        mark = _read(path)
        is_here = mark is not None and mark.get("host") == socket.gethostname()
        if (mark is not None and (not is_here or _is_alive(mark))) or time.monotonic() > deadline:
            return mark
        time.sleep(0.02)


def _is_alive(mark: Mark) -> bool:
    """Whether the very process that wrote the mark still runs on this machine.

    Its time of birth tells it from a later process with the same number.
    """
    pid, born = mark.get("pid"), mark.get("born")
    is_here = mark.get("host") == socket.gethostname()
    return is_here and isinstance(pid, int) and born is not None and _birth(pid) == born


def _birth(pid: int) -> int | None:
    """Clock ticks from the machine's start to that of a running process; None when unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None

"""What a case opened, wrote, ran, connected to and unpickled, told by Python's own audit events.

A hook cannot be taken off and sees what mocks would miss: every library's open, socket, subprocess
and unpickling, if it goes through Python. What native code opens by itself needs strace.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.server import Outcome, Server

VARIABLE = "HAM_TESTS_WATCH"

SOCKETS = {
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind",
}  # fmt: skip
PROCESSES = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "pty.spawn",
}  # fmt: skip
CHANGES = {
    "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "shutil.rmtree", "shutil.move",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OTHERS = {"pickle.find_class": "pickles", "builtins.input": "questions"}


@dataclass(frozen=True)
class Watched:
    """What a case did; each a list of what Python said of it."""

    opened: list[str]
    written: list[str]
    """Opened for writing, made, moved or removed."""
    sockets: list[str]
    processes: list[str]
    pickles: list[str]
    questions: list[str]

    def opened_below(self, folder: Path) -> list[str]:
        """What was opened inside `folder`."""
        return [path for path in self.opened if Path(path).is_relative_to(folder)]

    def written_outside(self, *allowed: Path) -> list[str]:
        """What was written that lies in none of these, the system's own devices left out."""
        fine = (*map(str, allowed), "/dev/null", "/dev/tty")
        return [path for path in self.written if not path.startswith(fine)]


def run(server: Server, argv: Sequence[str], cwd: Path, **options: Any) -> tuple[Outcome, Watched]:
    """A case of the fork server under the hook."""
    with tempfile.NamedTemporaryFile(prefix="ham-watch-") as file:
        environment = {**options.pop("env", {}), VARIABLE: file.name}
        done = server.run(
            argv, cwd=cwd, env=environment, before="tests.reliability.watching:watch", **options
        )
        return done, _read(Path(file.name))


def watch() -> None:
    """In the case: write a line for each event that matters."""
    told = os.open(os.environ.pop(VARIABLE), os.O_WRONLY | os.O_APPEND)
    here = os.getcwd()
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        # read on import, which the warm process did long ago
        import datasets
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(args[0], int):
                return
            kind = "written" if isinstance(args[2], int) and args[2] & WRITING else "opened"
            where = os.path.normpath(os.path.join(here, _text(args[0])))
        elif event in CHANGES:
            if event in ("os.remove", "os.rmdir") and args[1] != -1:
                return  # relative to a folder whose removal was told
            kind, where = "written", os.path.normpath(os.path.join(here, _text(args[0])))
        elif event in SOCKETS:
            if event != "socket.getaddrinfo" and isinstance(args[1], str | bytes):
                return  # a socket of this machine's own file system
            kind, where = "sockets", f"{event} {args!r}"
        elif event in PROCESSES:
            kind, where = "processes", f"{event} {args!r}"
        elif event in OTHERS:
            kind, where = OTHERS[event], repr(args)
        else:
            return
        os.write(told, (json.dumps([kind, where[:4000]]) + "\n").encode())

    sys.addaudithook(hook)


def _text(value: Any) -> str:
    return os.fsdecode(value) if isinstance(value, str | bytes | os.PathLike) else repr(value)


def _read(path: Path) -> Watched:
    found: dict[str, list[str]] = {
        "opened": [], "written": [], "sockets": [], "processes": [], "pickles": [], "questions": [],
    }  # fmt: skip
    for line in path.read_text().splitlines():
        kind, where = json.loads(line)
        found[kind].append(where)
    return Watched(**found)

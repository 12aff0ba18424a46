"""A warm process that forks for each case and runs the real `main(argv)` of the console script.

    outcome = server.run(["sparsify", ...], cwd=folder)        # waits for its end
    running = server.start(["sparsify", ...], cwd=folder)      # running.pid; running.wait()

The process has imported everything and lived the tiny job once, so a case costs no import. It sees
the case's own arguments, working folder, environment, streams, umask, user and limits. What only a
cold interpreter shows (PYTHONHASHSEED, locale, signals during the import) needs `cold`.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability import faults
from tests.reliability.faults import Fault

ROOT = Path(__file__).parents[2]
TIMEOUT = 120.0
MESSAGE_LIMIT = 2**18
SECRET = "hf_0tokenThatMayNotBeShown0123456789"
PLAIN = {
    "COLUMNS": "200",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    # torch may make its pool twice when the loading threads of a forked process are its first users
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_TOKEN": SECRET,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    code: int
    """Exit code, or minus the number of the signal that ended it."""
    stdout: str
    stderr: str
    seconds: float
    peak_rss: int
    """Bytes; what the process inherited counts, see `grown_bytes`."""
    base_rss: int = 0
    """Bytes of a case that does nothing."""
    cpu_seconds: float = 0.0
    """User and system time: what a busy machine does not stretch."""
    calls: tuple[str, ...] = field(default=(), repr=False)
    """`call path` of each call that the fault injector counted, the path below its folder."""
    struck: str = ""
    """The call at which the fault came; empty when it did not."""

    @property
    def grown_bytes(self) -> int:
        """Peak memory above that of a case that does nothing."""
        return max(0, self.peak_rss - self.base_rss)


class Running:
    """A case that was started and not waited for yet."""

    def __init__(self, server: "Server", number: int, pid: int, streams: Sequence[Any]) -> None:
        self.pid = pid
        self._server, self._number, self._streams = server, number, streams
        self._outcome: Outcome | None = None

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        with suppress(ProcessLookupError):  # it has just ended
            if not self.has_ended():
                os.kill(self.pid, number)

    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self._outcome is not None or self._server.told(self._number, 0.0) is not None

    def wait(self, timeout: float = TIMEOUT) -> Outcome:
        """Its outcome; when it runs longer it is killed, and an assertion fails."""
        if self._outcome is not None:
            return self._outcome
        told = self._server.told(self._number, timeout)
        if is_late := told is None:
            self.signal(signal.SIGKILL)
            told = self._server.told(self._number, 60.0)
        self._server.forget(self._number)
        texts = [self._text(stream) for stream in self._streams]
        assert not is_late, f"still running after {timeout} s: {texts[1][-2000:]}"
        assert told is not None
        self._outcome = Outcome(
            told["code"],
            *texts,
            told["seconds"],
            told["rss"],
            self._server.base_rss,
            told["cpu"],
            tuple(told["calls"]),
            told["struck"],
        )
        return self._outcome

    def stderr_so_far(self) -> str:
        """What it has said on stderr."""
        return self._text(self._streams[1], closes=False)

    def wait_for(self, condition: Any, timeout: float = TIMEOUT) -> None:
        """Wait until `condition()` holds; an assertion fails when the case ends before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert not self.has_ended(), f"it ended before: {self.wait()}"
            assert time.monotonic() < deadline, f"not within {timeout} s"
            time.sleep(0.002)

    @staticmethod
    def _text(stream: Any, closes: bool = True) -> str:
        if stream is None:
            return ""
        size = os.fstat(stream.fileno()).st_size
        text = os.pread(stream.fileno(), size, 0).decode("utf-8", "surrogateescape")
        if closes:
            stream.close()
        return text


class Server:
    """The fork server; a context manager.

    Args:
        folder: Of its own, for the tiny models (`folder/tiny`) and the fault injector.
    """

    def __init__(self, folder: Path) -> None:
        self.tiny = folder / "tiny"
        self.tiny.mkdir(parents=True, exist_ok=True)
        self.shim = faults.build(folder)
        self._told: dict[int | None, dict[str, Any]] = {}
        self._numbers = itertools.count(1)
        self._news = threading.Condition()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = ours
        preload = {"LD_PRELOAD": str(self.shim)} if self.shim else {}
        command = [sys.executable, "-m", "tests.reliability.forking", str(theirs.fileno())]
        self._process = subprocess.Popen(
            [*command, str(self.tiny)],
            cwd=ROOT,
            env={**os.environ, **PLAIN, **preload, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        told = self.told(0, 300.0)
        assert told is not None, "the fork server did not start"
        self.base_rss = int(told["rss"])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and every case that still runs."""
        self._channel.shutdown(socket.SHUT_RDWR)
        self._process.wait(30)
        self._reader.join()
        self._channel.close()

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | str | None = None,
        env: dict[str, str | None] | None = None,
        limit_bytes: int | None = None,
        shim: Fault | None = None,
        timeout: float = TIMEOUT,
        **more: Any,
    ) -> Outcome:
        """Run a case to its end.

        Args:
            argv: Words after `ham`.
            cwd: Its working folder; the server's when None.
            env: Variables over the plain environment of a test; None takes one away.
            limit_bytes: Address space it may take beyond what it was born with.
            shim: A fault; the case is skipped where the injector does not build.
            timeout: Seconds after which it is killed and an assertion fails.
            **more: See `start`.
        """
        started = self.start(argv, cwd=cwd, env=env, limit_bytes=limit_bytes, shim=shim, **more)
        return started.wait(timeout)

    def start(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | str | None = None,
        env: dict[str, str | None] | None = None,
        limit_bytes: int | None = None,
        shim: Fault | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        closed: Sequence[int] = (),
        umask: int | None = None,
        user: int | None = None,
        file_limit_bytes: int | None = None,
        before: str | None = None,
    ) -> Running:
        """Start a case; several may run at once.

        Args:
            argv: Words after `ham`.
            cwd: See `run`.
            env: See `run`.
            limit_bytes: See `run`.
            shim: See `run`.
            stdin: A file descriptor; nothing to read by default.
            stdout: A file descriptor; kept for `Outcome.stdout` by default.
            stderr: The same.
            closed: Descriptors, of 0, 1 and 2, that are closed in the case.
            umask: Of the case.
            user: Number of the user and group it runs as; needs root.
            file_limit_bytes: Size that no file of it may pass (`ulimit -f`).
            before: `module:function`, called in the case before `main`: a mutant, or a watch.
        """
        if shim is not None and self.shim is None:
            import pytest

            pytest.skip("the fault injector does not build here")
        environment: dict[str, str] = {**os.environ, **PLAIN}
        for name, value in (env or {}).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        case: dict[str, Any] = {
            "number": next(self._numbers),
            "argv": list(argv),
            "cwd": None if cwd is None else str(cwd),
            "env": environment,
            "limit": limit_bytes,
            "file_limit": file_limit_bytes,
            "fault": None if shim is None else shim.words(),
            "closed": list(closed),
            "umask": umask,
            "user": user,
            "before": before,
        }
        streams = [
            tempfile.TemporaryFile() if given is None else None  # noqa: SIM115  read at the end
            for given in (stdout, stderr)
        ]
        nothing = os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin
        handles = [nothing]
        for given, stream in zip((stdout, stderr), streams, strict=True):
            handles.append(stream.fileno() if stream is not None else given)  # type: ignore[arg-type]
        message = json.dumps(case).encode()
        assert len(message) < MESSAGE_LIMIT, "the arguments of the case are too long to send"
        socket.send_fds(self._channel, [message], handles)
        if stdin is None:
            os.close(nothing)
        started = self.told(-case["number"], 60.0)
        assert started is not None, "the fork server is silent"
        self.forget(-case["number"])
        return Running(self, case["number"], started["pid"], streams)

    def told(self, number: int, timeout: float) -> dict[str, Any] | None:
        """What was told of a case: minus its number that it began, its number that it ended."""
        with self._news:
            self._news.wait_for(lambda: number in self._told or None in self._told, timeout)
            assert number in self._told or None not in self._told, "the fork server has ended"
            return self._told.get(number)

    def forget(self, number: int) -> None:
        """Drop what was told."""
        with self._news:
            self._told.pop(number, None)

    def _read(self) -> None:
        while message := self._channel.recv(2**21):
            told = json.loads(message)
            with self._news:
                self._told[told["number"]] = told
                self._news.notify_all()
        with self._news:
            self._told[None] = {}
            self._news.notify_all()


def cold_environment() -> dict[str, str]:
    """Of a new interpreter that sees this code."""
    return {**os.environ, **PLAIN, "PYTHONPATH": str(ROOT)}


def answer_of(module: str, *words: object) -> dict[str, Any]:
    """What a module of this package prints as JSON, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.reliability.{module}", *map(str, words)],
        cwd=ROOT,
        env=cold_environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout))


def cold(
    argv: Sequence[str],
    *,
    cwd: Path | str,
    env: dict[str, str] | None = None,
    **more: Any,
) -> "subprocess.Popen[str]":
    """The console script in an interpreter of its own, with stdout and stderr as pipes."""
    options: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        **more,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "hamcli", *argv],
        cwd=cwd,
        env={**cold_environment(), **(env or {})},
        text=True,
        **options,
    )

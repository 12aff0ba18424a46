"""The fork server itself; `server.py` is who speaks to it. Imports everything, forks per case."""

import ctypes
import gc
import importlib
import io
import json
import mmap
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.reliability import tiny

PAGE_BYTES = 2**20 + 24
LINES_AT = 24
SHOWN_CALLS = 2**19
PR_SET_PDEATHSIG = 1


class Case:
    """A forked child and what the parent keeps of it."""

    def __init__(self, number: int, pid: int, page: mmap.mmap | None) -> None:
        self.number, self.pid, self.page = number, pid, page
        self.handle = os.pidfd_open(pid)
        self.began = time.monotonic()

    def end(self) -> dict[str, Any]:
        """Wait for it; how it ended."""
        _, status, used = os.wait4(self.pid, 0)
        os.close(self.handle)
        lines, struck = _calls(self.page) if self.page is not None else ([], "")
        return {
            "number": self.number,
            "code": os.waitstatus_to_exitcode(status),
            "rss": used.ru_maxrss * 1024,
            "cpu": used.ru_utime + used.ru_stime,
            "seconds": time.monotonic() - self.began,
            "calls": lines,
            "struck": struck,
        }


def _calls(page: mmap.mmap) -> tuple[list[str], str]:
    _, struck, used = (int.from_bytes(page[at : at + 8], "little") for at in (0, 8, 16))
    text = page[LINES_AT : LINES_AT + min(used, SHOWN_CALLS)].decode(errors="surrogateescape")
    lines = text.splitlines()
    return lines, lines[struck - 1] if struck else ""


def main() -> None:
    """Warm up, then serve until the other end of the socket is closed."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    warm_up(Path(sys.argv[2]))
    gc.collect()
    gc.freeze()
    channel.send(json.dumps({"number": 0, "rss": rss_of_nothing()}).encode())
    cases: dict[int, Case] = {}
    while True:
        ready, _, _ = select.select([channel, *cases], [], [])
        for handle in ready:
            if handle is not channel:
                channel.send(json.dumps(cases.pop(handle).end()).encode())
        if channel in ready:
            message, handles, _, _ = socket.recv_fds(channel, 2**18, 3)
            if not message:
                break
            case = start(json.loads(message), handles, channel)
            cases[case.handle] = case
            channel.send(json.dumps({"number": -case.number, "pid": case.pid}).encode())
    for case in cases.values():
        os.kill(case.pid, signal.SIGKILL)


def warm_up(folder: Path) -> None:
    """Make the tiny models and live the job: what is imported late is imported now."""
    import torch

    import hamcli.cli

    torch.set_num_threads(1)
    tiny.make(folder)
    with tempfile.TemporaryDirectory() as place:
        words = tiny.sparsify(folder, Path(place) / "out", "-q")
        for argv in (words, ["inspect", str(folder / "untied")]):
            kept, sys.stdout = sys.stdout, io.StringIO()
            try:
                hamcli.cli.main(argv)
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(f"the tiny job failed: {end.code}") from end
            finally:
                sys.stdout = kept


def rss_of_nothing() -> int:
    """Peak memory of a child that does nothing."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    return os.wait4(child, 0)[2].ru_maxrss * 1024


def start(case: dict[str, Any], handles: list[int], channel: socket.socket) -> Case:
    """Fork a case."""
    page = mmap.mmap(-1, PAGE_BYTES) if case["fault"] else None
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            channel.close()
            become(case, handles, page, parent)
        except BaseException:  # noqa: BLE001  a bug of the harness must not run on as a second server
            traceback.print_exc()
        os._exit(99)
    for handle in handles:
        os.close(handle)
    return Case(case["number"], child, page)


def become(case: dict[str, Any], handles: list[int], page: mmap.mmap | None, parent: int) -> None:
    """Be the process of a case, to its end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(99)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    set_streams(handles, case["closed"])
    os.environ.clear()
    os.environ.update(case["env"])
    time.tzset()
    if case["cwd"] is not None:
        os.chdir(case["cwd"])
    if case["umask"] is not None:
        os.umask(case["umask"])
    if case["before"] is not None:
        module, _, name = case["before"].partition(":")
        getattr(importlib.import_module(module), name)()
    set_limits(case)
    if case["user"] is not None:
        os.setgroups([])
        os.setgid(case["user"])
        os.setuid(case["user"])
    if case["fault"]:
        arm(case["fault"], page)
    os._exit(code_of(case["argv"]))


def set_streams(handles: list[int], closed: list[int]) -> None:
    """Descriptors 0 to 2 and Python's streams on them, as a new interpreter has them."""
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    for number in closed:
        os.close(number)

    def stream(number: int, mode: str, **more: Any) -> Any:
        return None if number in closed else open(number, mode, encoding="utf-8", **more)

    sys.stdin = sys.__stdin__ = stream(0, "r", errors="surrogateescape")
    sys.stdout = sys.__stdout__ = stream(1, "w", errors="surrogateescape")
    sys.stderr = sys.__stderr__ = stream(2, "w", errors="backslashreplace", buffering=1)


def set_limits(case: dict[str, Any]) -> None:
    """Address space and size of files."""
    if case["limit"] is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * mmap.PAGESIZE + case["limit"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if case["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["file_limit"], case["file_limit"]))


def arm(fault: dict[str, Any], page: mmap.mmap | None) -> None:
    """Load the fault injector's gun."""
    assert page is not None
    shared = (ctypes.c_char * PAGE_BYTES).from_buffer(page)
    gun = ctypes.CDLL(None).arm
    gun.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    gun(
        os.fsencode(fault["below"]),
        fault["at"],
        fault["how"],
        fault["number"],
        ctypes.addressof(shared),
    )
    arm.kept = shared  # type: ignore[attr-defined]  # the page must outlive this call


def code_of(argv: list[str]) -> int:
    """Run `main` as an interpreter would, to its exit code."""
    from hamcli.cli import main as console_script

    code: Any = 0
    try:
        console_script(argv)
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001  shown as an interpreter would
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = 120  # as an interpreter says when its last flush fails
    if code is None:
        return 0
    return code if isinstance(code, int) else 1


if __name__ == "__main__":
    main()

"""The processes of a run watch each other, so that all end when one does.

Each process but the first holds a connection to process 0. A process that dies, by whatever signal,
has its connections closed by the kernel; one that fails says so first, with its exit code and line.
Either way all others hear of it at once: their main thread may be waiting in a collective that
never returns, so after a short grace the listening thread ends the process. A machine that is gone
is noticed by the keep-alive of its connections.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hamcli.errors import (
    EXIT_INTERNAL,
    LINE_LIMIT,
    HamError,
    ResourceError,
    foreseen,
    printable,
    shorten,
)
from hamcli.parallel.launch import speaks, take_over

GRACE_SECONDS = 3.0  # for the main thread to end by itself, with its own line
NEWS_SECONDS = 5.0  # a collective fails a moment before the news of why
KEEP_ALIVE = {"TCP_KEEPIDLE": 8, "TCP_KEEPINTVL": 4, "TCP_KEEPCNT": 3}  # 20 seconds
HELLO_SECONDS = 10.0  # for who has knocked to say who it is
LONGEST = 1 << 16  # bytes of a message
_BYE = "bye"


@dataclass(frozen=True, slots=True)
class News:
    """Why a run cannot go on.

    Attributes:
        rank: Of the process that is gone.
        exit_code: What it failed with; None where it died without a word.
        code: Of its error.
        lines: What it said.
    """

    rank: int
    exit_code: int | None = None
    code: str = ""
    lines: tuple[str, ...] = ()

    def as_message(self) -> dict[str, Any]:
        """The news as it is sent on."""
        return asdict(self)


class MateFailed(HamError):
    """Another process of the run failed, and has said why; this one ends with the same code."""

    def __init__(self, news: News) -> None:
        self._lines = list(news.lines)
        super().__init__(news.code, "another process failed", f"process {news.rank}")
        self.exit_code = news.exit_code or 1

    def line(self) -> str:
        """The line of the process that failed."""
        return self._lines[0]

    def lines(self) -> list[str]:
        """All that it said."""
        return list(self._lines)


def error_of(news: News, size: int) -> HamError:
    """What to raise for news."""
    if news.exit_code is not None:
        return MateFailed(news)
    return ResourceError(
        "E545",
        "a process of the run died",
        f"process {news.rank} of {size}",
        "killed, out of memory, or its machine is gone; all others ended",
        "the same launch with --resume goes on from the last run checkpoint",
    )


class Mates:
    """The other processes of this run, from `listen` and `connect` on until `leave`.

    Args:
        rank: Of this process.
        size: Of the run.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._server: socket.socket | None = None
        self._links: dict[int, socket.socket] = {}
        self._news: News | None = None
        self._heard = threading.Event()
        self._is_leaving = False
        self._lock = threading.Lock()

    # ---- meeting ----

    def listen(self, token: str) -> int:
        """Process 0: open a port for the others, which they must enter with `token`."""
        has_both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if has_both else socket.AF_INET
        self._server = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=has_both, backlog=self.size
        )
        self._token = token
        return int(self._server.getsockname()[1])

    def accept(self, seconds: float) -> None:
        """Process 0: wait for all others, then watch."""
        assert self._server is not None
        deadline = time.monotonic() + seconds
        while len(self._links) < self.size - 1:
            self._server.settimeout(max(0.1, deadline - time.monotonic()))
            link, _ = self._server.accept()
            link.settimeout(min(seconds, HELLO_SECONDS))
            hello = _read(link)
            if hello is None or hello.get("token") != self._token:
                link.close()  # a stranger
                continue
            _keep_alive(link)
            self._links[int(hello["rank"])] = link
        self._server.close()
        self._watch()

    def connect(self, host: str, port: int, token: str, seconds: float) -> None:
        """Every other process: enter, then watch."""
        link = socket.create_connection((host, port), timeout=seconds)
        _keep_alive(link)
        _send(link, {"token": token, "rank": self.rank})
        self._links[0] = link
        self._watch()

    def _watch(self) -> None:
        for rank, link in self._links.items():
            link.settimeout(None)
            threading.Thread(target=self._listen_to, args=(rank, link), daemon=True).start()

    # ---- hearing ----

    def _listen_to(self, rank: int, link: socket.socket) -> None:
        found = _read(link)
        if found == {"word": _BYE}:
            return
        if found is None:
            news = News(rank)
        else:
            news = News(found["rank"], found["exit_code"], found["code"], tuple(found["lines"]))
        with self._lock:
            if self._news is not None or self._is_leaving:
                return
            self._news = news
        if self.rank == 0:
            self._pass_on(news)
        elif news.rank == 0 and news.exit_code is None and self.rank == 1:
            take_over()
        self._heard.set()
        time.sleep(GRACE_SECONDS)
        if not self._is_leaving:
            _end_at_once(error_of(news, self.size))

    def _pass_on(self, news: News) -> None:
        for other, link in self._links.items():
            if other != news.rank:
                with contextlib.suppress(OSError):
                    _send(link, news.as_message())

    # ---- leaving ----

    def end_together(self, error: BaseException) -> HamError | None:
        """The main thread has failed: tell the others, or learn that one of them is the reason.

        Returns:
            What to raise instead of `error`; None to raise that.
        """
        is_foreseen = foreseen(error) is not None
        if not is_foreseen:
            self._heard.wait(NEWS_SECONDS)  # a broken collective is another's failure
        with self._lock:
            news = self._news
            self._is_leaving = True
        own = _news_of(error, self.rank)
        # what meets all alike is told by each in its own words; what nobody foresaw is most often a
        # collective that another's failure broke
        is_other = not is_foreseen or (news and news.exit_code != own.exit_code)
        if news is not None and is_other:
            return error_of(news, self.size)
        for link in self._links.values():
            with contextlib.suppress(OSError):
                _send(link, own.as_message())
        self._close()
        return None

    def leave(self) -> None:
        """The run is done: others may go too."""
        self._is_leaving = True
        for link in self._links.values():
            with contextlib.suppress(OSError):
                _send(link, {"word": _BYE})
        self._close()

    def _close(self) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)


def _news_of(error: BaseException, rank: int) -> News:
    known = foreseen(error)
    if known is not None:
        return News(rank, known.exit_code, known.code, tuple(known.lines()))
    text = f"ham: error[HAM-E001]: process {rank}: {type(error).__name__}: {printable(str(error))}"
    return News(rank, EXIT_INTERNAL, "E001", (shorten(text, LINE_LIMIT),))


def _keep_alive(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


def _read(link: socket.socket) -> dict[str, Any] | None:
    """One message; None when the other side is gone, or talks nonsense."""
    try:
        line = b"".join(_bytes_of_line(link))
        found = json.loads(line)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _bytes_of_line(link: socket.socket) -> Iterator[bytes]:
    for _ in range(LONGEST):
        byte = link.recv(1)
        if byte in (b"", b"\n"):
            return
        yield byte


def _end_at_once(error: HamError) -> None:
    """End this process: its main thread may wait for the dead."""
    if speaks():
        with contextlib.suppress(Exception):
            show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
            sys.stderr.write(show_cursor + "\n" + "\n".join(error.lines()) + "\n")
            sys.stderr.flush()
    os._exit(error.exit_code)

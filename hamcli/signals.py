"""Signals that ask a run to stop: a flag is set, and the loop looks at it between two steps."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from hamcli.errors import Interrupted, Preempted

EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130

_PREEMPTING = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
_SHOW_CURSOR = b"\x1b[?25h"
_LAST_WORDS = (
    b"\nham: error[HAM-E902]: interrupted twice: nothing more is saved "
    b"(the last run checkpoint stands)\n"
)


class Stop:
    """Whether somebody asked the run to stop.

    Attributes:
        requested: Name of the first signal that came, None while there was none.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.num_interrupts = 0

    @property
    def exit_code(self) -> int:
        """130 when Ctrl-C came first, else 75."""
        return EXIT_INTERRUPTED if self.requested == "SIGINT" else EXIT_PREEMPTED


@contextmanager
def stop_on_signals(restore_terminal: Callable[[], None] | None = None) -> Iterator[Stop]:
    """Listen for TERM, USR1, USR2, HUP and INT while the block runs.

    The first signal of any kind only sets the flag: what is going on, a save too, comes to its end.
    The second Ctrl-C ends the process at once with 130. A HUP that was ignored before (nohup) stays
    ignored. Outside the main thread, where Python allows no handlers, the flag is never set.

    Args:
        restore_terminal: Called before the process ends at once; a shown cursor comes by itself.
    """
    stop = Stop()

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            stop.num_interrupts += 1
            if stop.num_interrupts > 1:
                _end_at_once(restore_terminal)
        if stop.requested is None:
            stop.requested = signal.Signals(number).name

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _wanted():
            before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def ignore_signals() -> None:
    """Hear none of these signals any more, in a process that is about to end by one of them."""
    if threading.current_thread() is threading.main_thread():
        for number in _wanted():
            signal.signal(number, signal.SIG_IGN)


def _wanted() -> list[signal.Signals]:
    found = [getattr(signal, name) for name in (*_PREEMPTING, "SIGINT") if hasattr(signal, name)]
    return [
        number
        for number in found
        if not (number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN)
    ]


def _end_at_once(restore_terminal: Callable[[], None] | None) -> None:
    # Nothing may keep the process alive here: not a broken terminal, not a closed stream.
    with suppress(Exception):
        if restore_terminal is not None:
            restore_terminal()
    with suppress(OSError, ValueError):
        handle = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
        os.write(handle, (_SHOW_CURSOR if os.isatty(handle) else b"") + _LAST_WORDS)
    os._exit(EXIT_INTERRUPTED)


class Guard:
    """Whether a signal may raise just now: between `arm` and `hold`, once."""

    def __init__(self) -> None:
        self._is_armed = self._is_held = False
        self._came: list[int] = []

    def arm(self) -> None:
        """From now on the first signal raises; one that came before does so here.

        Raises:
            Interrupted: E902, on Ctrl-C.
            Preempted: E901, on any other.
        """
        self._is_armed = True
        if self._came:
            self._raise(self._came[0])

    def hold(self) -> None:
        """From now on the job comes to its end whatever signals come."""
        self._is_held = True

    def note(self, number: int, _: FrameType | None) -> None:
        """A signal came."""
        self._came.append(number)
        if self._is_held or not self._is_armed:
            return
        if len(self._came) == 1:
            self._raise(number)
        if number == signal.SIGINT:
            _end_at_once(None)

    def _raise(self, number: int) -> None:
        name = signal.Signals(number).name
        why = "nothing is kept; the same command starts again"
        if name == "SIGINT":
            raise Interrupted("E902", "interrupted", "", why)
        raise Preempted("E901", f"stopped by {name}", "", why)


@contextmanager
def raise_on_signals() -> Iterator[Guard]:
    """Let the first of INT, TERM, HUP, USR1 and USR2 raise wherever the armed block is.

    For jobs that keep nothing when stopped: what is half done is cleaned up on the way out, which
    no further signal but a second Ctrl-C disturbs.
    """
    guard = Guard()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _wanted():
            before[number] = signal.signal(number, guard.note)
    try:
        yield guard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

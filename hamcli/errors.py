"""What can go wrong for a user, and the exit code of each.

    HamError                     carries code, what, where, why, right, hints
    ├── UsageError          2    HAM-E1xx   words of the command line, folders that may not be used
    ├── RecipeError         2    HAM-E2xx   a recipe; may hold several faults
    ├── GateFailed          3    HAM-E3xx   target or quality not met
    ├── InputRefused        4    HAM-E4xx   model (E40x-E44x) or data (E45x-E49x)
    ├── ResourceError       5    HAM-E5xx   disk, permission, memory
    ├── OutputLocked        6    HAM-E6xx   another run holds the output
    ├── Diverged            7    HAM-E7xx   non-finite loss, gradient or weight
    ├── NoRunCheckpoint     8    HAM-E8xx   nothing to resume from, or it does not fit
    └── Stopped
        ├── Preempted      75    HAM-E901   a signal; saved, resumable
        └── Interrupted   130    HAM-E902   Ctrl-C; saved, resumable

Anything else that escapes is a bug: exit 1, HAM-E001. Subclasses exist where somebody catches them
apart or where the exit code differs. This module imports nothing of ours and no torch.
"""

import unicodedata
from collections.abc import Iterable

LINE_LIMIT = 300
HINT_LIMIT = 3

EXIT_INTERNAL = 1


class HamError(Exception):
    """A failure that a user can understand and mend.

    Args:
        code: Stable number, `"E301"`; shown as `HAM-E301`.
        what: What went wrong, in a few words.
        where: The path, key or argument it happened at; empty when there is none.
        why: Why it was refused.
        right: What would be right.
        hints: At most three next things to do, one line each.
    """

    exit_code = EXIT_INTERNAL

    def __init__(
        self,
        code: str,
        what: str,
        where: object = "",
        why: str = "",
        right: str = "",
        hints: Iterable[str] = (),
    ) -> None:
        self.code = code
        self.what = what
        self.where = str(where)
        self.why = why
        self.right = right
        self.hints = tuple(hints)[:HINT_LIMIT]
        super().__init__(self.line())

    def line(self) -> str:
        """One printable line of at most 300 characters: what: where: why (what would be right)."""
        parts = [part for part in (self.what, self.where, self.why) if part]
        text = ": ".join(parts)
        tail = f" ({self.right})" if self.right else ""
        head = f"ham: error[HAM-{self.code}]: "
        return head + shorten(printable(text), LINE_LIMIT - len(head), tail=printable(tail))

    def lines(self) -> list[str]:
        """The error's line, then its hints as `  hint: ...`."""
        return [self.line(), *(f"  hint: {printable(hint)}" for hint in self.hints)]


class UsageError(HamError):
    """The words of the command line do not make sense, or name a folder that may not be used."""

    exit_code = 2


class RecipeError(HamError):
    """One or more faults of a recipe, each with its own line and column."""

    exit_code = 2

    def __init__(
        self,
        code: str,
        what: str,
        where: object = "",
        why: str = "",
        right: str = "",
        hints: Iterable[str] = (),
        others: Iterable["RecipeError"] = (),
    ) -> None:
        super().__init__(code, what, where, why, right, hints)
        self.others = tuple(others)

    def lines(self) -> list[str]:
        """Every fault, a line each, then the hints of the first."""
        own = super().lines()
        return [own[0], *(other.line() for other in self.others), *own[1:]]


class GateFailed(HamError):
    """The run is complete and written, but a condition of its gate is not met."""

    exit_code = 3

    def __init__(
        self,
        code: str,
        what: str,
        where: object = "",
        why: str = "",
        right: str = "",
        hints: Iterable[str] = (),
        others: Iterable["GateFailed"] = (),
    ) -> None:
        super().__init__(code, what, where, why, right, hints)
        self.others = tuple(others)

    def lines(self) -> list[str]:
        """One line a failed condition, then the hints."""
        own = super().lines()
        return [own[0], *(other.line() for other in self.others), *own[1:]]


class InputRefused(HamError):
    """A model or data that cannot or must not be used."""

    exit_code = 4


class ResourceError(HamError):
    """Disk, permission or memory."""

    exit_code = 5


class OutputLocked(HamError):
    """Another run holds the output folder."""

    exit_code = 6


class Diverged(HamError):
    """The loss, a gradient or a weight became non-finite."""

    exit_code = 7


class NoRunCheckpoint(HamError):
    """There is no run checkpoint to go on from, or it does not fit this recipe, model or data."""

    exit_code = 8


class Stopped(HamError):
    """A signal ended a run that can go on.

    Args:
        code: E901 or E902.
        what: Which signal.
        where: As of any error.
        why: What was saved.
        last: The last words on stderr, in full: what was saved and the command that goes on.
    """

    def __init__(
        self, code: str, what: str, where: object = "", why: str = "", *, last: str = ""
    ) -> None:
        super().__init__(code, what, where, why)
        self.last = last

    def lines(self) -> list[str]:
        """The error's line, then the last words."""
        return [self.line(), *([f"ham: {printable(self.last)}"] if self.last else [])]


class Preempted(Stopped):
    """A signal asked for the machine; the run is saved and can go on."""

    exit_code = 75


class Interrupted(Stopped):
    """Ctrl-C; the run is saved and can go on."""

    exit_code = 130


def foreseen(error: BaseException) -> HamError | None:
    """What people are told of an error: itself, or the system's refusal by name; None of others."""
    if isinstance(error, HamError):
        return error
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, Exception)
        and ("out of memory" in text.lower() or "can't allocate memory" in text)
    ):
        return ResourceError("E543", "not enough memory", "", "", "a smaller batch_size")
    if isinstance(error, OSError):
        return ResourceError(
            "E506", "the system refused", error.filename or "", error.strerror or text
        )
    return None


def stopped_by(signal_name: str, why: str, *, last: str = "") -> Stopped:
    """The error of a run that a signal stopped.

    Args:
        signal_name: As `SIGTERM`; SIGINT is Ctrl-C.
        why: What was saved.
        last: See `Stopped`.
    """
    if signal_name == "SIGINT":
        return Interrupted("E902", "interrupted", "", why, last=last)
    return Preempted("E901", f"stopped by {signal_name}", "", why, last=last)


def printable(text: str) -> str:
    """`text` with control, format and other unprintable characters escaped.

    Names come from files that nobody vouches for: an escape sequence or a right-to-left mark in
    one must not reach a terminal.
    """
    return "".join(char if _is_safe(char) else _escaped(char) for char in text)


def _is_safe(char: str) -> bool:
    return char == " " or unicodedata.category(char)[0] not in "CZ"


def _escaped(char: str) -> str:
    point = ord(char)
    if point < 0x100:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def shorten(text: str, limit: int, *, tail: str = "") -> str:
    """`text + tail` in at most `limit` characters, the cut marked by an ellipsis.

    The tail says what would be right, so the text before it gives way first.
    """
    if len(text) + len(tail) <= limit:
        return text + tail
    tail = tail if len(tail) <= limit // 2 else tail[: limit // 2 - 2] + "…)"
    return text[: limit - len(tail) - 1] + "…" + tail

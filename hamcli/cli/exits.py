"""How a command ends: one line for what went wrong, and the exit code."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from hamcli.errors import (
    EXIT_INTERNAL,
    HamError,
    Stopped,
    UsageError,
    foreseen,
    printable,
    shorten,
)
from hamcli.signals import ignore_signals


def exit_code(command: Callable[[], object]) -> int:
    """Run a command; tell what went wrong."""
    try:
        code = command()
    except HamError as error:
        if isinstance(error, Stopped):
            ignore_signals()  # a scheduler that asks twice must not change the exit code
        return _told(error)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        return 0
    except Exception as error:  # noqa: BLE001 - the one place that catches: one line, not a trace
        return _unknown(error)
    return code if isinstance(code, int) else 0


def _interrupted() -> int:
    sys.stderr.write("\nham: interrupted before anything was saved\n")
    return 130


def _unknown(error: Exception) -> int:
    # Typer's own errors of usage are of private classes, told apart by what they can do.
    if hasattr(error, "format_message"):
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stdout.write(error.format_message() + "\n")
            return 2
        why = " ".join(error.format_message().split())
        return _told(UsageError("E101", why, hints=["ham --help, or ham COMMAND --help"]))
    if type(error).__name__ == "Abort":  # what Typer makes of Ctrl-C
        return _interrupted()
    known = foreseen(error)
    if known is not None:
        return _told(known)
    if os.environ.get("HAM_DEBUG") == "1":
        traceback.print_exc()
    text = f"ham: error[HAM-E001]: internal error: {type(error).__name__}: {printable(str(error))}"
    sys.stderr.write(shorten(text, 300) + "\n  hint: HAM_DEBUG=1 shows where; please report it\n")
    return EXIT_INTERNAL


def _told(error: HamError) -> int:
    if os.environ.get("HAM_DEBUG") == "1":
        traceback.print_exc()
    try:
        sys.stderr.write("\n".join(error.lines()) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
    return error.exit_code


def settled(code: int) -> int:
    """Flush what is left: a result that is lost is an error, a reader that has gone is none."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError) as error:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - closed by the end
            if name != "stdout" or code != 0 or not isinstance(error, OSError):
                continue
            if error.errno != errno.EPIPE:
                error.filename = name
                code = _unknown(error)
    return code


def open_closed_streams() -> None:
    """A stream that was closed when the process began is one that nobody reads."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - closed by the end

"""What every failing command must look like, in one place."""

import json
import re
from typing import Protocol

from tests.reliability.server import SECRET

FIRST = re.compile(r"ham: error\[HAM-E\d{3}\]: \S")
LINE_LIMIT, HINT_LIMIT = 300, 3
TYPERS_OWN = re.compile(r"^Usage: |^Error: |Aborted", re.MULTILINE)


class Ended(Protocol):
    """An outcome of the fork server, or anything with its three first fields."""

    code: int
    stdout: str
    stderr: str


def error_lines(stderr: str) -> list[str]:
    """From the first line of an error on; progress and warnings may stand before it."""
    lines = stderr.splitlines()
    first = next((at for at, line in enumerate(lines) if line.startswith("ham: error[")), None)
    return [] if first is None else lines[first:]


def assert_clean_error(outcome: Ended, code: int, pattern: str) -> None:
    """The exit code; on stderr one printable line that matches, then hints, and nothing else.

    Args:
        outcome: How the command ended.
        code: Exit code of the contract.
        pattern: Regular expression, searched in the first line of the error.
    """
    told = f"code {outcome.code}\n{outcome.stderr[-3000:]}"
    assert outcome.code == code, told
    lines = error_lines(outcome.stderr)
    assert lines, f"no line of an error: {told}"
    assert FIRST.match(lines[0]), told
    assert re.search(pattern, lines[0]), f"no {pattern!r} in the first line: {told}"
    hints = [line for line in lines if line.startswith("  hint: ")]
    faults = lines[: len(lines) - len(hints)]
    assert lines == faults + hints, f"something else than hints after the error: {told}"
    assert len(hints) <= HINT_LIMIT, told
    for line in faults:
        assert FIRST.match(line), f"not a line of an error: {line!r}"
        assert len(line) <= LINE_LIMIT, f"{len(line)} characters: {line!r}"
        assert line.isprintable(), f"{line!r}"
    assert_clean_streams(outcome)
    assert not outcome.stdout.strip() or is_json(outcome.stdout), outcome.stdout[-3000:]


def assert_stopped(outcome: Ended, code: int, step: int | None) -> None:
    """75 or 130; one line of an error, then what was saved and the command that goes on.

    Args:
        outcome: How the command ended.
        code: 75 or 130.
        step: That was saved; None when nothing was.
    """
    told = f"code {outcome.code}\n{outcome.stderr[-3000:]}"
    assert outcome.code == code, told
    lines = error_lines(outcome.stderr)
    assert len(lines) == 2, told
    assert lines[0].startswith(f"ham: error[HAM-E{901 if code == 75 else 902}]: "), told
    if step is None:
        assert re.match(r"ham: nothing (new )?was saved.*; to start: ham sparsify ", lines[1]), told
    else:
        assert lines[1].startswith(f"ham: saved step {step}; to go on: ham sparsify "), told
        assert "--resume" in lines[1], told
    assert outcome.stdout == "", told
    assert_clean_streams(outcome)


def assert_clean_streams(outcome: Ended) -> None:
    """No traceback, no escape byte, no secret, no words of Typer's own."""
    for text in (outcome.stdout, outcome.stderr):
        assert "Traceback" not in text, text[-3000:]
        assert "\x1b" not in text, repr(text[-3000:])
        assert SECRET not in text
    assert not TYPERS_OWN.search(outcome.stderr), outcome.stderr[-3000:]


def is_json(text: str) -> bool:
    """Whether it is one JSON document."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True

"""The command line: words in, one call, a result on stdout; nothing heavy at the top."""

import sys

from hamcli.cli.commands import app
from hamcli.cli.exits import exit_code, open_closed_streams, settled
from hamcli.parallel.launch import end_process, fall_silent, speaks
from hamcli.threads import wait_briefly

__all__ = ["app", "main"]


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if argv is not None:
        sys.argv = ["ham", *argv]
    open_closed_streams()
    wait_briefly()
    if not speaks():
        fall_silent()
    end_process(settled(exit_code(lambda: app(prog_name="ham", standalone_mode=False))))

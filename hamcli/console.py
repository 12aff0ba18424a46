"""Everything that is shown: progress and messages on stderr, results on stdout. Rich lives here.

A terminal gets a live display; anything else gets plain lines, at most one in ten seconds, without
colour. A reader that goes away (a closed pipe) never stops a run.
"""

import errno
import json
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hamcli.errors import printable
from hamcli.progress import StepRecord

PLAIN_SECONDS = 10.0
PIPE_WIDTH = 200  # a pipe has no width of its own; a table should not fold in it
LOSS_MEMORY = 0.9


class Unbreakable:
    """A text stream whose reader may go away: writing then does nothing, and never fails."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, or drop it when nobody reads any more."""
        if self._stream is not None:
            try:
                return self._stream.write(text)
            except (OSError, ValueError) as error:
                self._gone(error)
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody still reads."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._gone(error)

    def _gone(self, error: OSError | ValueError) -> None:
        """Nobody reads any more; a ValueError is that of a closed stream."""
        self._stream = None

    def isatty(self) -> bool:
        """Whether a person watches."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    @property
    def encoding(self) -> str:
        """Of the stream below."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        """Of the stream below."""
        if self._stream is None:
            raise OSError("the stream is closed")
        return self._stream.fileno()


class Results(Unbreakable):
    """The stream of results: half of them on a full disk is an error, a reader gone is none."""

    def _gone(self, error: OSError | ValueError) -> None:
        self._stream = None
        if isinstance(error, OSError) and error.errno != errno.EPIPE:
            error.filename = "stdout"
            raise error


class Screen:
    """The one place that prints.

    Args:
        quiet: Show warnings and errors only.
        verbose: Show notes that are not needed to follow the run.
        as_json: Results are JSON documents.
    """

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, as_json: bool = False
    ) -> None:
        self.quiet, self.verbose, self.as_json = quiet, verbose, as_json
        self._results = Results(sys.stdout)
        width = None if self._results.isatty() else PIPE_WIDTH
        self._out = Console(file=self._results, highlight=False, width=width)  # type: ignore[arg-type]  # a stream in all but type
        self._err = Console(file=Unbreakable(sys.stderr), highlight=False, soft_wrap=True)  # type: ignore[arg-type]  # a stream in all but type

    def result(self, document: Any, *tables: Table | str) -> None:
        """The result of a command: `document` as JSON, or else what a person reads.

        Raises:
            OSError: The system refuses; not for a closed pipe.
        """
        if self.as_json:
            self.text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False))
            return
        for table in tables:
            if isinstance(table, str):
                self._out.print(Text(printable_lines(table)), soft_wrap=True)
            else:
                self._out.print(table)

    def text(self, text: str) -> None:
        """A result that is text already, printed as it is; raises as `result` does."""
        self._results.write(text.rstrip("\n") + "\n")
        self._results.flush()

    def watcher(self) -> "LiveWatcher | PlainWatcher":
        """Who shows the progress of a long job here."""
        live = self._err.is_terminal and not self._err.is_dumb_terminal and not self.quiet
        return LiveWatcher(self, self._err) if live else PlainWatcher(self)

    def say(self, text: str, style: str = "") -> None:
        """A line on stderr for whoever follows; not in quiet mode."""
        if not self.quiet:
            self._err.print(Text(printable(text), style=style))

    def warn(self, text: str) -> None:
        """A warning on stderr, always."""
        self._err.print(Text.assemble(("ham: warning: ", "yellow"), printable(text)))

    def lines(self, lines: Iterable[str]) -> None:
        """Lines of an error on stderr, as they are."""
        for line in lines:
            self._err.print(Text(line), soft_wrap=True)


def printable_lines(text: str) -> str:
    """`text` with each of its lines made printable."""
    return "\n".join(printable(line) for line in text.split("\n"))


class PlainWatcher:
    """Progress without a terminal: at most one line in ten seconds."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._last_line = -PLAIN_SECONDS
        self._steps, self._target = 0, 0.0
        self._began, self._first = 0.0, 0
        self._job, self._bytes, self._done = "", 1, 0
        self._cell = ""
        self._waiting: threading.Timer | None = None

    def __enter__(self) -> "PlainWatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()

    def _line(self, text: str, *, may_wait: bool = False) -> None:
        """Say it if the last line is long enough ago; else never, or then if nothing came since."""
        self._forget()
        too_early = self._last_line + PLAIN_SECONDS - time.monotonic()
        if too_early <= 0:
            self._say(text)
        elif may_wait:
            self._waiting = threading.Timer(too_early, self._say, [text])
            self._waiting.daemon = True
            self._waiting.start()

    def _say(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._screen.say(f"ham: {text}")

    def _forget(self) -> None:
        """What waits to be said is out of date."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def stage(self, text: str) -> None:
        """A new part of the job begins."""
        # the line of one run of many may come too soon after another; its steps tell it then
        self._cell = text.partition(": ")[0] + ": " if text.startswith("cell ") else ""
        self._line(text, may_wait=True)  # a part may last a minute without any other line

    def begin_steps(self, *, steps: int, done: int, target: float) -> None:
        """Training begins."""
        self._forget()
        self._steps, self._target = steps, target
        self._began, self._first = time.monotonic(), done

    def step(self, record: StepRecord) -> None:
        """One optimizer step is done."""
        seconds = (time.monotonic() - self._began) / max(1, record.step - self._first)
        left = seconds * (self._steps - record.step)
        self._line(
            f"{self._cell}step {record.step}/{self._steps}  loss {record.loss:.4g}  "
            f"sparsity {record.sparsity:.1%} of {self._target:.1%}  {duration(left)} left"
        )

    def end_steps(self) -> None:
        """Training has ended."""

    def begin_bytes(self, text: str, total: int) -> None:
        """A job of so many bytes begins."""
        self._job, self._bytes, self._done = text, max(1, total), 0
        self._began = time.monotonic()
        self._line(f"{text} {size(total)}")

    def bytes_done(self, count: int) -> None:
        """So many more bytes are done."""
        self._done += count
        seconds = time.monotonic() - self._began
        left = seconds * (self._bytes - self._done) / max(1, self._done)
        self._line(
            f"{self._job} {size(self._done)} of {size(self._bytes)}  {duration(max(0, left))} left"
        )

    def end_bytes(self) -> None:
        """It has ended."""

    def note(self, text: str) -> None:
        """Something worth knowing, shown in verbose mode."""
        if self._screen.verbose:
            self._screen.say(f"ham: {text}")

    def tell(self, text: str) -> None:
        """A line at once, unless quiet."""
        self._screen.say(f"ham: {text}")

    def warn(self, text: str) -> None:
        """Something that may be wrong."""
        self._screen.warn(text)


class LiveWatcher:
    """Progress on a terminal: a spinner for the part under way, a bar while training."""

    def __init__(self, screen: Screen, console: Console) -> None:
        self._screen = screen
        self._progress = Progress(
            SpinnerColumn("dots", finished_text="[green]✓"),
            TextColumn("{task.description}"),
            StepsColumn(),
            LossColumn(),
            SparsityColumn(),
            LeftColumn(compact=True),
            console=console,
            transient=False,
        )
        self._stage_task: Any = None
        self._steps_task: Any = None
        self._bytes_task: Any = None
        self._target = 0.0
        self._smooth_loss: float | None = None

    def __enter__(self) -> "LiveWatcher":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # what failed gets no tick
            self._finish_stage()
        self._progress.stop()

    def stage(self, text: str) -> None:
        """A new part of the job begins."""
        self._finish_stage()
        self._stage_task = self._progress.add_task(escape(printable(text)), total=1)

    def _finish_stage(self) -> None:
        if self._stage_task is not None:
            self._progress.update(self._stage_task, completed=1)
            self._stage_task = None

    def begin_steps(self, *, steps: int, done: int, target: float) -> None:
        """Training begins."""
        self._finish_stage()
        self._target = target
        self._steps_task = self._progress.add_task(
            "training", total=steps, completed=done, steps=True
        )

    def step(self, record: StepRecord) -> None:
        """One optimizer step is done."""
        old = self._smooth_loss
        self._smooth_loss = (
            record.loss if old is None else LOSS_MEMORY * old + (1 - LOSS_MEMORY) * record.loss
        )
        self._progress.update(
            self._steps_task,
            completed=record.step,
            loss=self._smooth_loss,
            sparsity=record.sparsity,
            target=self._target,
        )

    def end_steps(self) -> None:
        """Training has ended."""
        self._steps_task = None

    def begin_bytes(self, text: str, total: int) -> None:
        """A job of so many bytes begins."""
        self._finish_stage()
        self._bytes_task = self._progress.add_task(
            escape(printable(text)), total=max(1, total), bytes=True
        )

    def bytes_done(self, count: int) -> None:
        """So many more bytes are done."""
        self._progress.advance(self._bytes_task, count)

    def end_bytes(self) -> None:
        """It has ended."""
        self._bytes_task = None

    def note(self, text: str) -> None:
        """Something worth knowing, shown in verbose mode."""
        if self._screen.verbose:
            self._screen.say(text, "dim")

    def tell(self, text: str) -> None:
        """A line, unless quiet."""
        self._screen.say(text)

    def warn(self, text: str) -> None:
        """Something that may be wrong."""
        self._screen.warn(text)


class StepsColumn(ProgressColumn):
    """`[bar] 120/300`, for a task that counts steps or bytes."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = BarColumn(bar_width=24)

    def render(self, task: Task) -> Any:
        """The bar and the count."""
        total = task.total or 0
        if task.fields.get("steps"):
            count = f"{task.completed:.0f}/{total:.0f}"
        elif task.fields.get("bytes"):
            count = f"{size(task.completed)} of {size(total)}"
        else:
            return Text("")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(self._bar.render(task), Text(count))
        return grid


class LossColumn(ProgressColumn):
    """The smoothed loss."""

    def render(self, task: Task) -> Text:
        """`loss 0.1234`."""
        loss = task.fields.get("loss")
        return Text("" if loss is None else f"loss {loss:.4g}", style="cyan")


class SparsityColumn(ProgressColumn):
    """Sparsity now, and where it goes."""

    def render(self, task: Task) -> Text:
        """`sparsity 71.2 % → 90 %`."""
        now = task.fields.get("sparsity")
        if now is None:
            return Text("")
        return Text(f"sparsity {now:.1%} → {task.fields['target']:.1%}", style="magenta")


class LeftColumn(TimeRemainingColumn):
    """Time left, for a task that counts steps or bytes."""

    def render(self, task: Task) -> Text:
        """`04:12 left`."""
        if not (task.fields.get("steps") or task.fields.get("bytes")):
            return Text("")
        if task.finished:
            return Text(duration(task.finished_time or 0.0), style="dim")
        return Text.assemble(super().render(task), (" left", "dim"))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2))
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return _filled(made, rows)


def facts(rows: Iterable[Sequence[object]]) -> Table:
    """A line a fact: its name, its value and, where there is one, a word on it; no headings."""
    made = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    lines = list(rows)
    for _ in lines[0]:
        made.add_column(overflow="fold")
    return _filled(made, lines)


def _filled(made: Table, rows: Iterable[Sequence[object]]) -> Table:
    for row in rows:
        made.add_row(*(Text(printable(str(cell))) for cell in row))
    return made


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """`91.2 MB`, in powers of 1000 as disks and the hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"

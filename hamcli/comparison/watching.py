"""Progress of a comparison: a line a run with what is left, and the steps of the run under way."""

import time

from hamcli.progress import Progress, Silent, StepRecord


class RunCounter:
    """Counts runs and guesses the time left from those that were really made.

    Args:
        progress: Who watches.
        total: Runs in all.
    """

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total = progress, total
        self.count = self.made = 0
        self.seconds = 0.0
        self._began = 0.0

    def found(self) -> None:
        """The next run was made before."""
        self.count += 1

    def begin(self, label: str) -> None:
        """The next run begins."""
        self.count += 1
        self._began = time.monotonic()
        left = ""
        if self.made:
            left = f", {in_words((self.total - self.count + 1) * self.seconds / self.made)} left"
        self.progress.stage(f"cell {self.count} of {self.total}{left}: {label}")

    def end(self) -> None:
        """The run is done."""
        self.made += 1
        self.seconds += time.monotonic() - self._began


class OneRun(Silent):
    """Lets the steps and warnings of a run through; its parts would drown the list of runs."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label

    def begin_steps(self, *, steps: int, done: int, target: float) -> None:
        """Training begins."""
        self._progress.begin_steps(steps=steps, done=done, target=target)

    def step(self, record: StepRecord) -> None:
        """One optimizer step is done."""
        self._progress.step(record)

    def end_steps(self) -> None:
        """Training has ended."""
        self._progress.end_steps()

    def note(self, text: str) -> None:
        """Something worth knowing, with the run it is about."""
        self._progress.note(f"{self._label}: {text}")

    def tell(self, text: str) -> None:
        """A run that goes on, with the run it is about."""
        self._progress.note(f"{self._label}: {text}")

    def warn(self, text: str) -> None:
        """Kept with the run's numbers; shown as a note, since most runs would say the same."""
        self._progress.note(f"{self._label}: {text}")


def in_words(seconds: float) -> str:
    """`about 40 s`, `about 3 min` or `about 2.5 h`."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"

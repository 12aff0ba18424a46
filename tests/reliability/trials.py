"""A tiny job that is stopped somewhere: what is wrong with the disk then, and after going on."""

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tests.reliability import judge, tiny
from tests.reliability.server import Outcome, Server

LANES = 2  # cases at a time
Item = TypeVar("Item")
Found = TypeVar("Found")


def in_lanes(work: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """`work` of each item, in order, two at a time: as many as the smallest machine has cores."""
    with ThreadPoolExecutor(LANES) as pool:
        return list(pool.map(work, items))


class Job:
    """The tiny job, and the bytes of its uninterrupted run.

    Args:
        server: The fork server.
        place: A folder for trials; each gets one of its own below it.
        more: Words after those of the job.
        steps: Optimizer steps of it.
        model: `untied` or `tied`.
    """

    def __init__(
        self,
        server: Server,
        place: Path,
        *more: str,
        steps: int = tiny.STEPS,
        model: str = "untied",
    ) -> None:
        self.server, self.place, self.more = server, place, more
        self.steps, self.model = steps, model
        place.mkdir(parents=True, exist_ok=True)
        out = self.new_out("reference")
        done = self.run(out)
        assert done.code == 0, done.stderr
        self.whole = judge.result(out)

    def new_out(self, name: object) -> Path:
        """OUT of a trial, in a folder of its own that exists."""
        folder = self.place / str(name)
        folder.mkdir()
        return folder / "o"

    def words(self, out: Path, *more: str) -> list[str]:
        """Of the job."""
        return tiny.sparsify(self.server.tiny, out, *self.more, *more, model=self.model)

    def run(self, out: Path, *more: str, **options: Any) -> Outcome:
        """Run it to its end."""
        return self.server.run(self.words(out, *more), **options)

    def go_on(self, out: Path, *more: str, **options: Any) -> Outcome:
        """The command that goes on: the same one, with `--resume` once something was saved."""
        steps, wrong = judge.sound_steps(out)
        return self.run(out, *(["--resume"] if steps or wrong else []), *more, **options)

    def interrupted(self, out: Path, before: dict[str, bytes] | None = None) -> list[str]:
        """What is wrong with the disk at the instant a run was stopped.

        Args:
            out: Of the run.
            before: What an OUT that is replaced held.
        """
        steps, wrong = judge.sound_steps(out)
        there = judge.contents(out) if out.exists() else None
        is_whole = there is not None and there != before and not self.faults_of_result(out)
        if not is_whole and there not in (None, before):
            wrong.append(f"OUT is neither absent nor complete: {sorted(there or {})}")
        if there is None and before is not None:
            aside = [judge.contents(old) for old in judge.run_folder(out).glob(".old-*")]
            if before not in aside:
                wrong.append("the old OUT is lost")
        if not is_whole and max(steps, default=0) >= 2 and len(steps) < 2:
            wrong.append(f"only {steps} left")
        return wrong

    def faults_of_result(self, out: Path) -> list[str]:
        """What in a finished OUT is not as in that of the uninterrupted run."""
        try:
            return judge.differences(judge.result(out), self.whole)
        except (OSError, ValueError, KeyError) as error:
            return [repr(error)]

    def recovered(self, out: Path, *more: str, **options: Any) -> list[str]:
        """What is wrong after going on with nothing in the way."""
        done = self.go_on(out, *more, **options)
        wrong = [] if done.code == 0 else [f"going on ended with {done.code}: {done.stderr}"]
        wrong += self.faults_of_result(out)
        if [path.name for path in out.parent.iterdir()] != [out.name]:
            wrong.append(f"left over: {judge.names(out.parent)}")
        return wrong

    def end(self, out: Path) -> None:
        """Remove a trial that found nothing."""
        shutil.rmtree(out.parent)

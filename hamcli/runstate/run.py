"""A run on disk: its folder, its lock, its checkpoints, and OUT, which appears by one rename.

OUT/                 the finished model folder
OUT.run/lock         one run at a time
OUT.run/run.json     what makes the run this run
OUT.run/checkpoints/ see `checkpoints`
OUT.run/ham.log      append only
OUT.run/.stage-*     only while something is written
OUT.run/.old-*       an OUT that is being replaced, until the new one is durable
"""

import json
import os
import re
import time
import traceback
import uuid
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from hamcli.errors import HamError, NoRunCheckpoint, UsageError, printable
from hamcli.runstate.checkpoints import KEEP, Checkpoint, Checkpoints
from hamcli.runstate.disk import (
    apply_umask,
    check_space,
    disk_errors,
    fsync_path,
    fsync_tree,
    remove_tree,
    rename_new,
    write_file,
)
from hamcli.runstate.folders import check_out, read_report, run_folder
from hamcli.runstate.identity import (
    RUN_JSON,
    RunIdentity,
    differences,
    document,
    misfit,
    read_document,
    warnings,
)
from hamcli.runstate.lock import LOCK, RunLock

if TYPE_CHECKING:
    from torch import Tensor

LOG = "ham.log"
CHECKPOINTS = "checkpoints"

_OWN_NAMES = {LOCK, RUN_JSON, LOG, CHECKPOINTS}
_STAGE = re.compile(r"\.stage-[0-9a-f]{32}")
_OLD = re.compile(r"\.old-[0-9a-f]{32}")
_OPEN_TRIES = 5


class RunState:
    """The run that makes OUT, held under its lock until `close` or `finish`.

    A context manager: leaving it closes it, and never finishes anything.

    Args:
        out: The folder that the finished model will be.
        inputs: Folders and files that the run reads; none of them may be written.
        overwrite: Whether an OUT that holds something may be replaced, and, without `resume`, an
            unfinished run be dropped.
        resume: Whether to go on from the run's checkpoints.

    Raises:
        UsageError: E110 to E112, see `check_out`; E113, an unfinished run lies there; E114,
            OUT.run is not ours.
        ResourceError: E501 to E505, the disk.
        OutputLocked: E601, another run is at work there.
    """

    def __init__(
        self,
        out: Path,
        *,
        inputs: Iterable[Path] = (),
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        inputs = list(inputs)
        self.out = check_out(out, inputs=inputs, overwrite=overwrite)
        self.folder = run_folder(self.out)
        self.overwrite = overwrite
        self.resume = resume
        self._stages: list[Path] = []
        with disk_errors("cannot make the run folder", self.folder):
            _refuse_foreign(self.folder)
            self._lock: RunLock | None = _open(self.folder)
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, self._new_stage, self._lock.check)
        try:
            with disk_errors("cannot use the run folder", self.folder):
                self._sweep()
                # what a killed run had moved aside is back now
                check_out(self.out, inputs=inputs, overwrite=overwrite)
                self._refuse_unfinished()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._lock is not None:
            self._log_failure(error)
        self.close()

    def _log_failure(self, error: BaseException) -> None:
        """What ended a run that had begun, and where in the code if `HAM_DEBUG=1` asks for it."""
        is_debugged = os.environ.get("HAM_DEBUG") == "1"
        if not is_debugged and not self._has_log():
            return  # there is nothing to go on with, so nothing stays
        self.log(
            error.line() if isinstance(error, HamError) else f"{type(error).__name__}: {error}"
        )
        if is_debugged:
            self.log("".join(traceback.format_exception(error)))

    def _refuse_unfinished(self) -> None:
        steps = self.checkpoints.steps()
        if steps and not self.resume and not self.overwrite:
            raise UsageError(
                "E113",
                "an unfinished run lies there",
                self.folder,
                f"saved up to step {steps[-1]}",
                "--resume or --overwrite",
                ["--resume goes on from it", "--overwrite drops it and starts over"],
            )

    # ---- what the run is ----

    def begin(self, identity: RunIdentity) -> tuple[str, ...]:
        """Record what makes this run, or hold it against what was recorded when resuming.

        Without `resume`, checkpoints of an earlier run are dropped here.

        Returns:
            Warnings: what differs but does not forbid going on.

        Raises:
            NoRunCheckpoint: E803, the recipe, the model or the data are others; E806, there are
                checkpoints but no telling of what run.
        """
        path = self.folder / RUN_JSON
        sessions: list[dict[str, Any]] = []
        first = identity
        found: tuple[str, ...] = ()
        with disk_errors("cannot record the run", path):
            if not self.resume:
                self.checkpoints.discard_all()
            elif self.checkpoints.steps():
                first, sessions = read_document(path)
                last = replace(first, **sessions[-1]) if sessions else first
                if changed := differences(first, identity):
                    for one in changed:
                        self.log(f"cannot go on: {one}")
                    raise misfit(changed, path)
                found = warnings(last, identity)
            self.log("the run goes on" if sessions else "the run begins")
            self._replace(path, document(first, sessions, identity))
        return found

    def _replace(self, path: Path, content: Mapping[str, Any]) -> None:
        stage = self.stage()
        try:
            text = json.dumps(content, sort_keys=True, indent=1) + "\n"
            write_file(stage / path.name, [text.encode()])
            (stage / path.name).replace(path)
            fsync_path(self.folder)
        finally:
            remove_tree(stage)

    # ---- checkpoints ----

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, "Tensor"]], values: Mapping[str, Any]
    ) -> Path:
        """Commit a run checkpoint; see `Checkpoints.save`."""
        path = self.checkpoints.save(step, tensors, values)
        self.log(f"saved step {step}")
        return path

    def load(self, step: int, required: Collection[str] = ()) -> Checkpoint:
        """One run checkpoint, read and hashed; see `Checkpoints.load`."""
        return self.checkpoints.load(step, required)

    def newest_valid(
        self, required: Collection[str] = (), *, must_exist: bool = True
    ) -> tuple[Checkpoint | None, tuple[str, ...]]:
        """The newest sound checkpoint and warnings; see `Checkpoints.newest_valid`.

        Args:
            required: Parts that the caller cannot do without.
            must_exist: Whether it is an error that nothing was ever saved; else None is returned.

        Raises:
            NoRunCheckpoint: E801, nothing was ever saved; E802, all is damaged; E804, a required
                part is missing.
        """
        found, notes = self.checkpoints.newest_valid(required)
        if found is None and must_exist:
            raise NoRunCheckpoint(
                "E801",
                "nothing to go on from",
                self.folder,
                "no run checkpoint was saved",
                hints=["the same command without --resume starts the run"],
            )
        for note in notes:
            self.log(note)
        return found, notes

    def check_space(self, checkpoint_bytes: int, model_bytes: int) -> None:
        """See that the disk holds what the run will write, less what it has written already.

        Raises:
            ResourceError: E504, it does not.
        """
        need = (KEEP + 1) * checkpoint_bytes + model_bytes
        with disk_errors("cannot measure the run folder", self.folder):
            have = sum(
                file.stat().st_size for file in self.checkpoints.folder.rglob("*") if file.is_file()
            )
        check_space(self.folder, max(0, need - have))

    # ---- the finished folder ----

    def stage(self) -> Path:
        """A fresh empty folder on OUT's own file system."""
        stage = self._new_stage()
        with disk_errors("cannot make a staging folder", stage):
            stage.mkdir()
        return stage

    def _new_stage(self) -> Path:
        stage = self.folder / f".stage-{uuid.uuid4().hex}"
        self._stages.append(stage)
        return stage

    def publish(self, stage: Path) -> tuple[str, ...]:
        """Make a finished stage OUT, by one rename.

        An OUT that is replaced is moved aside first and removed when the new one is durable; one
        that `ham` did not make is kept in OUT.run.

        Returns:
            Warnings: where an old OUT was kept.

        Raises:
            ResourceError: E501 to E503, the disk failed; OUT is as it was.
            OutputLocked: E602, another process wrote OUT meanwhile.
        """
        assert stage.parent == self.folder
        with disk_errors("cannot write the output folder", self.out):
            apply_umask(stage)
            fsync_tree(stage)
            self._check_holder()
            old = self._move_aside() if self.overwrite else None
            try:
                rename_new(stage, self.out)
            except BaseException:
                if old is not None and not self.out.exists():
                    old.rename(self.out)
                raise
            self.log(f"wrote {self.out}")
            return self._drop_old(old) if old is not None else ()

    def _move_aside(self) -> Path | None:
        if not self.out.exists() or not any(self.out.iterdir()):
            return None
        old = self.folder / f".old-{uuid.uuid4().hex}"
        self.out.rename(old)
        fsync_path(self.folder)
        return old

    def _drop_old(self, old: Path) -> tuple[str, ...]:
        if read_report(old) is not None:
            stage = self._new_stage()  # or a kill would leave half of it, which nobody can judge
            old.rename(stage)
            remove_tree(stage)
            return ()
        kept = old.with_name(old.name.replace(".old-", "replaced-"))
        old.rename(kept)
        warning = f"the folder that was replaced is not of ham; it is kept as {kept}"
        self.log(warning)
        return (warning,)

    # ---- the end ----

    def finish(self, *, keep_run: bool = False) -> None:
        """The run is done: OUT.run goes, but for what is not ours; `keep_run` leaves it."""
        if self._lock is None:
            return
        with disk_errors("cannot remove the run folder", self.folder):
            self._sweep()
            if not keep_run:
                self.checkpoints.discard_all()
                self._remove_bookkeeping(with_log=True)
        self._release(remove=not keep_run)

    def close(self) -> None:
        """Let go of the run as it is: its checkpoints stay, or, without any, only its log."""
        if self._lock is None:
            return
        leaves_nothing = self._lock.is_held() and not self.checkpoints.steps()
        with suppress(OSError):  # the failure that brought us here is the one to tell
            for stage in self._stages:
                if stage.exists():
                    remove_tree(stage)
            if leaves_nothing:
                self._remove_bookkeeping(with_log=not self._has_log())
        self._release(remove=leaves_nothing)

    def _has_log(self) -> bool:
        path = self.folder / LOG
        return path.exists() and path.stat().st_size > 0

    def _remove_bookkeeping(self, *, with_log: bool) -> None:
        (self.folder / RUN_JSON).unlink(missing_ok=True)
        if with_log:
            (self.folder / LOG).unlink(missing_ok=True)
        with suppress(OSError):
            self.checkpoints.folder.rmdir()

    def _release(self, *, remove: bool) -> None:
        assert self._lock is not None
        self._lock.release(remove=remove)
        self._lock = None
        if remove:
            with suppress(OSError):  # something of others lies there
                self.folder.rmdir()

    def _check_holder(self) -> None:
        assert self._lock is not None
        self._lock.check()

    def _sweep(self) -> None:
        """Remove what a killed run of ours left half done, or put it back."""
        for path in sorted(self.folder.iterdir()):
            if path.is_symlink() or not path.is_dir():
                continue
            if _STAGE.fullmatch(path.name):
                remove_tree(path)
            elif _OLD.fullmatch(path.name):
                self._settle_old(path)

    def _settle_old(self, old: Path) -> None:
        if self.out.exists() and any(self.out.iterdir()):
            self._drop_old(old)
        else:
            old.rename(self.out)
            fsync_path(self.out.parent)

    def log(self, text: str) -> None:
        """Append a line to `OUT.run/ham.log`; a log that cannot be written is no failure."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines = "".join(f"{stamp} {printable(line)}\n" for line in text.splitlines())
        with suppress(OSError), (self.folder / LOG).open("a", encoding="utf-8") as stream:
            stream.write(lines)


def _refuse_foreign(folder: Path) -> None:
    names: list[str] = []
    with suppress(FileNotFoundError):  # there is none, or the run before is just removing it
        names = [path.name for path in folder.iterdir()]
    if names and not any(_is_ours(name) for name in names):
        raise UsageError(
            "E114", "the run folder is not of ham", folder, f"it holds {names[0]}", "another --out"
        )


def _is_ours(name: str) -> bool:
    return bool(name in _OWN_NAMES or _STAGE.fullmatch(name) or _OLD.fullmatch(name)) or (
        name.startswith("replaced-")
    )


def _open(folder: Path) -> RunLock:
    """Make the folder and take its lock; the run before may just be removing it."""
    for attempt in range(_OPEN_TRIES):
        try:
            if not folder.exists():
                folder.mkdir()
                fsync_path(folder.parent)
            return RunLock(folder)
        except (FileNotFoundError, FileExistsError):
            if attempt == _OPEN_TRIES - 1:
                raise
            time.sleep(0.01)
    raise AssertionError

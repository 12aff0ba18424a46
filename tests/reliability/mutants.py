"""Bad writers and bad restores: what each harness must flag. Called in a case before `main`."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hamcli.runstate import checkpoints, disk

HERE = __name__


def named(mutant: Any) -> str:
    """`module:function`, as `server.start` takes it."""
    return f"{HERE}:{mutant.__name__}"


def write_in_place() -> None:
    """A checkpoint's folder appears first, its files one after another."""

    def commit(self: checkpoints.Checkpoints, stage: Path, step: int) -> None:
        final = self.path(step)
        final.mkdir(parents=True)
        for path in sorted(stage.iterdir()):
            path.rename(final / path.name)
        stage.rmdir()

    checkpoints.Checkpoints._commit = commit  # type: ignore[method-assign]


def write_straight() -> None:
    """A checkpoint is written where it will stay, file by file, each as slow as a real disk."""
    original = os.fsync

    def fsync(handle: int) -> None:
        time.sleep(0.005)
        original(handle)

    def save(self: checkpoints.Checkpoints, step: int, tensors: Any, values: Any) -> Path:
        final = self.path(step)
        final.mkdir(parents=True)
        checkpoints._write(final, step, tensors, values)
        return final

    checkpoints.Checkpoints.save = save  # type: ignore[method-assign]
    os.fsync = fsync


def rotate_first() -> None:
    """Old checkpoints go before the new one is there."""
    original = checkpoints.Checkpoints._commit

    def commit(self: checkpoints.Checkpoints, stage: Path, step: int) -> None:
        for old in self.steps()[:-1]:
            self._discard(old)
        original(self, stage, step)

    checkpoints.Checkpoints._commit = commit  # type: ignore[method-assign]


def swallow_fsync() -> None:
    """A failed fsync is tried no further and called a success."""
    original = os.fsync

    def fsync(handle: int) -> None:
        with suppress(OSError):
            original(handle)

    disk.os = type("os", (), {**vars(os), "fsync": staticmethod(fsync)})  # type: ignore[assignment]


def sync_nothing() -> None:
    """No fsync at all."""
    os.fsync = lambda handle: None  # type: ignore[assignment]


def trust_any_bytes() -> None:
    """Checkpoints are judged by the sizes of their files alone."""
    original = disk.read_back
    sizes: dict[str, Any] = {}

    def remember(folder: Path, name: str, entry: Any) -> None:
        size, _ = original(folder / name)
        sizes[name] = entry
        if size != entry["bytes"]:
            raise checkpoints._DamagedError(f"{folder / name}: {size} bytes")

    checkpoints._verify_file = remember


def start_over_silently() -> None:
    """With every checkpoint damaged the run begins again, and says nothing."""
    original = checkpoints.Checkpoints.newest_valid
    from hamcli import sparsifying
    from hamcli.errors import NoRunCheckpoint

    def newest_valid(self: checkpoints.Checkpoints, required: Any = ()) -> Any:
        try:
            return original(self, required)
        except NoRunCheckpoint:
            return None, ()

    checkpoints.Checkpoints.newest_valid = newest_valid  # type: ignore[method-assign]
    resume = sparsifying.Sparsification._resume

    def _resume(self: Any, optimizer: Any, course: Any) -> int:
        if self.run.checkpoints.newest_valid()[0] is None:
            return 0
        return resume(self, optimizer, course)

    sparsifying.Sparsification._resume = _resume  # type: ignore[method-assign]


def _restoring(change: Any) -> None:
    """Let `change` spoil what a checkpoint gives before a run goes on from it."""
    original = checkpoints.Checkpoint.tensors

    def tensors(self: checkpoints.Checkpoint, stem: str, names: Any = None) -> Any:
        return change(stem, original(self, stem, names))

    checkpoints.Checkpoint.tensors = tensors  # type: ignore[method-assign]


def forget_moments() -> None:
    """The optimizer begins anew: averages at zero, step 0, no state of HAM."""
    _restoring(lambda stem, found: {} if stem == "optimizer" else found)


def forget_one_moment() -> None:
    """One average of one tensor is not restored."""

    def change(stem: str, found: Any) -> Any:
        if stem == "optimizer":
            next(found[name] for name in sorted(found) if name.endswith("exp_avg")).zero_()
        return found

    _restoring(change)


def forget_one_weight() -> None:
    """One weight of the model is off by one unit in the last place."""

    def change(stem: str, found: Any) -> Any:
        if stem == "model":
            name = next(name for name in sorted(found) if name.endswith("q_proj.weight"))
            flat = found[name].view(-1).view(dtype=_int32())
            flat[int(flat.nonzero()[0])] += 1
        return found

    _restoring(change)


def _int32() -> Any:
    import torch

    return torch.int32


def go_on_a_step_late() -> None:
    """The data and the schedule go on one step too far on."""
    from hamcli import sparsifying

    sparsification: Any = sparsifying.Sparsification
    original = sparsification._resume
    sparsification._resume = lambda self, *given: original(self, *given) + 1

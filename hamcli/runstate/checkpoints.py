"""Run checkpoints: committed by one rename, checked by hash before they are trusted, rotated.

    checkpoints/step-00000100/   <stem>.safetensors ..., values.json, MANIFEST.json

The manifest is written last. It names the parts a checkpoint consists of and the size and sha256 of
each file. What the parts mean is for the caller to know.
"""

import json
import math
import re
import stat
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamcli.errors import Diverged, HamError, NoRunCheckpoint, OutputLocked, ResourceError
from hamcli.runstate.disk import (
    disk_error,
    disk_errors,
    fsync_path,
    read_back,
    remove_tree,
    rename_new,
    write_file,
)
from hamcli.runstate.tensors import read_tensors, tensor_names, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 2
FORMAT = 1
MANIFEST = "MANIFEST.json"
VALUES = "values.json"

_STEP = re.compile(r"step-(\d{8,18})")
_STEM = re.compile(r"[a-z][a-z0-9_]*")
_SUFFIX = ".safetensors"
_JSON_LIMIT = 256 * 2**20
_DONE_HINT = "--overwrite without --resume starts over from step 0, and drops what is there"


class _DamagedError(Exception):
    """A checkpoint that cannot be trusted; says which file and why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint whose every file was read and hashed."""

    step: int
    folder: Path
    parts: tuple[str, ...]
    """`stem` of each file of tensors, and `values.KEY` of each value."""
    values: dict[str, Any]

    @property
    def stems(self) -> tuple[str, ...]:
        """Of the files of tensors."""
        return tuple(part for part in self.parts if not part.startswith("values."))

    def tensors(self, stem: str, names: Collection[str] | None = None) -> dict[str, "Tensor"]:
        """The tensors of one file, on the CPU.

        Args:
            stem: Of the file.
            names: What must be in it, no more and no less; None takes what there is.

        Raises:
            NoRunCheckpoint: E804, a part or a tensor is missing, or one is too many.
        """
        path = self.folder / f"{stem}{_SUFFIX}"
        if stem not in self.parts:
            raise _missing(self.folder, stem)
        found = tensor_names(path)
        wanted = found if names is None else set(names)
        for name in sorted(wanted - found):
            raise _missing(path, name)
        for name in sorted(found - wanted):
            raise NoRunCheckpoint(
                "E804", "the run checkpoint does not fit", path, f"this run has no {name}"
            )
        with disk_errors("cannot read the run checkpoint", path):
            return read_tensors(path)


class Checkpoints:
    """The checkpoints of one run, under its lock.

    Args:
        folder: `OUT.run/checkpoints`; made when the first one is saved.
        new_stage: Makes an empty staging folder on the same file system.
        check_holder: Raises when another process has taken the run meanwhile.
    """

    def __init__(
        self, folder: Path, new_stage: Callable[[], Path], check_holder: Callable[[], None]
    ) -> None:
        self.folder = folder
        self._new_stage = new_stage
        self._check_holder = check_holder
        self._sound: set[int] = set()  # read and hashed by this process
        self._stale: set[int] = set()  # later than the one gone on from: damaged, or passed over

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, sound or not, ascending."""
        try:
            names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        return sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after `step` optimizer steps."""
        return self.folder / f"step-{step:08d}"

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, "Tensor"]], values: Mapping[str, Any]
    ) -> Path:
        """Commit a checkpoint, then remove those that are no longer needed.

        A step that this process has saved already is not written again.

        Args:
            step: Optimizer steps done.
            tensors: File stem to name to tensor.
            values: All else that the run needs to go on, as JSON.

        Raises:
            Diverged: E702, a tensor or value is not finite; nothing is committed.
            ResourceError: E501 to E503, the disk failed; older checkpoints stay as they are.
            OutputLocked: E602, another process is at work in the same folder.
        """
        final = self.path(step)
        if step in self._sound and final.is_dir():
            return final
        with disk_errors("cannot save the run checkpoint", final):
            stage = self._new_stage()
            try:
                _write(stage, step, tensors, values)
                self._commit(stage, step)
            except FileNotFoundError as error:
                raise self._swept(stage, error) from error
            finally:
                with suppress(OSError):  # swept by the next run; the first failure counts
                    if stage.exists():
                        remove_tree(stage)
            self._sound.add(step)
            self._stale.discard(step)
            self._rotate()
        return final

    def _commit(self, stage: Path, step: int) -> None:
        try:
            _verify(stage, step)
        except _DamagedError as error:
            raise ResourceError(
                "E503", "the disk does not hold what was written", stage, str(error)
            ) from error
        self._check_holder()
        if not self.folder.exists():
            self.folder.mkdir()
            fsync_path(self.folder.parent)
        if step in self._stale:
            self._discard(step)
        fsync_path(stage)
        rename_new(stage, self.path(step))

    def _swept(self, stage: Path, error: FileNotFoundError) -> HamError:
        if stage.exists():
            return disk_error("cannot save the run checkpoint", stage, error)
        return OutputLocked(
            "E602",
            "another process removed what was being saved",
            stage,
            right="one run at a time for one output",
        )

    def _rotate(self) -> None:
        """Keep the newest that this process has read and hashed; with fewer of them, keep all."""
        keep = sorted(self._sound)[-KEEP:]
        if len(keep) == KEEP:
            for step in self.steps():
                if step not in keep:
                    self._discard(step)

    def _discard(self, step: int) -> None:
        """Take a checkpoint out of sight in one rename, so that it is never seen half removed."""
        self._sound.discard(step)
        stage = self._new_stage()
        self.path(step).rename(stage / "old")
        remove_tree(stage)

    def discard_all(self) -> None:
        """Remove every checkpoint, for a run that starts over on purpose."""
        with disk_errors("cannot remove the old run checkpoints", self.folder):
            for step in self.steps():
                self._discard(step)

    def load(self, step: int, required: Collection[str] = ()) -> Checkpoint:
        """One checkpoint, read and hashed.

        Args:
            step: Optimizer steps done when it was saved.
            required: Parts that the caller cannot do without: file stems and `values.KEY`.

        Raises:
            NoRunCheckpoint: E805, it is damaged or not there; E804, a required part is missing.
        """
        folder = self.path(step)
        try:
            return self._load(step, required)
        except _DamagedError as error:
            raise NoRunCheckpoint(
                "E805", "the run checkpoint is damaged", folder, str(error)
            ) from error

    def newest_valid(
        self, required: Collection[str] = ()
    ) -> tuple[Checkpoint | None, tuple[str, ...]]:
        """The newest sound checkpoint, and a warning when newer ones are damaged.

        None when there is not one checkpoint, sound or damaged. Nothing is deleted.

        Raises:
            NoRunCheckpoint: E802, all of them are damaged; E804, a required part is missing.
        """
        steps = self.steps()
        damaged: list[str] = []
        for step in reversed(steps):
            try:
                found = self._load(step, required)
            except _DamagedError as error:
                damaged.append(str(error))
                continue
            return found, _warnings(damaged, step)
        if steps:
            raise NoRunCheckpoint(
                "E802",
                "every run checkpoint is damaged",
                self.folder,
                damaged[0],
                "nothing was deleted",
                [_DONE_HINT],
            )
        return None, ()

    def _load(self, step: int, required: Collection[str]) -> Checkpoint:
        folder = self.path(step)
        with disk_errors("cannot read the run checkpoint", folder):
            parts, values = _verify(folder, step)
        for part in required:
            if part not in parts:
                raise _missing(folder, part)
        self._stale = {later for later in self.steps() if later > step}
        self._sound = {*self._sound, step} - self._stale
        return Checkpoint(step, folder, parts, values)


def _warnings(damaged: list[str], step: int) -> tuple[str, ...]:
    if not damaged:
        return ()
    rest = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return (f"run checkpoint damaged: {damaged[0]}{rest}; going on from step {step} instead",)


def _missing(where: Path, part: str) -> NoRunCheckpoint:
    return NoRunCheckpoint(
        "E804", "a part of the run checkpoint is missing", where, part, "a whole checkpoint",
        [_DONE_HINT],
    )  # fmt: skip


def _write(
    stage: Path, step: int, tensors: Mapping[str, Mapping[str, "Tensor"]], values: Mapping[str, Any]
) -> None:
    """Fill a stage, each file fsynced, the manifest last."""
    files: dict[str, dict[str, Any]] = {}

    def note(name: str, written: tuple[int, str]) -> None:
        files[name] = {"bytes": written[0], "sha256": written[1]}

    for stem in sorted(tensors):
        assert _STEM.fullmatch(stem), stem
        name = f"{stem}{_SUFFIX}"
        note(name, write_tensors(stage / name, tensors[stem]))
    _refuse_non_finite("values", values)
    note(VALUES, write_file(stage / VALUES, [_json(values)]))
    parts = [*sorted(tensors), *(f"values.{key}" for key in sorted(values))]
    manifest = {"format": FORMAT, "step": step, "parts": parts, "files": files}
    write_file(stage / MANIFEST, [_json(manifest)])


def _json(value: Any) -> bytes:
    return (
        json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    )


def _refuse_non_finite(key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            assert isinstance(name, str), f"{key}: JSON would turn the key {name!r} into text"
            _refuse_non_finite(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _refuse_non_finite(f"{key}[{index}]", inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Diverged("E702", "non-finite values are not saved", key, f"it is {value}")


def _verify(folder: Path, step: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Read and hash every file; returns the parts and the values."""
    manifest = _read_json(folder / MANIFEST)
    parts, files = manifest.get("parts"), manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict):
        raise _DamagedError(f"{folder / MANIFEST}: not a manifest of this format")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise _DamagedError(f"{folder / MANIFEST}: it names no parts")
    if manifest.get("step") != step:
        raise _DamagedError(f"{folder / MANIFEST}: it is of step {manifest.get('step')!r}")
    for name, entry in files.items():
        _verify_file(folder, name, entry)
    values = _read_json(folder / VALUES) if VALUES in files else {}
    present = {name.removesuffix(_SUFFIX) for name in files if name != VALUES}
    present |= {f"values.{key}" for key in values}
    if extra := sorted(present.difference(parts)):
        raise _DamagedError(f"{folder / MANIFEST}: it does not name {extra[0]}")
    # A whole manifest that lists fewer files than parts is no accident of a disk.
    for part in parts:
        if part not in present:
            raise _missing(folder, part)
    return tuple(parts), values


def _verify_file(folder: Path, name: str, entry: Any) -> None:
    path = folder / name
    if name != VALUES and not _STEM.fullmatch(name.removesuffix(_SUFFIX)):
        raise _DamagedError(f"{folder / MANIFEST}: odd file name {name!r}")
    try:
        size, digest = read_back(path)
    except FileNotFoundError:
        raise _DamagedError(f"{path}: it is missing") from None
    except PermissionError:
        raise  # nothing wrong with the checkpoint: the user can mend this
    except OSError as error:
        raise _DamagedError(f"{path}: {error.strerror or error}") from error
    if not isinstance(entry, dict) or size != entry.get("bytes"):
        wanted = entry.get("bytes") if isinstance(entry, dict) else None
        raise _DamagedError(f"{path}: {size} bytes, not {wanted}")
    if digest != entry.get("sha256"):
        raise _DamagedError(f"{path}: its bytes are not those that were saved")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _JSON_LIMIT:
            raise _DamagedError(f"{path}: not a plain file of a sensible size")
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _DamagedError(f"{path}: it is missing") from None
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise _DamagedError(f"{path}: cannot be read as JSON") from error
    if not isinstance(found, dict):
        raise _DamagedError(f"{path}: not a JSON object")
    return found

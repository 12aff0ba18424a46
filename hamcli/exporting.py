"""`ham export`: a model folder or a safetensors file, dense <-> packed, bit for bit; no torch.

Blocks stream through, so that memory is that of a block, whatever the model; a result appears whole
or not at all.
"""

import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hamcli.checkpoint.folder import CONFIG, INDEX, SIDE_FILES, find_file, read_bytes
from hamcli.checkpoint.headers import Header
from hamcli.checkpoint.packed import native
from hamcli.checkpoint.packed.files import (
    Advance,
    dense_bytes,
    is_packed_file,
    pack_file,
    restore_file,
)
from hamcli.checkpoint.packed.folders import mark_config, unmark_config
from hamcli.checkpoint.source import find_weights
from hamcli.errors import InputRefused, UsageError
from hamcli.progress import Progress
from hamcli.report.moving import restate
from hamcli.runstate import RunState, check_space, disk_errors
from hamcli.signals import raise_on_signals

NATIVE_FROM = 256 * 2**20
"""Dense bytes from which loading torch for its extension saves more time than it takes."""
OUR_FILES = ("recipe.yaml", "report.json", "report.html", "README.md")


@dataclass(frozen=True, slots=True)
class Export:
    """What was written.

    Attributes:
        path: The input.
        out: The result.
        format: dense or packed.
        dense_bytes: Weight files in the dense form.
        packed_bytes: Weight files in the packed form.
        ratio: `dense_bytes / packed_bytes`.
        files: Names in the result, with their bytes.
    """

    path: str
    out: str
    format: str
    dense_bytes: int
    packed_bytes: int
    ratio: float
    files: dict[str, int]


def export(path: Path, form: str, *, out: Path, overwrite: bool, progress: Progress) -> Export:
    """Convert a folder or a bare file to `form`.

    Args:
        path: A model folder, or one safetensors file.
        form: `"dense"` or `"packed"`.
        out: Folder or file of the result.
        overwrite: Whether `out` may be replaced.
        progress: Who watches.

    Raises:
        InputRefused: There is no model, it is damaged, or it has this form already.
        UsageError: `out` may not be used.
        ResourceError: The disk.
        Interrupted: Ctrl-C; nothing is kept.
        Preempted: Another signal; nothing is kept.
    """
    if not path.exists():
        raise InputRefused(
            "E401", "no such checkpoint", path, "", "a folder or a .safetensors file"
        )
    weights = find_weights(path)
    headers = list(weights.values())
    _refuse_same(path, form, headers)
    total = sum(map(dense_bytes, headers))
    if total >= NATIVE_FROM:
        native.prepare(progress.stage)
    if form == "dense":
        check_space(out.absolute(), total)
    progress.begin_bytes("packing" if form == "packed" else "unpacking", total)
    try:
        if path.is_dir():
            files = _export_folder(path, form, weights, out, overwrite, progress)
        else:
            files = _export_file(headers[0].path, form, out, overwrite, progress.bytes_done)
    finally:
        progress.end_bytes()
    written = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    packed = written if form == "packed" else sum(header.file_bytes for header in headers)
    return Export(str(path), str(out), form, total, packed, total / max(1, packed), files)


def _refuse_same(path: Path, form: str, headers: Iterable[Header]) -> None:
    are_packed = {is_packed_file(header) for header in headers}
    if are_packed != {form == "dense"}:
        have = "packed" if are_packed == {True} else "dense" if are_packed == {False} else "mixed"
        raise InputRefused("E443", f"nothing to convert to {form}", path, f"it is {have} already")


def _export_folder(
    folder: Path,
    form: str,
    weights: dict[str, Header],
    out: Path,
    overwrite: bool,
    progress: Progress,
) -> dict[str, int]:
    with (
        raise_on_signals() as guard,
        RunState(out, inputs=[folder], overwrite=overwrite) as run,
    ):
        guard.arm()
        stage = run.stage()
        with disk_errors("cannot write the checkpoint", stage):
            _convert(folder, stage, form, weights, progress.bytes_done)
            for name in restate(stage, form):
                progress.warn(f"{name} is not as this version writes it, and stays as it was")
        names = files_of(stage)
        for left in _left_out(folder, names):
            progress.note(f"not copied: {left}")
        guard.hold()
        for text in run.publish(stage):
            progress.warn(text)
        run.finish()
    return names


def files_of(folder: Path) -> dict[str, int]:
    """Name and bytes of each file in a folder, at any depth."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def copy_beside(folder: Path, stage: Path, names: Sequence[str] = SIDE_FILES) -> None:
    """Copy the config, as the dense folder has it, and those of the named files that are there."""
    config = find_file(folder, CONFIG)
    if config is not None:
        (stage / CONFIG).write_bytes(unmark_config(config))
    for name in names:
        if (path := find_file(folder, name)) is not None:
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_bytes(read_bytes(path))


def _convert(
    folder: Path, stage: Path, form: str, weights: dict[str, Header], advance: Advance
) -> None:
    copy_beside(folder, stage, (INDEX, *SIDE_FILES, *OUR_FILES))
    config = find_file(folder, CONFIG)
    if config is not None and form == "packed":
        (stage / CONFIG).write_bytes(mark_config(config, next(iter(weights.values()))))
    for name, header in weights.items():
        write = pack_file if form == "packed" else restore_file
        write(header.path, stage / name, advance)


def _left_out(folder: Path, names: Iterable[str]) -> list[str]:
    """What of the input is not in the result, by its first name."""
    taken = {name.partition("/")[0] for name in names}
    return sorted({entry.name for entry in folder.iterdir()} - taken)


def _export_file(
    source: Path, form: str, out: Path, overwrite: bool, advance: Advance
) -> dict[str, int]:
    if out.is_dir():
        raise UsageError("E111", "cannot be an output file", out, "it is a folder", "a file name")
    if out.suffix != ".safetensors":  # nothing reads a file of weights by another name
        raise UsageError("E111", "cannot be an output file", out, "", "a name in .safetensors")
    if out.exists() and out.samefile(source):
        raise UsageError("E110", "would write into its own input", out, right="another --out")
    if out.exists() and not overwrite:
        raise UsageError("E112", "the output file exists", out, right="another, or --overwrite")
    stage = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    with raise_on_signals() as guard, disk_errors("cannot write the checkpoint", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            guard.arm()
            size = (pack_file if form == "packed" else restore_file)(source, stage, advance)
            guard.hold()
            os.replace(stage, out)
        finally:
            stage.unlink(missing_ok=True)
        parent = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    return {out.name: size}

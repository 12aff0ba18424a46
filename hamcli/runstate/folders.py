"""Where a run may write: OUT and OUT.run, checked before anything is loaded or made."""

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hamcli.errors import ResourceError, UsageError
from hamcli.runstate.disk import disk_errors

REPORT = "report.json"
_REPORT_LIMIT = 64 * 2**20


def run_folder(out: Path) -> Path:
    """`OUT.run`, beside OUT on the same file system."""
    return out.with_name(out.name + ".run")


def check_out(out: Path, *, inputs: Iterable[Path] = (), overwrite: bool = False) -> Path:
    """See that OUT may be written; nothing is made or changed.

    Args:
        out: The folder that the finished model will be.
        inputs: Folders and files that the run reads. None of them may hold OUT, lie in OUT or be
            OUT, by any spelling or link.
        overwrite: Whether an OUT that holds something may be replaced.

    Returns:
        OUT, absolute, with every link on the way to it resolved.

    Raises:
        UsageError: OUT may not be used: E110 it and an input hold each other, E111 it is no
            folder, E112 it holds something.
        ResourceError: E502 it may not be written, E505 its parent does not exist.
    """
    given, out = out, _absolute(out)
    with disk_errors("cannot use the output folder", out):
        _refuse_odd(out)
        _refuse_overlap(out, given, list(inputs))
        if not overwrite and out.exists() and any(out.iterdir()):
            raise UsageError(
                "E112",
                "the output folder is not empty",
                out,
                right="another --out, or --overwrite",
                hints=["--overwrite replaces it, once the new model is complete"],
            )
        _refuse_unwritable(out)
    return out


def _absolute(out: Path) -> Path:
    """The parent is resolved, the last name is not: a link there is refused, never followed."""
    if "\0" in str(out):
        raise UsageError("E111", "cannot be an output folder", out, "its name holds a NUL byte")
    try:
        if out.name in ("", ".."):
            return out.resolve()
        return out.parent.resolve() / out.name
    except OSError as error:
        why = error.strerror or str(error)
        raise ResourceError("E505", "no such output folder", out, why, "a full path") from error
    except RuntimeError as error:  # a loop of links, before Python 3.13
        raise UsageError("E111", "cannot be an output folder", out, "its links go round") from error


def _refuse_odd(out: Path) -> None:
    if out.name == "":
        raise UsageError("E111", "cannot be an output folder", out, right="a folder in a folder")
    for path in (out, run_folder(out)):
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise UsageError("E111", "name too long for an output folder", out) from error
        if stat.S_ISLNK(mode):
            right = "the folder it leads to" if path.exists() else "a folder"
            raise UsageError("E111", "cannot be an output folder", path, "it is a link", right)
        if not stat.S_ISDIR(mode):
            raise UsageError("E111", "cannot be an output folder", path, "it is a file", "a folder")


def _refuse_overlap(out: Path, spelled: Path, inputs: list[Path]) -> None:
    """Folders are compared by device and inode, which no spelling, link or mount can hide."""
    ours = {key for path in (out, run_folder(out)) if (key := _key(path))}
    above_out = {*_keys_above(out), *_keys_above(spelled.absolute())}
    linked = {key for path in (out, run_folder(out)) for key in _linked_files(path)}
    for given in inputs:
        for path in {given.absolute(), *_link_ends(given)}:
            if _key(path) in ours | above_out:
                _refuse(out, given, "OUT is the input, or lies in it")
            if ours.intersection(_keys_above(path)):
                _refuse(out, given, "the input lies in OUT")
        if linked and linked.intersection(_linked_files(_resolved(given))):
            _refuse(out, given, "they share files by hard links")


def _refuse(out: Path, given: Path, why: str) -> None:
    raise UsageError(
        "E110", "would write into its own input", out, f"{why}: {given}", "another --out"
    )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links that go round; refused where the input is read
        return path.absolute()


def _key(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _keys_above(path: Path) -> Iterator[tuple[int, int]]:
    """Of the folders that hold `path`, both as spelled and as resolved."""
    for parent in {*path.parents, *_resolved(path).parents}:
        if key := _key(parent):
            yield key


def _link_ends(path: Path) -> set[Path]:
    """Where the links directly in a folder lead: the hub's cache keeps the bytes elsewhere."""
    try:
        with os.scandir(path) as entries:
            return {_resolved(Path(entry.path)) for entry in entries if entry.is_symlink()}
    except OSError:
        return set()


def _linked_files(path: Path) -> Iterator[tuple[int, int]]:
    """Of the plain files at or below `path` that have another name somewhere."""
    files = (Path(parent, name) for parent, _, names in os.walk(path) for name in names)
    for file in files if path.is_dir() else [path]:
        with suppress(OSError):
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                yield status.st_dev, status.st_ino


def _refuse_unwritable(out: Path) -> None:
    if not out.parent.is_dir():
        raise ResourceError(
            "E505",
            "no folder to put the output in",
            out.parent,
            "it does not exist",
            hints=[f"mkdir -p {out.parent}"],
        )
    # Not OUT.run: another run may be removing it just now, and opening it says what is wrong.
    for path in (out.parent, out):
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise ResourceError(
                "E502", "cannot write", path, "permission denied", "a folder that you may write"
            )


def read_report(out: Path) -> dict[str, Any] | None:
    """What `report.json` of a folder says, or None when `ham` did not make the folder."""
    path = out / REPORT
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _REPORT_LIMIT:
            return None
        report = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and "ham_version" in report else None

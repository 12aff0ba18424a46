"""Bytes that stay: create, fsync, rename, modes and free space, with failures in a user's words.

What is written here survives a crash at any moment as a whole or not at all; what it means is
for others to know.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hamcli.errors import HamError, OutputLocked, ResourceError

MIB = 2**20

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST}
_CHUNK = 4 * MIB


@contextmanager
def disk_errors(what: str, path: Path) -> Iterator[None]:
    """Turn a failing disk under the block into a `ResourceError` about `path`.

    safetensors' own error for the same failures is known too.
    """
    try:
        yield
    except HamError:
        raise
    except OSError as error:
        raise disk_error(what, path, error) from error
    except Exception as error:
        code = _errno_of_safetensors(error)
        if code is None:
            raise
        raise disk_error(what, path, OSError(code, os.strerror(code))) from error


def disk_error(what: str, path: Path, error: OSError) -> ResourceError:
    """The error a user sees for a failed operation of the disk."""
    why = error.strerror or str(error)
    if error.errno in _FULL:
        free = f"{free_bytes(path) // MIB} MiB free"
        hint = "free some space, then the same command; with --resume where a run was saved"
        return ResourceError("E501", what, path, why, free, [hint])
    if error.errno in _FORBIDDEN:
        return ResourceError("E502", what, path, why, "a folder that you may write")
    return ResourceError("E503", what, path, why, "a disk that works")


def _errno_of_safetensors(error: Exception) -> int | None:
    if not type(error).__module__.startswith("safetensors"):
        return None
    found = re.search(r"os error (\d+)", str(error))
    if found:
        return int(found[1])
    return errno.ENOSPC if "No space left" in str(error) else None


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` lies, or will lie."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_space(path: Path, need_bytes: int) -> None:
    """Refuse a job that the disk under `path` cannot hold.

    Raises:
        ResourceError: Fewer than `need_bytes` are free.
    """
    with disk_errors("cannot measure the free space", path):
        free = free_bytes(path)
    if free < need_bytes:
        raise ResourceError(
            "E504",
            "not enough disk space",
            path,
            f"{-(-need_bytes // MIB)} MiB needed, {free // MIB} MiB free",
            hints=["free some space, or name another folder with --out"],
        )


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file that must not exist yet, and fsync it.

    Returns:
        Its bytes and their sha256, both of what was handed in: reading the file back tells
        whether the disk holds the same.
    """
    digest = hashlib.sha256()
    total = 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in _pieces(chunks):
            total += len(piece)
            digest.update(piece)
            _write_all(handle, piece)
        os.fsync(handle)
    finally:
        os.close(handle)
    return total, digest.hexdigest()


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes in pieces of at most `_CHUNK`; what is small is gathered into one."""
    gathered = bytearray()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        if len(gathered) + len(view) <= _CHUNK:
            gathered += view
            continue
        if gathered:
            yield memoryview(gathered)
            gathered = bytearray()
        for start in range(0, len(view), _CHUNK):
            yield view[start : start + _CHUNK]
    if gathered:
        yield memoryview(gathered)


def _write_all(handle: int, piece: memoryview) -> None:
    while len(piece):
        piece = piece[os.write(handle, piece) :]


def read_back(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of a plain file, from the disk rather than from memory where possible."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb", buffering=0) as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return os.fstat(handle).st_size, digest


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable. A failure is final, never tried again."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Make a folder and all below it durable, the innermost first."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(parent, name))
        fsync_path(Path(parent))


def rename_new(stage: Path, final: Path) -> None:
    """Rename a folder onto a name that holds nothing, and make both names durable.

    Raises:
        OutputLocked: Something lies there: another process wrote it after we looked.
    """
    try:
        stage.rename(final)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        raise OutputLocked(
            "E602",
            "another process wrote the same folder",
            final,
            "it appeared while this run was going on",
            "one run at a time for one output",
        ) from error
    fsync_path(final.parent)
    if stage.parent != final.parent:
        fsync_path(stage.parent)


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def apply_umask(folder: Path) -> None:
    """Give all below `folder` the modes that the user's umask asks for.

    safetensors makes files of mode 0600, https://github.com/huggingface/safetensors/issues/782
    """
    mask = umask()
    for parent, folders, names in os.walk(folder):
        assert not any(os.path.islink(os.path.join(parent, name)) for name in folders + names)
        folder_bits = os.stat(parent).st_mode & stat.S_ISGID  # inherited; not ours to drop
        os.chmod(parent, 0o777 & ~mask | folder_bits)
        for name in names:
            os.chmod(os.path.join(parent, name), 0o666 & ~mask)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours and all in it; links in it are removed, not followed."""
    shutil.rmtree(folder)

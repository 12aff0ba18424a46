"""Hub ids: resolved to a commit, fetched into the hub's own cache, or found there.

Never waits long for a network that is not there: the cache answers instead, or an error that says
what to do. What lies in the folder is checked by others.
"""

import errno
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hamcli.checkpoint.folder import CONFIG, INDEX, SIDE_FILES, SINGLE
from hamcli.errors import InputRefused, ResourceError

_SHARDS = "model-*-of-*.safetensors"
ALLOW_PATTERNS = [CONFIG, SINGLE, INDEX, _SHARDS, *SIDE_FILES]

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)

_ANSWER_SECONDS = 3.5
_NAME = re.compile(r"(?:[\w][\w.-]{0,95}/)?[\w][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w][\w./-]{0,199}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubName:
    """`org/name@revision`, taken apart."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_hub_name(text: str) -> HubName | None:
    """`text` as a hub id with an optional revision, or None when it cannot be one."""
    repo, at, revision = text.partition("@")
    bad_repo = not _NAME.fullmatch(repo) or ".." in repo or "--" in repo
    if bad_repo or (at and (not _REVISION.fullmatch(revision) or ".." in revision)):
        return None
    return HubName(repo, revision or None)


def fetch(name: HubName, *, offline: bool = False) -> tuple[Path, str]:
    """The folder of the hub's cache that holds `name`, and its commit.

    Args:
        name: What to fetch.
        offline: Ask no server; `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` say the same.

    Raises:
        InputRefused: The hub has no such model or revision or keeps it closed, it has no
            safetensors, or there is no answer and nothing in the cache.
        ResourceError: The disk refused the download.
    """
    if offline or _is_offline():
        return _from_cache(name, "offline")
    try:
        files = _list_files(name)
    except _NoAnswerError as error:
        return _from_cache(name, str(error))
    _refuse_without_safetensors(name, files)
    return _download(name, files)


class _NoAnswerError(Exception):
    """The hub cannot be reached."""


def _is_offline() -> bool:
    from huggingface_hub import constants

    words = {os.environ.get(key, "").upper() for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    return bool(constants.HF_HUB_OFFLINE) or not words.isdisjoint({"1", "TRUE", "YES", "ON"})


def _from_cache(name: HubName, why: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name.repo,
            revision=name.revision,
            allow_patterns=ALLOW_PATTERNS,
            local_files_only=True,
            cache_dir=_cache_dir(),
        )
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        raise InputRefused(
            "E402",
            "model not available",
            name,
            f"{why}, and it is neither a folder here nor in the hub's cache",
            "a folder, a .safetensors file, or an org/name of the hub",
            [f"on a machine with a network: hf download {name.repo}; then copy the cache"],
        ) from error
    path = Path(folder)
    if not (path / CONFIG).exists():
        raise InputRefused(
            "E402",
            "model not complete in the hub's cache",
            name,
            f"{why}, and its config.json is not there",
            hints=[f"with a network: hf download {name.repo}"],
        )
    return path, path.name


def _list_files(name: HubName) -> list[str]:
    """The files of `name` on the hub, asked for in a thread that may be left behind.

    A resolver that does not answer cannot be interrupted, so the wait is bounded here.
    """
    answer: list[Any] = []
    thread = threading.Thread(target=_ask, args=(name, answer), daemon=True)
    thread.start()
    thread.join(_seconds())
    if not answer:
        raise _NoAnswerError("no answer from the hub")
    if isinstance(answer[0], BaseException):
        _raise_for_hub_error(name, answer[0])
    return answer[0]  # type: ignore[no-any-return]


def _ask(name: HubName, answer: list[Any]) -> None:
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=_endpoint()).model_info(
            name.repo, revision=name.revision, timeout=_seconds()
        )
        answer.append([sibling.rfilename for sibling in info.siblings or []])
    except Exception as error:  # noqa: BLE001 - told to the thread that asked
        answer.append(error)


def _seconds() -> float:
    """How long to wait for a commit; longer where the user says so in the hub's own variable."""
    try:
        return max(_ANSWER_SECONDS, float(os.environ.get("HF_HUB_ETAG_TIMEOUT", "0")))
    except ValueError:
        return _ANSWER_SECONDS


def _raise_for_hub_error(name: HubName, error: BaseException) -> None:
    from huggingface_hub import errors

    login = ["closed models need `hf auth login` and the owner's leave"]
    if isinstance(error, errors.GatedRepoError):
        raise InputRefused("E403", "closed model", name, "the hub asks for a login", hints=login)
    if isinstance(error, errors.RevisionNotFoundError):
        raise InputRefused("E403", "no such revision on the hub", name, f"{name.revision}")
    if isinstance(error, errors.RepositoryNotFoundError):
        raise InputRefused(
            "E403", "no such model on the hub", name, right="org/name or a folder", hints=login
        )
    raise _NoAnswerError("the hub cannot be reached") from error


def _refuse_without_safetensors(name: HubName, files: list[str]) -> None:
    if SINGLE in files or INDEX in files:
        return
    raise InputRefused(
        "E407",
        "no safetensors weights",
        name,
        "the hub has none for it; pickled weights are never opened",
        "model.safetensors",
        ["many such models have a converted twin, or a revision refs/pr/N with safetensors"],
    )


def _download(name: HubName, files: list[str]) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    patterns = [pattern for pattern in ALLOW_PATTERNS if pattern in files]
    if SINGLE not in files:
        patterns.append(_SHARDS)
    try:
        # by the name as given, so that the cache remembers what it stood for when offline; the
        # commit is read off the folder, which is the truth even if a branch moved meanwhile
        with _bars_on_a_terminal():
            folder = snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=patterns,
                cache_dir=_cache_dir(),
                endpoint=_endpoint(),
            )
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise ResourceError(
                "E542", "cannot store the model", _cache_dir(), str(error.strerror)
            ) from error
        return _from_cache(name, "the download broke off")
    except Exception:  # noqa: BLE001 - whatever the network did, the cache may hold it all
        return _from_cache(name, "the download broke off")
    return Path(folder), Path(folder).name


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """The hub's own progress bars, unless nobody is there to see them."""
    from huggingface_hub import utils

    bars: Any = utils
    was_hidden = bars.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if not was_hidden:
            bars.enable_progress_bars()


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _cache_dir() -> str:
    """Where the hub keeps its cache, by the variables as they are now."""
    from huggingface_hub import constants

    if cache := os.environ.get("HF_HUB_CACHE"):
        return os.path.expandvars(os.path.expanduser(cache))
    if home := os.environ.get("HF_HOME"):
        return str(Path(os.path.expandvars(home)).expanduser() / "hub")
    return str(constants.HF_HUB_CACHE)

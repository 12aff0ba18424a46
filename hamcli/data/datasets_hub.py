"""Dataset ids: `name[:config][:split]`, by the `datasets` library.

No code of a dataset is run: the library has none to run any more, and only builders that read plain
formats are let through. A network that is not there is noticed in seconds; the library's cache is
used then.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hamcli.data.files import ArrowColumn
from hamcli.data.table import Table
from hamcli.errors import InputRefused, ResourceError

PLAIN_BUILDERS = ("parquet", "arrow", "csv", "json", "text", "imagefolder", "cache")

_ANSWER_SECONDS = 3.5
_ID = re.compile(
    r"(?P<name>(?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95})"
    r"(?::(?P<config>[\w.+-]{0,100}))?"
    r"(?::(?P<split>\w[\w.-]{0,60}(?:\[[\w:%-]{0,30}\])?))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class DatasetId:
    """`name:config:split`, taken apart."""

    name: str
    config: str | None
    split: str | None

    def __str__(self) -> str:
        return ":".join([self.name, *(part for part in (self.config, self.split) if part)])


def parse(text: str) -> DatasetId | None:
    """`text` as a dataset id, or None when it cannot be one."""
    match = _ID.fullmatch(text)
    if match is None or ".." in text or "--" in match["name"] or text.startswith("buckets/"):
        return None
    return DatasetId(match["name"], match["config"] or None, match["split"])


@dataclass(frozen=True, slots=True)
class OpenedDataset:
    """A dataset on this machine."""

    name: str
    builder: Any
    splits: tuple[str, ...]
    split: str | None
    """What the id names."""

    def read(self, split: str) -> Table:
        """The rows of a split, as they lie in the library's cache; images stay encoded."""
        with _quiet(), _refusals(self.name):
            rows = self.builder.as_dataset(split=split).with_format("arrow")
            names = list(rows.column_names)
            table = rows.data if rows._indices is None else rows[:]
        if len(rows) == 0:
            raise InputRefused("E452", "data is empty", self.name, f"split {split} has no rows")
        columns = {name: ArrowColumn(table.column(name).chunks) for name in names}
        label = f"{self.name}:{split}"
        return Table(
            label,
            "rows",
            columns,
            lambda row: f"{label}: row {row}",
            str(rows._fingerprint),
            class_names=_class_names(rows.features),
        )


def open_dataset(identifier: DatasetId) -> OpenedDataset:
    """Find, download and prepare a dataset, or take it from the library's cache.

    Raises:
        InputRefused: There is no such dataset or config, it is closed, of a kind that is not read
            here, or neither reachable nor in the cache.
        ResourceError: The disk refused it.
    """
    why = _why_unreachable(identifier)
    with _quiet(), _refusals(str(identifier), why), _offline(bool(why)):
        builder, split = _builder(identifier)
        _check_plain(identifier, builder)
        builder.download_and_prepare()
    splits = tuple(builder.info.splits or {})
    if split is not None and "[" in split:
        splits = (*splits, split)
    name = identifier.name if split == identifier.config else str(identifier)
    return OpenedDataset(name.removesuffix(f":{split}"), builder, splits, split)


def _builder(identifier: DatasetId) -> tuple[Any, str | None]:
    """The builder and the split; in `name:x` x is a config where there is one of that name."""
    from datasets import load_dataset_builder

    if identifier.config is None or identifier.split is not None:
        return load_dataset_builder(identifier.name, identifier.config), identifier.split
    try:
        return load_dataset_builder(identifier.name, identifier.config), None
    except ValueError as error:
        if "BuilderConfig" not in str(error) and "config" not in str(error).lower():
            raise
        try:
            builder = load_dataset_builder(identifier.name)
        except ValueError:
            raise error from None
        return builder, identifier.config


def _check_plain(identifier: DatasetId, builder: Any) -> None:
    modules = [cls.__module__ for cls in type(builder).__mro__]
    plain = {f"datasets.packaged_modules.{name}.{name}" for name in PLAIN_BUILDERS}
    if plain.isdisjoint(modules):
        kind = next((name.rpartition(".")[2] for name in modules if name != "abc"), "unknown")
        raise InputRefused(
            "E472",
            "dataset of an unsupported kind",
            identifier,
            f"its files are read by {kind}",
            "parquet, arrow, csv, json, text or images",
        )


def _class_names(features: Any) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        names = getattr(inner, "names", None)
        if isinstance(names, list) and all(isinstance(one, str) for one in names):
            found[name] = tuple(names)
    return found


# ---- the network, and what the library raises ----


def _why_unreachable(identifier: DatasetId) -> str:
    """Why no server can be asked; empty when one answers.

    Raises:
        InputRefused: The server says that there is no such dataset, or that it is closed.
    """
    if _told_offline():
        return "offline"
    answer: list[BaseException | None] = []
    thread = threading.Thread(target=_ask, args=(identifier.name, answer), daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if not answer:
        return "no answer from the hub"
    return _judge(identifier, answer[0])


def _told_offline() -> bool:
    from huggingface_hub import constants

    keys = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    words = {os.environ.get(key, "").upper() for key in keys}
    return bool(constants.HF_HUB_OFFLINE) or not words.isdisjoint({"1", "TRUE", "YES", "ON"})


def _ask(name: str, answer: list[BaseException | None]) -> None:
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        HfApi(endpoint=endpoint).dataset_info(name, timeout=_ANSWER_SECONDS)
        answer.append(None)
    except Exception as error:  # noqa: BLE001 - judged by the thread that asked
        answer.append(error)


def _judge(identifier: DatasetId, error: BaseException | None) -> str:
    from huggingface_hub import errors

    login = ["closed datasets need `hf auth login` and the owner's leave"]
    if error is None:
        return ""
    if isinstance(error, errors.GatedRepoError):
        raise InputRefused(
            "E473", "closed dataset", identifier, "the hub asks for a login", hints=login
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        right = "a file, a folder, or a dataset id name[:config][:split]"
        raise InputRefused("E471", "no such dataset", identifier, "", right, login)
    return "the hub cannot be reached"


@contextlib.contextmanager
def _refusals(name: str, unreachable: str = "") -> Iterator[None]:
    """What the library raises about a dataset, as refusals."""
    try:
        yield
    except InputRefused:
        raise
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError | FileNotFoundError):
            raise ResourceError("E546", "cannot store the data", name, str(error)) from error
        raise _not_available(name, unreachable, error) from error
    except Exception as error:
        if unreachable:
            raise _not_available(name, unreachable, error) from error
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise InputRefused("E471", "dataset refused", name, why) from error


def _not_available(name: str, unreachable: str, error: BaseException) -> InputRefused:
    why = unreachable or f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return InputRefused(
        "E470",
        "dataset not available",
        name,
        f"{why}, and it is neither a file here nor in the cache of datasets",
        "a file, a folder, or a dataset id name[:config][:split]",
        ["on a machine with a network, load it once; then copy the cache"],
    )


@contextlib.contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Keep both libraries from asking a server that does not answer."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if wanted:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no warnings of the library."""
    import datasets
    from datasets.utils import logging

    bars, level = datasets.utils.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()

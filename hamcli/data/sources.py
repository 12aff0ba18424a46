"""Where data comes from: the words of a recipe → splits of rows.

    file            .txt .jsonl .csv .tsv .parquet: one split
    folder          files of one kind; `train.jsonl`, `test-00.jsonl`, ... or folders of these names
                    are its splits
    image folder    images, a folder a class; optional train/ and validation/ or test/ above
    dataset id      name[:config][:split], by the `datasets` library

Held out, where the recipe does not say, is the split validation, val, valid, dev, test or eval, the
first that there is. Without one `division.py` holds out a share of the rows.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hamcli.data import datasets_hub
from hamcli.data.files import KINDS, KNOWN, kind_of, read_files
from hamcli.data.table import Table
from hamcli.errors import InputRefused, ResourceError

TRAIN = "train"
HELD_OUT = ("validation", "val", "valid", "dev", "test", "eval")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_SPLIT_NAME = re.compile(rf"({'|'.join((TRAIN, *HELD_OUT))})(?:[-_.].*)?", re.ASCII | re.IGNORECASE)
_MAX_FILES = 5_000_000


@dataclass(frozen=True, slots=True)
class Source:
    """Something with splits; none of them is read yet.

    Attributes:
        name: As shown to people.
        splits: Name to a function that reads the rows.
        has_names: Whether the names of the splits are the source's own; else there is one split.
    """

    name: str
    splits: Mapping[str, Callable[[], Table]]
    has_names: bool

    def read(self, split: str) -> Table:
        """The rows of a split.

        Raises:
            InputRefused: E474, there is no such split.
        """
        if not self.has_names and split == TRAIN:
            return next(iter(self.splits.values()))()
        if split not in self.splits:
            raise InputRefused(
                "E474",
                "no such split",
                f"{self.name}: {split}",
                "" if self.has_names else "it has no splits",
                f"one of {', '.join(self.splits)}" if self.has_names else "no split named",
            )
        return self.splits[split]()


def open_source(text: str) -> tuple[Source, str | None]:
    """A source by the recipe's words, and the split that the words name.

    Raises:
        InputRefused: There is nothing there, or nothing that can be read.
    """
    path = Path(text)
    try:
        if path.is_dir():
            return _folder(path), None
        exists = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        raise InputRefused("E450", "no such data", text, str(error), KNOWN) from error
    if exists:
        kind_of(path)
        return Source(path.name, {TRAIN: partial(read_files, [path], path.name)}, False), None
    identifier = datasets_hub.parse(text)
    if identifier is None or path.suffix.lower() in (*KINDS, *IMAGES, ".json"):
        right = f"{KNOWN}, or a dataset id name[:config][:split]"
        raise InputRefused("E450", "no such data", text, "no such file or folder", right)
    opened = datasets_hub.open_dataset(identifier)
    splits = {name: partial(opened.read, name) for name in opened.splits}
    return Source(opened.name, splits, True), opened.split


def read_rows(
    source: str, *, split: str, evaluation: str | None, evaluation_split: str | None
) -> tuple[Table, Table | None]:
    """Training rows, and held-out rows where the words or the source name some.

    Args:
        source: File, folder or dataset id.
        split: Split to train on, unless the id names one.
        evaluation: Another source to measure on.
        evaluation_split: Split to measure on, of `evaluation` or else of `source`.
    """
    opened, named = open_source(source)
    training = named or split
    if training == TRAIN and TRAIN not in opened.splits and len(opened.splits) == 1:
        training = next(iter(opened.splits))  # a folder that holds nothing but test.jsonl, say
    table = opened.read(training)
    if evaluation is not None:
        other, other_named = open_source(evaluation)
        return table, other.read(evaluation_split or other_named or _held_out_split(other) or TRAIN)
    if evaluation_split is not None:
        return table, opened.read(evaluation_split)
    found = _held_out_split(opened) if opened.has_names else None
    return table, opened.read(found) if found is not None and found != training else None


def read_training_rows(source: str, split: str) -> Table:
    """The training rows alone."""
    opened, named = open_source(source)
    return opened.read(named or split)


def _held_out_split(source: Source) -> str | None:
    found = next((name for name in HELD_OUT if name in source.splits), None)
    return found or (next(iter(source.splits)) if len(source.splits) == 1 else None)


# ---- folders ----


def _folder(folder: Path) -> Source:
    name = folder.resolve().name
    entries = _entries(folder)
    files = {kind: _of_kind(entries, kind) for kind in ("parquet", "jsonl", "csv")}
    kinds = [kind for kind, found in files.items() if found]
    if len(kinds) > 1:
        both = " and ".join(path.name for kind in kinds[:2] for path in files[kind][:1])
        raise InputRefused("E451", "data of several kinds in one folder", folder, both, "one kind")
    if kinds:
        return _file_splits(name, files[kinds[0]])
    if (found := _image_splits(name, folder, entries)) is not None:
        return found
    if texts := _of_kind(entries, "text"):
        return _file_splits(name, texts)
    nested = _nested_splits(folder, entries)
    if nested:
        return Source(
            name, {key: partial(read_files, paths, name) for key, paths in nested.items()}, True
        )
    raise InputRefused("E451", "folder without data", folder, right=KNOWN)


def _entries(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ResourceError("E545", "cannot read the data", folder, str(error.strerror)) from error
    return [folder / name for name in names if not name.startswith((".", "_"))]


def _of_kind(paths: Sequence[Path], kind: str) -> list[Path]:
    return [path for path in paths if KINDS.get(path.suffix.lower()) == kind and path.is_file()]


def _file_splits(name: str, paths: Sequence[Path]) -> Source:
    splits: dict[str, list[Path]] = {}
    for path in paths:
        match = _SPLIT_NAME.fullmatch(path.stem)
        splits.setdefault(match[1].lower() if match else "", []).append(path)
    plain = splits.pop("", [])
    if not splits:
        return Source(name, {TRAIN: partial(read_files, plain, name)}, False)
    if plain:
        # data-00.jsonl beside test.jsonl: what has no split's name is there to train on
        splits[TRAIN] = sorted([*splits.get(TRAIN, []), *plain])
    return Source(
        name,
        {
            split: partial(
                read_files,
                found,
                f"{name}/{found[0].name}" if len(found) == 1 else f"{name} ({split})",
            )
            for split, found in splits.items()
        },
        True,
    )


def _nested_splits(folder: Path, entries: Sequence[Path]) -> dict[str, list[Path]]:
    """train/*.jsonl and the like."""
    splits = {}
    for entry in entries:
        if _SPLIT_NAME.fullmatch(entry.name) and entry.is_dir():
            inside = _entries(entry)
            kinds = [
                found
                for kind in ("parquet", "jsonl", "csv", "text")
                if (found := _of_kind(inside, kind))
            ]
            if kinds:
                splits[entry.name.lower()] = kinds[0]
    kinds_seen = {kind_of(paths[0]) for paths in splits.values()}
    if len(kinds_seen) > 1:
        raise InputRefused("E451", "data of several kinds in one folder", folder, right="one kind")
    return splits


# ---- folders of images ----


def _image_splits(name: str, folder: Path, entries: Sequence[Path]) -> Source | None:
    below = [entry for entry in entries if entry.is_dir() and _has_images(entry)]
    here = [entry for entry in entries if entry.suffix.lower() in IMAGES]
    if not below and not here:
        return None
    named = {entry.name.lower(): entry for entry in below if _SPLIT_NAME.fullmatch(entry.name)}
    if below and len(named) == len(below) and not here:
        splits = {
            key: partial(_image_table, f"{name}/{path.name}", path) for key, path in named.items()
        }
        return Source(name, splits, True)
    return Source(name, {TRAIN: partial(_image_table, name, folder)}, False)


def _has_images(folder: Path) -> bool:
    return next(_images_below(folder), None) is not None


def _images_below(folder: Path) -> Iterator[Path]:
    """Images of a folder and the folders in it, by name; links to folders are not followed."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGES:
                yield Path(parent) / name


def _image_table(name: str, folder: Path) -> Table:
    """Images and their classes: the folders right below; without any, no labels."""
    paths = []
    for path in _images_below(folder):
        paths.append(path)
        if len(paths) > _MAX_FILES:
            raise InputRefused("E451", "too many files", folder, f"over {_MAX_FILES:,}")
    if not paths:
        raise InputRefused("E452", "data is empty", name, "it has no images")
    relative = [path.relative_to(folder) for path in paths]
    flat = [part for part in relative if len(part.parts) == 1]
    columns = {"image": [part.as_posix() for part in relative]}
    if not flat:
        columns["label"] = [part.parts[0] for part in relative]
    elif len(flat) < len(relative):
        raise InputRefused(
            "E451",
            "images beside folders of images",
            f"{name}/{flat[0]}",
            "it has no class where others have one",
            "every image in a folder named as its class, or none",
        )
    digest = hashlib.sha256()
    for path, part in zip(paths, relative, strict=True):
        digest.update(
            f"{part.as_posix()}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape")
        )
    return Table(
        name,
        "images",
        columns,
        lambda row: f"{name}/{columns['image'][row]}",
        digest.hexdigest(),
        folder=folder,
    )

"""Runs that are kept: one file each, named by the hash of everything that the run depends on."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hamcli import __version__
from hamcli.checkpoint.source import find_model
from hamcli.comparison.records import Outcome
from hamcli.opening import data_digests, public_recipe
from hamcli.recipe import Recipe
from hamcli.runstate import disk_errors, installed_versions
from hamcli.runstate.disk import fsync_path

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the runs of a comparison have in common besides the recipe.

    Attributes:
        model: sha256 of each file of the model.
        revision: Commit of a model of the hub.
        data: Digest of each source of data that lies here.
        versions: Of Python and packages.
    """

    model: dict[str, str]
    revision: str | None
    data: dict[str, str]
    versions: dict[str, str]


def find_inputs(recipe: Recipe) -> Inputs:
    """Hash the files that every run reads.

    Raises:
        InputRefused: There is no such model.
    """
    assert recipe.model.id is not None
    source = find_model(recipe.model.id, config=recipe.model.config)
    return Inputs(
        dict(source.files),
        source.revision,
        _with_folders(data_digests(recipe), recipe),
        {"ham": __version__, **installed_versions()},
    )


def _with_folders(digests: dict[str, str], recipe: Recipe) -> dict[str, str]:
    """The digests of files, and by the same names those of folders."""
    found = dict(digests)
    for name in dict.fromkeys((recipe.data.source, recipe.data.evaluation)):
        if name is not None and Path(name).is_dir():
            key = Path(name).name
            # two folders of one name in two folders, or a folder and a file
            found[f"{key} (evaluation)" if key in found else key] = _listing(Path(name))
    return found


def _listing(folder: Path) -> str:
    """Digest of the names, sizes and times of a folder of data, whose bytes may be very many."""
    listed = sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    )
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def identity(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """All that the numbers of a run depend on, as JSON holds it."""
    return {"recipe": public_recipe(recipe), **asdict(inputs)}


def key_of(content: dict[str, Any]) -> str:
    """The hash of an identity."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cells:
    """The folder of finished runs.

    Args:
        folder: It is made where it is missing.

    Raises:
        ResourceError: It cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk_errors("cannot make the folder of cells", folder):
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, content: dict[str, Any]) -> Outcome | None:
        """The outcome of the run of this identity; None if it is not there or damaged."""
        try:
            found = json.loads((self.folder / f"{key_of(content)}.json").read_bytes())
            if found["format"] != FORMAT or found["identity"] != content:
                return None
            known = {one.name for one in fields(Outcome)}
            outcome = {key: value for key, value in found["outcome"].items() if key in known}
            return Outcome(**{**outcome, "warnings": tuple(outcome["warnings"])})
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def save(self, content: dict[str, Any], outcome: Outcome) -> None:
        """Keep an outcome; the file is there as a whole or not at all.

        Raises:
            ResourceError: The disk failed.
        """
        path = self.folder / f"{key_of(content)}.json"
        document = {"format": FORMAT, "identity": content, "outcome": asdict(outcome)}
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a new one that is durable before it takes the name.

    Raises:
        ResourceError: The disk failed; the old file stands.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors("cannot write", path):
        try:
            part.write_text(text, encoding="utf-8", newline="\n")
            fsync_path(part)
            part.replace(path)
            fsync_path(path.parent)
        finally:
            part.unlink(missing_ok=True)

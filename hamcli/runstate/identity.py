"""What makes a run this run: kept in `run.json`, compared before it goes on."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hamcli.errors import NoRunCheckpoint, shorten

RUN_JSON = "run.json"
FORMAT = 1

_PACKAGES = ("hamcli", "torch", "transformers", "safetensors", "accelerate", "numpy")
# Another one of these is another run, or only a warning.
_HARD = ("recipe", "model", "data", "seed")
_SOFT = ("versions", "device", "threads", "num_processes")
_DEVICE_KEYS = {
    "training.device",
    "training.parallel",
}  # a place, not a wish: another one is a warning
_SHOWN = 2
_TEXT_LIMIT = 80


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Everything that the bytes of a run depend on.

    Args:
        recipe: The effective recipe as plain data.
        model: sha256 of each file of the model, by relative name.
        data: sha256 of each file of data, by name; empty for built-in samples.
        seed: Of the run.
        versions: Package to version, `python` among them.
        device: As torch spells it.
        threads: Of torch on the CPU.
        num_processes: That train together.
    """

    recipe: dict[str, Any]
    model: dict[str, str]
    data: dict[str, str]
    seed: int
    versions: dict[str, str]
    device: str
    threads: int
    num_processes: int = 1


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was."""

    key: str
    saved: str
    now: str

    def __str__(self) -> str:
        """Two columns, the saved run first."""
        saved, now = shorten(self.saved, _TEXT_LIMIT), shorten(self.now, _TEXT_LIMIT)
        return f"{self.key}: {saved} (saved) | {now} (now)"


def installed_versions() -> dict[str, str]:
    """Versions of Python and the packages that a run's bytes depend on; imports none of them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def differences(saved: RunIdentity, now: RunIdentity) -> list[Difference]:
    """What forbids going on: another recipe, model or data."""
    return [
        difference
        for section in _HARD
        for difference in _compare(section, getattr(saved, section), getattr(now, section))
        if difference.key not in _DEVICE_KEYS
    ]


def warnings(saved: RunIdentity, now: RunIdentity) -> tuple[str, ...]:
    """What may change the bytes but does not forbid going on: versions, device, threads."""
    found = [
        difference
        for section in _SOFT
        for difference in _compare(section, getattr(saved, section), getattr(now, section))
    ]
    return tuple(
        f"{one.key} was {one.saved} when the run began, is {one.now} now: "
        "the result may differ from that of one uninterrupted run"
        for one in found
    )


def misfit(found: list[Difference], where: object) -> NoRunCheckpoint:
    """The error for a run that cannot go on as another one, with a two-column difference."""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    keys = ", ".join(one.key for one in found[:_SHOWN])
    return NoRunCheckpoint(
        "E803",
        "the run checkpoint is of another run",
        where,
        f"{keys}{more} changed",
        "the same recipe, model and data",
        [*(str(one) for one in found[:_SHOWN]), "--overwrite without --resume starts a new run"],
    )


def document(
    first: RunIdentity, sessions: list[dict[str, Any]], now: RunIdentity
) -> dict[str, Any]:
    """What `run.json` holds: the run as it began, and what each start of it ran under."""
    sessions = [*sessions, {key: getattr(now, key) for key in _SOFT}]
    return {"format": FORMAT, "identity": asdict(first), "sessions": sessions}


def read_document(path: Path) -> tuple[RunIdentity, list[dict[str, Any]]]:
    """The run as it began and its sessions so far.

    Raises:
        NoRunCheckpoint: E806, the file is missing or damaged.
        PermissionError: It may not be read.
    """
    try:
        found = json.loads(path.read_bytes())
        first = RunIdentity(**found["identity"])
        sessions = [{key: one[key] for key in _SOFT} for one in found["sessions"]]
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise NoRunCheckpoint(
            "E806",
            "cannot tell what run the checkpoints are of",
            path,
            "it is missing or damaged",
            hints=["--overwrite without --resume starts over from step 0"],
        ) from error
    return first, sessions


def _compare(section: str, saved: Any, now: Any) -> list[Difference]:
    before, after = dict(_flat(section, saved)), dict(_flat(section, now))
    return [
        Difference(key.removeprefix("recipe."), before.get(key, "-"), after.get(key, "-"))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(key: str, value: Any) -> list[tuple[str, str]]:
    """Leaves of nested mappings by dotted key, each as text."""
    if isinstance(value, Mapping):
        return [pair for name in value for pair in _flat(f"{key}.{name}", value[name])]
    return [(key, value if isinstance(value, str) else json.dumps(value, sort_keys=True))]

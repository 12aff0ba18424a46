"""What makes a run this run: kept in `run.json`, compared before it goes on."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from hamcli.errors import NoRunCheckpoint, shorten

RUN_JSON = "run.json"
FORMAT = 1

_PACKAGES = ("hamcli", "torch", "transformers", "safetensors", "accelerate", "numpy")
_DEVICE_KEYS = {"training.device"}  # a place, not a wish: another one is a warning
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `run.json` holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """The identity that `to_dict` made; TypeError when it is none."""
        return cls(**document)


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
        for section in ("recipe", "model", "data", "seed")
        for difference in _compare(section, getattr(saved, section), getattr(now, section))
        if difference.key not in _DEVICE_KEYS
    ]


def warnings(saved: RunIdentity, now: RunIdentity) -> tuple[str, ...]:
    """What may change the bytes but does not forbid going on: versions, device, threads."""
    found = [
        difference
        for section in ("versions", "device", "threads", "num_processes")
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

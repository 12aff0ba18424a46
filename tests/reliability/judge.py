"""What lies on the disk, judged with struct, numpy and json alone: no line of hamcli is used."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.safetensors_reader import read_file

# Fields of report.json that tell of a run and not of its result, as the contract lists them.
VOLATILE = {"speed", "speed_reason", "training.seconds"}
PARTS = {"model.safetensors", "optimizer.safetensors", "sparsifier.safetensors", "values.json"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, links not followed; {} when there is no folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def names(folder: Path) -> list[str]:
    """Every name below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def run_folder(out: Path) -> Path:
    """`OUT.run`."""
    return out.with_name(out.name + ".run")


def sound_steps(out: Path) -> tuple[list[int], list[str]]:
    """Steps of the run checkpoints that are whole, and what is wrong with each other one."""
    sound, wrong = [], []
    for folder in sorted((run_folder(out) / "checkpoints").glob("*")):
        try:
            sound.append(_sound_step(folder))
        except (AssertionError, OSError, ValueError, KeyError, TypeError) as error:
            wrong.append(f"{folder.name}: {error!r}")
    return sound, wrong


def _sound_step(folder: Path) -> int:
    found = re.fullmatch(r"step-(\d{8})", folder.name)
    assert found, folder.name
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["step"] == int(found[1])
    assert set(manifest["files"]) == PARTS
    assert {path.name for path in folder.iterdir()} == {*PARTS, "MANIFEST.json"}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert len(data) == entry["bytes"], name
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        if name.endswith(".safetensors"):
            for tensor in read_file(folder / name).values():
                assert np.isfinite(tensor).all(), name
    return int(found[1])


def result(out: Path) -> dict[str, Any]:
    """Every file of a finished OUT, of the report what is not volatile."""
    found: dict[str, Any] = contents(out)
    found["report.json"] = _settled(json.loads(found["report.json"]))
    return found


def _settled(report: dict[str, Any]) -> dict[str, Any]:
    assert set(report["volatile"]) <= VOLATILE
    for dotted in VOLATILE:
        section, _, key = dotted.partition(".")
        if not key:
            report.pop(section, None)
        elif report.get(section) is not None:
            report[section].pop(key, None)
    return report


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of files that are not the same in two results."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))

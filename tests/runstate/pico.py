"""A tiny deterministic run, and a judge of run folders that shares no code with the package."""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamcli.runstate import RunIdentity, RunState, disk_errors, finished, remove_leftovers

if TYPE_CHECKING:
    from torch import Tensor

LAST_STEP = 3


def identity(**changes: Any) -> RunIdentity:
    known = {
        "recipe": {"optimizer": {"lr": 1e-4}, "training": {"steps": 3, "device": "cpu"}},
        "model": {"model.safetensors": "aa"},
        "data": {"train.txt": "bb"},
        "seed": 0,
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "device": "cpu",
        "threads": 1,
    }
    return RunIdentity(**known | changes)


def tensors(step: int) -> dict[str, dict[str, "Tensor"]]:
    import torch

    weights = torch.arange(12.0).reshape(3, 4) / (step + 1)
    return {
        "model": {"weight": weights, "half": weights.bfloat16()},
        "masks": {"weight": weights > 1.0, "step": torch.tensor(step)},
    }


def values(step: int) -> dict[str, Any]:
    return {"step": step, "losses": [0.1 * one for one in range(step)]}


def live(out: Path, *, overwrite: bool = False, tensors_at: Any = tensors) -> list[str]:
    """The whole life of a run, from its start or from where it was left; returns its warnings."""
    done = finished(out)
    if done is not None and done.is_of(identity()):
        remove_leftovers(out)
        return []
    with RunState(out, overwrite=overwrite, resume=True) as run:
        notes = [*run.begin(identity())]
        found, damaged = run.newest_valid(["model", "masks", "values.step"], must_exist=False)
        notes += damaged
        first = found.step + 1 if found else 1
        for step in range(first, LAST_STEP + 1):
            run.save(step, tensors_at(step), values(step))
        stage = run.stage()
        with disk_errors("cannot write the model", stage):
            fill(stage)
        notes += run.publish(stage)
        run.finish()
    return notes


def die_with_old_aside(out: Path) -> None:
    """What a run leaves that is killed when it has moved the old folder aside, and no further."""
    out.mkdir()
    fill(out, content="old")
    run = RunState(out, overwrite=True)
    run._move_aside()
    run._lock.release()


def fill(folder: Path, *, content: str = "weights", recipe: dict[str, Any] | None = None) -> None:
    """A folder that looks like a finished one."""
    known = identity()
    (folder / "model.safetensors").write_text(content)
    report = {
        "ham_version": "1",
        "recipe": known.recipe if recipe is None else recipe,
        "model": {"sha256": known.model},
        "environment": {"versions": known.versions},
        "files": [{"path": "model.safetensors", "bytes": len(content)}],
    }
    (folder / "report.json").write_text(json.dumps(report))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sound_steps(run_folder: Path) -> tuple[list[int], list[str]]:
    """Checkpoints that are whole, and what is wrong with each other one."""
    sound, wrong = [], []
    for folder in sorted((run_folder / "checkpoints").glob("*")):
        step = int(re.fullmatch(r"step-(\d{8})", folder.name)[1])
        try:
            manifest = json.loads((folder / "MANIFEST.json").read_text())
            assert manifest["step"] == step
            for name, entry in manifest["files"].items():
                data = (folder / name).read_bytes()
                assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
            assert set(manifest["files"]) == {
                "model.safetensors",
                "masks.safetensors",
                "values.json",
            }
        except (AssertionError, OSError, ValueError, KeyError) as error:
            wrong.append(f"{folder.name}: {error!r}")
        else:
            sound.append(step)
    return sound, wrong

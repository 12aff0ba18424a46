"""The finished folder: written into a stage, opened again as a stranger would, published."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hamcli import __version__
from hamcli.checkpoint.dense import write_model
from hamcli.checkpoint.folder import CONFIG, sha256
from hamcli.checkpoint.loading import load_model
from hamcli.checkpoint.packed.folders import pack_in_place
from hamcli.checkpoint.source import find_model, weight_files
from hamcli.opening import Opened
from hamcli.progress import Progress
from hamcli.recipe import effective_text
from hamcli.report.records import REPORT_NAME, FileRecord, Report
from hamcli.runstate import RunState, disk_errors, installed_versions


@dataclass(frozen=True, slots=True)
class Written:
    """A staged folder: model, configs and recipe, no report yet."""

    stage: Path
    names: dict[str, tuple[str, ...]]
    files: tuple[FileRecord, ...]


def write_folder(
    opened: Opened,
    model: nn.Module,
    stage: Path,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Written:
    """Write the model and the effective recipe into a staging folder, or a fresh one below it.

    Args:
        opened: The run.
        model: What is written.
        stage: Where.
        gather: As for `write_model`.
    """
    section = opened.recipe.export
    made = write_model(
        model,
        opened.source,
        stage,
        dtype=section.dtype,
        max_shard_size=section.max_shard_size,
        tokenizer=opened.loaded.tokenizer,
        image_processor=opened.loaded.image_processor,
        gather=gather,
    )
    files = {one.path: (one.bytes, one.sha256) for one in made.files}
    if section.format == "packed":
        weights = list(weight_files(stage).values())
        with disk_errors("cannot pack the model", stage):
            pack_in_place(stage, weights)
        for path in (*weights, stage / CONFIG):
            files[path.name] = path.stat().st_size, sha256(path)
    text = effective_text(opened.recipe, {"ham": __version__, **installed_versions()})
    with disk_errors("cannot write the recipe", stage):
        (stage / "recipe.yaml").write_text(text, encoding="utf-8")
    raw = text.encode()
    files["recipe.yaml"] = len(raw), hashlib.sha256(raw).hexdigest()
    listed = tuple(FileRecord(name, size, digest) for name, (size, digest) in files.items())
    return Written(stage, made.names, listed)


def reload(opened: Opened, folder: Path, device: torch.device) -> nn.Module:
    """The written model, opened as a stranger's would be."""
    source = find_model(str(folder), hashed=False)
    return load_model(source, opened.loaded.task, dtype="float32").model.to(device)


def written_tensors(written: Written) -> Iterator[tuple[str, Tensor]]:
    """Parameter and tensor as it lies in the files, one after the other.

    Parameters that are split or joined for the disk are left out.
    """
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for path in weight_files(written.stage).values():
        with safe_open(path, "pt", backend="pread") as file:
            places |= dict.fromkeys(file.keys(), path)
    for name, stored in written.names.items():
        if len(stored) == 1:
            with safe_open(places[stored[0]], "pt", backend="pread") as file:
                yield name, file.get_tensor(stored[0])


def finish_folder(report: Report, stage: Path, run: RunState, progress: Progress) -> Report:
    """Write the report's three files and publish the folder."""
    from hamcli.report.writing import write_report

    progress.stage("writing the report")
    with disk_errors("cannot write the report", stage):
        write_report(report, stage)
    for text in run.publish(stage):
        progress.warn(text)
    return report


def finish_levels(
    reports: Mapping[str, Report], stage: Path, run: RunState, progress: Progress
) -> Report:
    """Write the reports of several results, each a folder of the stage, and publish them as one.

    The stage itself gets the last one's `report.json`, which lists the files of all.
    """
    from hamcli.report.writing import write_report

    progress.stage("writing the reports")
    files = []
    for name, report in reports.items():
        write_report(report, stage / name)
        files += [replace(one, path=f"{name}/{one.path}") for one in report.files]
    last = replace([*reports.values()][-1], files=tuple(files))
    (stage / REPORT_NAME).write_text(last.to_json(), encoding="utf-8", newline="\n")
    for text in run.publish(stage):
        progress.warn(text)
    return last

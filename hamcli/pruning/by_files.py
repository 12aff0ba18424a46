"""`ham prune`: by files alone where that is possible, in bounded memory and without torch.

Files alone tell what magnitude pruning needs, for known architectures and for files without a
config; for others the network is built without weights. What looks at data, measures quality or
stores its weights in other parts goes the road through memory, and a line says why.
"""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from hamcli import __version__
from hamcli.checkpoint.config import clean_config, infer_task
from hamcli.checkpoint.folder import (
    CONFIG,
    GENERATION,
    INDEX,
    SIDE_FILES,
    SINGLE,
    find_file,
    read_bytes,
    sha256,
)
from hamcli.checkpoint.headers import DTYPE_BITS, FLOATS, Header, TensorInfo
from hamcli.checkpoint.packed.folders import pack_in_place, unmark_config
from hamcli.checkpoint.recount import count_zeros
from hamcli.checkpoint.sidefiles import copy_side_files, pretty
from hamcli.checkpoint.source import Source, find_bare, find_model, find_weights, is_bare
from hamcli.checkpoint.stream import Shard, Writer, open_shards
from hamcli.completing import input_paths, placed, public_recipe
from hamcli.errors import InputRefused, RecipeError, UsageError
from hamcli.native import bits as magnitudes
from hamcli.progress import Progress
from hamcli.pruning.chunked import Found, cut_files, parts_of, passes, shapes_of
from hamcli.recipe import ReadRecipe, Recipe, effective_text
from hamcli.recipe.schema import WITHOUT_TRAINING, ExportSection
from hamcli.report.records import (
    EnvironmentRecord,
    FileRecord,
    GateCondition,
    GateRecord,
    ModelRecord,
    Report,
    SizeRecord,
    SparsityRecord,
    TensorRecord,
)
from hamcli.report.writing import write_report
from hamcli.runstate import RunState, check_space, disk_errors, installed_versions
from hamcli.signals import raise_on_signals
from hamcli.sizes import size_record
from hamcli.sparsity.families import FileTargets, Undecided, by_family, by_names
from hamcli.sparsity.rules import Rules, parse_block, rules_for, settled_allocation

NATIVE_FROM = 32 * 2**20
"""Bytes of targets from which building the C++ library saves more time than it takes."""
WEIGHED_UP_TO = 256 * 2**20
"""Dense bytes up to which the packed and the gzip size are computed, which takes long."""
QUANTISED = {"I8", *(name for name in DTYPE_BITS if name[0] == "F" and name not in FLOATS)}
"""Dtypes of weights that no magnitude orders: their scales lie elsewhere."""
HASHED_UP_TO = 2**30
"""Dense bytes up to which weight files are hashed: it costs as much as all the rest."""


def prune(read: ReadRecipe, *, out: Path, overwrite: bool, progress: Progress) -> Report:
    """Zero weights exactly, by files alone if they tell enough, else through memory.

    Raises:
        UsageError: E106, a method that trains, or several targets, are asked for.
    """
    _refuse_training(read)
    if not (why := _needs_memory(read.recipe)):
        try:
            return prune_files(read, out=out, overwrite=overwrite, progress=progress)
        except Undecided as reason:
            why = str(reason)
            progress.warn(f"pruned in memory, not file by file: {why}")
    else:
        progress.note(f"pruned in memory, not file by file: {why}")
    from hamcli.pruning.in_memory import prune as prune_in_memory

    return prune_in_memory(read, out=out, overwrite=overwrite, progress=progress)


def _refuse_training(read: ReadRecipe) -> None:
    """Refuse what one shot cannot give; a recipe for training may be pruned by, a word may not."""
    section = read.recipe.sparsity
    place = read.place("sparsity", "method")
    if section.levels is not None:
        where = read.place("sparsity", "target")
        raise UsageError(
            "E106", "several targets from one run", where, "", "one, or ham sparsify --method ast"
        )
    if place.startswith("--") and section.method not in ("one-shot", *WITHOUT_TRAINING):
        raise UsageError(
            "E106",
            "the method trains",
            place,
            section.method,
            f"ham sparsify --method {section.method}, or {', '.join(WITHOUT_TRAINING)}",
        )


def _needs_memory(recipe: Recipe) -> str:
    """Why files alone will not do for what is asked, whatever the model; empty if they may."""
    section = recipe.sparsity
    allocation = _allocation(recipe)
    has_bounds = section.min_sparsity > 0.0 or section.max_sparsity < 1.0
    reasons = {
        "quality is measured on --data": recipe.data.source or recipe.data.evaluation,
        "--max-drop measures quality": recipe.gate.max_drop is not None,
        f"{section.method} looks at data": section.method in WITHOUT_TRAINING,
        f"score {section.score}": section.one_shot_score != "magnitude",
        f"allocation {allocation}": allocation in ("lamp", "owl"),
        f"pattern {section.pattern}": parse_block(section.pattern) is not None,
        "bounds of a global allocation": has_bounds and allocation == "global",
        "another dtype": recipe.export.dtype != "auto" or recipe.model.dtype != "auto",
        "another shard size": recipe.export.max_shard_size != ExportSection().max_shard_size,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _allocation(recipe: Recipe) -> str:
    section = recipe.sparsity
    return settled_allocation(section.method, section.allocation, section.pattern)


def prune_files(read: ReadRecipe, *, out: Path, overwrite: bool, progress: Progress) -> Report:
    """Prune a model's files, tensor by tensor, and write them with a report.

    Raises:
        Undecided: Files alone do not tell the targets; nothing was written.
        InputRefused: The model is damaged, or a target is not finite.
        RecipeError: Targets and rules do not fit the model.
        UsageError: `out` may not be used.
        ResourceError: The disk.
        Interrupted: Ctrl-C; nothing is kept.
        Preempted: Another signal; nothing is kept.
    """
    opened = _OpenedFiles(read, progress)
    inputs = [opened.place, *input_paths(read.recipe)]
    with (
        raise_on_signals() as guard,
        RunState(out, inputs=inputs, overwrite=overwrite) as run,
    ):
        guard.arm()
        need = opened.dense_bytes + (opened.largest if opened.is_packing else 0)
        check_space(run.folder, need)
        stage = run.stage()
        with disk_errors("cannot write the model", stage):
            found = opened.write(stage)
            opened.write_others(stage)
            opened.refuse_changed()
            progress.stage("recounting")
            report = opened.report(stage, found)
            progress.stage("writing the report")
            write_report(report, stage)
        guard.hold()
        for text in run.publish(stage):
            progress.warn(text)
        run.finish()
    return report


class _OpenedFiles:
    """A model as files, with the targets that they tell."""

    def __init__(self, read: ReadRecipe, progress: Progress) -> None:
        recipe = read.recipe
        model = recipe.model.id or ""
        progress.stage(f"opening {model}")
        self.progress = progress
        self.source: Source | None = None
        if is_bare(model, recipe.model.config):
            self.place = find_bare(model)
            weights = find_weights(self.place)
        else:
            self.source = find_model(model, config=recipe.model.config, hashed=False)
            if Path(model).expanduser().is_file():
                # its config makes it a model, whose one file has a fixed name
                self.place = self.source.weights[0]
                weights = {SINGLE: self.source.headers[0]}
            else:
                self.place = self.source.folder
                weights = find_weights(self.place)
            _refuse_other_task(recipe, self.source)
        self.stamps = _stamps(weights.values())
        self.shards = open_shards(weights)
        self.warnings = _warnings(self.shards)
        for text in self.warnings:
            progress.warn(text)
        self.targets = self._targets(read)
        self.recipe = self._resolved(recipe)
        self.parts = parts_of(self.targets, self.shards)
        self.rules: Rules = rules_for(self.targets, self.recipe.sparsity)

    @property
    def dense_bytes(self) -> int:
        """Of all files in the dense form."""
        return sum(shard.dense_bytes for shard in self.shards)

    @property
    def largest(self) -> int:
        """The largest file in the dense form."""
        return max(shard.dense_bytes for shard in self.shards)

    @property
    def is_packing(self) -> bool:
        """Whether the result is packed."""
        return self.recipe.export.format == "packed"

    def _targets(self, read: ReadRecipe) -> FileTargets:
        shapes = shapes_of(self.shards)
        include, exclude = read.recipe.targets.include, read.recipe.targets.exclude
        try:
            if self.source is None:
                return by_names(shapes, include, exclude)
            try:
                return by_family(self.source.config, shapes, include, exclude)
            except Undecided as why:
                self.progress.note(f"torch is loaded to tell the targets: {why}")
                from hamcli.pruning.skeletons import by_skeleton

                return by_skeleton(self.source, shapes, include, exclude)
        except RecipeError as error:
            raise placed(error, read) from None

    def _resolved(self, recipe: Recipe) -> Recipe:
        """The recipe with revision, task, allocation and exclusions written out."""
        model = {}
        if self.source is not None:
            model["task"] = infer_task(self.source.config)
            if self.source.revision is not None:
                name = (recipe.model.id or "").partition("@")[0]
                model["id"] = f"{name}@{self.source.revision}"
        return recipe.model_copy(
            update={
                "model": recipe.model.model_copy(update=model),
                "sparsity": recipe.sparsity.model_copy(update={"allocation": _allocation(recipe)}),
                "targets": recipe.targets.model_copy(update={"exclude": self.targets.exclude}),
            }
        )

    # ---- writing ----

    def write(self, stage: Path) -> Found:
        """Write the weight files, dense."""
        chosen = {name for target in self.targets for name in target.pieces}
        if sum(piece.dense_bytes for part in self.parts for piece in part.pieces) >= NATIVE_FROM:
            magnitudes.prepare()
        rest = [
            (shard, tensor)
            for shard in self.shards
            for tensor in shard.header.tensors
            if tensor.name not in chosen
        ]
        left = sum(_dense_bytes(shard, tensor) for shard, tensor in rest)
        writer = Writer(stage, self.shards)
        writer.begin()
        self.progress.begin_bytes("pruning", passes(self.parts, self.rules) + left)
        try:
            found = cut_files(self.parts, self.rules, writer, self.progress.bytes_done)
            for shard, tensor in rest:
                writer.copy(shard, tensor, self.progress.bytes_done)
        finally:
            self.progress.end_bytes()
        return found

    def write_others(self, stage: Path) -> None:
        """Write what lies beside the weights, and pack the files if they shall be packed."""
        if self.source is not None:
            folder = self.source.folder
            (stage / CONFIG).write_bytes(_config(folder, self.recipe.model.config))
            if self.place == folder and len(self.shards) > 1:
                index = find_file(folder, INDEX)
                assert index is not None, "several shards have an index"
                (stage / INDEX).write_bytes(read_bytes(index))
            for note in copy_side_files(self.source, stage, extra=(GENERATION,)):
                self.progress.note(note)
        if self.is_packing:
            self.progress.stage("packing")
            files = [stage / shard.name for shard in self.shards]
            pack_in_place(stage, files, marked=self.source is not None)
        text = effective_text(self.recipe, {"ham": __version__, **installed_versions()})
        (stage / "recipe.yaml").write_text(text, encoding="utf-8")

    def refuse_changed(self) -> None:
        """See that the input is what it was.

        Raises:
            InputRefused: E416, it is not.
        """
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise InputRefused("E416", "the file changed while it was read", path)

    # ---- telling ----

    def report(self, stage: Path, found: Found) -> Report:
        """What was made, counted in the written files."""
        section = self.recipe.sparsity
        names = [piece.info.name for part in self.parts for piece in part.pieces]
        counts = count_zeros(stage, frozenset(names))
        tensors = tuple(
            TensorRecord.counted(
                name,
                shape=counts[name].shape,
                dtype=counts[name].dtype,
                zeros=counts[name].zeros,
                total=counts[name].total,
            )
            for name in names
        )
        sparsity = SparsityRecord.counted(
            section.target,
            zeros=sum(one.zeros for one in tensors),
            total=sum(one.total for one in tensors),
            num_parameters=self._num_parameters(),
            threshold=found.threshold,
            natural_zeros=found.natural_zeros,
            method="one-shot",
            allocation=section.allocation,
            pattern=section.pattern,
        )
        is_small = self.dense_bytes <= HASHED_UP_TO
        return Report(
            ham_version=__version__,
            model=self._model_record(),
            recipe=public_recipe(self.recipe),
            environment=_environment(),
            sparsity=sparsity,
            tensors=tensors,
            files=_file_records(stage, is_small),
            size=self._sizes(stage),
            gate=_gate(self.recipe.gate.min_sparsity, sparsity.achieved),
            command="prune",
            warnings=self.warnings
            + (() if is_small else (f"weights above {HASHED_UP_TO >> 30} GiB: not hashed",)),
        )

    def _num_parameters(self) -> int:
        return sum(
            tensor.total
            for shard in self.shards
            for tensor in shard.header.tensors
            if tensor.name in self.targets.parameters
        )

    def _sizes(self, stage: Path) -> SizeRecord:
        inputs = [shard.header.path for shard in self.shards]
        if self.dense_bytes <= WEIGHED_UP_TO:
            return size_record(stage, inputs)
        return SizeRecord(
            dense_bytes=self.dense_bytes,
            packed_bytes=sum((stage / shard.name).stat().st_size for shard in self.shards)
            if self.is_packing
            else None,
            input_bytes=sum(path.stat().st_size for path in inputs),
        )

    def _model_record(self) -> ModelRecord:
        source = self.source
        name = (self.recipe.model.id or "").partition("@")[0]
        files: dict[str, Path] = {}
        if self.dense_bytes <= HASHED_UP_TO:
            files |= {shard.name: shard.header.path for shard in self.shards}
        if source is not None:
            beside = (CONFIG, INDEX, *SIDE_FILES)
            files |= {one: path for one in beside if (path := find_file(source.folder, one))}
        architectures = source.config.get("architectures") if source is not None else None
        return ModelRecord(
            id=Path(name).name if Path(name).exists() else name,
            revision=source.revision if source is not None else None,
            sha256={one: sha256(path) for one, path in sorted(files.items())},
            task=infer_task(source.config) if source is not None else None,
            architecture=str(architectures[0]) if architectures else None,
            is_hub=source is not None and source.revision is not None,
        )


def _warnings(shards: Sequence[Shard]) -> tuple[str, ...]:
    """That quantised weights stay as they are, and are not among the parameters counted."""
    left = [
        tensor.dtype
        for shard in shards
        for tensor in shard.header.tensors
        if len(tensor.shape) >= 2 and tensor.dtype in QUANTISED
    ]
    if not left:
        return ()
    kinds = ", ".join(sorted(set(left)))
    return (f"{len(left):,} tensor(s) in {kinds} are neither pruned nor counted",)


def _refuse_other_task(recipe: Recipe, source: Source) -> None:
    if recipe.model.task not in ("auto", infer_task(source.config)):
        raise Undecided(f"--task {recipe.model.task} is not the one that the files were saved for")


def _config(folder: Path, named: str | None) -> bytes:
    """config.json without what names code or places; as it is where it names none."""
    is_file = named is not None and Path(named).expanduser().is_file()
    found = find_file(folder, Path(named).name if is_file and named else CONFIG)
    assert found is not None, "it was read before"
    raw = unmark_config(found)
    config = json.loads(raw)
    cleaned = clean_config(config)
    return raw if cleaned == config else pretty(cleaned)


def _dense_bytes(shard: Shard, tensor: TensorInfo) -> int:
    place = shard.places[tensor.name]
    return place.end - place.begin


def _stamps(headers: Iterable[Header]) -> dict[Path, tuple[int, int, int]]:
    return {header.path: _stamp(header.path) for header in headers}


def _stamp(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _environment() -> EnvironmentRecord:
    return EnvironmentRecord(
        versions=installed_versions(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
    )


def _file_records(stage: Path, with_weights: bool) -> tuple[FileRecord, ...]:
    records = []
    for path in sorted(one for one in stage.rglob("*") if one.is_file()):
        is_hashed = with_weights or path.suffix != ".safetensors"
        digest = sha256(path) if is_hashed else None
        name = path.relative_to(stage).as_posix()
        records.append(FileRecord(name, path.stat().st_size, digest))
    return tuple(records)


def _gate(least: float | None, achieved: float) -> GateRecord | None:
    if least is None:
        return None
    return GateRecord.of(GateCondition("min_sparsity", least, achieved, achieved >= least))

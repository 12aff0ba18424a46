"""From a user's words to everything a run stands on: checked recipe, model, data, targets."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hamcli.checkpoint.loading import LoadedModel, has_head, load_model
from hamcli.checkpoint.source import Source, find_model, infer_task
from hamcli.data import Data, label_names, open_data
from hamcli.defaults import RECIPE_OF_TASK
from hamcli.errors import RecipeError, UsageError
from hamcli.objective import Objective, make_objective
from hamcli.progress import Progress
from hamcli.recipe import ReadRecipe, Recipe, read_recipe, recipe_layer, values_layer
from hamcli.recipe.text import KeyPath, Parsed
from hamcli.runstate import RunIdentity, installed_versions
from hamcli.sparsity.masks import Rules, make_rules
from hamcli.sparsity.methods import settled_allocation
from hamcli.sparsity.targets import Targets, select_targets


@dataclass(frozen=True, slots=True)
class Opened:
    """What a run stands on: recipe with everything resolved, model, data, targets."""

    recipe: Recipe
    source: Source
    loaded: LoadedModel
    data: Data
    targets: Targets


def complete(layers: Sequence[Any], *, has_recipe: bool) -> ReadRecipe:
    """The checked recipe; without one of the user's, that of the model's task lies below."""
    layers = [_with_levels(layer) for layer in layers]
    if not has_recipe:
        said = [layer.data for layer in layers]
        model = _last(said, "model", "id")
        task = _last(said, "model", "task") or "auto"
        if task == "auto" and isinstance(model, str):
            config = _last(said, "model", "config")
            source = find_model(model, config=config, hashed=False)
            task = infer_task(source.config)
        if task in RECIPE_OF_TASK:
            layers.insert(0, recipe_layer(RECIPE_OF_TASK[task]))
            layers.insert(1, values_layer({"model.task": task}, "task"))
    pattern = _last([layer.data for layer in layers], "sparsity", "pattern")
    asked = _last([layer.data for layer in layers[1:]], "sparsity", "target")
    if isinstance(pattern, str) and asked is None and ":" in pattern:
        kept, _, group = pattern.partition(":")
        if kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group):
            fixed = values_layer({"sparsity.target": 1 - int(kept) / int(group)}, "pattern")
            layers.append(fixed)
    return read_recipe(layers)


def _with_levels(layer: Parsed) -> Parsed:
    """A layer whose `sparsity.target` is a list says the levels of ast instead."""
    section = layer.data.get("sparsity")
    target = section.get("target") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(target, list | tuple) or not target:
        return layer
    levels = sorted(set(target))
    said: dict[str, Any] = {"target": levels[-1]}
    if len(levels) > 1:
        said |= {"levels": levels, "method": section.get("method", "ast")}
    place = layer.places.get(("sparsity", "target"), "")
    places: dict[KeyPath, str] = {("sparsity", key): place for key in said}
    return Parsed({**layer.data, "sparsity": {**section, **said}}, {**places, **layer.places})


def _last(layers: Sequence[Mapping[str, Any]], section: str, key: str) -> Any:
    found = None
    for layer in layers:
        inner = layer.get(section)
        if isinstance(inner, Mapping) and inner.get(key) is not None:
            found = inner[key]
    return found


def open_run(read: ReadRecipe, progress: Progress, *, hashed: bool = True) -> Opened:
    """Open model and data, choose the targets, and resolve what the recipe left open."""
    recipe = read.recipe
    if recipe.model.id is None:
        raise UsageError("E103", "no model", "MODEL", "", "a hub id, folder or builtin:minilm")
    progress.stage(f"opening {recipe.model.id}")
    source = find_model(recipe.model.id, config=recipe.model.config, hashed=hashed)
    task = infer_task(source.config) if recipe.model.task == "auto" else recipe.model.task
    names = None if has_head(source, task) else label_names(recipe.data, task)
    loaded = load_model(
        source,
        task,
        dtype="float32" if recipe.model.dtype == "auto" else recipe.model.dtype,
        id2label=dict(enumerate(names)) if names else None,
        allow_new_head=names is not None,
        seed=recipe.training.seed,
    )
    for note in loaded.notes:
        progress.note(note)
    progress.stage("reading data")
    data = open_data(
        recipe.data,
        task=task,
        tokenizer=loaded.tokenizer,
        image_processor=loaded.image_processor,
        config=loaded.model.config,
    )
    try:
        targets = select_targets(loaded.model, recipe.targets.include, recipe.targets.exclude)
    except RecipeError as error:
        place = read.place("targets", "exclude" if error.code == "E215" else "include")
        raise RecipeError(
            error.code, error.what, place, f"{error.where}: {error.why}", error.right, error.hints
        ) from None
    return Opened(_resolved(recipe, source, task, targets), source, loaded, data, targets)


def _resolved(recipe: Recipe, source: Source, task: str, targets: Targets) -> Recipe:
    """The recipe with revision, task, allocation and exclusions written out."""
    model_id = recipe.model.id or ""
    if source.revision is not None:
        model_id = f"{model_id.partition('@')[0]}@{source.revision}"
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"id": model_id, "task": task}),
            "sparsity": recipe.sparsity.model_copy(
                update={
                    "allocation": settled_allocation(
                        recipe.sparsity.method, recipe.sparsity.allocation, recipe.sparsity.pattern
                    )
                }
            ),
            "targets": recipe.targets.model_copy(update={"exclude": tuple(targets.exclude)}),
        }
    )


def rules_of(opened: Opened, outliers: Sequence[float] | None = None) -> Rules:
    """Where zeros may lie and how many, as the recipe says.

    Args:
        opened: The run.
        outliers: Share of outliers of each target; `owl` needs them.
    """
    section = opened.recipe.sparsity
    return make_rules(
        opened.targets,
        target=section.target,
        allocation=section.allocation,
        pattern=section.pattern,
        min_sparsity=section.min_sparsity,
        max_sparsity=section.max_sparsity,
        outliers=outliers,
    )


def objective_of(opened: Opened) -> Objective:
    """What the run minimises."""
    section = opened.recipe.objective
    return make_objective(
        opened.loaded.task,
        weights={
            "task": section.task,
            "logits": section.distill.logits,
            "hidden": section.distill.hidden,
            "embedding": section.distill.embedding,
        },
        temperature=section.distill.temperature,
        has_labels=opened.data.has_labels,
        has_teacher=not opened.loaded.new_head,
    )


def run_identity(opened: Opened, num_processes: int = 1) -> RunIdentity:
    """All that the bytes of the run depend on."""
    return RunIdentity(
        recipe=public_recipe(opened.recipe),
        model=dict(opened.source.files),
        data=data_digests(opened.recipe),
        seed=opened.recipe.training.seed,
        versions=installed_versions(),
        device=opened.recipe.training.device,
        threads=torch.get_num_threads(),
        num_processes=num_processes,
    )


def data_digests(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each data file, by its last name; folders, data sets and samples have none."""
    named = [name for name in (recipe.data.source, recipe.data.evaluation) if name is not None]
    return {Path(name).name: _digest(Path(name)) for name in named if Path(name).is_file()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as reports show it: paths by their last name."""
    shown = recipe.as_dict()
    for section, key in (
        ("model", "id"),
        ("model", "config"),
        ("data", "source"),
        ("data", "evaluation"),
    ):
        value = shown[section][key]
        if value is not None and os.path.isabs(value):
            shown[section][key] = Path(value).name
    return shown

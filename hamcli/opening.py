"""From a user's words to everything a run stands on: checked recipe, model, data, targets."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hamcli.checkpoint.fitting import has_head
from hamcli.checkpoint.loading import LoadedModel, load_model
from hamcli.checkpoint.positions import learned_positions
from hamcli.checkpoint.source import Source, find_model, infer_task
from hamcli.completing import complete, placed, public_recipe
from hamcli.data import Data, label_names, open_data
from hamcli.errors import RecipeError, UsageError
from hamcli.objective import Objective, make_objective
from hamcli.optim.eta import choose_eta_and_clamp
from hamcli.progress import Progress
from hamcli.recipe import ReadRecipe, Recipe
from hamcli.recipe.schema import OptimizerSection
from hamcli.runstate import RunIdentity, installed_versions
from hamcli.sparsity.rules import Rules, rules_for, settled_allocation
from hamcli.sparsity.targets import Targets, select_targets

__all__ = [
    "Opened",
    "complete",
    "data_digests",
    "objective_of",
    "open_run",
    "public_recipe",
    "rules_of",
    "run_identity",
]


@dataclass(frozen=True, slots=True)
class Opened:
    """What a run stands on: recipe with everything resolved, model, data, targets."""

    recipe: Recipe
    source: Source
    loaded: LoadedModel
    data: Data
    targets: Targets


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
    try:
        data = open_data(
            recipe.data,
            task=task,
            tokenizer=loaded.tokenizer,
            no_tokenizer=loaded.no_tokenizer,
            image_processor=loaded.image_processor,
            config=loaded.model.config,
            positions=learned_positions(loaded.model),
        )
        targets = select_targets(loaded.model, recipe.targets.include, recipe.targets.exclude)
    except RecipeError as error:
        raise placed(error, read) from None
    return Opened(_resolved(recipe, source, task, targets), source, loaded, data, targets)


def _resolved(recipe: Recipe, source: Source, task: str, targets: Targets) -> Recipe:
    """The recipe with revision, task, eta, clamp, allocation and exclusions written out."""
    model_id = recipe.model.id or ""
    if source.revision is not None:
        model_id = f"{model_id.partition('@')[0]}@{source.revision}"
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"id": model_id, "task": task}),
            "optimizer": _fitted(recipe.optimizer, targets),
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


def _fitted(section: OptimizerSection, targets: Targets) -> OptimizerSection:
    """The section with eta and clamp as the targets' weights stand them."""
    ham = section.ham
    eta, clamp = choose_eta_and_clamp(
        targets.params,
        base=section.base,
        lr=section.lr,
        alpha=ham.alpha,
        scaling=ham.scaling,
        eta=ham.eta,
        clamp=ham.clamp,
    )
    return section.model_copy(update={"ham": ham.model_copy(update={"eta": eta, "clamp": clamp})})


def rules_of(opened: Opened, outliers: Sequence[float] | None = None) -> Rules:
    """Where zeros may lie and how many, as the recipe says.

    Args:
        opened: The run.
        outliers: Share of outliers of each target; `owl` needs them.
    """
    return rules_for(opened.targets, opened.recipe.sparsity, outliers)


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
    found: dict[str, str] = {}
    for name in dict.fromkeys((recipe.data.source, recipe.data.evaluation)):
        if name is not None and Path(name).is_file():
            key = Path(name).name
            # two files of one name in two folders
            found[f"{key} (evaluation)" if key in found else key] = _digest(Path(name))
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

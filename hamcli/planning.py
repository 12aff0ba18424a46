"""`ham plan`: what a run would do and need, without doing it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hamcli.checkpoint.loading import DTYPE_NAMES
from hamcli.checkpoint.reading import TORCH_DTYPES
from hamcli.data import batch
from hamcli.objective import make_teacher
from hamcli.opening import Opened, objective_of, open_run, rules_of
from hamcli.progress import Progress
from hamcli.recipe import ReadRecipe, Recipe
from hamcli.shrinking import Pruning, SizeEstimate, estimate_sizes
from hamcli.sparsity.catalogue import COPIES
from hamcli.sparsity.factors import KINDS

TRIED_STEPS = 2
WEIGHT_COPIES = 5  # weights, gradients, two moments, teacher
CHECKPOINT_COPIES = 3  # weights, two moments
KEPT = 3  # two kept and one being written


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do.

    Attributes:
        model: As named.
        task: What it does.
        data: In words.
        targets: Name and number of weights of each tensor that may become zero.
        prunable: Weights of all targets.
        zeros: Zeros at the end.
        parameters: Of the whole model.
        overall_sparsity: `zeros / parameters`.
        excluded: Globs that stay dense.
        steps: Optimizer steps.
        memory_bytes: Weights, gradients, optimizer state and teacher; activations come on top.
        disk_bytes: Run checkpoints and result.
        seconds: Estimated training time here, from a few tried steps.
        costs: What method and optimizer cost beside plain training, in words.
        sizes: What the weight files will shrink to, estimated, and what they would with embeddings.
    """

    model: str
    task: str
    data: str
    targets: tuple[tuple[str, int], ...]
    prunable: int
    zeros: int
    parameters: int
    overall_sparsity: float
    excluded: tuple[str, ...]
    steps: int
    memory_bytes: int
    disk_bytes: int
    seconds: float
    costs: tuple[str, ...] = ()
    sizes: tuple[SizeEstimate, ...] = ()


def plan(read: ReadRecipe, progress: Progress) -> Plan:
    """Work out a run; nothing is written."""
    opened = open_run(read, progress, hashed=False)
    recipe, targets, model = opened.recipe, opened.targets, opened.loaded.model
    section = recipe.sparsity
    rules = rules_of(opened)
    parameters = sum(param.numel() for param in model.parameters())
    progress.stage("estimating sizes")
    sizes = _sizes(opened, read.recipe.targets.exclude)
    progress.stage("trying two steps")
    seconds = _step_seconds(opened) * recipe.training.steps * recipe.training.accumulation
    results = len(section.levels or (section.target,))
    extra, more, costs = _costs(recipe, targets.total, parameters)
    if recipe.optimizer.sam > 0:
        seconds *= 2
    return Plan(
        model=recipe.model.id or "",
        task=opened.loaded.task,
        data=opened.data.description,
        targets=tuple((target.name, target.param.numel()) for target in targets),
        prunable=targets.total,
        zeros=rules.num_zeros,
        parameters=parameters,
        overall_sparsity=rules.num_zeros / parameters,
        excluded=tuple(targets.exclude),
        steps=recipe.training.steps,
        memory_bytes=WEIGHT_COPIES * 4 * parameters + extra,
        disk_bytes=(KEPT * CHECKPOINT_COPIES + results) * 4 * parameters + KEPT * more,
        seconds=seconds,
        costs=costs,
        sizes=sizes,
    )


def _sizes(opened: Opened, exclude: Sequence[str] | None) -> tuple[SizeEstimate, ...]:
    recipe = opened.recipe
    section, said = recipe.sparsity, recipe.export.dtype
    pruning = Pruning(
        section.target,
        section.allocation,
        section.pattern,
        section.min_sparsity,
        section.max_sparsity,
    )
    return estimate_sizes(
        opened.loaded.model,
        opened.targets,
        recipe.targets.include,
        exclude,
        pruning,
        TORCH_DTYPES[opened.source.dtype] if said == "auto" else DTYPE_NAMES[said],
    )


def _costs(recipe: Recipe, prunable: int, parameters: int) -> tuple[int, int, tuple[str, ...]]:
    """Bytes of memory and of a run checkpoint beside those of plain training, and why."""
    method, copies = recipe.sparsity.method, COPIES.get(recipe.sparsity.method, 0)
    extra = more = copies * 4 * prunable
    costs = []
    if method in KINDS:
        costs.append(f"{method} trains two factors a weight: twice the parameters and moments")
    elif copies:
        costs.append(f"{method} keeps {copies} more copies of the targets' weights")
    if recipe.optimizer.sam > 0:
        extra += 4 * parameters
        costs.append("sam: two passes a step, and one more copy of the weights")
    return extra, more, tuple(costs)


def _step_seconds(opened: Opened) -> float:
    recipe, model = opened.recipe, opened.loaded.model
    objective = objective_of(opened)
    teacher = make_teacher(model)
    model.train()
    began = time.monotonic()
    for step in range(TRIED_STEPS):
        if step == 1:  # the first one warms up
            began = time.monotonic()
        values = batch(
            opened.data, step, batch_size=recipe.training.batch_size, seed=recipe.training.seed
        )
        torch.manual_seed(0)
        objective(model, values, teacher).backward()  # type: ignore[no-untyped-call]  # torch's
    return time.monotonic() - began

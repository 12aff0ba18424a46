"""`ham plan`: what a run would do and need, without doing it."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hamcli.checkpoint.loading import DTYPE_NAMES
from hamcli.checkpoint.reading import TORCH_DTYPES
from hamcli.data import batch
from hamcli.memory import Memory, memory_of
from hamcli.objective import make_teacher
from hamcli.opening import Opened, objective_of, open_run, rules_of
from hamcli.parallel.launch import planned_parallel
from hamcli.parallel.limits import refuse_dropped_layers, refuse_unsharded
from hamcli.parallel.parts import refuse_uneven_batch
from hamcli.parallel.shards import blocks_of
from hamcli.progress import Progress
from hamcli.recipe import ReadRecipe, Recipe
from hamcli.size_estimate import Pruning, SizeEstimate, estimate_sizes
from hamcli.sparsity.catalogue import COPIES
from hamcli.sparsity.factors import KINDS

TRIED_STEPS = 2
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
        memory_bytes: Of each process; activations come on top.
        memory: What they are for.
        parallel: none, ddp or fsdp.
        world: Number of processes.
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
    memory: Memory
    costs: tuple[str, ...] = ()
    sizes: tuple[SizeEstimate, ...] = ()
    parallel: str = "none"
    world: int = 1


def plan(read: ReadRecipe, progress: Progress, world: int = 1) -> Plan:
    """Work out a run; nothing is written.

    Args:
        read: The recipe.
        progress: Who watches.
        world: Processes that would train together, as `training.parallel` says.

    Raises:
        RecipeError: E241, E242, E244 and E245: several processes cannot do this, or one cannot.
    """
    parallel = planned_parallel(read.recipe.training.parallel, world)
    refuse_uneven_batch(read.recipe.training.batch_size, world)
    if parallel == "fsdp":
        refuse_unsharded(read.recipe)
    opened = open_run(read, progress, hashed=False)
    recipe, targets, model = opened.recipe, opened.targets, opened.loaded.model
    refuse_dropped_layers(model, world)
    section = recipe.sparsity
    rules = rules_of(opened)
    parameters = sum(param.numel() for param in model.parameters())
    progress.stage("estimating sizes")
    sizes = _sizes(opened, read.recipe.targets.exclude)
    progress.stage("trying two steps")
    tried = _try_step(opened)
    seconds = tried.seconds * recipe.training.steps * recipe.training.accumulation
    results = len(section.levels or (section.target,))
    extra, more, costs = _costs(recipe, targets.total, parameters)
    if recipe.optimizer.sam > 0:
        seconds *= 2
    memory = memory_of(
        parameters=parameters,
        prunable=targets.total,
        largest=largest_part(model),
        sorted_weights=max(one.size for one in targets) if section.allocation == "lamp" else 0,
        moments=int(recipe.optimizer.momentum > 0) if recipe.optimizer.base == "sgd" else 2,
        has_teacher=not opened.loaded.new_head,
        extra=extra,
        activations=tried.activations,
        parallel=parallel,
        world=world,
    )
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
        memory_bytes=memory.total,
        memory=memory,
        disk_bytes=(KEPT * CHECKPOINT_COPIES + results) * 4 * parameters + KEPT * more,
        seconds=seconds,
        costs=costs,
        sizes=sizes,
        parallel=parallel,
        world=world,
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


def largest_part(model: nn.Module) -> int:
    """Parameters of the largest part that FSDP gathers at once: a block, or what is in none."""
    blocks = [sum(one.numel() for one in block.parameters()) for block in blocks_of(model)]
    rest = sum(one.numel() for one in model.parameters()) - sum(blocks)
    return max([rest, *blocks])


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


@dataclass(frozen=True, slots=True)
class _Tried:
    seconds: float
    activations: int


def _try_step(opened: Opened) -> _Tried:
    """Time of a micro-step, and bytes that its forward pass keeps for its backward pass."""
    recipe, model = opened.recipe, opened.loaded.model
    objective = objective_of(opened)
    teacher = make_teacher(model)
    model.train()
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    began = time.monotonic()
    for step in range(TRIED_STEPS):
        if step == 1:  # the first one warms up
            began = time.monotonic()
        values = batch(
            opened.data, step, batch_size=recipe.training.batch_size, seed=recipe.training.seed
        )
        torch.manual_seed(0)
        with saved_tensors_hooks(keep, lambda tensor: tensor) if step == 0 else nullcontext():
            loss = objective(model, values, teacher)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
    return _Tried(time.monotonic() - began, sum(kept.values()))

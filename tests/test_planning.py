"""A plan by hand: counts, bytes and time, with the tried step given."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hamcli import planning
from hamcli.completing import complete
from hamcli.errors import RecipeError
from hamcli.planning import largest_part, plan
from hamcli.progress import Silent
from hamcli.recipe import values_layer

RESNET = str(Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny")


@pytest.fixture
def planned(monkeypatch):
    """A plan of settings, whose micro-step takes 2 s and keeps 64 bytes."""
    monkeypatch.setattr(planning, "_try_step", lambda _: planning._Tried(2.0, 64))

    def make(**words):
        settings = {key.replace("__", "."): value for key, value in words.items()}
        base = {
            "model.id": RESNET, "sparsity.target": 0.9, "training.steps": 10,
            "training.accumulation": 3, "optimizer.base": "adamw",
        }  # fmt: skip
        return plan(complete([values_layer(base | settings, "x")], has_recipe=True), Silent())

    return make


def test_counts_are_those_of_the_model(planned):
    found = planned()
    assert found.prunable == sum(count for _, count in found.targets)
    assert found.zeros == round(0.9 * found.prunable)
    assert found.parameters > found.prunable > found.zeros
    assert found.overall_sparsity == found.zeros / found.parameters
    assert (found.steps, found.world, found.parallel) == (10, 1, "none")
    assert (found.costs, found.task) == ((), "image-classification")


def test_bytes_and_seconds_follow_from_the_counts(planned):
    found = planned()
    # three run checkpoints of weights and two moments, and the result, in fp32
    assert found.disk_bytes == (3 * 3 + 1) * 4 * found.parameters
    assert found.seconds == 2.0 * 10 * 3
    assert found.memory.activations == 64
    assert found.memory.moments == 2 * 4 * found.parameters
    assert found.memory.teacher == 4 * found.parameters
    assert found.memory_bytes == found.memory.total


def test_what_is_added_costs_more(planned):
    base = planned()
    assert planned(optimizer__base="sgd", optimizer__momentum=0.0).memory.moments == 0
    momentum = planned(optimizer__base="sgd", optimizer__momentum=0.9)
    assert momentum.memory.moments == 4 * base.parameters
    sam = planned(optimizer__sam=0.05)
    assert sam.seconds == 2 * base.seconds
    assert sam.memory_bytes == base.memory_bytes + 4 * base.parameters
    assert sam.disk_bytes == base.disk_bytes
    factors = planned(sparsity__method="pilot")
    assert factors.disk_bytes > base.disk_bytes
    levels = planned(sparsity__method="ast", sparsity__levels=[0.5, 0.8, 0.9])
    assert levels.disk_bytes - base.disk_bytes >= 2 * 4 * base.parameters


def test_a_batch_that_does_not_divide_is_refused_before_the_model_is_opened(monkeypatch):
    monkeypatch.setattr(planning, "open_run", None)
    words = {"model.id": RESNET, "training.batch_size": 7, "training.parallel": "ddp"}
    read = complete([values_layer(words, "x")], has_recipe=True)
    with pytest.raises(RecipeError, match="E244"):
        plan(read, Silent(), 2)


class Blocks(nn.Module):
    def __init__(self, first, rest):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, first, bias=False), nn.Linear(4, 2, bias=False)])
        self.head = nn.Linear(4, rest, bias=False)


def test_the_largest_part_is_a_block_or_the_rest():
    assert largest_part(Blocks(5, 3)) == 20
    assert largest_part(Blocks(5, 7)) == 28
    assert largest_part(Blocks(1, 1)) == 8


def test_a_tried_step_counts_what_the_backward_pass_keeps_but_no_weights():
    read = complete([values_layer({"model.id": RESNET, "training.batch_size": 2}, "x")],
                    has_recipe=True)  # fmt: skip
    opened = planning.open_run(read, Silent(), hashed=False)
    model = opened.loaded.model
    kept, weights = [], {one.untyped_storage().data_ptr() for one in model.parameters()}

    def keep(tensor):
        kept.append(tensor)
        return tensor

    tried = planning._try_step(opened)
    values = planning.batch(opened.data, 0, batch_size=2, seed=read.recipe.training.seed)
    model.train()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        planning.objective_of(opened)(model, values, planning.make_teacher(model))
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
    assert tried.activations == sum(
        size for place, size in storages.items() if place not in weights
    )

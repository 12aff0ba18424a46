"""What cannot be cut over processes is refused by name, with what works."""

import weakref

import numpy as np
import pytest
import torch

from hamcli.completing import complete
from hamcli.errors import RecipeError
from hamcli.memory import memory_of
from hamcli.parallel.limits import METHODS, refuse_dropped_layers, refuse_unsharded
from hamcli.planning import plan
from hamcli.progress import Silent
from hamcli.recipe import values_layer
from hamcli.sparsity.masks import prune_masks
from hamcli.sparsity.targets import Part, Target, Targets
from tests.parallel.pico import ALBERT


def recipe(**words):
    settings = {key.replace("__", "."): value for key, value in words.items()}
    return complete([values_layer(settings, "x")], has_recipe=True)


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_the_weights_themselves_go(method):
    refuse_unsharded(recipe(sparsity__method=method).recipe)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"sparsity__method": "str"}, "sparsity.method: str .*gradual"),
        ({"sparsity__score": "wanda", "sparsity__method": "one-shot"}, "sparsity.score: wanda"),
        ({"sparsity__allocation": "owl"}, "sparsity.allocation: owl"),
        ({"optimizer__bar": 0.1, "sparsity__method": "spred"}, "sparsity.method: spred"),
        ({"training__precision": "fp16"}, "training.precision: fp16"),
        ({"export__format": "packed"}, "export.format: packed"),
    ],
)
def test_what_needs_whole_tensors_is_refused(words, told):
    with pytest.raises(RecipeError, match=rf"E245.*{told}.*or training.parallel ddp"):
        refuse_unsharded(recipe(**words).recipe)


def test_layers_that_are_left_out_by_chance_are_refused_in_several_processes():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Module())
    model[1].layerdrop = 0.0
    refuse_dropped_layers(model, 2)
    model[1].layerdrop = 0.1
    refuse_dropped_layers(model, 1)
    with pytest.raises(RecipeError, match=r"E245.*layerdrop 0\.1 in 1: .*layerdrop 0 in"):
        refuse_dropped_layers(model, 2)


def test_a_count_is_that_of_the_whole():
    held = torch.randn(8, 8)
    target = Target("layer.weight", held, 1, part=Part((16, 8), 8, held))
    assert Targets((target,)).total == 128
    assert target.own(torch.arange(16)).tolist() == list(range(8, 16))


def test_memory_by_hand():
    one = memory_of(parameters=1000, prunable=800, largest=100, activations=64)
    assert (one.weights, one.gradients, one.moments, one.teacher) == (4000, 4000, 8000, 4000)
    assert (one.masks, one.dense, one.exchange) == (1600, 3200, 0)
    assert one.total == 4000 * 5 + 1600 + 3200
    cut_ = memory_of(
        parameters=1000, prunable=800, largest=100, activations=64, parallel="fsdp", world=4
    )
    assert cut_.total == 1000 * 5 + 400 + 800 + 6 * 4 * 100
    assert cut_.activations == 16
    words = {"parameters": 1000, "prunable": 800, "largest": 100, "parallel": "fsdp", "world": 4}
    assert memory_of(**words, sorted_weights=60).exchange == 48 * 60
    assert memory_of(**words, sorted_weights=40).exchange == 6 * 4 * 100
    assert memory_of(**words, extra=4000).extra == 1000
    ddp = memory_of(parameters=1000, prunable=800, largest=100, parallel="ddp", world=4)
    assert ddp.total == one.total + 4000


@pytest.mark.slow
def test_the_plan_of_several_processes():
    words = {
        "model__id": str(ALBERT), "training__batch_size": 4, "training__parallel": "fsdp",
        "data__max_length": 8,
    }  # fmt: skip
    found = plan(recipe(**words), Silent(), 4)
    assert (found.parallel, found.world) == ("fsdp", 4)
    assert found.memory.weights == -(-4 * found.parameters // 4)
    assert found.memory.activations > 0
    with pytest.raises(RecipeError, match="E244"):
        plan(recipe(**words), Silent(), 3)
    with pytest.raises(RecipeError, match="E241"):
        plan(recipe(**words), Silent(), 1)


class Two:
    """Process 0 of two that hold the same rows; counts the bytes that are whole at once."""

    rank, size = 0, 2

    def __init__(self):
        self._gathered, self.times = [], 0

    def add(self, counts):
        return np.array(counts) * 2

    def gather(self, counts):
        return np.stack([np.array(counts)] * 2)

    def whole(self, rows):
        assert all(one() is None for one in self._gathered), "two tensors are whole at once"
        made = torch.cat([rows, rows])
        self._gathered.append(weakref.ref(made))
        self.times += 1
        return made


@pytest.mark.parametrize(
    ("input_dim", "pattern", "allocation", "times"),
    [(0, "2:4", "global", 6), (0, "block:4x4", "global", 12), (1, "unstructured", "lamp", 3)],
)
def test_one_tensor_is_whole_at_a_time(input_dim, pattern, allocation, times):
    across = Two()
    rows = [torch.randn(6, 8) for _ in range(3)]
    parts = [Part((12, 8), 0, one) for one in rows]
    items = [
        Target(f"{place}.weight", one, input_dim, part=part)
        for place, (one, part) in enumerate(zip(rows, parts, strict=True))
    ]
    targets = Targets(tuple(items), (), across)
    masks = prune_masks(targets, 0.5, pattern=pattern, allocation=allocation)
    assert [mask.shape for mask in masks] == [(6, 8)] * 3
    assert across.times == times

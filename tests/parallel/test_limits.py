"""What cannot be cut over processes is refused by name, with what works."""

import pytest
import torch

from hamcli.completing import complete
from hamcli.errors import RecipeError
from hamcli.memory import memory_of
from hamcli.parallel.limits import METHODS, refuse_unsharded
from hamcli.planning import plan
from hamcli.progress import Silent
from hamcli.recipe import values_layer
from hamcli.sparsity.masks import refuse_cut
from hamcli.sparsity.rules import make_rules
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
        ({"sparsity__allocation": "lamp"}, "sparsity.allocation: lamp"),
        ({"sparsity__score": "wanda", "sparsity__method": "one-shot"}, "sparsity.score: wanda"),
        ({"sparsity__allocation": "owl"}, "sparsity.allocation: owl"),
        ({"optimizer__sam": 0.05}, "optimizer.sam: 0.05"),
        ({"optimizer__bar": 0.1, "sparsity__method": "spred"}, "sparsity.method: spred"),
        ({"training__precision": "fp16"}, "training.precision: fp16"),
        ({"export__format": "packed"}, "export.format: packed"),
    ],
)
def test_what_needs_whole_tensors_is_refused(words, told):
    with pytest.raises(RecipeError, match=rf"E245.*{told}.*or training.parallel ddp"):
        refuse_unsharded(recipe(**words).recipe)


class Two:
    """Process 0 of two that hold the same."""

    rank = 0

    def add(self, counts):
        import numpy as np

        return np.array(counts) * 2

    def gather(self, counts):
        import numpy as np

        return np.stack([np.array(counts)] * 2)


def cut(shape, rows, input_dim, begin=0):
    """A tensor of which some rows lie here."""
    held = torch.randn(rows, *shape[1:])
    target = Target("layer.weight", held, input_dim, part=Part(shape, begin, held))
    return Targets((target,), (), Two())


def chosen(targets, pattern):
    refuse_cut(targets, make_rules(targets, target=0.5, pattern=pattern))


def test_a_pattern_along_the_rows_must_not_be_cut():
    chosen(cut((16, 8), 8, 0), "2:4")
    with pytest.raises(RecipeError, match=r"E246.*2:4: layer.weight: rows that belong together"):
        chosen(cut((12, 8), 6, 0), "2:4")
    chosen(cut((12, 8), 6, 1), "2:4")


def test_blocks_must_not_be_cut():
    chosen(cut((16, 8), 8, 1), "block:4x2")
    with pytest.raises(RecipeError, match="E246"):
        chosen(cut((12, 8), 6, 1), "block:4x2")
    with pytest.raises(RecipeError, match="E246"):  # blocks of a kernel lie in another order
        chosen(cut((16, 8, 3, 3), 8, 1), "block:4x2")


def test_a_count_is_that_of_the_whole():
    assert cut((16, 8), 8, 1).total == 128


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

"""The presets of the quality benchmark: every run of each has a valid recipe."""

import importlib.util
import sys
from pathlib import Path

import pytest

from hamcli.comparison.grid import refuse_faults

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality" / "run.py"
NAMES = ("fashion", "mlp", "rxnfp", "rxnmapper", "spam", "movies", "speeches")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("quality_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("small", [False, True])
def test_a_preset_is_valid_and_finds_its_sets_in_the_cache(script, name, small, tmp_path):
    preset = script.PRESETS[name]
    settings = {**preset.settings, **(script.SMALL if small else {})}
    recipe = script.recipe_of(preset, tmp_path, settings).recipe
    refuse_faults(preset.grid, recipe)
    assert recipe.data.source.startswith(f"{tmp_path}/")
    assert recipe.training.steps == (10 if small else recipe.training.steps)
    assert "dense" in preset.grid.methods


def test_no_preset_is_forgotten(script):
    assert set(script.PRESETS) == set(NAMES)


def test_the_head_of_a_classifier_is_trained_densely_without_ham(script, tmp_path):
    preset = script.PRESETS["spam"]
    settings = {**preset.settings, **preset.head, **script.OFF}
    recipe = script.recipe_of(preset, tmp_path, settings).recipe
    assert (recipe.sparsity.target, recipe.optimizer.ham.alpha, recipe.optimizer.ham.beta) == (
        0.0, 0.0, 0.0,
    )  # fmt: skip

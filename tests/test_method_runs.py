"""Each method, score, allocation and pattern on the main road, small: exact, resumable, honest."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hamcli.cli import app
from hamcli.errors import Preempted, RecipeError, UsageError
from hamcli.opening import complete
from hamcli.pipeline import sparsify
from hamcli.planning import plan
from hamcli.progress import Silent
from hamcli.recipe import values_layer
from tests.stopping import StopsAt

pytestmark = pytest.mark.slow
RESNET = str(Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny")
SETTINGS = {
    "training.batch_size": 4,
    "training.checkpoint_every": 100,
    "evaluation.examples": 8,
    "sparsity.update_every": 0.2,
    "sparsity.calibration": 8,
}
OFF = {"optimizer.ham.alpha": 0.0, "optimizer.ham.beta": 0.0}
METHODS = ("random", "ac-dc", "rigl", "cyclic", "str", "spred", "pilot", "sign-in", "ast")


def run(out, **more):
    settings = SETTINGS | more.pop("settings", {})
    words = {"model": RESNET, "target": 0.8, "steps": 6} | more
    return sparsify(out=out, settings=settings, **words)


def exact(report):
    assert report.sparsity.zeros == round(report.sparsity.target * report.sparsity.total)
    return report


@pytest.mark.parametrize("method", METHODS)
def test_a_method_stopped_and_resumed_gives_the_bytes_of_one_run(method, tmp_path):
    exact(run(tmp_path / "one", method=method))
    with pytest.raises(Preempted):
        run(tmp_path / "two", method=method, progress=StopsAt(3))
    report = exact(run(tmp_path / "two", method=method, resume=True))
    files = [tmp_path / name / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert report.sparsity.method == method
    assert report.sparsity.allocation == ("erk" if method in ("random", "rigl") else "global")
    assert report.training.ham is not None


@pytest.mark.parametrize("method", ["gradual", "cyclic"])
def test_fisher_scores_go_on_where_they_stopped_and_choose_other_weights(method, tmp_path):
    fisher = {}  # what auto takes
    for name, settings in (("one", fisher), ("plain", {"sparsity.score": "magnitude"})):
        exact(run(tmp_path / name, method=method, settings=settings))
    with pytest.raises(Preempted):
        run(tmp_path / "two", method=method, settings=fisher, progress=StopsAt(3))
    exact(run(tmp_path / "two", method=method, settings=fisher, resume=True))
    one, two, plain = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "plain")
    )
    assert one == two
    assert one != plain


@pytest.mark.parametrize("method", ["ac-dc", "str", "pilot"])
def test_a_method_goes_without_ham(method, tmp_path):
    assert exact(run(tmp_path / "out", method=method, settings=OFF)).training.ham is None


def test_several_targets_give_a_folder_each_also_when_resumed(tmp_path):
    words = {"target": [0.5, 0.8], "steps": 7}
    report = run(tmp_path / "one", **words)
    with pytest.raises(Preempted):
        run(tmp_path / "two", **words, progress=StopsAt(4))
    run(tmp_path / "two", **words, resume=True)
    for name, target in (("50", 0.5), ("80", 0.8)):
        files = [tmp_path / out / name / "model.safetensors" for out in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
        told = json.loads((tmp_path / "one" / name / "report.json").read_text())["sparsity"]
        assert told["target"] == target
        assert told["zeros"] == round(target * told["total"])
    assert report.sparsity.target == 0.8
    assert {one.path.partition("/")[0] for one in report.files} == {"50", "80"}
    before = (tmp_path / "one" / "report.json").read_bytes()
    run(tmp_path / "one", **words)  # complete already
    assert (tmp_path / "one" / "report.json").read_bytes() == before
    # and every folder is a model
    exact(sparsify(model=str(tmp_path / "one" / "50"), target=0.9, steps=2, out=tmp_path / "on",
                   settings=SETTINGS))  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity.score": "first-order", "sparsity.method": "one-shot"},
        {"sparsity.score": "first-order"},
        {"sparsity.score": "fisher", "sparsity.method": "ac-dc"},
        {"sparsity.score": "random"},
        {"sparsity.score": "wanda", "sparsity.method": "one-shot"},
        {"sparsity.allocation": "lamp"},
        {"sparsity.allocation": "owl"},
        {"optimizer.sam": 0.05},
        {"optimizer.sam": 0.05, "sparsity.method": "ast"},
        {"optimizer.bar": 0.05, "sparsity.method": "pilot"},
    ],
    ids=lambda one: " ".join(f"{key.partition('.')[2]}={value}" for key, value in one.items()),
)
def test_a_setting_goes_all_the_way(settings, tmp_path):
    exact(run(tmp_path / "out", settings=settings))


def test_bar_without_pairs_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="E226"):
        run(tmp_path / "out", settings={"optimizer.bar": 0.05})


def test_blocks_go_all_the_way(tmp_path):
    from safetensors.torch import load_file

    narrow = {"targets.include": ["*layer.1.convolution"], "sparsity.pattern": "block:4x2"}
    report = run(tmp_path / "out", settings=narrow)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for tensor in report.tensors:
        weight = weights[tensor.name]
        alive = (
            (weight != 0).movedim((0, 1), (-2, -1)).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 4))
        )
        share = alive.float().mean(dim=(-1, -3))
        assert ((share == 0) | (share == 1)).all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_methods_without_training_are_of_prune(method, tmp_path):
    with pytest.raises(UsageError, match=f"E106.*ham prune --method {method}"):
        run(tmp_path / "no", method=method)
    words = ["prune", RESNET, "--target", "0.7", "--method", method, "--out", str(tmp_path / "out")]
    words += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    found = CliRunner().invoke(app, [*words, "--json"])
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sparsity"]["zeros"] == round(0.7 * report["sparsity"]["total"])
    assert report["sparsity"]["method"] == method
    assert report["sparsity"]["allocation"] == "uniform"
    assert f"pruned by {method}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"sparsity.levels": [0.5, 0.9], "sparsity.target": 0.9}, "method ast"),
        ({"sparsity.method": "ast", "sparsity.levels": [0.9, 0.5]}, "levels must rise"),
        ({"sparsity.score": "wanda"}, "score wanda needs"),
        ({"sparsity.method": "str", "training.precision": "fp16"}, "fp16"),
        ({"optimizer.sam": 0.05, "training.precision": "fp16"}, "sam"),
        ({"sparsity.pattern": "block:1x1"}, "unstructured"),
    ],
)
def test_words_that_do_not_fit_are_refused(words, told):
    with pytest.raises(RecipeError, match=told):
        complete([values_layer(words, "test")], has_recipe=True)


def test_a_list_of_targets_is_of_ast():
    section = complete([values_layer({"sparsity.target": [0.9, 0.5]}, "x")], has_recipe=True)
    assert section.recipe.sparsity.method == "ast"
    assert section.recipe.sparsity.levels == (0.5, 0.9)
    assert section.recipe.sparsity.target == 0.9


def test_a_target_that_is_no_number_is_refused():
    found = CliRunner().invoke(app, ["sparsify", RESNET, "--target", "0.5,half"])
    assert "E107" in str(found.exception)


def test_the_plan_says_what_a_method_costs():
    def planned(**words):
        settings = {"model.id": RESNET, "training.batch_size": 2, "training.steps": 10}
        return plan(complete([values_layer(settings | words, "x")], has_recipe=True), Silent())

    plain = planned()
    assert plain.costs == ()
    factors = planned(**{"sparsity.method": "pilot"})
    assert factors.memory_bytes == plain.memory_bytes + 6 * 4 * plain.prunable
    assert "twice the parameters" in factors.costs[0]
    sam = planned(**{"optimizer.sam": 0.05})
    assert "two passes" in sam.costs[0]

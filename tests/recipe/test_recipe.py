"""Recipes: strict, numbers mean numbers, faults with their places."""

import pytest

from hamcli.errors import HamError, RecipeError, UsageError
from hamcli.recipe import (
    effective_text,
    json_schema,
    read_recipe,
    recipe_layer,
    shipped_names,
    words_layer,
)
from hamcli.recipe.text import parse


def faults(text):
    with pytest.raises(HamError) as caught:
        read_recipe([parse(text, "r.yaml")])
    return caught.value.lines()


def value(text):
    return parse(f"v: {text}", "r.yaml").data["v"]


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_are_valid_and_round_trip(name):
    recipe = read_recipe([recipe_layer(name)]).recipe
    again = parse(effective_text(recipe, {"ham": "0"}), "again.yaml")
    assert read_recipe([again]).recipe == recipe


def test_the_recipes_that_readers_rely_on_are_shipped():
    wanted = {
        "quick",
        "text-encoder-90",
        "causal-lm-50",
        "masked-lm-80",
        "masked-lm-95",
        "image-classifier-95",
    }
    assert wanted <= set(shipped_names())


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("1e-5", 1e-5), (".5", 0.5), ("5.", 5.0), ("1_000", "1_000"), ("0777", "0777"),
        ("1:30", "1:30"), ("no", "no"), ("~", None), ("true", True), ("2024-99-99", "2024-99-99"),
    ],
)  # fmt: skip
def test_scalars_mean_what_they_look_like(text, meaning):
    found = value(text)
    assert found == meaning
    assert type(found) is type(meaning)


def test_an_unknown_key_names_the_nearest_with_line_and_column():
    (line,) = faults("sparsity:\n  targt: 0.9\n")
    assert "r.yaml:2:3: sparsity.targt" in line
    assert 'did you mean "target"?' in line


def test_all_faults_are_told_at_once():
    lines = faults("sparsity: {target: 90}\noptimizer: {lr: '1e-3', base: adamx}\n")
    assert len(lines) == 3
    assert any("did you mean 0.9?" in line for line in lines)
    assert any("adamw" in line for line in lines)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x 1\nb: *x", "a: !!python/object:os.system x", "sparsity: {target: .nan}",
        "optimizer: {lr: 1e999}", "sparsity: 3", "- 1", "a: 1\n---\nb: 2",
        "sparsity: {target: true}",
        "[" * 2000, "sparsity: {target: 0.5, target: 0.6}", "model: {token: x}", "a: [", "\x00",
        "sparsity: {pattern: '4:2'}", "sparsity: {pattern: '2:4', target: 0.9}",
        "sparsity: {ramp_start: 0.6, freeze_last: 0.5}", "x" * 300_000,
    ],
)  # fmt: skip
def test_hostile_and_mistaken_recipes_are_refused_in_short_lines(text):
    for line in faults(text):
        assert len(line) <= 300
        assert line.isprintable()


def test_words_of_the_command_line_override_a_file_and_say_so():
    layers = [parse("sparsity: {target: 0.5}", "r.yaml"), words_layer(["sparsity.target=0.8"])]
    read = read_recipe(layers)
    assert read.recipe.sparsity.target == 0.8
    assert read.place("sparsity", "target") == "--set: sparsity.target"


def test_a_word_that_is_no_setting_is_a_usage_error():
    with pytest.raises(UsageError):
        words_layer(["target"])


def test_a_missing_file_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError):
        recipe_layer(str(tmp_path / "absent.yaml"))


def test_the_schema_knows_every_section():
    assert {"model", "data", "sparsity", "gate"} <= set(json_schema()["properties"])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("{}", "fisher"), ("sparsity: {method: cyclic}", "fisher"),
        ("sparsity: {method: ac-dc}", "magnitude"),
        ("sparsity: {method: ac-dc, score: fisher}", "fisher"),
        ("sparsity: {method: rigl}", "magnitude"), ("sparsity: {method: str}", "magnitude"),
        ("sparsity: {method: one-shot}", "magnitude"), ("optimizer: {base: sgd}", "magnitude"),
        ("sparsity: {score: magnitude}", "magnitude"),
    ],
)  # fmt: skip
def test_the_score_is_fisher_where_that_pays_and_adam_keeps_moments(text, score):
    assert read_recipe([parse(text, "r.yaml")]).recipe.score == score


@pytest.mark.parametrize(
    "text",
    ["sparsity: {score: fisher, method: rigl}",
     "sparsity: {score: fisher}\noptimizer: {base: sgd}"],
)  # fmt: skip
def test_fisher_is_refused_where_there_are_no_moments(text):
    (line,) = faults(text)
    assert "score fisher" in line

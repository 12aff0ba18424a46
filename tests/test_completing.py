"""What is filled in where a user says little."""

import pytest

from hamcli.completing import complete
from hamcli.recipe import values_layer


def eta_of(**words: object) -> float:
    said = {"model.id": "hub/name", **{key.replace("__", "."): one for key, one in words.items()}}
    recipe = complete([values_layer(said, "test")], has_recipe=False).recipe
    assert recipe.model.task == words["model__task"]
    return recipe.optimizer.ham.eta


@pytest.mark.parametrize(
    ("target", "eta"),
    [(None, 0.01), (0.8, 0.01), (0.89, 0.01), (0.9, 0.005), (0.95, 0.005), (1, 0.005)],
)
def test_a_masked_language_model_gets_the_recipe_of_its_sparsity(target, eta):
    words = {} if target is None else {"sparsity__target": target}
    assert eta_of(model__task="masked-lm", **words) == eta


def test_several_sparsities_go_by_the_highest():
    assert eta_of(model__task="masked-lm", sparsity__target=[0.5, 0.95]) == 0.005
    assert eta_of(model__task="masked-lm", sparsity__target=[0.5, 0.8]) == 0.01


def test_other_tasks_have_one_recipe_at_every_sparsity():
    low = eta_of(model__task="text-classification", sparsity__target=0.5)
    assert eta_of(model__task="text-classification", sparsity__target=0.95) == low


def test_what_the_user_says_stands():
    assert (
        eta_of(model__task="masked-lm", sparsity__target=0.95, optimizer__ham__eta=0.002) == 0.002
    )


def test_a_target_that_is_no_number_is_told_as_always():
    from hamcli.errors import RecipeError

    with pytest.raises(RecipeError, match=r"sparsity\.target"):
        eta_of(model__task="masked-lm", sparsity__target="much")

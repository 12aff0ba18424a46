"""What does not go with weights that are cut over processes, and what to do instead."""

from hamcli.errors import RecipeError
from hamcli.recipe import Recipe

METHODS = ("gradual", "one-shot", "random", "ac-dc", "rigl", "cyclic")
ALLOCATIONS = ("auto", "global", "uniform", "erk", "lamp")


def refuse_unsharded(recipe: Recipe) -> None:
    """See that a recipe can be carried out on shards.

    Raises:
        RecipeError: E245.
    """
    sparsity, optimizer = recipe.sparsity, recipe.optimizer
    works = {
        "sparsity.method": (sparsity.method, METHODS),
        "sparsity.allocation": (sparsity.allocation, ALLOCATIONS),
        "sparsity.score": (sparsity.score, ("magnitude", "first-order", "random")),
        "optimizer.bar": (optimizer.bar, (0,)),
        "training.precision": (recipe.training.precision, ("auto", "fp32", "bf16")),
        "export.format": (recipe.export.format, ("dense",)),
    }
    for key, (value, possible) in works.items():
        if value not in possible:
            raise RecipeError(
                "E245",
                "it does not go with training.parallel fsdp",
                key,
                f"{value}",
                f"{', '.join(map(str, possible))}; or training.parallel ddp",
            )

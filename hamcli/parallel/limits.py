"""What does not go with several processes, or weights that are cut, and what to do instead."""

from torch import nn

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
        "sparsity.score": (
            sparsity.score,
            ("auto", "magnitude", "fisher", "first-order", "random"),
        ),
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


def refuse_dropped_layers(model: nn.Module, num_processes: int) -> None:
    """See that all processes go through the same layers of a model, or they would wait in vain.

    Raises:
        RecipeError: E245.
    """
    shares = {name: getattr(one, "layerdrop", 0) for name, one in model.named_modules()}
    dropping = [
        (name, share) for name, share in shares.items() if isinstance(share, float) and share > 0
    ]
    if num_processes > 1 and dropping:
        name, share = dropping[0]
        raise RecipeError(
            "E245",
            "it does not go with several processes",
            "training.parallel",
            f"layerdrop {share:g} in {name or 'the model'}: each would leave out other layers",
            "layerdrop 0 in the model's config.json, or training.parallel none",
        )

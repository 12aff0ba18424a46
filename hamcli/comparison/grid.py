"""Which runs a comparison is made of, and the recipe of each; nothing is run here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hamcli.errors import UsageError
from hamcli.recipe import ReadRecipe, Recipe, read_recipe, values_layer
from hamcli.recipe.schema import WITHOUT_TRAINING

DENSE = "dense"
"""Name of the reference that is fine-tuned as long, without zeros and without HAM."""
VALIDATION_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Arm:
    """A method with HAM or without: what gets a learning rate of its own."""

    method: str
    ham: bool

    @property
    def label(self) -> str:
        """`gradual + HAM` or `gradual`."""
        return f"{self.method} + HAM" if self.ham else self.method


@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    Attributes:
        arm: Its method, and whether HAM is on.
        target: Sparsity to reach, 0 to 1.
        seed: Of data order, dropout and random masks.
        lr: Peak learning rate.
        is_trial: Whether it is measured on validation rows, to choose `lr`.
    """

    arm: Arm
    target: float
    seed: int
    lr: float
    is_trial: bool = False

    @property
    def label(self) -> str:
        """`gradual + HAM at 90 %, seed 0`, or with the learning rate of a trial."""
        last = f"trying lr {self.lr:g}" if self.is_trial else f"seed {self.seed}"
        return f"{self.arm.label} at {100 * self.target:g} %, {last}"

    @property
    def slug(self) -> str:
        """The same as the beginning of a folder's name."""
        words = [self.arm.method, "ham" if self.arm.ham else "plain", f"{100 * self.target:g}"]
        return "-".join([*words, f"lr{self.lr:g}" if self.is_trial else f"seed{self.seed}"])


@dataclass(frozen=True, slots=True)
class Grid:
    """Everything that is compared with everything.

    Attributes:
        methods: Names of methods, or `dense`.
        targets: Sparsities, 0 to 1.
        seeds: The same for every arm, so that runs are paired.
        hams: Whether HAM is on; both for pairs.
        trials: Learning rates tried for each arm; 1 takes the recipe's and tries none.
    """

    methods: tuple[str, ...]
    targets: tuple[float, ...]
    seeds: tuple[int, ...]
    hams: tuple[bool, ...] = (False, True)
    trials: int = 3

    @property
    def arms(self) -> tuple[Arm, ...]:
        """In the order of their runs."""
        return tuple(
            Arm(method, ham)
            for method in self.methods
            for ham in (self.hams if method != DENSE else (False,))
        )

    def targets_of(self, arm: Arm) -> tuple[float, ...]:
        """The sparsities of an arm: the dense reference has none but 0."""
        return (0.0,) if arm.method == DENSE else self.targets

    def tuned_at(self, arm: Arm) -> float:
        """The sparsity that the learning rate is chosen at: the highest."""
        return max(self.targets_of(arm))

    def cells(self, arm: Arm, lr: float) -> Iterator[Cell]:
        """The runs of an arm at its learning rate."""
        for target in self.targets_of(arm):
            for seed in self.seeds:
                yield Cell(arm, target, seed, lr)

    @property
    def num_trials(self) -> int:
        """Runs that choose learning rates."""
        return len(self.arms) * (self.trials if self.trials > 1 else 0)

    @property
    def num_cells(self) -> int:
        """Runs that are compared."""
        return sum(len(self.targets_of(arm)) * len(self.seeds) for arm in self.arms)


def refuse_faults(grid: Grid, base: Recipe) -> None:
    """See that every run of the grid has a valid recipe, before the first one begins.

    Raises:
        UsageError: A list is empty or says something twice, or a method does not train.
        RecipeError: A method or a sparsity that no recipe takes.
    """
    for word, values in (
        ("--methods", grid.methods),
        ("--targets", grid.targets),
        ("--seeds", grid.seeds),
        ("--ham", grid.hams),
    ):
        if not values or len(set(values)) < len(values):
            why = "it says one thing twice" if values else "it is empty"
            raise UsageError("E108", "not a list to compare", word, why, "different values")
    if grid.trials < 1:
        raise UsageError("E108", "too few trials", "--trials", str(grid.trials), "at least 1")
    for method in grid.methods:
        if method in WITHOUT_TRAINING:
            raise UsageError(
                "E106",
                "the method does not train",
                "--methods",
                method,
                f"ham prune --method {method}",
            )
    for arm in grid.arms:
        for cell in grid.cells(arm, base.optimizer.lr):
            cell_recipe(base, cell)


def cell_recipe(base: Recipe, cell: Cell) -> ReadRecipe:
    """The recipe of a run: the common one with the words of the cell.

    Raises:
        RecipeError: The words do not fit it.
    """
    plain = base.as_dict()
    plain["sparsity"]["levels"] = None
    plain["data"]["validation_fraction"] = None
    if cell.arm.method == DENSE:
        plain["sparsity"] |= {"min_sparsity": 0.0, "pattern": "unstructured"}
    words: dict[str, Any] = {
        "sparsity.method": "gradual" if cell.arm.method == DENSE else cell.arm.method,
        "sparsity.target": cell.target,
        "optimizer.lr": cell.lr,
        "data.validation_fraction": VALIDATION_FRACTION if cell.is_trial else None,
    }
    ham = base.optimizer.ham
    if not cell.arm.ham:
        words |= {"optimizer.ham.alpha": 0.0, "optimizer.ham.beta": 0.0}
    elif ham.alpha == 0 and ham.beta == 0:
        words |= {"optimizer.ham.alpha": "auto", "optimizer.ham.beta": "auto"}
    seed = values_layer({"training.seed": cell.seed}, "--seeds")
    return read_recipe([values_layer(plain, "recipe"), values_layer(words, "--methods"), seed])

"""The course of each method, by name, from what a recipe says of sparsity."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from hamcli.recipe.schema import SparsitySection
from hamcli.sparsity.courses import Course, latent_targets
from hamcli.sparsity.factors import KINDS, Factors
from hamcli.sparsity.levels import Levels
from hamcli.sparsity.methods import Sparsifier, make_sparsifier
from hamcli.sparsity.score import Score, first_order, magnitude, make_random
from hamcli.sparsity.targets import Targets
from hamcli.sparsity.thresholding import Thresholding

COPIES = {"str": Thresholding.copies, "ast": Levels.copies} | dict.fromkeys(KINDS, Factors.copies)


def make_course(
    words: SparsitySection,
    targets: Targets,
    model: nn.Module,
    *,
    steps: int,
    seed: int,
    score: str = "magnitude",
    outliers: Sequence[float] | None = None,
    of_run: Mapping[str, Score] = MappingProxyType({}),
) -> Course:
    """What becomes of the weights in one run.

    Args:
        words: The recipe's section on sparsity.
        targets: What may become zero.
        model: Whose weights they are.
        steps: Optimizer steps of the run.
        seed: Of random scores.
        score: Name of what makes a weight important.
        outliers: Share of outliers of each target's layer; needed by owl.
        of_run: Scores that only a run can make, by name: fisher, wanda.

    Raises:
        RecipeError: As `make_sparsifier`.
    """

    def sparsifier(on: Targets, target: float = words.target) -> Sparsifier:
        kind = "random" if words.method == "random" else score
        return make_sparsifier(
            words.method,
            on,
            target=target,
            steps=steps,
            allocation=words.allocation,
            pattern=words.pattern,
            ramp_start=words.ramp_start,
            freeze_last=words.freeze_last,
            update_every=words.update_every,
            min_sparsity=min(words.min_sparsity, target),
            max_sparsity=words.max_sparsity,
            score=make_score(kind, on, seed, of_run),
            outliers=outliers,
            phase=words.phase,
            drop_fraction=words.drop_fraction,
            cycles=words.cycles,
            start_sparsity=words.start_sparsity,
        )

    if words.method in KINDS:
        return Factors(
            targets,
            sparsifier(targets),
            kind=words.method,
            regularisation=words.regularisation,
            rescale_every=max(1, round(words.rescale_every * steps)),
        )
    if words.method == "str":
        latent = latent_targets(targets)
        return Thresholding(targets, latent, sparsifier(latent))
    if words.method == "ast":
        latent = latent_targets(targets)
        levels = words.levels or (words.target,)
        return Levels(targets, latent, [sparsifier(latent, one) for one in levels], model)
    return Course(targets, sparsifier(targets))


def make_score(kind: str, targets: Targets, seed: int, of_run: Mapping[str, Score]) -> Score:
    """The score of a name: magnitude, first-order, random, or one `of_run`."""
    if kind == "random":
        return make_random(targets, seed)
    return {"magnitude": magnitude, "first-order": first_order, **of_run}[kind]

"""One run of a comparison: begun, gone on with or found finished; its model is not kept."""

import math
from pathlib import Path

from hamcli.comparison.records import Outcome
from hamcli.errors import Diverged, NoRunCheckpoint, RecipeError
from hamcli.pipeline import run_sparsify
from hamcli.progress import Progress
from hamcli.recipe import ReadRecipe
from hamcli.report.records import Report
from hamcli.runstate import disk_errors, remove_leftovers, run_folder
from hamcli.runstate.disk import remove_tree
from hamcli.signals import Stop


def run_cell(
    read: ReadRecipe, folder: Path, *, keep: bool, progress: Progress, stop: Stop
) -> Outcome:
    """Train, prune and measure; what diverges or is refused is an outcome too.

    Args:
        read: Of the run.
        folder: Where the model is written; a run that was stopped there goes on.
        keep: Whether the written model stays.
        progress: Who watches.
        stop: Whether a signal has come; looked at after every step.

    Raises:
        HamError: What would meet every other run too: the model, the data, the disk, a signal.
    """
    # a comparison is one of quality: its runs share the machine, and many of them are small
    evaluation = read.recipe.evaluation.model_copy(update={"speed": "off"})
    read = ReadRecipe(read.recipe.model_copy(update={"evaluation": evaluation}), read.places)
    try:
        outcome = outcome_of(_trained(read, folder, progress, stop))
    except Diverged as error:
        outcome = Outcome("diverged", error.line())
    except RecipeError as error:
        outcome = Outcome("refused", error.line())
    remove_leftovers(folder)
    if not keep and folder.is_dir():
        with disk_errors("cannot remove a model that was measured", folder):
            remove_tree(folder)
    return outcome


def _trained(read: ReadRecipe, folder: Path, progress: Progress, stop: Stop) -> Report:
    def run(*, resume: bool, overwrite: bool) -> Report:
        return run_sparsify(
            read,
            out=folder,
            resume=resume,
            overwrite=overwrite,
            keep_run=False,
            progress=progress,
            stop=stop,
        )

    if not run_folder(folder).is_dir():
        return run(resume=False, overwrite=False)
    try:
        return run(resume=True, overwrite=False)
    except NoRunCheckpoint:  # it was stopped before its first one, or they are damaged
        return run(resume=False, overwrite=True)


def outcome_of(report: Report) -> Outcome:
    """What a comparison keeps of a report; a quality that is not finite has diverged."""
    quality, training = report.quality, report.training
    assert quality is not None
    if quality.sparse is None or not math.isfinite(quality.sparse):
        return Outcome("diverged", f"{quality.metric} is {quality.sparse}")
    ham = training.ham if training is not None else None
    return Outcome(
        status="done",
        metric=quality.metric,
        higher_is_better=quality.higher_is_better,
        value=quality.sparse,
        loss=_finite(quality.sparse_loss),
        agreement=_finite(quality.agreement),
        dense=_finite(quality.dense),
        dense_loss=_finite(quality.dense_loss),
        one_shot=_finite(quality.one_shot),
        num_examples=quality.num_examples,
        data=quality.data,
        zeros=report.sparsity.zeros,
        total=report.sparsity.total,
        overall_sparsity=report.sparsity.overall_achieved,
        exponent_mean=_finite(ham.exponent_mean) if ham is not None else None,
        moved_fraction=_finite(training.ham_moved_fraction) if training is not None else None,
        seconds=training.seconds if training is not None else None,
        warnings=report.warnings,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

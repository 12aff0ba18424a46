"""The road of `ham sparsify`, and the function that the library offers: recipe in, report out."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hamcli.completing import complete, input_paths
from hamcli.defaults import out_folder
from hamcli.errors import UsageError
from hamcli.opening import open_run, public_recipe, run_identity
from hamcli.parallel.world import World, joined
from hamcli.progress import Progress, Silent
from hamcli.recipe import WORDS, ReadRecipe, Recipe, recipe_layer, values_layer
from hamcli.recipe.schema import WITHOUT_TRAINING
from hamcli.report.records import Report, read_report
from hamcli.runstate import RunState, check_out, finished, remove_leftovers
from hamcli.signals import Stop, stop_on_signals
from hamcli.sparsifying import Sparsification
from hamcli.tracking import Trackers, refuse_missing
from hamcli.training import refuse_missing_device, refuse_missing_scaler


def sparsify(
    recipe: Recipe | str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_run: bool = False,
    progress: Progress | None = None,
    **overrides: Any,
) -> Report:
    """Make a model sparse and keep it good; what `ham sparsify` calls.

    Args:
        recipe: A Recipe, a shipped recipe's name, or a file; None takes the recipe of the task.
        out: Folder of the result; it appears complete or not at all.
        resume: Go on from the run checkpoints beside `out`.
        overwrite: Replace `out` if it holds something.
        keep_run: Leave the run folder when done.
        progress: Who watches; nobody by default.
        **overrides: `model`, `target`, `data`, `steps`, ... or dotted keys in a dict `settings`.

    Returns:
        The report, as written to `out`.

    Raises:
        TypeError: An override is none that there is.
        HamError: Anything of `hamcli.errors` but GateFailed: `report.gate` has the verdict.
    """
    settings = overrides.pop("settings", {})
    if unknown := sorted(overrides.keys() - WORDS.keys()):
        known = ", ".join(WORDS)
        raise TypeError(f"sparsify() has no argument {unknown[0]!r}: {known}, or a key in settings")
    words = {WORDS[key]: value for key, value in overrides.items()} | settings
    layers = [values_layer(words, "argument")]
    if isinstance(recipe, Recipe):
        layers.insert(0, values_layer(recipe.as_dict(), "recipe"))
    elif recipe is not None:
        layers.insert(0, recipe_layer(str(recipe)))
    read = complete(layers, has_recipe=recipe is not None)
    return run_sparsify(
        read, out=out, resume=resume, overwrite=overwrite, keep_run=keep_run, progress=progress
    )


def run_sparsify(
    read: ReadRecipe,
    *,
    out: str | Path | None,
    resume: bool,
    overwrite: bool,
    keep_run: bool,
    progress: Progress | None,
    command: str = "",
    stop: Stop | None = None,
) -> Report:
    """The main road, from a checked recipe to a finished folder.

    Whoever makes several runs listens for signals itself and hands its `stop` in, so that one that
    comes after the last step of a run is not lost.
    """
    progress = progress or Silent()
    recipe = read.recipe
    target = recipe.sparsity.target
    if recipe.sparsity.method in WITHOUT_TRAINING:
        raise UsageError(
            "E106",
            "the method does not train",
            read.place("sparsity", "method"),
            recipe.sparsity.method,
            f"ham prune --method {recipe.sparsity.method}, or another method",
        )
    refuse_missing_device(recipe.training.device, read.place("training", "device"))
    refuse_missing_scaler(
        recipe.training.precision, recipe.training.device, read.place("training", "precision")
    )
    if recipe.training.trackers:
        refuse_missing(recipe.training.trackers)
    folder = Path(out) if out is not None else out_folder(recipe.model.id or "", target)
    with joined(recipe.training.parallel, recipe.training.device) as world:
        if not overwrite and (found := _complete_already(read, folder, progress, world)):
            return found
        return _in_world(read, folder, resume, overwrite, keep_run, progress, command, stop, world)


def _in_world(
    read: ReadRecipe,
    folder: Path,
    resume: bool,
    overwrite: bool,
    keep_run: bool,
    progress: Progress,
    command: str,
    stop: Stop | None,
    world: World,
) -> Report:
    """The run, in each of its processes; process 0 alone has the run folder."""
    inputs = input_paths(read.recipe)
    with ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(stop_on_signals())
        run = None
        if world.is_main:
            state = RunState(folder, inputs=inputs, overwrite=overwrite, resume=resume)
            run = stack.enter_context(state)
        with world.turns():
            # nobody else may hold what is opened: weights that are cut would stay whole
            job = Sparsification(open_run(read, progress), run, stop, progress, command, world)
        opened, warnings = job.opened, job.warnings
        if run is not None:
            check_out(folder, inputs=[opened.source.folder], overwrite=overwrite)
            warnings += run.begin(run_identity(opened, world.size))
        for text in warnings:
            progress.warn(text)
        names = read.recipe.training.trackers if world.is_main else ()
        trackers = Trackers(names, folder, public_recipe(opened.recipe), progress)
        stack.callback(trackers.close)
        report = job.work(trackers.step)
        if run is not None and report is not None:
            trackers.result(report)
            run.finish(keep_run=keep_run)
        # the others learn it as people do
        told = world.tell(report.to_json() if report is not None else None)
    return report if report is not None else Report.from_json(told)


def _complete_already(
    read: ReadRecipe, folder: Path, progress: Progress, world: World
) -> Report | None:
    """The report of a folder that this very run has made before; None for any other."""
    found = None
    if world.is_main:
        before = finished(folder)
        if before is not None and before.is_of(run_identity(open_run(read, progress))):
            remove_leftovers(folder)
            progress.tell(f"{folder} is already complete: nothing was done")
            found = read_report(folder)
    told = world.tell(found.to_json() if found is not None else None)
    return found if found is not None or told is None else Report.from_json(told)

"""The road of `ham compare`: tune each arm on validation rows, run the grid, write the result."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from hamcli.comparison.cells import Cells, Inputs, find_inputs, identity, key_of
from hamcli.comparison.grid import Arm, Cell, Grid, cell_recipe, refuse_faults
from hamcli.comparison.page import write_comparison
from hamcli.comparison.records import Comparison, Row, Tuning
from hamcli.comparison.running import run_cell
from hamcli.comparison.summary import means, pairs
from hamcli.comparison.tuning import choose, learning_rates
from hamcli.comparison.watching import OneRun, RunCounter
from hamcli.errors import HamError, Stopped, UsageError, stopped_by
from hamcli.opening import public_recipe
from hamcli.progress import Progress, Silent
from hamcli.recipe import ReadRecipe, Recipe
from hamcli.signals import Stop, stop_on_signals

CELLS, RUNS = "cells", "runs"
VARIED = {
    "optimizer": ("lr",),
    "sparsity": ("method", "target", "levels"),
    "training": ("seed",),
    "data": ("validation_fraction",),
}
"""Keys of the recipe that a comparison sets itself."""


def compare(
    read: ReadRecipe,
    grid: Grid,
    *,
    out: Path,
    keep: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Run a grid of methods, sparsities and seeds under one budget, and write what came of it.

    The learning rate of each arm is chosen first, on validation rows held out of the training
    data; the held-out examples are for the runs that are compared. What was run before in `out`
    is not run again, and a run that was stopped goes on.

    Args:
        read: The common recipe: model, data, steps and all that no arm varies.
        grid: What is compared.
        out: Folder of the result; made, or of a comparison before.
        keep: Whether the models stay, in `out/runs`.
        progress: Who watches; nobody by default.

    Returns:
        What was written to `out` as compare.json, compare.html and table.md.

    Raises:
        HamError: Anything of `hamcli.errors` but Diverged, which is a row of the result.
    """
    progress = progress or Silent()
    refuse_faults(grid, read.recipe)
    _refuse_foreign(out)
    progress.stage("hashing the model and the data")
    inputs = find_inputs(read.recipe)
    base = _pinned(read.recipe, inputs)
    tunings, rows = [], []
    with stop_on_signals() as stop:
        runner = _Runner(base, inputs, out, keep, grid, progress, stop)
        for arm in grid.arms:
            tunings.append(runner.tune(arm))
            rows += [runner.row(cell) for cell in grid.cells(arm, tunings[-1].lr)]
    found = Comparison(
        grid,
        _facts(read.recipe, inputs),
        tuple(tunings),
        tuple(rows),
        means(grid, rows),
        pairs(grid, rows),
    )
    progress.stage("writing the page")
    write_comparison(found, out)
    runner.close()
    return found


class _Runner:
    """Makes rows, from the cache where it has them."""

    def __init__(
        self,
        base: Recipe,
        inputs: Inputs,
        out: Path,
        keep: bool,
        grid: Grid,
        progress: Progress,
        stop: Stop,
    ) -> None:
        self.base, self.inputs, self.grid, self.keep = base, inputs, grid, keep
        self.cells, self.runs = Cells(out / CELLS), out / RUNS
        self.counter = RunCounter(progress, grid.num_trials + grid.num_cells)
        self.progress = progress
        self.stop = stop

    def tune(self, arm: Arm) -> Tuning:
        """Choose the learning rate of an arm, on the first seed at the highest sparsity."""
        lr, target = self.base.optimizer.lr, self.grid.tuned_at(arm)
        if self.grid.trials == 1:
            return Tuning(arm, target, lr, False, ())
        rates = learning_rates(lr, self.grid.trials)
        seed = self.grid.seeds[0]
        trials = [self.row(Cell(arm, target, seed, rate, is_trial=True)) for rate in rates]
        chosen, is_edge = choose(trials)
        if is_edge:
            self.progress.note(f"{arm.label}: lr {chosen:g} is the last one tried on its side")
        return Tuning(arm, target, chosen, is_edge, tuple(trials))

    def row(self, cell: Cell) -> Row:
        """The outcome of a run, made now or before."""
        read = cell_recipe(self.base, cell)
        content = identity(read.recipe, self.inputs)
        key = key_of(content)
        outcome = self.cells.load(content)
        if outcome is not None:
            self.counter.found()
            return Row(cell, key, outcome)
        if self.stop.requested is not None:
            raise self._stopped("")
        self.counter.begin(cell.label)
        folder = self.runs / f"{cell.slug}-{key[:12]}"
        watcher = OneRun(self.progress, cell.label)
        keep = self.keep and not cell.is_trial
        self.runs.mkdir(exist_ok=True)
        try:
            outcome = run_cell(read, folder, keep=keep, progress=watcher, stop=self.stop)
        except Stopped as stopped:
            raise self._stopped(f"{cell.label}: {stopped.why}; ") from None
        self.cells.save(content, outcome)
        self.counter.end()
        if outcome.status != "done":
            self.progress.warn(f"{cell.label}: {outcome.status}: {outcome.why}")
        return Row(cell, key, outcome)

    def close(self) -> None:
        """Remove the folder of models if none was kept."""
        with suppress(OSError):  # another comparison may be at work in it, or it holds models
            self.runs.rmdir()

    def _stopped(self, saved: str) -> HamError:
        return stopped_by(
            self.stop.requested or "",
            f"{self.counter.made} runs were made; {saved}the same command goes on",
        )


def _refuse_foreign(out: Path) -> None:
    """See that `out` is new, empty or a comparison's."""
    if out.exists() and not out.is_dir():
        raise UsageError("E111", "cannot be an output folder", out, "it is a file", "a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CELLS).is_dir():
        raise UsageError(
            "E109", "the folder is of something else", out, f"no {CELLS} in it", "another --out"
        )


def _pinned(recipe: Recipe, inputs: Inputs) -> Recipe:
    """The recipe with the model's commit, so that a hub that moves on changes no run."""
    if inputs.revision is None or recipe.model.id is None:
        return recipe
    pinned = f"{recipe.model.id.partition('@')[0]}@{inputs.revision}"
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"id": pinned})})


def _facts(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    shared = public_recipe(recipe)
    for section, keys in VARIED.items():
        for key in keys:
            if (section, key) != ("optimizer", "lr"):  # the middle of those tried
                del shared[section][key]
    return {
        "model": {"id": shared["model"]["id"], "revision": inputs.revision, "sha256": inputs.model},
        "data": inputs.data,
        "recipe": shared,
        "versions": inputs.versions,
    }

"""The end of a run of `ham sparsify`: a trained model written, recounted, measured and reported.

The numbers of the report come from the files as they were written, opened again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hamcli import __version__, outcome
from hamcli.changes import Change, change_of, greatest_dropped
from hamcli.checkpoint.dense import stored_tensors
from hamcli.evaluation import Quality
from hamcli.opening import Opened, public_recipe
from hamcli.optim import HAM
from hamcli.parallel.shards import Shards, whole
from hamcli.parallel.world import World
from hamcli.progress import Progress
from hamcli.report.records import NO_SPEED, EnvironmentRecord, Report, TensorRecord
from hamcli.result_folder import (
    Written,
    finish_folder,
    finish_levels,
    reload,
    write_folder,
    written_tensors,
)
from hamcli.runstate import RunState
from hamcli.saving import History, own_tensors
from hamcli.sizes import size_record
from hamcli.sparsity.courses import Course
from hamcli.sparsity.levels import Levels
from hamcli.sparsity.targets import Targets
from hamcli.speed import Found

MOVED_FLOOR = 0.01


@dataclass(frozen=True, slots=True)
class Trained:
    """What training leaves to be written and reported.

    Attributes:
        model: Whole, or cut over the processes.
        targets: Its prunable weights, or this process's rows of them.
        shards: How it is cut; None where it is whole.
        course: Its `sparsifier` holds the masks of the level that the model shows.
        optimizer: With its last state.
        history: Of all steps.
        objective: What was minimised, in words.
        dense: Quality of the dense model; None of one with a new head.
        one_shot: Quality of pruning as far without training.
        dense_weights: The targets' weights before, on the CPU.
        seconds: Of training, in all sessions.
    """

    model: nn.Module
    targets: Targets
    shards: Shards | None
    course: Course
    optimizer: HAM
    history: History
    objective: str
    dense: Quality | None
    one_shot: Quality | None
    dense_weights: Sequence[Tensor]
    seconds: float


class Conclusion:
    """From a trained model to its finished folder, in each of the processes of the run.

    Args:
        opened: The run.
        trained: What its training left.
        run: The run folder, which process 0 alone holds; None in the others.
        world: The processes.
        progress: Who watches.
        environment: For the report.
        device: Where the written model is measured.
        measure: Quality of a model on the held-out examples; None where another process has it.
        stop_here: Ends the run if a signal has come; looked at between the parts.
        warnings: Of the run, told in the report.
        warn: Adds one to them, and says it now.
    """

    def __init__(
        self,
        opened: Opened,
        trained: Trained,
        run: RunState | None,
        world: World,
        progress: Progress,
        environment: EnvironmentRecord,
        device: torch.device,
        *,
        measure: Callable[[nn.Module], Quality | None],
        stop_here: Callable[[], None],
        warnings: Sequence[str],
        warn: Callable[[str], None],
    ) -> None:
        self.opened, self.trained, self.run, self.world = opened, trained, run, world
        self.recipe, self.progress, self.warnings = opened.recipe, progress, warnings
        self.environment, self.device = environment, device
        self._measure, self._stop_here, self._warn = measure, stop_here, warn

    def report(self) -> Report | None:
        """Write the folder and publish it; the report, None but in process 0."""
        if self.trained.shards is not None:
            self.trained.course.finish()
            return self._write_together(self.trained.shards)
        return None if self.run is None else self._finish(self.run)

    def _finish(self, run: RunState) -> Report:
        """Write the result, or one for each level."""
        stage, levels, course = run.stage(), self.recipe.sparsity.levels, self.trained.course
        if levels is None or not isinstance(course, Levels):
            course.finish()
            report = self._write(stage, self.recipe.sparsity.target)
            self._stop_here()
            return finish_folder(report, stage, run, self.progress)
        reports = {}
        for level, target in enumerate(levels):
            course.finish_level(level)
            name = f"{target * 100:g}"
            reports[name] = self._write(stage / name, target)
        self._stop_here()
        return finish_levels(reports, stage, run, self.progress)

    def _threshold(self) -> float | None:
        """Largest dense magnitude among what one shot by magnitude dropped; else unknown."""
        section, masks = self.recipe.sparsity, self.trained.course.sparsifier.masks
        if section.method != "one-shot" or self.recipe.score != "magnitude" or masks is None:
            return None
        largest = greatest_dropped(self.trained.dense_weights, masks)
        if not self.world.is_sharded:
            return largest
        found = self.world.greatest(-1.0 if largest is None else largest)
        return found if found >= 0 else None

    def _write(self, folder: Path, target: float) -> Report:
        """Write the model into a staging folder, recount and measure it there."""
        change = change_of(self.trained.dense_weights, self.trained.targets, self.world)
        threshold = self._threshold()
        self._stop_here()
        self.progress.stage("writing and recounting")
        written = write_folder(self.opened, self.trained.model, folder)
        tensors = outcome.counted_tensors(written.stage, self.trained.targets.names, written.names)
        self.progress.stage("measuring the written model")
        again = reload(self.opened, written.stage, self.device)
        sparse = self._measure(again)
        assert sparse is not None, "process 0 measures"
        self.progress.stage("measuring speed")
        speed = outcome.measured_speed(self.opened, again, tensors, self.device)
        return self._report(written, tensors, target, sparse, speed, change, threshold)

    def _write_together(self, shards: Shards) -> Report | None:
        """The same of a model that is cut: process 0 writes what all give, and reads it back."""
        change = change_of(self.trained.dense_weights, self.trained.targets, self.world)
        threshold = self._threshold()
        self.progress.stage("writing and recounting")
        run, written = self.run, None
        if run is not None:
            written = write_folder(self.opened, self.trained.model, run.stage(), gather=whole)
        else:
            for tensor in stored_tensors(self.trained.model):
                whole(tensor)
        self.progress.stage("measuring the written model")
        self._read_back(shards, written)
        sparse = self._measure(self.trained.model)
        if run is None or written is None or sparse is None:
            return None
        tensors = outcome.counted_tensors(written.stage, self.trained.targets.names, written.names)
        target = self.recipe.sparsity.target
        report = self._report(written, tensors, target, sparse, (None, NO_SPEED), change, threshold)
        return finish_folder(report, written.stage, run, self.progress)

    @torch.no_grad()
    def _read_back(self, shards: Shards, written: Written | None) -> None:
        """Give the model the weights that lie in the files, one tensor after the other."""
        own = own_tensors(self.trained.model)
        files = None if written is None else written_tensors(written)
        names = None if written is None else [n for n, s in written.names.items() if len(s) == 1]
        for name in self.world.tell(names):
            here = torch.empty(own[name].shape, dtype=torch.float32)
            if files is not None:
                found, tensor = next(files)
                assert found == name
                here.copy_(tensor)
            self.world.broadcast(here)
            own[name].copy_(shards.cut(here, own[name]))

    def _report(
        self,
        written: Written,
        tensors: tuple[TensorRecord, ...],
        target: float,
        sparse: Quality,
        speed: Found,
        change: Change,
        threshold: float | None,
    ) -> Report:
        section, sparsifier = self.recipe.sparsity, self.trained.course.sparsifier
        sparsity = outcome.sparsity_record(
            tensors,
            target,
            num_parameters=sum(param.numel() for param in self.trained.model.parameters()),
            threshold=threshold,
            natural_zeros=sparsifier.natural_zeros,
            method=section.method,
            allocation=section.allocation,
            pattern=section.pattern,
        )
        if sparsity.zeros < sparsifier.num_zeros:
            raise AssertionError(f"{sparsity.zeros} zeros written of {sparsifier.num_zeros}")
        self._warn_of(tensors)
        one_shot = self.trained.one_shot if target == section.target else None
        quality = outcome.quality_record(self.trained.dense, sparse, one_shot, self.opened.data)
        if quality.is_below_one_shot:
            self._warn(
                f"training did harm: {quality.metric} {quality.sparse:.4g}, pruned in one shot "
                f"{quality.one_shot:.4g}; more steps or a lower optimizer.lr may help"
            )
        return Report(
            ham_version=__version__,
            model=outcome.model_record(self.opened),
            recipe=public_recipe(self.recipe),
            environment=self.environment,
            sparsity=sparsity,
            tensors=tensors,
            files=written.files,
            size=size_record(written.stage, self.opened.source.weights),
            quality=quality,
            speed=speed[0],
            speed_reason=speed[1],
            training=outcome.training_record(
                self.recipe,
                self.trained.history.records,
                self.trained.optimizer.param_groups[0],
                self.trained.history.exponents(self.trained.optimizer),
                objective=self.trained.objective,
                seconds=self.trained.seconds,
                sign_flips=change.sign_flips,
            ),
            gate=outcome.gate_record(
                self.recipe.gate.max_drop,
                self.recipe.gate.min_sparsity,
                quality.drop,
                sparsity.achieved,
            ),
            data=outcome.data_record(self.opened),
            histogram=change.histogram,
            warnings=tuple(self.warnings),
        )

    def _warn_of(self, tensors: Sequence[TensorRecord]) -> None:
        empty = [one.name for one in tensors if one.zeros == one.total]
        if empty and self.recipe.sparsity.target < 1.0:
            self._warn(f"{len(empty)} tensors lost every weight, first {empty[0]}")
        moved = [
            one
            for record in self.trained.history.records
            if (one := record.moved_fraction) is not None
        ]
        is_on = self.recipe.optimizer.ham.alpha != 0 or self.recipe.optimizer.ham.beta != 0
        if is_on and moved and max(moved) < MOVED_FLOOR:
            self._warn("the mirror step moved almost no weight: HAM did nothing in this run")

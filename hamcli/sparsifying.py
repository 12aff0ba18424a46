"""One run of `ham sparsify`: train while zeros come, write, reopen, recount, measure, report."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hamcli import __version__, outcome
from hamcli.calibration import activation_score, calibrate, outliers
from hamcli.changes import Change, change_of, greatest_dropped
from hamcli.checkpoint.dense import stored_tensors
from hamcli.data import batch, evaluation_batches
from hamcli.divergence import refuse_high_loss
from hamcli.errors import HamError, RecipeError, stopped_by
from hamcli.evaluation import Quality, measure
from hamcli.finishing import (
    Written,
    finish_folder,
    finish_levels,
    reload,
    write_folder,
    written_tensors,
)
from hamcli.objective import Objective, Part, make_teacher
from hamcli.opening import Opened, objective_of, public_recipe
from hamcli.optim import HAM, forms
from hamcli.parallel.limits import refuse_dropped_layers, refuse_unsharded
from hamcli.parallel.parts import (
    has_batch_norm,
    part_of,
    refuse_uneven_batch,
)
from hamcli.parallel.shards import Shards, fill_, shard_, shard_teacher, whole
from hamcli.parallel.world import World
from hamcli.progress import Progress, StepRecord
from hamcli.report.records import (
    NO_SPEED,
    Report,
    TensorRecord,
)
from hamcli.runstate import RunState
from hamcli.saving import PARTS, History, State, own_tensors, restore, save
from hamcli.sharpness import adapter_pairs, balance_
from hamcli.signals import Stop
from hamcli.sizes import size_record
from hamcli.sparsity.catalogue import COPIES, make_course
from hamcli.sparsity.courses import Course
from hamcli.sparsity.levels import Levels
from hamcli.sparsity.masks import apply_masks_, prune_masks
from hamcli.sparsity.score import Score
from hamcli.sparsity.targets import Targets, select_targets
from hamcli.speed import Found
from hamcli.training import (
    Engine,
    Hooks,
    find_gradients,
    has_idle_parameters,
    in_cycles,
    make_accelerator,
    make_engine,
    to_device,
    train,
    warm_up_and_decay,
)

MEASURED_STEPS = 50  # times in a run that the mirror step is measured
MOVED_FLOOR = 0.01


@dataclass(frozen=True, slots=True)
class Trained:
    """What training leaves to be written and reported.

    Attributes:
        objective: What was minimised.
        optimizer: With its last state.
        course: Its `sparsifier` holds the masks of the level that the model shows.
        dense: Quality of the dense model; None of one with a new head.
        one_shot: Quality of pruning as far without training.
        dense_weights: The targets' weights before, on the CPU.
        seconds: Of training, in all sessions.
    """

    objective: Objective
    optimizer: HAM
    course: Course
    dense: Quality | None
    one_shot: Quality | None
    dense_weights: Sequence[Tensor]
    seconds: float


class Sparsification:
    """One run of `sparsify`, from opened model to written folder, in each of its processes.

    Process 0 alone holds the run folder, and measures and writes; `run` is None in the others.
    """

    def __init__(
        self,
        opened: Opened,
        run: RunState | None,
        stop: Stop,
        progress: Progress,
        command: str,
        world: World,
    ) -> None:
        self.opened, self.run, self.stop, self.progress = opened, run, stop, progress
        self.world = world
        self.recipe, self.targets, self.data = opened.recipe, opened.targets, opened.data
        self.warnings, self.command = list(opened.data.notes), command
        self.model = opened.loaded.model
        self.shards: Shards | None = None
        training = self.recipe.training
        refuse_uneven_batch(training.batch_size, world.size)
        refuse_dropped_layers(self.model, world.size)
        if world.is_sharded:
            refuse_unsharded(self.recipe)
        self.accelerator = make_accelerator(training.device, training.precision, world.size)
        self.device = self.accelerator.device
        self.history = History()
        self.outliers: list[float] | None = None
        self.activation: Score | None = None
        self.teacher = self._place()

    def work(self, track: Callable[[StepRecord], None] = lambda record: None) -> Report | None:
        """Train, prune, write, reopen, measure, report; None but in process 0.

        Args:
            track: Told of every step.
        """
        self.track = track
        self._stop_here()
        objective = objective_of(self.opened)
        for note in objective.notes:
            self.progress.note(note)
        teacher = self.teacher
        if self.world.is_sharded:
            self._look_at_shards()
        dense_weights = [param.detach().to("cpu", copy=True) for param in self.targets.params]
        self.progress.stage("measuring the dense model")
        self._warn_of_parts()
        dense = self._measure(self.model, teacher) if teacher is not None else None
        self._look_at_inputs()
        one_shot = self._one_shot(teacher)
        self.empty_loss = self._empty_loss(objective)
        course = self._course()
        self._prepare_step()
        self._stop_here()
        optimizer = self._optimizer(course)
        seconds = self._train(objective, optimizer, course, teacher)
        self.model.eval()
        trained = Trained(objective, optimizer, course, dense, one_shot, dense_weights, seconds)
        if self.shards is not None:
            course.finish()
            return self._write_together(self.shards, trained)
        return None if self.run is None else self._finish(self.run, trained)

    def _finish(self, run: RunState, trained: Trained) -> Report:
        """Write the result, or one for each level."""
        stage, levels, course = run.stage(), self.recipe.sparsity.levels, trained.course
        if levels is None or not isinstance(course, Levels):
            course.finish()
            report = self._write(stage, self.recipe.sparsity.target, trained)
            self._stop_here()
            return finish_folder(report, stage, run, self.progress)
        reports = {}
        for level, target in enumerate(levels):
            course.finish_level(level)
            name = f"{target * 100:g}"
            reports[name] = self._write(stage / name, target, trained)
        self._stop_here()
        return finish_levels(reports, stage, run, self.progress)

    def _place(self) -> nn.Module | None:
        """Put the model on its device, or cut it over the processes; the teacher beside it."""
        has_teacher = not self.opened.loaded.new_head
        if not self.world.is_sharded:
            self.model.to(self.device)
            return make_teacher(self.model) if has_teacher else None
        teacher = shard_teacher(self.model, self.world, self.device) if has_teacher else None
        shard_(self.model, self.world, self.device)
        if teacher is not None:
            fill_(teacher, self.model)
        # the targets still hold the whole weights
        self.targets = Targets(())
        self.opened = replace(self.opened, targets=self.targets)
        return teacher

    def _look_at_shards(self) -> None:
        """Find the same targets among the parameters as they are now."""
        section = self.recipe.targets
        cut = select_targets(self.model, section.include, section.exclude)
        self.shards = Shards(self.model, self.world)
        self.targets = self.shards.targets(cut)
        self.opened = replace(self.opened, targets=self.targets)

    def _prepare_step(self) -> None:
        """Build or compile the step before the clock of the first step runs, and say so."""
        if self.device.type != "cpu" or self.recipe.optimizer.ham.backend not in ("auto", "cpu"):
            return
        without_extension = forms.prepare(self.progress.stage)
        if without_extension is not None:
            self.progress.warn(without_extension)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        section = self.recipe.evaluation
        for values in evaluation_batches(
            self.data, batch_size=section.batch_size, examples=section.examples
        ):
            self._stop_here()  # measuring may take longer than a step
            yield values

    def _measure(self, model: nn.Module, teacher: nn.Module | None) -> Quality | None:
        """Quality on the held-out examples, in process 0; the others go on and wait later."""
        if not (self.world.is_main or self.world.is_sharded):
            return None
        return measure(
            model,
            self._batches(),
            task=self.opened.loaded.task,
            has_labels=self.data.has_labels,
            teacher=teacher,
            device=self.device,
            is_sharded=self.world.is_sharded,
        )

    def _warn_of_parts(self) -> None:
        """Say where several processes do not compute what one would."""
        if self.world.size > 1 and has_batch_norm(self.model):
            self._warn(
                "batch norm sees each process's own part of the batch: the result is not that of "
                "one process"
            )

    def _look_at_inputs(self) -> None:
        """Of the dense model, what owl and the score wanda stand on; the same when resumed."""
        section = self.recipe.sparsity
        if section.allocation != "owl" and section.score != "wanda":
            return
        self.progress.stage("looking at the inputs of the layers")
        inputs = calibrate(self.opened, self.device, full=False)
        # the score reads the weights of the moment; the shares of outliers are the dense model's
        self.outliers = outliers(self.targets, inputs)
        self.activation = activation_score(self.targets, inputs)

    def _one_shot(self, teacher: nn.Module | None) -> Quality | None:
        """Quality of pruning as far in one shot; the model is left as it was."""
        if teacher is None or self.recipe.sparsity.target == 0.0:
            return None
        self.progress.stage("measuring one-shot pruning")
        section = self.recipe.sparsity
        masks = prune_masks(
            self.targets,
            section.target,
            allocation=section.allocation,
            pattern=section.pattern,
            min_sparsity=section.min_sparsity,
            max_sparsity=section.max_sparsity,
            outliers=self.outliers,
        )
        with self._weights_kept():
            apply_masks_(self.targets, masks)
            return self._measure(self.model, teacher)

    @torch.no_grad()
    def _empty_loss(self, objective: Objective) -> float:
        """Loss of the first batch with every target zero; the model is left as it was."""
        whole = batch(self.data, 0, batch_size=self.recipe.training.batch_size, seed=0)
        part = to_device(part_of(whole, self.world.rank, self.world.size), self.device)
        with self._weights_kept():
            for param in self.targets.params:
                param.zero_()
            loss = objective(self.model, part, self.teacher, self._part(whole))
        return self.world.mean(float(loss))

    @contextmanager
    def _weights_kept(self) -> Iterator[None]:
        """Put the targets' weights back at the end."""
        kept = [param.detach().clone() for param in self.targets.params]
        try:
            yield
        finally:
            with torch.no_grad():
                for param, values in zip(self.targets.params, kept, strict=True):
                    param.copy_(values)

    def _course(self) -> Course:
        recipe = self.recipe
        return make_course(
            recipe.sparsity,
            self.targets,
            self.model,
            steps=recipe.training.steps,
            seed=recipe.training.seed,
            outliers=self.outliers,
            activation=self.activation,
        )

    def _optimizer(self, course: Course) -> HAM:
        section = self.recipe.optimizer
        targeted = {id(param) for param in self.targets.trained}
        others = [param for param in self.model.parameters() if id(param) not in targeted]
        wide = [param for param in others if param.dim() >= 2]
        flat = [param for param in others if param.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": course.params}]
        groups += [{"params": wide, "mirror": False}] if wide else []
        groups += [{"params": flat, "mirror": False, "weight_decay": 0.0}] if flat else []
        return HAM(
            groups,
            base=section.base,
            lr=section.lr,
            weight_decay=section.weight_decay,
            betas=section.betas,
            eps=section.eps,
            momentum=section.momentum if section.base == "sgd" else 0.0,
            nesterov=section.nesterov,
            alpha=section.ham.alpha,
            beta=section.ham.beta,
            scaling=section.ham.scaling,
            eta=section.ham.eta,
            clamp=section.ham.clamp,
            backend=section.ham.backend,
        )

    # ---- training ----

    def _train(
        self,
        objective: Objective,
        optimizer: HAM,
        course: Course,
        teacher: nn.Module | None,
    ) -> float:
        training, section = self.recipe.training, self.recipe.optimizer
        pairs = self._balanced_pairs(course)
        done = self._resume(optimizer, course)
        state = self._state(optimizer, course)
        self._preflight()
        every = max(1, training.steps // MEASURED_STEPS)

        def after_step(step: int) -> float:
            if pairs:
                lr = float(optimizer.param_groups[0]["lr"])
                balance_(pairs, section.bar * lr, optimizer.state)
            optimizer.set_masks(course.after_step(step))
            if self.shards is not None:
                self.shards.hide_gradients(self.targets)
            if (step + 1) % every == 0 or step == 0:
                optimizer.measure_next_step()
            return course.sparsity

        def after_backward(step: int) -> None:
            if self.shards is not None:
                self.shards.show_gradients(self.targets)
            course.after_backward(step)

        hooks = Hooks(
            batch_at=lambda micro: batch(
                self.data, micro, batch_size=training.batch_size, seed=training.seed
            ),
            loss_of=lambda model, values, whole: objective(
                model, values, teacher, self._part(whole)
            ),
            lr_at=in_cycles(
                lambda steps: warm_up_and_decay(
                    section.schedule, peak=section.lr, steps=steps, warmup=section.warmup
                ),
                training.steps,
                course.sparsifier.cycles,
            ),
            measures=lambda step: step % every == 0,
            exponents=optimizer.exponent_statistics,
            after_step=after_step,
            before_step=course.before_step,
            after_backward=after_backward,
            sharpness=section.sam,
            zeros=self.targets.trained,
            part_of=lambda whole: part_of(whole, self.world.rank, self.world.size),
            mean=self.world.mean,
            total=self.world.total if self.world.is_sharded else float,
            rank=self.world.rank,
        )
        engine = make_engine(
            self.accelerator,
            self.model,
            optimizer,
            is_sharded=self.world.is_sharded,
            has_idle=self.world.kind == "ddp" and has_idle_parameters(self.model, hooks),
        )
        if done == 0:
            self._begin(engine, hooks, optimizer, course)
        if every == 1 or (done + 1) % every == 0:
            optimizer.measure_next_step()
        began = time.monotonic()
        self.progress.begin_steps(
            steps=training.steps, done=done, target=self.recipe.sparsity.target
        )
        try:
            for record in train(
                engine,
                hooks,
                first_step=done + 1,
                last_step=training.steps,
                accumulation=training.accumulation,
                max_grad_norm=section.max_grad_norm,
                seed=training.seed,
            ):
                self.history.records.append(record)
                self.track(record)
                self.progress.step(record)
                seconds = self.history.seconds_before + time.monotonic() - began
                is_due = record.step % training.checkpoint_every == 0
                stop = self._stop_agreed()
                # the last one lets a run that ends while it writes its result go on from here
                if stop is not None or is_due or record.step == training.steps:
                    save(self.run, state, self.history, record.step, seconds)
                    stop = stop or self._stop_agreed()  # one that came while saving
                refuse_high_loss(self.history.records, self.empty_loss)
                if stop is not None:
                    raise self._stopped(stop)
        finally:
            self.progress.end_steps()
        return self.history.seconds_before + time.monotonic() - began

    def _part(self, whole: dict[str, Tensor]) -> Part | None:
        return Part(whole, self.world.size, self.world.sum_) if self.world.size > 1 else None

    def _stop_agreed(self) -> str | None:
        """The signal that stops all processes: the first one's that any of them got."""
        here = 0 if self.stop.requested is None else int(signal.Signals[self.stop.requested])
        found = int(self.world.greatest(here))
        return None if found == 0 else signal.Signals(found).name

    def _begin(self, engine: Engine, hooks: Hooks, optimizer: HAM, course: Course) -> None:
        """Masks that hold before the first step; a first-order score needs gradients for them."""
        training = self.recipe.training
        if self.recipe.sparsity.score == "first-order":
            find_gradients(engine, hooks, accumulation=training.accumulation, seed=training.seed)
            found = any(bool(one.grad.any()) for one in self.targets.params if one.grad is not None)
            if not self.world.greatest(found):
                raise RecipeError(
                    "E228",
                    "no gradient to score by",
                    "sparsity.score",
                    "the dense model is its own teacher, and there is no other loss",
                    "data with labels and objective.task above 0, or another score",
                )
        optimizer.set_masks(course.after_step(0))
        optimizer.zero_grad()
        if self.shards is not None:
            self.shards.hide_gradients(self.targets)

    def _balanced_pairs(self, course: Course) -> list[tuple[Tensor, Tensor]]:
        if self.recipe.optimizer.bar == 0:
            return []
        pairs = [*course.pairs, *adapter_pairs(self.model)]
        if not pairs:
            raise RecipeError(
                "E226",
                "nothing to balance",
                "optimizer.bar",
                "the method trains no factors and the model has no LoRA adapters",
                "method spred, pilot or sign-in, or optimizer.bar 0",
            )
        return pairs

    def _preflight(self) -> None:
        if self.run is None:
            return
        weights = sum(param.numel() for param in self.model.parameters()) * 4
        more = COPIES.get(self.recipe.sparsity.method, 0) * self.targets.total * 4
        copies = 2 if self.world.is_sharded else 1  # what was gathered waits on the disk
        self.run.check_space(checkpoint_bytes=3 * weights + more, model_bytes=copies * weights)

    def _stop_here(self) -> None:
        """End the run if a signal came to process 0, which ends the others."""
        if self.world.is_main and self.stop.requested is not None:
            raise self._stopped(self.stop.requested)

    def _stopped(self, name: str) -> HamError:
        """The error of a run that signal `name` ends; all steps done so far are saved."""
        again = self.command or "the same command"
        if self.world.size > 1:
            again = "the same launch"
        if self.history.saved == 0:
            resumed = self.run is not None and self.run.resume
            nothing = f"{'nothing new' if resumed else 'nothing'} was saved before the first step"
            return stopped_by(name, nothing, last=f"{nothing}; to start: {again}")
        if "--resume" not in again:
            again += " with --resume" if self.world.size > 1 else " --resume"
        saved = f"saved step {self.history.saved}"
        return stopped_by(name, saved, last=f"{saved}; to go on: {again}")

    def _state(self, optimizer: HAM, course: Course) -> State:
        return State(self.model, optimizer, course, self.targets, self.world, self.shards)

    def _resume(self, optimizer: HAM, course: Course) -> int:
        """Go on from the newest run checkpoint, if that is asked for; its step, or 0."""
        found = None
        if self.run is not None and self.run.resume:
            found, notes = self.run.newest_valid(PARTS)
            assert found is not None
            for note in notes:
                self._warn(note)
        step = int(self.world.tell(0 if found is None else found.step))
        if step > 0:
            restore(found, self._state(optimizer, course), self.history)
            self.history.saved = step
        if found is not None and self.run is not None:
            self.progress.tell(
                f"going on from step {step} of {self.recipe.training.steps}, "
                f"the newest run checkpoint of {self.run.folder}"
            )
        return step

    # ---- the end ----

    def _threshold(self, trained: Trained) -> float | None:
        """Largest dense magnitude among what one shot by magnitude dropped; else unknown."""
        section, masks = self.recipe.sparsity, trained.course.sparsifier.masks
        if section.method != "one-shot" or section.score != "magnitude" or masks is None:
            return None
        largest = greatest_dropped(trained.dense_weights, masks)
        if not self.world.is_sharded:
            return largest
        found = self.world.greatest(-1.0 if largest is None else largest)
        return found if found >= 0 else None

    def _write(self, folder: Path, target: float, trained: Trained) -> Report:
        """Write the model into a staging folder, recount and measure it there."""
        change = change_of(trained.dense_weights, self.targets, self.world)
        threshold = self._threshold(trained)
        self._stop_here()
        self.progress.stage("writing and recounting")
        written = write_folder(self.opened, self.model, folder)
        tensors = outcome.counted_tensors(written.stage, self.targets.names, written.names)
        self.progress.stage("measuring the written model")
        again = reload(self.opened, written.stage, self.device)
        sparse = self._measure(again, self.teacher)
        assert sparse is not None, "process 0 measures"
        self.progress.stage("measuring speed")
        speed = outcome.measured_speed(self.opened, again, tensors, self.device)
        return self._report(written, tensors, target, sparse, speed, change, threshold, trained)

    def _write_together(self, shards: Shards, trained: Trained) -> Report | None:
        """The same of a model that is cut: process 0 writes what all give, and reads it back."""
        change = change_of(trained.dense_weights, self.targets, self.world)
        threshold = self._threshold(trained)
        self.progress.stage("writing and recounting")
        run, written = self.run, None
        if run is not None:
            written = write_folder(self.opened, self.model, run.stage(), gather=whole)
        else:
            for tensor in stored_tensors(self.model):
                whole(tensor)
        self.progress.stage("measuring the written model")
        self._read_back(shards, written)
        sparse = self._measure(self.model, self.teacher)
        if run is None or written is None or sparse is None:
            return None
        tensors = outcome.counted_tensors(written.stage, self.targets.names, written.names)
        target = self.recipe.sparsity.target
        report = self._report(
            written, tensors, target, sparse, (None, NO_SPEED), change, threshold, trained
        )
        return finish_folder(report, written.stage, run, self.progress)

    @torch.no_grad()
    def _read_back(self, shards: Shards, written: Written | None) -> None:
        """Give the model the weights that lie in the files, one tensor after the other."""
        own = own_tensors(self.model)
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
        trained: Trained,
    ) -> Report:
        section, sparsifier = self.recipe.sparsity, trained.course.sparsifier
        sparsity = outcome.sparsity_record(
            tensors,
            target,
            num_parameters=sum(param.numel() for param in self.model.parameters()),
            threshold=threshold,
            natural_zeros=sparsifier.natural_zeros,
            method=section.method,
            allocation=section.allocation,
            pattern=section.pattern,
        )
        if sparsity.zeros < sparsifier.num_zeros:
            raise AssertionError(f"{sparsity.zeros} zeros written of {sparsifier.num_zeros}")
        self._warn_of(tensors)
        one_shot = trained.one_shot if target == section.target else None
        quality = outcome.quality_record(trained.dense, sparse, one_shot, self.data)
        return Report(
            ham_version=__version__,
            model=outcome.model_record(self.opened),
            recipe=public_recipe(self.recipe),
            environment=outcome.environment_record(
                self.device,
                self.accelerator.mixed_precision,
                self.accelerator.num_processes,
                self.world.kind,
            ),
            sparsity=sparsity,
            tensors=tensors,
            files=outcome.file_records(written.stage, written.files),
            size=size_record(written.stage, self.opened.source.weights),
            quality=quality,
            speed=speed[0],
            speed_reason=speed[1],
            training=outcome.training_record(
                self.recipe,
                self.history.records,
                trained.optimizer.param_groups[0],
                self.history.exponents(trained.optimizer),
                objective=trained.objective.description,
                seconds=trained.seconds,
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

    def _warn(self, text: str) -> None:
        """Say it now, and in the report."""
        self.warnings.append(text)
        self.progress.warn(text)

    def _warn_of(self, tensors: Sequence[TensorRecord]) -> None:
        empty = [one.name for one in tensors if one.zeros == one.total]
        if empty and self.recipe.sparsity.target < 1.0:
            self._warn(f"{len(empty)} tensors lost every weight, first {empty[0]}")
        moved = [
            one for record in self.history.records if (one := record.moved_fraction) is not None
        ]
        is_on = self.recipe.optimizer.ham.alpha != 0 or self.recipe.optimizer.ham.beta != 0
        if is_on and moved and max(moved) < MOVED_FLOOR:
            self._warn("the mirror step moved almost no weight: HAM did nothing in this run")

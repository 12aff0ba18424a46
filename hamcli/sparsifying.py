"""One run of `ham sparsify`: look at the dense model, train while zeros come, save, go on, stop.

What a trained model becomes is left to `conclusion`.
"""

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hamcli.ablation import empty_loss, one_shot_quality
from hamcli.calibration import activation_score, calibrate, outliers
from hamcli.conclusion import Conclusion, Trained
from hamcli.data import batch, evaluation_batches
from hamcli.divergence import describe_collapse, refuse_high_loss
from hamcli.errors import HamError, RecipeError, stopped_by
from hamcli.evaluation import Quality, measure
from hamcli.objective import Objective, Part, make_teacher
from hamcli.opening import Opened, objective_of
from hamcli.optim import HAM, forms
from hamcli.outcome import environment_record
from hamcli.parallel.limits import refuse_dropped_layers, refuse_unsharded
from hamcli.parallel.parts import has_batch_norm, part_of, refuse_uneven_batch
from hamcli.parallel.shards import Shards, fill_, local, shard_, shard_teacher
from hamcli.parallel.world import World
from hamcli.progress import Progress, StepRecord
from hamcli.report.records import Report
from hamcli.runstate import RunState
from hamcli.saving import PARTS, History, State, restore, save
from hamcli.sharpness import adapter_pairs, balance_
from hamcli.signals import Stop
from hamcli.sparsity.catalogue import COPIES, make_course
from hamcli.sparsity.courses import Course
from hamcli.sparsity.rules import rules_for
from hamcli.sparsity.score import Score, make_fisher
from hamcli.sparsity.targets import Targets, select_targets
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
        self.optimizer: HAM | None = None
        self.scores: dict[str, Score] = {"fisher": make_fisher(self._second_moment)}
        self.teacher = self._place()

    def work(self, track: Callable[[StepRecord], None] = lambda record: None) -> Report | None:
        """Train, prune, write, reopen, measure, report; None but in process 0.

        Args:
            track: Told of every step.
        """
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
        empty_loss = self._empty_loss(objective)
        course = self._course()
        self._prepare_step()
        self._stop_here()
        optimizer = self.optimizer = self._optimizer(course)
        seconds = self._train(objective, optimizer, course, empty_loss, track)
        self.model.eval()
        trained = Trained(
            self.model,
            self.targets,
            self.shards,
            course,
            optimizer,
            self.history,
            objective.description,
            dense,
            one_shot,
            dense_weights,
            seconds,
        )
        return self._conclusion(trained).report()

    def _conclusion(self, trained: Trained) -> Conclusion:
        return Conclusion(
            self.opened,
            trained,
            self.run,
            self.world,
            self.progress,
            environment_record(
                self.device,
                self.accelerator.mixed_precision,
                self.accelerator.num_processes,
                self.world.kind,
            ),
            self.device,
            measure=lambda model: self._measure(model, self.teacher),
            stop_here=self._stop_here,
            warnings=self.warnings,
            warn=self._warn,
        )

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
        self.scores["wanda"] = activation_score(self.targets, inputs)

    def _one_shot(self, teacher: nn.Module | None) -> Quality | None:
        """Quality of pruning as far in one shot."""
        if teacher is None or self.recipe.sparsity.target == 0.0:
            return None
        self.progress.stage("measuring one-shot pruning")
        rules = rules_for(self.targets, self.recipe.sparsity, self.outliers)
        return one_shot_quality(self.targets, rules, lambda: self._measure(self.model, teacher))

    def _empty_loss(self, objective: Objective) -> float:
        """Loss of the first batch with every target zero."""
        whole = batch(self.data, 0, batch_size=self.recipe.training.batch_size, seed=0)
        part = to_device(part_of(whole, self.world.rank, self.world.size), self.device)
        loss = empty_loss(
            self.targets, lambda: objective(self.model, part, self.teacher, self._part(whole))
        )
        return self.world.mean(loss)

    def _course(self) -> Course:
        recipe = self.recipe
        return make_course(
            recipe.sparsity,
            self.targets,
            self.model,
            steps=recipe.training.steps,
            seed=recipe.training.seed,
            score=recipe.score,
            outliers=self.outliers,
            of_run=self.scores,
        )

    def _second_moment(self, param: Tensor) -> Tensor | None:
        """Of a target, or of its rows that lie here, what Adam keeps of its gradients."""
        if self.optimizer is None:
            return None
        sources = {id(one.param): one.part.source for one in self.targets if one.part is not None}
        moment = self.optimizer.second_moment(sources.get(id(param), param))
        return None if moment is None else local(moment)

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
        empty_loss: float,
        track: Callable[[StepRecord], None],
    ) -> float:
        """Train from the start, or from the newest run checkpoint; seconds in all sessions."""
        training = self.recipe.training
        hooks = self._hooks(objective, optimizer, course)
        done = self._resume(optimizer, course)
        state = self._state(optimizer, course)
        self._preflight()
        engine = make_engine(
            self.accelerator,
            self.model,
            optimizer,
            is_sharded=self.world.is_sharded,
            has_idle=self.world.kind == "ddp" and has_idle_parameters(self.model, hooks),
            has_dropout=objective.keeps_dropout(training.dropout),
        )
        if done == 0:
            self._begin(engine, hooks, optimizer, course)
        if hooks.measures(done + 1):
            optimizer.measure_next_step()
        began = time.monotonic() - self.history.seconds_before
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
                max_grad_norm=self.recipe.optimizer.max_grad_norm,
                seed=training.seed,
            ):
                self.history.records.append(record)
                track(record)
                self.progress.step(record)
                self._between_steps(record, state, time.monotonic() - began, empty_loss)
        finally:
            self.progress.end_steps()
        self._look_for_collapse()
        return time.monotonic() - began

    def _hooks(self, objective: Objective, optimizer: HAM, course: Course) -> Hooks:
        """What the loop asks for at each step."""
        training, section = self.recipe.training, self.recipe.optimizer
        pairs = self._balanced_pairs(course)
        every = max(1, training.steps // MEASURED_STEPS)

        def after_step(step: int) -> float:
            if pairs:
                lr = float(optimizer.param_groups[0]["lr"])
                balance_(pairs, section.bar * lr, optimizer.state)
            optimizer.set_masks(course.after_step(step))
            if self.shards is not None:
                self.shards.hide_gradients(self.targets)
            if (step + 1) % every == 0:
                optimizer.measure_next_step()
            return course.sparsity

        def after_backward(step: int) -> None:
            if self.shards is not None:
                self.shards.show_gradients(self.targets)
            course.after_backward(step)

        return Hooks(
            batch_at=lambda micro: batch(
                self.data, micro, batch_size=training.batch_size, seed=training.seed
            ),
            loss_of=lambda model, values, whole: objective(
                model, values, self.teacher, self._part(whole)
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

    def _between_steps(
        self, record: StepRecord, state: State, seconds: float, empty_loss: float
    ) -> None:
        """Save where that is due; end a run that went astray, or that a signal stops.

        Args:
            record: Of the step just done.
            state: After it.
            seconds: Of training, in all sessions.
            empty_loss: Loss of the model without its target weights.
        """
        training = self.recipe.training
        stop = self._stop_agreed()
        is_due = record.step % training.checkpoint_every == 0
        # the last one lets a run that ends while it writes its result go on from here
        if stop is not None or is_due or record.step == training.steps:
            save(self.run, state, self.history, record.step, seconds)
            stop = stop or self._stop_agreed()  # one that came while saving
        refuse_high_loss(self.history.records, empty_loss)
        if record.exponent_mean is not None:
            self._look_for_collapse()
        if stop is not None:
            raise self._stopped(stop)

    def _look_for_collapse(self) -> None:
        """Warn once, as soon as it is seen, for who would rather not wait for the end."""
        warning = describe_collapse(self.history.records)
        if warning is not None and warning not in self.warnings:
            self._warn(warning)

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
        scaler = getattr(self.accelerator, "scaler", None)  # fp16 on a GPU has one
        return State(self.model, optimizer, course, self.targets, self.world, self.shards, scaler)

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

    def _warn(self, text: str) -> None:
        """Say it now, and in the report."""
        self.warnings.append(text)
        self.progress.warn(text)

"""One run of `ham sparsify`: train while zeros come, write, reopen, recount, measure, report."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hamcli import __version__, native, outcome
from hamcli.calibration import activation_score, calibrate, outliers
from hamcli.data import batch, evaluation_batches
from hamcli.errors import RecipeError, stopped_by
from hamcli.evaluation import Quality, measure
from hamcli.finishing import finish_folder, finish_levels, reload, write_folder
from hamcli.objective import Objective, make_teacher
from hamcli.opening import Opened, objective_of, public_recipe
from hamcli.optim import HAM
from hamcli.progress import Progress, StepRecord
from hamcli.report.records import Curves, HamRecord, Report, TrainingRecord
from hamcli.runstate import Checkpoint, RunState
from hamcli.sharpness import adapter_pairs, balance_
from hamcli.signals import Stop
from hamcli.sparsity.catalogue import COPIES, make_course
from hamcli.sparsity.courses import Course
from hamcli.sparsity.levels import Levels
from hamcli.sparsity.masks import apply_masks_, prune_masks
from hamcli.sparsity.methods import Sparsifier
from hamcli.sparsity.score import Score
from hamcli.training import (
    Hooks,
    find_gradients,
    in_cycles,
    make_accelerator,
    train,
    warm_up_and_decay,
)

MEASURED_STEPS = 50  # times in a run that the mirror step is measured
MOVED_FLOOR = 0.01
RUN_PARTS = (
    "model",
    "optimizer",
    "sparsifier",
    "values.exponents",
    "values.groups",
    "values.records",
    "values.seconds",
    "values.tensors",
)


class Sparsification:
    """One run of `sparsify`, from opened model to written folder."""

    def __init__(
        self,
        opened: Opened,
        run: RunState,
        stop: Stop,
        progress: Progress,
        warnings: list[str],
        command: str,
    ) -> None:
        self.opened, self.run, self.stop, self.progress = opened, run, stop, progress
        self.recipe, self.targets, self.data = opened.recipe, opened.targets, opened.data
        self.warnings, self.command = warnings, command
        self.model = opened.loaded.model
        training = self.recipe.training
        self.accelerator = make_accelerator(training.device, training.precision)
        self.device = self.accelerator.device
        self.records: list[StepRecord] = []
        self.seconds_before = 0.0
        self.exponents_before: dict[str, Any] | None = None  # of the run that is gone on with
        self.done = 0  # steps that are saved, or will be before anybody hears of a stop
        self.outliers: list[float] | None = None
        self.activation: Score | None = None

    def work(self) -> Report:
        """Train, prune, write, reopen, measure, report."""
        self._stop_here()
        objective = objective_of(self.opened)
        for note in objective.notes:
            self.progress.note(note)
        self.model.to(self.device)
        dense_weights = [param.detach().to("cpu", copy=True) for param in self.targets.params]
        teacher = None if self.opened.loaded.new_head else make_teacher(self.model)
        self.progress.stage("measuring the dense model")
        dense = self._measure(self.model, teacher) if teacher is not None else None
        self._look_at_inputs()
        one_shot = self._one_shot(teacher)
        course = self._course()
        self._prepare_step()
        self._stop_here()
        optimizer = self._optimizer(course)
        seconds = self._train(objective, optimizer, course, teacher)
        self.model.eval()
        stage = self.run.stage()

        def written(folder: Path, target: float) -> Report:
            alone = one_shot if target == self.recipe.sparsity.target else None
            return self._write(
                folder, target, objective, optimizer, course.sparsifier, teacher, dense, alone,
                dense_weights, seconds,
            )  # fmt: skip

        levels = self.recipe.sparsity.levels
        if levels is None or not isinstance(course, Levels):
            course.finish()
            report = written(stage, self.recipe.sparsity.target)
            self._stop_here()
            return finish_folder(report, stage, self.run, self.progress)
        reports = {}
        for level, target in enumerate(levels):
            course.finish_level(level)
            name = f"{target * 100:g}"
            reports[name] = written(stage / name, target)
        self._stop_here()
        return finish_levels(reports, stage, self.run, self.progress)

    def _prepare_step(self) -> None:
        """Build the native step before the clock of the first step runs, and say so."""
        if self.device.type != "cpu" or self.recipe.optimizer.ham.backend not in ("auto", "cpu"):
            return
        status = native.prepare(self.progress.stage)
        if not status.is_available:
            self.progress.warn(f"{status.reason}; the slower step in plain torch is used")

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        section = self.recipe.evaluation
        for values in evaluation_batches(
            self.data, batch_size=section.batch_size, examples=section.examples
        ):
            self._stop_here()  # measuring may take longer than a step
            yield values

    def _measure(self, model: nn.Module, teacher: nn.Module | None) -> Quality:
        return measure(
            model,
            self._batches(),
            task=self.opened.loaded.task,
            has_labels=self.data.has_labels,
            teacher=teacher,
            device=self.device,
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
        kept = [param.detach().clone() for param in self.targets.params]
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
        apply_masks_(self.targets, masks)
        quality = self._measure(self.model, teacher)
        with torch.no_grad():
            for param, values in zip(self.targets.params, kept, strict=True):
                param.copy_(values)
        return quality

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
        targeted = {id(param) for param in self.targets.params}
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
            strength=section.ham.strength,
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
        self._preflight()
        every = max(1, training.steps // MEASURED_STEPS)

        def after_step(step: int) -> float:
            if pairs:
                lr = float(optimizer.param_groups[0]["lr"])
                balance_(pairs, section.bar * lr, optimizer.state)
            optimizer.set_masks(course.after_step(step))
            if (step + 1) % every == 0 or step == 0:
                optimizer.measure_next_step()
            return course.sparsity

        hooks = Hooks(
            batch_at=lambda micro: batch(
                self.data, micro, batch_size=training.batch_size, seed=training.seed
            ),
            loss_of=lambda model, values: objective(model, values, teacher),
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
            after_backward=course.after_backward,
            sharpness=section.sam,
            zeros=self.targets.params,
        )
        if done == 0:
            self._begin(hooks, optimizer, course)
        if every == 1 or (done + 1) % every == 0:
            optimizer.measure_next_step()
        began = time.monotonic()
        self.progress.begin_steps(
            steps=training.steps, done=done, target=self.recipe.sparsity.target
        )
        try:
            for record in train(
                self.model,
                optimizer,
                hooks,
                accelerator=self.accelerator,
                first_step=done + 1,
                last_step=training.steps,
                accumulation=training.accumulation,
                max_grad_norm=section.max_grad_norm,
                seed=training.seed,
            ):
                self.records.append(record)
                self.progress.step(record)
                seconds = self.seconds_before + time.monotonic() - began
                is_due = record.step % training.checkpoint_every == 0
                # the last one lets a run that ends while it writes its result go on from here
                if self.stop.requested or is_due or record.step == training.steps:
                    self._save(record.step, optimizer, course, seconds)
                    self._stop_here()
        finally:
            self.progress.end_steps()
        return self.seconds_before + time.monotonic() - began

    def _begin(self, hooks: Hooks, optimizer: HAM, course: Course) -> None:
        """Masks that hold before the first step; a first-order score needs gradients for them."""
        training = self.recipe.training
        if self.recipe.sparsity.score == "first-order":
            find_gradients(
                self.model,
                hooks,
                accelerator=self.accelerator,
                accumulation=training.accumulation,
                seed=training.seed,
            )
            if not any(bool(one.grad.any()) for one in course.params if one.grad is not None):
                raise RecipeError(
                    "E228",
                    "no gradient to score by",
                    "sparsity.score",
                    "the dense model is its own teacher, and there is no other loss",
                    "data with labels and objective.task above 0, or another score",
                )
        optimizer.set_masks(course.after_step(0))
        optimizer.zero_grad()

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
        weights = sum(param.numel() for param in self.model.parameters()) * 4
        more = COPIES.get(self.recipe.sparsity.method, 0) * self.targets.total * 4
        self.run.check_space(checkpoint_bytes=3 * weights + more, model_bytes=weights)

    def _stop_here(self) -> None:
        """End the run if a signal came; all steps done so far are saved."""
        if not self.stop.requested:
            return
        again = self.command or "the same command"
        if self.done == 0:
            nothing = "nothing was saved" if not self.run.resume else "nothing new was saved"
            nothing += " before the first step"
            raise stopped_by(self.stop.requested, nothing, last=f"{nothing}; to start: {again}")
        if "--resume" not in again:
            again += " --resume"
        saved = f"saved step {self.done}"
        raise stopped_by(self.stop.requested, saved, last=f"{saved}; to go on: {again}")

    def _save(self, step: int, optimizer: HAM, course: Course, seconds: float) -> None:
        state = optimizer.state_dict()
        moments = {
            f"{index}.{key}": value
            for index, entries in state["state"].items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }
        tensors = {
            "model": _own_tensors(self.model),
            "optimizer": moments,
            "sparsifier": course.state(),
        }
        self.run.save(
            step,
            tensors,
            {
                "exponents": self._exponents(optimizer),
                "groups": state["param_groups"],
                "records": [asdict(record) for record in self.records],
                "seconds": seconds,
                # a moment that is missing would not be missed: the optimizer would begin it anew
                "tensors": {stem: sorted(named) for stem, named in tensors.items()},
            },
        )
        self.done = step

    def _exponents(self, optimizer: HAM) -> dict[str, Any] | None:
        """What the report tells of the last mirror step measured, here or before a stop."""
        last = optimizer.exponent_statistics()
        if last is None:
            return self.exponents_before
        return {
            "alpha": last.alpha,
            "clamped_fraction": last.clamped_fraction,
            "guard_events": last.guard_events,
        }

    def _resume(self, optimizer: HAM, course: Course) -> int:
        if not self.run.resume:
            return 0
        found, notes = self.run.newest_valid(RUN_PARTS)
        assert found is not None
        for note in notes:
            self.warnings.append(note)
            self.progress.warn(note)
        self._restore(found, optimizer, course)
        self.done = found.step
        self.progress.tell(
            f"going on from step {found.step} of {self.recipe.training.steps}, "
            f"the newest run checkpoint of {self.run.folder}"
        )
        return found.step

    def _restore(self, found: Checkpoint, optimizer: HAM, course: Course) -> None:
        own = _own_tensors(self.model)
        saved = found.tensors("model", set(own))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        entries: dict[int, dict[str, Tensor]] = {}
        names = found.values["tensors"]
        for name, tensor in found.tensors("optimizer", names["optimizer"]).items():
            index, _, key = name.partition(".")
            entries.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": entries, "param_groups": found.values["groups"]})
        course.load_state(found.tensors("sparsifier", names["sparsifier"]))
        self.records = [StepRecord(**record) for record in found.values["records"]]
        self.seconds_before = float(found.values["seconds"])
        self.exponents_before = found.values["exponents"]

    # ---- the end ----

    def _threshold(self, dense: Sequence[Tensor], sparsifier: Sparsifier) -> float | None:
        """Largest dense magnitude among what one shot by magnitude dropped; else unknown."""
        section = self.recipe.sparsity
        is_cut = section.method == "one-shot" and section.score == "magnitude"
        if not is_cut or sparsifier.masks is None:
            return None
        dropped = [
            float(weights.abs()[~mask.cpu()].max())
            for weights, mask in zip(dense, sparsifier.masks, strict=True)
            if bool((~mask).any())
        ]
        return max(dropped, default=None)

    def _write(
        self,
        folder: Path,
        target: float,
        objective: Objective,
        optimizer: HAM,
        sparsifier: Sparsifier,
        teacher: nn.Module | None,
        dense: Quality | None,
        one_shot: Quality | None,
        dense_weights: Sequence[Tensor],
        seconds: float,
    ) -> Report:
        """Write the model into a staging folder, recount and measure it there."""
        section = self.recipe.sparsity
        threshold = self._threshold(dense_weights, sparsifier)
        self._stop_here()
        self.progress.stage("writing and recounting")
        written = write_folder(self.opened, self.model, folder)
        tensors = outcome.counted_tensors(written.stage, self.targets.names, written.names)
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
        self.progress.stage("measuring the written model")
        sparse = self._measure(reload(self.opened, written.stage, self.device), teacher)
        quality = outcome.quality_record(dense, sparse, one_shot, self.data)
        self._warn_of(tensors, sparsity.natural_zeros, sparsifier)
        return Report(
            ham_version=__version__,
            model=outcome.model_record(self.opened),
            recipe=public_recipe(self.recipe),
            environment=outcome.environment_record(self.device, self.accelerator.mixed_precision),
            sparsity=sparsity,
            tensors=tensors,
            files=outcome.file_records(written.stage, written.files),
            size=outcome.size_record(written.stage, self.opened.source.weights),
            quality=quality,
            training=self._training_record(objective, optimizer, dense_weights, seconds),
            gate=outcome.gate_record(
                self.recipe.gate.max_drop,
                self.recipe.gate.min_sparsity,
                quality.drop,
                sparsity.achieved,
            ),
            data=outcome.data_record(self.opened),
            histogram=outcome.histogram(dense_weights, self.targets.params),
            warnings=tuple(self.warnings),
        )

    def _warn_of(self, tensors: Any, natural_zeros: int, sparsifier: Sparsifier) -> None:
        empty = [one.name for one in tensors if one.zeros == one.total]
        if empty and self.recipe.sparsity.target < 1.0:
            text = f"{len(empty)} tensors lost every weight, first {empty[0]}"
            self.warnings.append(text)
            self.progress.warn(text)
        moved = [r.moved_fraction for r in self.records if r.moved_fraction is not None]
        is_on = self.recipe.optimizer.ham.alpha != 0 or self.recipe.optimizer.ham.beta != 0
        if is_on and moved and max(moved) < MOVED_FLOOR:
            text = "the mirror step moved almost no weight: HAM did nothing in this run"
            self.warnings.append(text)
            self.progress.warn(text)

    def _training_record(
        self, objective: Objective, optimizer: HAM, dense: Sequence[Tensor], seconds: float
    ) -> TrainingRecord:
        means = [r.exponent_mean for r in self.records if r.exponent_mean is not None]
        greatest = [r.exponent_max for r in self.records if r.exponent_max is not None]
        moved = [r.moved_fraction for r in self.records if r.moved_fraction is not None]
        last = self._exponents(optimizer) or {}
        group = optimizer.param_groups[0]
        is_on = not (group["alpha"] == 0 and group["beta"] == 0)
        ham = HamRecord(
            scaling=group["scaling"],
            strength=group["strength"],
            alpha=last.get("alpha"),
            beta=group["beta"],
            clamp=group["clamp"],
            exponent_mean=_mean(means),
            exponent_max=max(greatest, default=None),
            clamped_fraction=last.get("clamped_fraction"),
            guard_events=last.get("guard_events", 0),
        )
        training = self.recipe.training
        return TrainingRecord(
            steps=training.steps,
            seconds=round(seconds, 1),
            ham_moved_fraction=_mean(moved),
            sign_flips=sign_flips(dense, self.targets.params),
            curves=Curves.from_rows(curve_rows(self.records), limit=500),
            ham=ham if is_on else None,
            batch_size=training.batch_size * training.accumulation,
            objective=objective.description,
            optimizer=self.recipe.optimizer.base,
        )


def curve_rows(records: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """A row a step; between two measured mirror steps the last one's exponents hold."""
    rows = []
    held: dict[str, Any] = {}
    for record in records:
        row = asdict(record)
        measured = {key: row[key] for key in ("exponent_mean", "exponent_max")}
        held = measured if record.exponent_mean is not None else held
        rows.append({**row, **held})
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their first name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def sign_flips(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Share of the surviving weights whose sign is not the dense model's."""
    alive = flipped = 0
    for old, new in zip(before, after, strict=True):
        kept = new.detach().cpu()
        alive += int(kept.count_nonzero())
        flipped += int((torch.sign(kept) * torch.sign(old) < 0).sum())
    return flipped / alive if alive else 0.0


# ---- what sparsify and prune share ----

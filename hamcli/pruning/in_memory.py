"""`ham prune` in memory: by magnitude, Wanda or SparseGPT, with quality before and after."""

from pathlib import Path

import torch
from torch import Tensor

from hamcli import __version__, outcome
from hamcli.calibration import activation_score, calibrate, outliers
from hamcli.changes import greatest_dropped, histogram_of
from hamcli.checkpoint_quality import measure_opened
from hamcli.completing import input_paths
from hamcli.errors import RecipeError
from hamcli.objective import make_teacher
from hamcli.opening import Opened, open_run, public_recipe, rules_of, run_identity
from hamcli.progress import Progress
from hamcli.pruning.layerwise import prune_layers_
from hamcli.recipe import ReadRecipe
from hamcli.recipe.schema import WITHOUT_TRAINING
from hamcli.report.records import Report
from hamcli.result_folder import finish_folder, reload, write_folder
from hamcli.runstate import RunState, check_out
from hamcli.sizes import size_record
from hamcli.sparsity.catalogue import make_score
from hamcli.sparsity.masks import (
    apply_masks_,
    nonzero_masks,
    num_dropped,
    one_shot_masks,
)


def prune(read: ReadRecipe, *, out: Path, overwrite: bool, progress: Progress) -> Report:
    """Zero weights exactly, write, recount and measure; nothing is trained."""
    recipe = read.recipe
    device = torch.device("cpu")
    with RunState(out, inputs=input_paths(recipe), overwrite=overwrite) as run:
        opened = open_run(read, progress)
        check_out(out, inputs=[opened.source.folder], overwrite=overwrite)
        run.begin(run_identity(opened))
        model, targets, section = opened.loaded.model, opened.targets, opened.recipe.sparsity
        before = [param.detach().clone() for param in targets.params]
        natural = num_dropped(nonzero_masks(targets))
        teacher = make_teacher(model)
        progress.stage("pruning")
        masks = _prune_(opened, device)
        progress.stage("writing and recounting")
        written = write_folder(opened, model, run.stage())
        tensors = outcome.counted_tensors(written.stage, targets.names, written.names)
        sparsity = outcome.sparsity_record(
            tensors,
            section.target,
            num_parameters=sum(param.numel() for param in model.parameters()),
            threshold=greatest_dropped(before, masks)
            if section.method not in WITHOUT_TRAINING and section.one_shot_score == "magnitude"
            else None,
            natural_zeros=natural,
            method=section.method if section.method in WITHOUT_TRAINING else "one-shot",
            allocation=section.allocation,
            pattern=section.pattern,
        )
        progress.stage("measuring dense and pruned")
        dense = measure_opened(opened, teacher, teacher, device)
        again = reload(opened, written.stage, device)
        sparse = measure_opened(opened, again, teacher, device)
        progress.stage("measuring speed")
        speed, no_speed = outcome.measured_speed(opened, again, tensors, device)
        quality = outcome.quality_record(dense, sparse, None, opened.data)
        report = Report(
            ham_version=__version__,
            model=outcome.model_record(opened),
            recipe=public_recipe(opened.recipe),
            environment=outcome.environment_record(device, "no"),
            sparsity=sparsity,
            tensors=tensors,
            files=written.files,
            size=size_record(written.stage, opened.source.weights),
            quality=quality,
            speed=speed,
            speed_reason=no_speed,
            gate=outcome.gate_record(
                recipe.gate.max_drop, recipe.gate.min_sparsity, quality.drop, sparsity.achieved
            ),
            command="prune",
            data=outcome.data_record(opened),
            histogram=histogram_of(before, targets),
            warnings=opened.data.notes,
        )
        finish_folder(report, written.stage, run, progress)
        run.finish()
    return report


def _prune_(opened: Opened, device: torch.device) -> list[Tensor]:
    """Prune the targets in place, as the recipe says; the masks."""
    section, targets = opened.recipe.sparsity, opened.targets
    if section.score in ("first-order", "fisher"):
        raise RecipeError(
            "E228",
            "no gradient to score by",
            "sparsity.score",
            "ham prune computes none",
            "ham sparsify, or another score",
        )
    is_layerwise = section.method in WITHOUT_TRAINING
    looks = is_layerwise or section.score == "wanda" or section.allocation == "owl"
    inputs = calibrate(opened, device, full=section.method == "sparsegpt") if looks else None
    shares = outliers(targets, inputs) if inputs is not None else None
    rules = rules_of(opened, shares)
    if is_layerwise:
        assert inputs is not None
        return prune_layers_(section.method, targets, rules, inputs)
    of_run = {"wanda": activation_score(targets, inputs)} if inputs is not None else {}
    score = make_score(section.one_shot_score, targets, opened.recipe.training.seed, of_run)
    masks = one_shot_masks(targets, rules, score)
    apply_masks_(targets, masks)
    return masks

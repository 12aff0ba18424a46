"""`ham eval`: quality of a checkpoint on held-out data, alone or beside its dense self."""

from dataclasses import dataclass

import torch

from hamcli.data import Data, evaluation_batches
from hamcli.errors import UsageError
from hamcli.evaluation import Quality, drop, measure
from hamcli.opening import Opened, open_run
from hamcli.progress import Progress
from hamcli.recipe import ReadRecipe


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality of a checkpoint, and of the dense one beside it."""

    metric: str
    value: float
    dense: float | None
    drop: float | None
    loss: float | None
    agreement: float | None
    num_examples: int
    data: str


def evaluate(read: ReadRecipe, *, against: str | None, progress: Progress) -> Evaluation:
    """Measure a model on held-out data, and its loss of quality against a dense one."""
    opened = open_run(read, progress, hashed=False)
    device = torch.device("cpu")
    teacher = None
    if against is not None:
        other = read.recipe.model_copy(
            update={"model": read.recipe.model.model_copy(update={"id": against})}
        )
        teacher = open_run(ReadRecipe(other, read.places), progress, hashed=False).loaded.model
    if teacher is None and opened.loaded.task == "feature-extraction":
        raise UsageError(
            "E104",
            "nothing to compare with",
            "--against",
            "an encoder without a head has no score of its own",
            "--against DENSE",
        )
    progress.stage("measuring")
    sparse = measure_opened(opened, opened.loaded.model, teacher, device)
    dense = measure_opened(opened, teacher, teacher, device) if teacher is not None else None
    return _evaluation(sparse, dense, opened.data)


def _evaluation(sparse: Quality, dense: Quality | None, data: Data) -> Evaluation:
    return Evaluation(
        sparse.metric,
        sparse.value,
        dense.value if dense is not None else None,
        drop(dense, sparse) if dense is not None else None,
        sparse.loss,
        sparse.agreement,
        sparse.num_examples,
        f"{sparse.num_examples:,} of {data.evaluation_description}",
    )


def measure_opened(
    opened: Opened, model: torch.nn.Module, teacher: torch.nn.Module | None, device: torch.device
) -> Quality:
    """Quality of a model on the held-out data of a run, and agreement with the teacher."""
    section = opened.recipe.evaluation
    batches = evaluation_batches(
        opened.data, batch_size=section.batch_size, examples=section.examples
    )
    return measure(
        model,
        batches,
        task=opened.loaded.task,
        has_labels=opened.data.has_labels,
        teacher=teacher,
        device=device,
    )

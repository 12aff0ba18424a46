"""Quality of a model on held-out data; what a loss of quality is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamcli.objective import IGNORED, Batch, pooled, valid_rows, without_labels

LANGUAGE = {"causal-lm": "perplexity", "masked-lm": "masked perplexity"}


@dataclass(frozen=True, slots=True)
class Quality:
    """One number and what stands beside it.

    Attributes:
        metric: Its name.
        value: On the held-out examples.
        loss: Mean loss in nats a prediction, where there are labels.
        agreement: Share of predictions that are the teacher's, where there is a teacher.
        num_examples: Examples measured.
        higher_is_better: Which way it counts.
    """

    metric: str
    value: float
    loss: float | None
    agreement: float | None
    num_examples: int
    higher_is_better: bool


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: str,
    has_labels: bool,
    teacher: nn.Module | None,
    device: torch.device,
    is_sharded: bool = False,
) -> Quality:
    """Measure `model`; it is left in the mode it came in.

    Args:
        model: On `device`.
        batches: Held-out batches, on the CPU.
        task: Chooses the metric: perplexity, accuracy, agreement with the teacher, or cosine.
        has_labels: Whether batches bring labels.
        teacher: The dense model, on `device`; None for no comparison.
        device: Where to compute.
        is_sharded: Whether the weights are gathered as they are used; every process must measure.
    """
    was_training = model.training
    model.eval()
    sums = _Sums()
    try:
        # what is gathered in inference mode could not be trained afterwards
        with torch.no_grad() if is_sharded else torch.inference_mode():
            for batch in batches:
                placed = {name: tensor.to(device) for name, tensor in batch.items()}
                outputs = model(**without_labels(placed))
                guide = teacher(**without_labels(placed)) if teacher is not None else None
                sums.examples += len(next(iter(batch.values())))
                if task == "feature-extraction":
                    theirs = guide if guide is not None else outputs
                    sums.add_cosine(pooled(outputs, placed), pooled(theirs, placed))
                else:
                    logits = outputs.logits
                    sums.add(task, logits, guide.logits if guide is not None else None, placed)
    finally:
        model.train(was_training)
    return sums.quality(task, has_labels)


def drop(dense: Quality, sparse: Quality) -> float:
    """Quality lost, above 0 when worse: absolute where higher is better, else relative."""
    if dense.higher_is_better:
        return dense.value - sparse.value
    return sparse.value / dense.value - 1


class _Sums:
    def __init__(self) -> None:
        self.examples = self.labelled = self.right = self.compared = self.agreed = self.cosines = 0
        self.loss = self.cosine = 0.0

    def add_cosine(self, ours: Tensor, theirs: Tensor) -> None:
        cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=-1)
        self.cosine += float(cosine.sum())
        self.cosines += cosine.numel()

    def add(self, task: str, logits: Tensor, guide: Tensor | None, batch: Batch) -> None:
        valid = valid_rows(task, batch)
        rows = logits[valid] if valid is not None else logits
        if guide is not None:
            theirs = guide[valid] if valid is not None else guide
            self.agreed += int((rows.argmax(-1) == theirs.argmax(-1)).sum())
            self.compared += rows[..., 0].numel()
        if "labels" not in batch:
            return
        labels = batch["labels"]
        if task == "causal-lm":
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        chosen = labels[valid] if valid is not None else labels
        kept = chosen != IGNORED
        self.labelled += int(kept.sum())
        self.right += int((rows.argmax(-1) == chosen)[kept].sum())
        self.loss += float(F.cross_entropy(rows.float(), chosen, reduction="sum"))

    def quality(self, task: str, has_labels: bool) -> Quality:
        agreement = self.agreed / self.compared if self.compared else None
        loss = self.loss / self.labelled if self.labelled else None
        higher = task not in LANGUAGE
        if task == "feature-extraction":
            metric, value = "cosine to dense", self.cosine / max(1, self.cosines)
        elif task in LANGUAGE:
            metric, value = LANGUAGE[task], _exp(loss if loss is not None else math.inf)
        elif has_labels:
            metric = "token accuracy" if task == "token-classification" else "accuracy"
            value = self.right / max(1, self.labelled)
        else:
            metric, value = "agreement", agreement if agreement is not None else 1.0
        return Quality(metric, value, loss, agreement, self.examples, higher)


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))

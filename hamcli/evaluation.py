"""Quality of a model on held-out data; what a loss of quality is.

    causal-lm               perplexity of each next token
    masked-lm               masked perplexity: of hidden tokens
    text- and image-        accuracy; without labels agreement with the dense model
    token-classification    token accuracy; the same
    feature-extraction      cosine to dense: of pooled embeddings

Means are over predictions, not over batches, so the size of a batch is no matter.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamcli.errors import Diverged, InputRefused
from hamcli.objective import IGNORED, Batch, Outputs, counted_rows, forward, pooled, targets

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
        accuracy: Share of predictions that are right, where there are labels.
        num_predictions: Tokens, texts or images that were predicted or compared.
    """

    metric: str
    value: float
    loss: float | None
    agreement: float | None
    num_examples: int
    higher_is_better: bool
    accuracy: float | None = None
    num_predictions: int = 0


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: str,
    has_labels: bool,
    teacher: nn.Module | None,
    device: torch.device,
) -> Quality:
    """Measure `model`; it and the teacher are left in the mode they came in.

    Args:
        model: On `device`.
        batches: Held-out batches, on the CPU.
        task: Chooses the metric.
        has_labels: Whether batches bring labels.
        teacher: The dense model, on `device`; the model itself to measure dense against dense;
            None for no comparison.
        device: Where to compute.

    Raises:
        Diverged: The model's outputs are not finite.
        InputRefused: Nothing was measured: no labels and no teacher, or no batch.
    """
    sums = _Sums(task, teacher is not None)
    with _evaluating(model, teacher), torch.inference_mode():
        for batch in batches:
            placed = {name: tensor.to(device) for name, tensor in batch.items()}
            inner = task == "feature-extraction"
            outputs = forward(model, placed, inner=inner)
            guide = outputs
            if teacher is not None and teacher is not model:
                guide = forward(teacher, placed, inner=inner)
            sums.add(outputs, guide, placed)
    return sums.quality(has_labels)


def drop(dense: Quality, sparse: Quality) -> float:
    """Quality lost, above 0 when worse: absolute where higher is better, else relative."""
    if dense.higher_is_better:
        return dense.value - sparse.value
    return sparse.value / dense.value - 1


@contextmanager
def _evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Dropout off and batch-norm frozen, for a while."""
    modes = [
        (module, module.training)
        for model in models
        if model is not None
        for module in model.modules()
    ]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


class _Sums:
    """Sums over batches, in double precision and integers."""

    def __init__(self, task: str, has_teacher: bool) -> None:
        self.task, self.has_teacher = task, has_teacher
        self.examples = self.predictions = self.agreed = self.labelled = self.right = 0
        self.loss = self.cosine = 0.0

    def add(self, outputs: Outputs, guide: Outputs, batch: Batch) -> None:
        self.examples += len(next(iter(batch.values())))
        if self.task == "feature-extraction":
            self._add_cosine(pooled(outputs, batch), pooled(guide, batch))
            return
        rows = counted_rows(self.task, batch)
        assert outputs.logits is not None  # all other tasks have a head
        assert guide.logits is not None
        logits = outputs.logits[rows]
        self._refuse_non_finite(logits)
        self.predictions += len(logits)
        if self.has_teacher:
            self.agreed += int((logits.argmax(-1) == guide.logits[rows].argmax(-1)).sum())
        if "labels" in batch:
            self._add_labels(logits, targets(self.task, batch)[rows])

    def _add_cosine(self, ours: Tensor, theirs: Tensor) -> None:
        self._refuse_non_finite(ours)
        cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=-1)
        self.predictions += len(cosine)
        self.cosine += float(cosine.sum())

    def _add_labels(self, logits: Tensor, labels: Tensor) -> None:
        self.labelled += int((labels != IGNORED).sum())
        self.right += int((logits.argmax(-1) == labels).sum())
        losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
        self.loss += float(losses.double().sum())

    def _refuse_non_finite(self, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise Diverged(
                "E702",
                "the model's outputs are not finite",
                "evaluation",
                f"after {self.predictions:,} predictions",
                "a model, or a model.dtype, that computes finite numbers",
            )

    def quality(self, has_labels: bool) -> Quality:
        loss = self.loss / self.labelled if self.labelled else None
        accuracy = self.right / self.labelled if self.labelled else None
        agreement = None
        if self.has_teacher and self.task != "feature-extraction" and self.predictions:
            agreement = self.agreed / self.predictions
        metric, value = self._metric(has_labels, loss, accuracy, agreement)
        if value is None:
            why = "no labels and no dense model beside it" if self.examples else "no examples"
            raise InputRefused("E469", "nothing to measure", "evaluation", why, "data with labels")
        return Quality(
            metric,
            value,
            loss,
            agreement,
            self.examples,
            self.task not in LANGUAGE,
            accuracy,
            self.predictions,
        )

    def _metric(
        self,
        has_labels: bool,
        loss: float | None,
        accuracy: float | None,
        agreement: float | None,
    ) -> tuple[str, float | None]:
        if self.task == "feature-extraction":
            known = self.has_teacher and self.predictions
            return "cosine to dense", self.cosine / self.predictions if known else None
        if self.task in LANGUAGE:
            # beyond e^700 a float has no number; JSON would have none for infinity
            return LANGUAGE[self.task], None if loss is None else math.exp(min(loss, 700.0))
        if not has_labels:
            return "agreement", agreement
        name = "token accuracy" if self.task == "token-classification" else "accuracy"
        return name, accuracy

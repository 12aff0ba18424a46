"""What is minimised: the task's own loss and distillation from the dense teacher, weighted.

    loss = task * L_task + logits * T^2 KL(teacher || student) + hidden * L_hidden
           + embedding * (1 - cos)

Logit distillation: Hinton et al. 2015 (arXiv 1503.02531). What is pruned it does not know.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamcli.errors import RecipeError

Batch = dict[str, Tensor]
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Part:
    """What one process sees of a batch that several share.

    Attributes:
        whole: The batch of all processes.
        size: Number of processes.
        add: Sums a tensor over them, in place.
    """

    whole: Batch
    size: int
    add: Callable[[Tensor], Tensor]


def make_teacher(model: nn.Module) -> nn.Module:
    """A frozen copy of the model, in eval mode and the model's own dtype."""
    teacher = copy.deepcopy(model).eval()
    for param in teacher.parameters():
        param.requires_grad_(False)
    return teacher


@dataclass(frozen=True, slots=True)
class Objective:
    """A weighted sum of the terms that the task has; made by `make_objective`.

    Attributes:
        task: What the model does.
        weights: Term to weight; only terms that count.
        temperature: Softens the logits.
        notes: Terms of the recipe that the task does not have.
    """

    task: str
    weights: dict[str, float]
    temperature: float
    notes: tuple[str, ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term asks the teacher."""
        return any(name != "task" for name in self.weights)

    def keeps_dropout(self, word: str) -> bool:
        """Whether the model's own dropout acts in training.

        Noise in the student is noise in what it learns of the teacher, whose soft targets keep it
        from learning its examples by heart; measured in benchmarks/LOG.md.

        Args:
            word: `training.dropout`: auto, on or off.
        """
        return word == "on" or (word == "auto" and not self.needs_teacher)

    @property
    def description(self) -> str:
        """The sum in words."""
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        teacher: nn.Module | None,
        part: Part | None = None,
    ) -> Tensor:
        """The scalar loss of one batch.

        Args:
            model: The student.
            batch: On its device.
            teacher: The dense model, where a term asks it.
            part: Where `batch` is one process's part of a batch: the mean over the processes is
                then the loss of the whole, however the tokens that count are spread.
        """
        wants_hidden = "hidden" in self.weights
        inputs = dict(batch) if "task" in self.weights else without_labels(batch)
        student = forward(model, inputs, hidden=wants_hidden)
        guide = None
        if teacher is not None and self.needs_teacher:
            with torch.no_grad():
                guide = forward(teacher, without_labels(batch), hidden=wants_hidden)
        total = torch.zeros((), device=next(iter(batch.values())).device)
        for name, weight in self.weights.items():
            here = 1.0
            if part is not None:
                here = part.size * self._count(name, batch) / max(1, self._count(name, part.whole))
            # also where nothing counts: the others wait for what a term sums over the processes
            term = self._term(name, student, guide, batch, part)
            if here == 0:  # a mean of nothing is NaN
                total = total + 0 * _outputs(student).sum()
            else:
                total = total + (weight if here == 1 else weight * here) * term
        return total

    def _count(self, name: str, batch: Batch) -> int:
        """Over how many places a term is a mean."""
        rows = len(next(iter(batch.values())))
        if name == "task" and "labels" in batch:
            labels = batch["labels"][:, 1:] if self.task == "causal-lm" else batch["labels"]
            return int((labels != IGNORED).sum())
        if name == "logits":
            valid = valid_rows(self.task, batch)
            return rows if valid is None else int(valid.sum())
        if name == "hidden" and "attention_mask" in batch:
            return int(batch["attention_mask"].bool().sum())
        return rows

    def _term(self, name: str, student: Any, guide: Any, batch: Batch, part: Part | None) -> Tensor:
        if name == "task":
            return student.loss  # type: ignore[no-any-return]  # transformers' outputs are untyped
        if name == "logits":
            return self._logits(student.logits, guide.logits, batch)
        if name == "hidden":
            return hidden_error(student.hidden_states, guide.hidden_states, batch, part)
        ours, theirs = pooled(student, batch), pooled(guide, batch)
        return (1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1)).mean()

    def _logits(self, student: Tensor, guide: Tensor, batch: Batch) -> Tensor:
        valid = valid_rows(self.task, batch)
        if valid is not None:
            student, guide = student[valid], guide[valid]
        return divergence(student, guide, self.temperature)


def make_objective(
    task: str,
    *,
    weights: dict[str, float],
    temperature: float,
    has_labels: bool,
    has_teacher: bool,
) -> Objective:
    """Keep the terms that the task, the data and the teacher allow.

    Args:
        task: What the model does.
        weights: Weight of task, logits, hidden and embedding, at least 0.
        temperature: Above 0.
        has_labels: Whether batches bring labels.
        has_teacher: Whether the dense model can teach; not with a new head.

    Raises:
        RecipeError: E231, no term is left.
    """
    reasons = {
        "task": "" if has_labels else "the data has no labels",
        "logits": "the model has no head" if task == "feature-extraction" else "",
        "hidden": "",
        "embedding": ""
        if task == "feature-extraction"
        else "only encoders without a head have one",
    }
    if not has_teacher:
        new = "the head is new, so there is no dense model to learn from"
        reasons |= dict.fromkeys(("logits", "hidden", "embedding"), new)
    asked = {name: weight for name, weight in weights.items() if weight > 0}
    kept = {name: weight for name, weight in asked.items() if not reasons[name]}
    notes = tuple(
        f"objective.{name} is left out: {reasons[name]}" for name in asked if reasons[name]
    )
    if not kept:
        right = "data with labels, or " if not has_labels else ""
        raise RecipeError(
            "E231",
            "nothing is left to minimise",
            "objective",
            "; ".join(notes) or "all weights are 0",
            f"{right}a term of objective.distill above 0 that {task} has",
        )
    return Objective(task, kept, temperature, notes)


def without_labels(batch: Batch) -> Batch:
    """The batch without labels, so that the model computes no loss."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def forward(model: nn.Module, batch: Batch, *, hidden: bool) -> Any:
    """The model's outputs."""
    return model(**batch, output_hidden_states=True) if hidden else model(**batch)


def valid_rows(task: str, batch: Batch) -> Tensor | None:
    """Which positions of the logits count, bool of their leading shape; None = all."""
    if task == "masked-lm":
        return batch["labels"] != IGNORED
    if task == "causal-lm":  # as the task's own loss: a position predicts the token after it
        valid = batch["attention_mask"].bool()
        followed = torch.zeros_like(valid)
        followed[:, :-1] = valid[:, 1:]
        return valid & followed
    if task == "token-classification":
        if "labels" in batch:
            return batch["labels"] != IGNORED
        return batch["attention_mask"].bool()
    return None


def divergence(student: Tensor, guide: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits [..., classes], averaged over the leading axes."""
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(guide.float() / temperature, dim=-1)
    each = (theirs.exp() * (theirs - ours)).sum(dim=-1)
    return each.mean() * temperature**2


def hidden_error(student: Any, guide: Any, batch: Batch, part: Part | None = None) -> Tensor:
    """Squared error of the hidden states over the teacher's mean square, averaged over layers.

    The mean square is that of the whole batch, of which this may be a `part`.
    """
    mask = batch.get("attention_mask")
    errors = []
    for ours, theirs in zip(student, guide, strict=True):
        ours, theirs = ours.float(), theirs.float()
        if mask is not None and ours.dim() == 3:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        square = theirs.square().mean() if part is None else _mean_square(theirs, part)
        errors.append(F.mse_loss(ours, theirs) / square.clamp(min=1e-12))
    return torch.stack(errors).mean()


def _mean_square(states: Tensor, part: Part) -> Tensor:
    """Mean square over all processes."""
    sums = torch.stack(
        [states.square().sum(), torch.tensor(float(states.numel()), device=states.device)]
    )
    found = part.add(sums)
    return found[0] / found[1].clamp(min=1)


def _outputs(student: Any) -> Tensor:
    found: Tensor = getattr(student, "logits", None)  # type: ignore[assignment]  # or None
    return student.last_hidden_state if found is None else found


def pooled(outputs: Any, batch: Batch) -> Tensor:
    """Mean of the last hidden state over tokens that are no padding, [batch, hidden]."""
    states: Tensor = outputs.last_hidden_state
    mask = batch.get("attention_mask")
    if mask is None or states.dim() != 3:
        return states.flatten(2).mean(-1) if states.dim() > 2 else states
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

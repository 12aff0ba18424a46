"""What is minimised: the task's own loss and distillation from the dense teacher, weighted.

    loss = task * CE + logits * T^2 KL(teacher || student)
           + hidden * mean over layers of |student - teacher|^2 / |teacher|^2
           + embedding * (1 - cos)

Logits at temperature T: Hinton et al. 2015 (arXiv 1503.02531), over the positions that the task's
own loss counts. Hidden states: over tokens that are no padding; dividing by the teacher's mean
square makes layers of any scale weigh the same. Embedding: the mean of the last hidden state over
such tokens. What is pruned this module does not know.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamcli.errors import RecipeError

Batch = dict[str, Tensor]
IGNORED = -100

TERMS = ("task", "logits", "hidden", "embedding")
_TINY = 1e-12


def make_teacher(model: nn.Module) -> nn.Module:
    """A frozen copy of the model, in eval mode and the model's own dtype."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model said of a batch.

    Attributes:
        logits: [batch, ..., classes], or None without a head.
        hidden: Hidden states, first to last; empty where nobody asked.
        last: Last hidden state, or None where nobody asked.
    """

    logits: Tensor | None
    hidden: tuple[Tensor, ...]
    last: Tensor | None


@dataclass(frozen=True, slots=True)
class Objective:
    """A weighted sum of the terms that the task has; made by `make_objective`.

    Attributes:
        task: What the model does.
        weights: Term to weight; only terms that count.
        temperature: Softens the logits.
        notes: What of the recipe's words does not fit the task, and what is done instead.
    """

    task: str
    weights: Mapping[str, float]
    temperature: float
    notes: tuple[str, ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term asks the teacher."""
        return any(name != "task" for name in self.weights)

    @property
    def description(self) -> str:
        """The sum in words."""
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    def __call__(self, model: nn.Module, batch: Batch, teacher: nn.Module | None) -> Tensor:
        """The scalar loss of one batch, as `parts` weighs it."""
        parts = self.parts(model, batch, teacher)
        losses = [self.weights[name] * part for name, part in parts.items()]
        return torch.stack(losses).sum()

    def parts(self, model: nn.Module, batch: Batch, teacher: nn.Module | None) -> dict[str, Tensor]:
        """Each term of one batch, not weighted yet.

        Args:
            model: The student; gradients flow to it.
            batch: On the model's device.
            teacher: Frozen; needed where `needs_teacher`.
        """
        inner = "hidden" in self.weights or "embedding" in self.weights
        student = forward(model, batch, inner=inner)
        guide = student
        if self.needs_teacher:
            assert teacher is not None  # the caller has asked needs_teacher
            with torch.inference_mode():
                guide = forward(teacher, batch, inner=inner)
        return {name: self._term(name, student, guide, batch) for name in self.weights}

    def _term(self, name: str, student: Outputs, guide: Outputs, batch: Batch) -> Tensor:
        if name == "hidden":
            return hidden_error(student.hidden, guide.hidden, batch)
        if name == "embedding":
            ours, theirs = pooled(student, batch), pooled(guide, batch)
            return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()
        assert student.logits is not None  # make_objective drops terms that need a head
        rows = counted_rows(self.task, batch)
        if name == "task":
            return cross_entropy(student.logits[rows], targets(self.task, batch)[rows])
        assert guide.logits is not None
        return divergence(student.logits[rows], guide.logits[rows], self.temperature)


def make_objective(
    task: str,
    *,
    weights: Mapping[str, float],
    temperature: float,
    has_labels: bool,
    has_teacher: bool,
) -> Objective:
    """Keep the terms that the task, the data and the teacher allow.

    An encoder without a head has no logits; where the recipe asks for nothing that it has, it
    learns its dense self's hidden states and embeddings instead.

    Args:
        task: What the model does.
        weights: Weight of task, logits, hidden and embedding, at least 0; a missing one is 0.
        temperature: Above 0.
        has_labels: Whether batches bring labels.
        has_teacher: Whether the dense model can teach; not with a new head.

    Raises:
        RecipeError: E231, no term is left.
    """
    asked = {name: weights[name] for name in TERMS if weights.get(name, 0.0) > 0}
    reasons = _reasons(task, has_labels, has_teacher)
    kept = {name: weight for name, weight in asked.items() if not reasons[name]}
    notes = [f"objective: {name} is left out, {reasons[name]}" for name in asked if reasons[name]]
    if not kept and task == "feature-extraction" and "logits" in asked and has_teacher:
        kept = {"hidden": asked["logits"], "embedding": asked["logits"]}
        notes.append(
            "objective: hidden states and embeddings of the dense model are learned instead"
        )
    if not kept:
        raise RecipeError(
            "E231",
            "nothing is left to minimise",
            "objective",
            "; ".join(notes) or "all weights are 0",
            ("" if has_labels else "data with labels, or ")
            + f"a weight of objective.distill above 0 that {task} has",
        )
    return Objective(task, kept, temperature, tuple(notes))


def _reasons(task: str, has_labels: bool, has_teacher: bool) -> dict[str, str]:
    """Why each term cannot be; empty where it can."""
    headless = "the model has no head" if task == "feature-extraction" else ""
    unlabelled = "" if has_labels else "the data has no labels"
    new = "" if has_teacher else "the head is new and there is nothing to learn from"
    return {
        "task": headless or unlabelled,
        "logits": headless or new,
        "hidden": new,
        "embedding": new,
    }


def forward(model: nn.Module, batch: Batch, *, inner: bool) -> Outputs:
    """The model's outputs; it is not shown the labels.

    Args:
        model: A transformers model, or a wrapper around one.
        batch: On its device.
        inner: Whether hidden states are wanted.
    """
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    if _has_cache(model):
        inputs["use_cache"] = False  # nothing is generated; the cache would hold every layer's keys
    outputs = model(**inputs, output_hidden_states=True if inner else None, return_dict=True)
    hidden = tuple(getattr(outputs, "hidden_states", None) or ())
    last = getattr(outputs, "last_hidden_state", None)
    return Outputs(
        getattr(outputs, "logits", None),
        hidden,
        last if last is not None else hidden[-1] if hidden else None,
    )


def _has_cache(model: nn.Module) -> bool:
    inner = getattr(model, "module", model)  # DDP's wrapper
    return "use_cache" in inspect.signature(inner.forward).parameters


# ---- which positions count ----


def counted_rows(task: str, batch: Batch) -> Tensor:
    """Positions of the logits that count, bool of their shape without the classes.

    masked-lm: hidden tokens · causal-lm: tokens that are followed by one that is no padding ·
    token-classification: tokens with a label, or without labels all but padding · else all.
    """
    if task == "causal-lm":
        valid = batch["attention_mask"].bool()
        followed = torch.zeros_like(valid)
        followed[:, :-1] = valid[:, 1:]
        return valid & followed
    if task == "masked-lm" or (task == "token-classification" and "labels" in batch):
        return batch["labels"] != IGNORED
    if task == "token-classification":
        return batch["attention_mask"].bool()
    some = next(iter(batch.values()))
    return torch.ones(len(some), dtype=torch.bool, device=some.device)


def targets(task: str, batch: Batch) -> Tensor:
    """The right class at each position of the logits: for causal-lm the token after it."""
    labels = batch["labels"]
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if task == "causal-lm" else labels


# ---- terms ----


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss in nats of logits [rows, classes]; 0 where there is no row."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))


def divergence(student: Tensor, guide: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits [rows, classes], averaged over rows."""
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(guide.float() / temperature, dim=-1)
    total = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return total * (temperature**2 / max(1, len(ours)))


def hidden_error(student: Sequence[Tensor], guide: Sequence[Tensor], batch: Batch) -> Tensor:
    """Squared error of hidden states over the teacher's mean square, averaged over layers."""
    mask = batch.get("attention_mask")
    errors = []
    for ours, theirs in zip(student, guide, strict=True):
        ours, theirs = ours.float(), theirs.float()
        if mask is not None and ours.shape[:2] == mask.shape:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        scale = theirs.square().mean().clamp(min=_TINY)
        errors.append((ours - theirs).square().mean() / scale)
    return torch.stack(errors).mean()


def pooled(outputs: Outputs, batch: Batch) -> Tensor:
    """Mean of the last hidden state, [batch, width], over tokens that are no padding.

    Of an image model: over patches, or over places of a feature map.
    """
    assert outputs.last is not None  # every transformers encoder has one
    states = outputs.last.float()
    if states.dim() == 4:  # [batch, channels, height, width]
        return states.flatten(2).mean(-1)
    mask = batch.get("attention_mask")
    if mask is None or states.shape[:2] != mask.shape:
        return states.flatten(1, -2).mean(1) if states.dim() > 2 else states
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

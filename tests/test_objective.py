"""The objective and the measures against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hamcli.errors import RecipeError
from hamcli.evaluation import Quality, drop, measure
from hamcli.objective import (
    Objective,
    Part,
    divergence,
    hidden_error,
    make_objective,
    pooled,
    valid_rows,
)

ALL = {"task": 0.1, "logits": 0.9, "hidden": 0.0, "embedding": 1.0}


def made(task, **more):
    words = {"weights": ALL, "temperature": 2.0, "has_labels": True, "has_teacher": True}
    return make_objective(task, **{**words, **more})


def test_divergence_is_the_kl_of_softened_logits_times_the_temperature_squared():
    student, guide = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    # at T = 2 the teacher says 3/4, 1/4 and the student 1/2, 1/2
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(divergence(student, guide, 2.0)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(guide, guide, 2.0)) == 0.0


def test_hidden_error_is_relative_and_passes_over_padding():
    guide = torch.tensor([[[2.0], [5.0]]])
    student = torch.tensor([[[3.0], [-9.0]]])
    batch = {"attention_mask": torch.tensor([[1, 0]])}
    assert float(hidden_error([student], [guide], batch)) == pytest.approx(1 / 4)


class Echo(nn.Module):
    """Hidden states of one layer, and logits that are their sums."""

    def __init__(self, states):
        super().__init__()
        self.states = nn.Parameter(states)

    def forward(self, **inputs):
        return SimpleNamespace(hidden_states=(self.states,), logits=self.states.sum(-1))


@pytest.mark.parametrize("is_padding", [True, False])
def test_a_process_without_any_token_still_takes_part_in_sums(is_padding):
    mask = torch.tensor([[0, 0]] if is_padding else [[1, 1]])
    batch = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "attention_mask": mask}
    whole = {name: torch.cat([one, torch.ones_like(one)]) for name, one in batch.items()}
    added = []
    part = Part(whole, 2, lambda sums: added.append(sums.tolist()) or sums)
    student, guide = Echo(torch.ones(1, 2, 1)), Echo(torch.full((1, 2, 1), 2.0))
    loss = Objective("causal-lm", {"hidden": 1.0}, 1.0, ())(student, batch, guide, part)
    loss.backward()
    assert added == [[0.0, 0.0] if is_padding else [8.0, 2.0]]
    # 2 processes * 2 of 4 tokens here * 1 / 4
    assert float(loss.detach()) == (0.0 if is_padding else 0.25)
    assert bool(torch.isfinite(student.states.grad).all())


def test_pooling_averages_tokens_that_are_no_padding():
    outputs = SimpleNamespace(last_hidden_state=torch.tensor([[[2.0], [4.0], [9.0]]]))
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert pooled(outputs, batch).tolist() == [[3.0]]


def test_causal_positions_count_where_a_token_follows():
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0]])}
    assert valid_rows("causal-lm", batch).tolist() == [[True, True, False, False]]


def test_terms_that_the_task_lacks_are_dropped_with_a_note():
    assert set(made("masked-lm").weights) == {"task", "logits"}
    assert set(made("feature-extraction", has_labels=False).weights) == {"embedding"}
    assert len(made("feature-extraction", has_labels=False).notes) == 2
    assert set(made("text-classification", has_teacher=False).weights) == {"task"}


def test_nothing_to_minimise_is_refused():
    with pytest.raises(RecipeError, match="nothing is left"):
        made("text-classification", has_teacher=False, has_labels=False)


class Table(nn.Module):
    """Logits looked up by the first token."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits[input_ids])


def quality(task, logits, ids, labels, teacher=None):
    batch = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.ones(len(ids), *torch.tensor(ids).shape[1:], dtype=torch.int64),
        "labels": torch.tensor(labels),
    }
    return measure(
        Table(logits), [batch], task=task, has_labels=True, teacher=teacher,
        device=torch.device("cpu"),
    )  # fmt: skip


def test_perplexity_is_the_exponential_of_the_mean_loss():
    half = [[0.0, 0.0], [0.0, 0.0]]
    found = quality("causal-lm", half, [[0, 1, 0]], [[0, 1, 0]])
    assert found.value == pytest.approx(2.0, rel=1e-6)
    assert not found.higher_is_better
    found = quality("masked-lm", half, [[0, 1, 0]], [[-100, 1, -100]])
    assert found.value == pytest.approx(2.0, rel=1e-6)


def test_accuracy_and_agreement_count():
    logits = [[1.0, 0.0], [0.0, 1.0]]
    teacher = Table([[1.0, 0.0], [1.0, 0.0]])
    found = quality("text-classification", logits, [0, 1, 1, 1], [0, 1, 0, 1], teacher)
    assert found.value == 0.75
    assert found.agreement == 0.25


def test_drop_is_absolute_for_accuracy_and_relative_for_perplexity():
    def one(value, higher):
        return Quality("m", value, None, None, 1, higher)

    assert drop(one(0.9, True), one(0.8, True)) == pytest.approx(0.1)
    assert drop(one(2.0, False), one(3.0, False)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("word", "has_teacher", "kept"),
    [("auto", True, False), ("auto", False, True), ("on", True, True), ("off", False, False)],
)
def test_dropout_acts_by_itself_only_where_nobody_teaches(word, has_teacher, kept):
    objective = made("text-classification", has_teacher=has_teacher)
    assert objective.keeps_dropout(word) == kept

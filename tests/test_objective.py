"""The objective against numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from hamcli.errors import RecipeError
from hamcli.objective import (
    Outputs,
    counted_rows,
    cross_entropy,
    divergence,
    forward,
    hidden_error,
    make_objective,
    make_teacher,
    pooled,
    targets,
)
from tests.pico import pico_bert, pico_llama, pico_resnet

IGNORED = -100
ALL = {"task": 0.1, "logits": 0.9, "hidden": 2.0, "embedding": 3.0}


def number(loss):
    return float(loss.detach())


def made(task="masked-lm", **more):
    words = {"weights": ALL, "temperature": 2.0, "has_labels": True, "has_teacher": True}
    return make_objective(task, **{**words, **more})


# ---- terms ----


def test_divergence_is_the_kl_of_softened_logits_times_the_temperature_squared():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    # at T = 2 the teacher says 3/4, 1/4 and the student 1/2, 1/2
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert number(divergence(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-6)
    both = torch.cat([student, teacher]), torch.cat([teacher, teacher])
    assert number(divergence(*both, 2.0)) == pytest.approx(expected / 2, rel=1e-6)


def test_divergence_is_not_symmetric():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(9), 0.0]])
    # teacher 9/10, 1/10: KL(teacher || student) = 0.9 ln 1.8 + 0.1 ln 0.2
    expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert number(divergence(student, teacher, 1.0)) == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_divergence_does_not_fade_with_the_temperature():
    teacher = torch.tensor([[1.0, -1.0, 0.5]])
    sizes = []
    for temperature in (1.0, 100.0):
        student = torch.zeros(1, 3, requires_grad=True)
        divergence(student, teacher, temperature).backward()
        sizes.append(number(student.grad.norm()))
    # for high T the gradient tends to (student - teacher) / classes, of the order of that at 1
    assert sizes[1] == pytest.approx(number((teacher - teacher.mean()).norm()) / 3, rel=0.02)
    assert 0.5 < sizes[1] / sizes[0] < 2


def test_hidden_error_is_relative_to_the_teacher_and_passes_over_padding():
    teacher = [torch.tensor([[[2.0], [5.0]]]), torch.tensor([[[10.0], [5.0]]])]
    student = [torch.tensor([[[3.0], [-9.0]]]), torch.tensor([[[10.0], [0.0]]])]
    batch = {"attention_mask": torch.tensor([[1, 0]])}
    # a quarter in the first layer, none in the second
    assert number(hidden_error(student, teacher, batch)) == pytest.approx(1 / 8)


def test_hidden_error_takes_feature_maps():
    teacher, student = torch.full((2, 3, 4, 4), 2.0), torch.full((2, 3, 4, 4), 3.0)
    assert number(hidden_error([student], [teacher], {})) == pytest.approx(1 / 4)


def test_pooling_averages_tokens_that_are_no_padding():
    states = torch.tensor([[[2.0], [4.0], [9.0]], [[1.0], [7.0], [7.0]]])
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert pooled(Outputs(None, (), states), batch).tolist() == [[3.0], [1.0]]
    assert pooled(Outputs(None, (), states), {}).tolist() == [[5.0], [5.0]]
    maps = torch.tensor([[[[1.0, 3.0]], [[5.0, 7.0]]]])
    assert pooled(Outputs(None, (), maps), {}).tolist() == [[2.0, 6.0]]


def test_cross_entropy_is_the_mean_in_nats():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    # probabilities of the right class: 3/4 and 1/2
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    assert number(cross_entropy(logits, torch.tensor([0, 1]))) == pytest.approx(expected, rel=1e-6)


def test_no_row_is_no_loss_and_no_nan():
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.int64)) + divergence(
        logits, logits, 2.0
    )
    loss.backward()
    assert number(loss) == 0


# ---- which positions count ----


def test_causal_positions_count_where_a_token_follows():
    batch = {
        "input_ids": torch.tensor([[7, 8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "labels": torch.tensor([[7, 8, 9, IGNORED]]),
    }
    rows = counted_rows("causal-lm", batch)
    assert rows.tolist() == [[True, True, False, False]]
    assert targets("causal-lm", batch)[rows].tolist() == [8, 9]


def test_masked_positions_count_where_something_is_asked():
    batch = {"labels": torch.tensor([[IGNORED, 4], [5, IGNORED]])}
    assert counted_rows("masked-lm", batch).tolist() == [[False, True], [True, False]]
    assert targets("masked-lm", batch)[counted_rows("masked-lm", batch)].tolist() == [4, 5]


def test_tags_count_where_they_are_or_without_them_all_tokens():
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert counted_rows("token-classification", batch).tolist() == [[True, True, False]]
    batch["labels"] = torch.tensor([[IGNORED, 1, IGNORED]])
    assert counted_rows("token-classification", batch).tolist() == [[False, True, False]]


# ---- which terms ----


def test_terms_that_the_task_lacks_are_left_out_with_a_note():
    assert dict(made().weights) == ALL
    objective = made("feature-extraction", has_labels=False)
    assert set(objective.weights) == {"hidden", "embedding"}
    assert len(objective.notes) == 2
    objective = made("text-classification", has_labels=False)
    assert set(objective.weights) == {"logits", "hidden", "embedding"}
    assert "the data has no labels" in objective.notes[0]
    objective = made("text-classification", has_teacher=False)
    assert set(objective.weights) == {"task"}
    assert not objective.needs_teacher


def test_an_encoder_asked_for_logits_alone_learns_states_and_embeddings():
    objective = made("feature-extraction", weights={"task": 0.1, "logits": 0.9})
    assert dict(objective.weights) == {"hidden": 0.9, "embedding": 0.9}
    assert "instead" in objective.notes[-1]


def test_a_weight_of_zero_is_no_term():
    objective = made(weights={"task": 1.0, "logits": 0.0, "hidden": 0.0, "embedding": 0.0})
    assert dict(objective.weights) == {"task": 1.0}
    assert not objective.needs_teacher
    assert objective.notes == ()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("text-classification", {"has_labels": False, "has_teacher": False}),
        ("text-classification", {"has_labels": False, "weights": {"task": 1.0}}),
        ("feature-extraction", {"weights": {"task": 1.0}}),
        ("causal-lm", {"weights": {}}),
    ],
)
def test_nothing_to_minimise_is_refused(task, words):
    with pytest.raises(RecipeError) as caught:
        made(task, **words)
    assert (caught.value.code, caught.value.exit_code) == ("E231", 2)


# ---- on models ----


def text_batch(vocabulary=40, labels=True):
    torch.manual_seed(0)
    ids = torch.randint(5, vocabulary, (3, 8))
    attention = torch.ones_like(ids)
    attention[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": attention}
    if labels:
        batch["labels"] = torch.where(attention == 1, ids, IGNORED)
    return batch


def test_the_task_loss_of_a_causal_model_is_transformers_own():
    model, batch = pico_llama(), text_batch()
    objective = made("causal-lm", weights={"task": 1.0})
    expected = model(**batch).loss
    assert number(objective(model, batch, None)) == pytest.approx(number(expected), rel=1e-6)


def test_the_task_loss_of_a_masked_model_is_transformers_own():
    model, batch = pico_bert("masked-lm"), text_batch()
    batch["labels"][:, ::3] = IGNORED
    objective = made("masked-lm", weights={"task": 1.0})
    expected = model(**batch).loss
    assert number(objective(model, batch, None)) == pytest.approx(number(expected), rel=1e-6)


def test_a_model_has_nothing_to_learn_from_itself():
    for model, batch, task in (
        (pico_llama(), text_batch(), "causal-lm"),
        (pico_bert("feature-extraction"), text_batch(labels=False), "feature-extraction"),
        (pico_resnet(), {"pixel_values": torch.randn(2, 1, 16, 16)}, "image-classification"),
    ):
        weights = {"logits": 1.0, "hidden": 1.0, "embedding": 1.0}
        objective = made(task, weights=weights, has_labels="labels" in batch)
        loss = objective(model, batch, make_teacher(model))
        assert number(loss) == pytest.approx(0.0, abs=1e-5), task


def test_the_sum_is_weighted_and_reaches_the_student_alone():
    torch.manual_seed(1)
    model, batch = pico_bert("masked-lm"), text_batch()
    teacher = make_teacher(model)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    objective = made()
    parts = objective.parts(model, batch, teacher)
    expected = sum(ALL[name] * number(part) for name, part in parts.items())
    assert all(number(part) > 0 for part in parts.values())
    loss = objective(model, batch, teacher)
    assert number(loss) == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert all(param.grad is not None for param in model.parameters())
    assert all(param.grad is None for param in teacher.parameters())


def test_distillation_brings_the_student_back():
    torch.manual_seed(0)
    model, batch = pico_bert("feature-extraction"), text_batch(labels=False)
    teacher = make_teacher(model)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.2)
    objective = made("feature-extraction", weights={"hidden": 1.0, "embedding": 1.0})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = objective(model, batch, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(number(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_the_teacher_is_a_frozen_copy():
    model = pico_bert("masked-lm").train()
    teacher = make_teacher(model)
    assert model.training
    assert not any(module.training for module in teacher.modules())
    assert not any(param.requires_grad for param in teacher.parameters())
    assert all(param.requires_grad for param in model.parameters())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not torch.equal(next(model.parameters()), next(teacher.parameters()))


def test_models_are_not_shown_the_labels_and_keep_no_cache():
    class Spy(nn.Module):
        def forward(self, input_ids, use_cache=True, **more):
            self.seen = {"use_cache": use_cache, **more}
            return Outputs(None, (), None)

    spy = Spy()
    forward(spy, {"input_ids": torch.zeros(1, 1), "labels": torch.zeros(1, 1)}, inner=False)
    assert "labels" not in spy.seen
    assert spy.seen["use_cache"] is False

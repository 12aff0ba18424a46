"""Quality against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hamcli.errors import Diverged, InputRefused
from hamcli.evaluation import Quality, drop, measure
from tests.pico import pico_resnet

IGNORED = -100
CPU = torch.device("cpu")


class Table(nn.Module):
    """Logits, or hidden states, looked up by token."""

    def __init__(self, rows, name="logits"):
        super().__init__()
        self.rows, self.name = torch.tensor(rows), name
        self.inner = nn.Dropout(0.5)
        self.was_training = None

    def forward(self, input_ids, attention_mask=None, **_):
        self.was_training = self.inner.training
        return SimpleNamespace(**{self.name: self.rows[input_ids]})


def quality(task, rows, batches, teacher=None, *, has_labels=True, name="logits"):
    model = rows if isinstance(rows, nn.Module) else Table(rows, name)
    return measure(model, batches, task=task, has_labels=has_labels, teacher=teacher, device=CPU)


def batch(ids, labels=None, attention=None):
    made = {"input_ids": torch.tensor(ids)}
    made["attention_mask"] = (
        torch.ones_like(made["input_ids"]) if attention is None else torch.tensor(attention)
    )
    return made if labels is None else {**made, "labels": torch.tensor(labels)}


EVEN = [[0.0, 0.0], [0.0, 0.0]]
SURE = [[math.log(3), 0.0], [0.0, math.log(3)]]  # 3/4 for the token's own class


def test_perplexity_is_the_exponential_of_the_mean_loss_a_token():
    found = quality("causal-lm", EVEN, [batch([[0, 1, 0]], [[0, 1, 0]])])
    assert found.value == pytest.approx(2.0, rel=1e-6)
    assert found.metric == "perplexity"
    assert not found.higher_is_better
    # after 0 comes 0, as the model says with 3/4; padding is no prediction
    found = quality(
        "causal-lm", SURE, [batch([[0, 0, 0, 1]], [[0, 0, 0, IGNORED]], [[1, 1, 1, 0]])]
    )
    assert found.value == pytest.approx(4 / 3, rel=1e-6)
    assert found.num_predictions == 2


def test_masked_perplexity_counts_what_was_asked():
    found = quality("masked-lm", SURE, [batch([[0, 1, 0]], [[IGNORED, 0, IGNORED]])])
    assert found.value == pytest.approx(4.0, rel=1e-6)
    assert (found.metric, found.accuracy, found.num_predictions) == ("masked perplexity", 0.0, 1)


def test_means_are_over_predictions_whatever_the_batches():
    one, two = batch([[0, 0]], [[0, IGNORED]]), batch([[0, 1]], [[1, 0]])
    both = batch([[0, 0], [0, 1]], [[0, IGNORED], [1, 0]])
    apart, together = (quality("masked-lm", SURE, batches) for batches in ([one, two], [both]))
    assert apart == together
    assert apart.loss == pytest.approx((math.log(4 / 3) + 2 * math.log(4)) / 3, rel=1e-6)


def test_accuracy_and_agreement_count():
    logits = [[1.0, 0.0], [0.0, 1.0]]
    teacher = Table([[1.0, 0.0], [1.0, 0.0]])
    found = quality("text-classification", logits, [batch([0, 1, 1, 1], [0, 1, 0, 1])], teacher)
    assert (found.metric, found.value, found.agreement) == ("accuracy", 0.75, 0.25)
    assert (found.num_examples, found.higher_is_better) == (4, True)


def test_without_labels_agreement_with_the_teacher_is_the_quality():
    logits = [[1.0, 0.0], [0.0, 1.0]]
    teacher = Table([[1.0, 0.0], [1.0, 0.0]])
    found = quality("text-classification", logits, [batch([0, 0, 1])], teacher, has_labels=False)
    assert (found.metric, found.value) == ("agreement", 2 / 3)
    assert found.loss is None


def test_token_accuracy_passes_over_tokens_without_a_tag():
    logits = [[1.0, 0.0], [0.0, 1.0]]
    found = quality("token-classification", logits, [batch([[0, 1, 1]], [[0, 0, IGNORED]])])
    assert (found.metric, found.value) == ("token accuracy", 0.5)


def test_cosine_is_that_of_pooled_embeddings():
    states = [[1.0, 0.0], [0.0, 1.0]]
    teacher = Table([[1.0, 0.0], [1.0, 0.0]], "last_hidden_state")
    batches = [batch([[0, 1], [0, 1]], attention=[[1, 1], [1, 0]])]
    found = quality(
        "feature-extraction", states, batches, teacher, has_labels=False, name="last_hidden_state"
    )
    # pooled: (1/2, 1/2) against (1, 0), and (1, 0) against itself
    assert found.value == pytest.approx((math.sqrt(0.5) + 1) / 2, rel=1e-7)
    assert found.metric == "cosine to dense"


def test_a_model_agrees_with_itself():
    model = Table([[0.3, 0.7]], "last_hidden_state")
    found = quality("feature-extraction", model, [batch([[0, 0]])], model, has_labels=False)
    assert found.value == pytest.approx(1.0, abs=1e-12)
    model = Table(SURE)
    assert quality("masked-lm", model, [batch([[0]], [[0]])], model).agreement == 1.0


def test_models_are_left_in_the_mode_they_came_in():
    model, teacher = Table(SURE), Table(SURE)
    model.inner.eval()  # a part that is frozen while the rest trains
    quality("masked-lm", model, [batch([[0]], [[0]])], teacher)
    assert (model.was_training, teacher.was_training) == (False, False)
    assert (model.training, model.inner.training) == (True, False)
    assert teacher.training


def test_the_mode_comes_back_after_an_error():
    model = Table([[math.nan, 0.0]])
    with pytest.raises(Diverged):
        quality("masked-lm", model, [batch([[0]], [[0]])])
    assert model.training


def test_measuring_changes_no_statistics_of_batch_norm():
    model = pico_resnet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = {"pixel_values": torch.randn(4, 1, 16, 16), "labels": torch.tensor([0, 1, 0, 1])}
    quality("image-classification", model, [images])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_outputs_that_are_not_finite_are_an_error():
    with pytest.raises(Diverged, match="not finite") as caught:
        quality("text-classification", [[math.inf, 0.0]], [batch([0], [0])])
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("task", ["feature-extraction", "text-classification"])
def test_nothing_to_measure_is_refused(task):
    for batches in ([], [batch([[0]])]):
        with pytest.raises(InputRefused) as caught:
            quality(task, Table([[1.0, 0.0]], "last_hidden_state" if task[0] == "f" else "logits"),
                    batches, has_labels=False)  # fmt: skip
        assert caught.value.code == "E469"


def test_a_hopeless_model_has_a_finite_perplexity():
    found = quality("masked-lm", [[0.0, 5000.0]], [batch([[0]], [[0]])])
    assert math.isfinite(found.value)


def test_drop_is_absolute_for_accuracy_and_relative_for_perplexity():
    def one(value, higher):
        return Quality("m", value, None, None, 1, higher)

    assert drop(one(0.9, True), one(0.8, True)) == pytest.approx(0.1)
    assert drop(one(2.0, False), one(3.0, False)) == pytest.approx(0.5)
    assert drop(one(2.0, False), one(1.5, False)) == pytest.approx(-0.25)

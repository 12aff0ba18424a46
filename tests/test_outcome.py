"""What a run found, as records: which number goes where."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from hamcli.completing import complete
from hamcli.evaluation import Quality
from hamcli.outcome import counted_tensors, gate_record, quality_record, training_record
from hamcli.progress import StepRecord
from hamcli.recipe import values_layer

GROUP = {"scaling": "calibrated", "eta": 0.004, "alpha": "auto", "beta": 1e-3, "clamp": 0.1}
RECORDS = [
    StepRecord(1, 3.0, 0.1, 1e-3, 1.0, 0.2, 0.9, 1.0),
    StepRecord(2, 2.0, 0.2, 2e-3, 1.0),
    StepRecord(3, 1.0, 0.3, 1e-3, 1.0, 0.4, 0.8, 0.5),
]


def trained(group=None, exponents=None, records=RECORDS):
    words = {"training.batch_size": 8, "training.accumulation": 2, "training.steps": 3}
    recipe = complete([values_layer(words, "x")], has_recipe=True).recipe
    return training_record(
        recipe, records, {**GROUP, **(group or {})}, exponents, objective="task", seconds=1.25,
        sign_flips=0.125,
    )  # fmt: skip


def test_the_record_of_training_holds_each_number_in_its_place():
    last = {"alpha": 7.0, "clamped_fraction": 0.25, "guard_events": 2}
    found = trained(exponents=last)
    assert (found.steps, found.batch_size, found.optimizer) == (3, 16, "adamw")
    assert (found.objective, found.sign_flips, found.ham_moved_fraction) == ("task", 0.125, 0.75)
    assert dataclasses.asdict(found.ham) == {
        "scaling": "calibrated", "eta": 0.004, "alpha": 7.0, "beta": 1e-3, "clamp": 0.1,
        "exponent_mean": pytest.approx(0.3), "exponent_max": 0.9, "clamped_fraction": 0.25,
        "guard_events": 2,
    }  # fmt: skip
    assert found.curves.loss == (3.0, 2.0, 1.0)
    assert found.curves.lr == (1e-3, 2e-3, 1e-3)
    # between two measurements the last one holds
    assert found.curves.exponent_mean == (0.2, 0.2, 0.4)
    assert found.curves.exponent_max == (0.9, 0.9, 0.8)


def test_without_a_mirror_step_there_is_no_record_of_it():
    assert trained({"alpha": 0, "beta": 0}, records=RECORDS[1:2]).ham is None
    assert trained({"alpha": 0}).ham is not None
    assert trained({"beta": 0}).ham is not None
    nothing = trained(records=RECORDS[1:2])
    assert nothing.ham_moved_fraction is None
    assert (nothing.ham.exponent_mean, nothing.ham.exponent_max, nothing.ham.guard_events) == (
        None, None, 0,
    )  # fmt: skip
    assert nothing.curves.exponent_mean == (None,)


@pytest.mark.parametrize(
    ("drop", "achieved", "passed"),
    [(0.1, 0.9, True), (0.11, 0.9, False), (0.1, 0.89, False), (None, 0.9, False)],
)
def test_a_gate_holds_at_its_limits(drop, achieved, passed):
    found = gate_record(0.1, 0.9, drop, achieved)
    assert found.passed is passed
    names = [(one.name, one.limit, one.value) for one in found.conditions]
    assert names == [("max_drop", 0.1, drop), ("min_sparsity", 0.9, achieved)]


def test_without_a_condition_there_is_no_gate():
    assert gate_record(None, None, 0.5, 0.5) is None
    assert gate_record(None, 0.5, None, 0.5).passed
    assert gate_record(0.0, None, 0.0, 0.0).passed


class Evaluated:
    evaluation_description = "1,000 rows"


def test_the_quality_of_each_model_stands_under_its_name():
    dense, sparse, one_shot = (
        Quality("accuracy", value, loss, agreement, 500, True)
        for value, loss, agreement in ((0.9, 0.1, None), (0.8, 0.2, 0.7), (0.4, 0.3, 0.6))
    )
    found = quality_record(dense, sparse, one_shot, Evaluated)
    assert (found.dense, found.sparse, found.one_shot) == (0.9, 0.8, 0.4)
    assert (found.dense_loss, found.sparse_loss, found.agreement) == (0.1, 0.2, 0.7)
    assert found.drop == pytest.approx(0.1)
    assert (found.data, found.num_examples) == ("500 of 1,000 rows", 500)
    alone = quality_record(None, sparse, None, Evaluated)
    assert (alone.dense, alone.drop, alone.one_shot, alone.dense_loss) == (None,) * 4


@pytest.mark.parametrize(
    ("higher_is_better", "sparse", "one_shot", "is_below"),
    [
        (True, 0.34, 0.4, True),
        (True, 0.36, 0.4, False),
        (True, 0.5, 0.4, False),
        (False, 300.0, 400.0, False),
        (False, 419.0, 400.0, False),
        (False, 421.0, 400.0, True),
        (True, 0.3, None, False),
    ],
)
def test_below_one_shot_is_clearly_worse(higher_is_better, sparse, one_shot, is_below):
    def of(value):
        return Quality("a metric", value, None, None, 500, higher_is_better)

    known = of(one_shot) if one_shot is not None else None
    assert quality_record(None, of(sparse), known, Evaluated).is_below_one_shot == is_below


def test_zeros_are_counted_in_the_file_and_one_tensor_counts_once(tmp_path):
    values = torch.tensor([[0.0, 1.0, 2.0], [-0.0, 3.0, 4.0]])
    save_file({"a": values, "b": torch.ones(2, 2), "c": torch.zeros(3)}, tmp_path / "m.safetensors")
    stored = {"x": ["b", "a"], "y": ["a"], "z": ["c"]}
    found = counted_tensors(tmp_path, ["x", "y"], stored)
    assert [(one.name, one.shape, one.zeros, one.total) for one in found] == [
        ("b", (2, 2), 0, 4), ("a", (2, 3), 2, 6),
    ]  # fmt: skip

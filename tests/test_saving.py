"""What a run checkpoint holds is what a run goes on with, tensor by tensor and number by number."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hamcli.errors import NoRunCheckpoint, ResourceError
from hamcli.optim import HAM
from hamcli.parallel.world import World
from hamcli.progress import StepRecord
from hamcli.runstate import RunState
from hamcli.saving import PARTS, History, State, own_tensors, restore, save
from hamcli.sparsity.targets import select_targets
from tests.optim.numbers import normal


class Course:
    """Has a mask and a threshold."""

    def __init__(self, seed):
        self.held = {"mask.0.weight": normal(8, 8, seed=seed) > 0, "limit": torch.tensor(seed)}

    def state(self):
        return dict(self.held)

    def load_state(self, state):
        self.held = dict(state)


def made(seed):
    """A model that has taken `seed` steps, and the rest of a run's state."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = HAM(model.parameters(), lr=1e-2 * seed, scaling="raw")
    for step in range(seed):
        model(normal(4, 8, seed=step)).square().sum().backward()
        optimizer.measure_next_step()
        optimizer.step()
    targets = select_targets(model, ["0"], [])
    return State(model, optimizer, Course(seed), targets, World(), None)


def record(step):
    return StepRecord(step, 0.5 * step, 0.1, 1e-3, 1.0, 0.25, None, 1.0)


def tensors_of(optimizer):
    return {
        (index, key): value
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


@pytest.fixture
def saved(tmp_path):
    state, history = made(3), History([record(1), record(2), record(3)])
    with RunState(tmp_path / "o") as run:
        save(run, state, history, 3, 12.5)
        yield run.load(3, PARTS), state, history


def test_a_run_goes_on_with_everything_that_was_saved(saved):
    found, before, history = saved
    assert history.saved == 3
    after = made(1)
    later = History([record(9)], exponents_before={"alpha": 0.0})
    restore(found, after, later)
    ours, theirs = own_tensors(after.model), own_tensors(before.model)
    assert ours.keys() == theirs.keys()
    assert {"1.running_mean", "0.weight"} <= ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = tensors_of(after.optimizer), tensors_of(before.optimizer)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 6 * 3
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    groups = [one.state_dict()["param_groups"] for one in (after.optimizer, before.optimizer)]
    assert json.loads(json.dumps(groups[0])) == json.loads(json.dumps(groups[1]))
    assert after.course.held.keys() == before.course.held.keys()
    assert all(torch.equal(after.course.held[key], before.course.held[key])
               for key in after.course.held)  # fmt: skip
    assert later.records == history.records
    assert later.seconds_before == 12.5
    told = history.exponents(before.optimizer)
    assert told["alpha"] == 200.0
    assert later.exponents_before == told


def test_a_step_that_fp16_skipped_is_saved_like_others(tmp_path):
    state, history = made(3), History([record(1), replace(record(2), grad_norm=math.inf)])
    with RunState(tmp_path / "o") as run:
        save(run, state, history, 2, 1.0)
        later = History()
        restore(run.load(2, PARTS), made(1), later)
    assert later.records == history.records


def test_the_scale_of_fp16_gradients_goes_on(tmp_path):
    scalers = [torch.amp.GradScaler("cpu", init_scale=size) for size in (1024.0, 65536.0)]
    before, after = (replace(made(1), scaler=scaler) for scaler in scalers)
    with RunState(tmp_path / "o") as run:
        save(run, before, History([record(1)]), 1, 1.0)
        restore(run.load(1, PARTS), after, History())
    assert scalers[1].get_scale() == 1024.0
    assert scalers[1].state_dict() == scalers[0].state_dict()


def test_the_last_measured_step_is_told_here_or_from_before():
    history, state = History(exponents_before={"alpha": 1.0}), made(1)
    assert history.exponents(state.optimizer)["alpha"] == 200.0
    fresh = HAM(state.model.parameters())
    assert history.exponents(fresh) == {"alpha": 1.0}
    assert History().exponents(fresh) is None


@pytest.mark.parametrize("part", ["model", "optimizer", "sparsifier"])
def test_a_tensor_that_is_missing_is_refused(part, saved, tmp_path):
    found, _, _ = saved
    after = made(1)
    values = {**found.values, "tensors": {**found.values["tensors"]}}
    if part == "model":
        after = State(
            nn.Sequential(*after.model, nn.Linear(2, 2)), after.optimizer, after.course,
            after.targets, after.world, None,
        )  # fmt: skip
    else:
        values["tensors"][part] = [*values["tensors"][part], "7.more"]
    with pytest.raises(NoRunCheckpoint, match="E804"):
        restore(type(found)(found.step, found.folder, found.parts, values), after, History())


class Two(World):
    """Two processes that hold the same, or not."""

    def __init__(self, kind, difference):
        super().__init__(0, 1, kind)
        self.difference = difference

    def gather(self, counts):
        import numpy as np

        return np.array([counts, [count + self.difference for count in counts]])


@pytest.mark.parametrize(
    ("kind", "difference", "is_refused"), [("ddp", 1, True), ("ddp", 0, False), ("none", 1, False)]
)
def test_processes_with_other_weights_save_nothing(kind, difference, is_refused, tmp_path):
    alone = made(1)
    state = State(
        alone.model, alone.optimizer, alone.course, alone.targets, Two(kind, difference), None
    )
    with RunState(tmp_path / "o") as run:
        if is_refused:
            with pytest.raises(ResourceError, match=r"E546.*step 2"):
                save(run, state, History(), 2, 0.0)
            assert run.checkpoints.steps() == []
        else:
            save(run, state, History(), 2, 0.0)
            assert run.checkpoints.steps() == [2]

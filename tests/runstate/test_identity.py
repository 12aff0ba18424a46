import json
from pathlib import Path

import pytest

from hamcli.errors import NoRunCheckpoint, ResourceError
from hamcli.runstate import RunState, installed_versions
from hamcli.runstate.identity import differences, warnings
from tests.runstate import pico


def saved_run(out):
    with RunState(out) as run:
        run.begin(pico.identity())
        run.save(1, pico.tensors(1), pico.values(1))
    return run


def recipe(**changes):
    known = pico.identity().recipe
    return {**known, "training": {**known["training"], **changes}}


OTHERS = {
    "recipe value": ({"recipe": recipe(steps=40)}, "training.steps: 3 (saved) | 40 (now)"),
    "recipe key gone": (
        {"recipe": {"training": recipe()["training"]}},
        "optimizer.lr: 0.0001 (saved) | - (now)",
    ),
    "model": (
        {"model": {"model.safetensors": "cc"}},
        "model.model.safetensors: aa (saved) | cc (now)",
    ),
    "one more model file": (
        {"model": {"model.safetensors": "aa", "config.json": "dd"}},
        "model.config.json: - (saved) | dd (now)",
    ),
    "data": ({"data": {"train.txt": "cc"}}, "data.train.txt: bb (saved) | cc (now)"),
    "seed": ({"seed": 1}, "seed: 0 (saved) | 1 (now)"),
}


@pytest.mark.parametrize(("changes", "columns"), OTHERS.values(), ids=OTHERS)
def test_another_recipe_model_or_data_is_refused_with_two_columns(tmp_path, changes, columns):
    run = saved_run(tmp_path / "o")
    before = pico.contents(run.folder / "checkpoints")
    record = (run.folder / "run.json").read_bytes()
    with RunState(tmp_path / "o", resume=True) as again:
        with pytest.raises(NoRunCheckpoint) as caught:
            again.begin(pico.identity(**changes))
        assert caught.value.code == "E803"
        assert caught.value.exit_code == 8
        assert columns in caught.value.hints
        assert columns in (run.folder / "ham.log").read_text()
    assert pico.contents(run.folder / "checkpoints") == before
    assert (run.folder / "run.json").read_bytes() == record


def test_many_differences_stay_one_line_and_all_stand_in_the_log(tmp_path):
    run = saved_run(tmp_path / "o")
    changed = pico.identity(recipe=recipe(steps=40, batch_size=8), seed=3, data={})
    again = RunState(tmp_path / "o", resume=True)
    with again, pytest.raises(NoRunCheckpoint) as caught:
        again.begin(changed)
    assert "training.batch_size, training.steps and 2 more changed" in caught.value.line()
    assert len(caught.value.hints) == 3
    log = (run.folder / "ham.log").read_text()
    assert all(key in log for key in ("training.steps", "seed", "data.train.txt", "batch_size"))


def test_long_values_that_differ_only_at_their_end_are_seen():
    long = "x" * 500
    found = differences(
        pico.identity(recipe={"a": long + "1"}), pico.identity(recipe={"a": long + "2"})
    )
    assert [one.key for one in found] == ["a"]
    assert len(str(found[0])) < 200


SOFT = {
    "version": ({"versions": {"python": "3.11.0", "torch": "2.14.0"}}, "versions.torch"),
    "package gone": ({"versions": {"python": "3.11.0"}}, "versions.torch"),
    "threads": ({"threads": 4}, "threads"),
    "device": ({"device": "cuda:0"}, "device"),
    "processes": ({"num_processes": 2}, "num_processes"),
}


@pytest.mark.parametrize(("changes", "key"), SOFT.values(), ids=SOFT)
def test_another_version_thread_or_device_count_is_a_warning_and_recorded(tmp_path, changes, key):
    run = saved_run(tmp_path / "o")
    with RunState(tmp_path / "o", resume=True) as again:
        notes = again.begin(pico.identity(**changes))
        assert len(notes) == 1
        assert notes[0].startswith(key)
        assert again.newest_valid()[0].step == 1
    sessions = json.loads((run.folder / "run.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[0] != sessions[1]
    with RunState(tmp_path / "o", resume=True) as third:
        assert third.begin(pico.identity(**changes)) == ()


def test_another_device_in_the_recipe_is_no_other_run():
    now = pico.identity(recipe=recipe(device="cuda"), device="cuda:0")
    assert differences(pico.identity(), now) == []
    assert len(warnings(pico.identity(), now)) == 1


@pytest.mark.parametrize(
    "changes", [{"parallel": "ddp"}, {"trackers": ["tensorboard"]}, {"device": "cuda"}], ids=str
)
def test_places_and_watchers_in_the_recipe_are_no_other_run(changes):
    assert differences(pico.identity(), pico.identity(recipe=recipe(**changes))) == []
    assert differences(pico.identity(), pico.identity(recipe={"training": changes})) != []


def test_a_record_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    saved_run(tmp_path / "o")

    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    with RunState(tmp_path / "o", resume=True) as again:
        monkeypatch.setattr(Path, "read_bytes", forbidden)
        with pytest.raises(ResourceError, match=r"E502.*run\.json"):
            again.begin(pico.identity())
        monkeypatch.undo()


def test_the_same_run_has_no_differences_and_no_warnings(tmp_path):
    saved_run(tmp_path / "o")
    with RunState(tmp_path / "o", resume=True) as again:
        assert again.begin(pico.identity()) == ()


def test_tuples_of_the_recipe_are_the_lists_that_were_saved(tmp_path):
    with RunState(tmp_path / "o") as run:
        run.begin(pico.identity(recipe={"betas": (0.9, 0.999)}))
        run.save(1, {}, {})
    with RunState(tmp_path / "o", resume=True) as again:
        assert again.begin(pico.identity(recipe={"betas": (0.9, 0.999)})) == ()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"identity": {}, "sessions": []}'])
def test_checkpoints_without_a_readable_record_are_refused(tmp_path, content):
    run = saved_run(tmp_path / "o")
    record = run.folder / "run.json"
    record.unlink()
    if content is not None:
        record.write_text(content)
    with (
        RunState(tmp_path / "o", resume=True) as again,
        pytest.raises(NoRunCheckpoint, match="E806"),
    ):
        again.begin(pico.identity())
    assert again.checkpoints.steps() == [1]


def test_versions_are_those_of_what_is_installed():
    import torch

    assert installed_versions()["torch"] == torch.__version__
    assert "python" in installed_versions()

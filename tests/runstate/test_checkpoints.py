import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hamcli.errors import Diverged, NoRunCheckpoint, OutputLocked, ResourceError
from hamcli.runstate import RunState
from tests.runstate import pico


@pytest.fixture
def run(tmp_path):
    with RunState(tmp_path / "o") as state:
        state.begin(pico.identity())
        yield state


def save(run, *steps):
    for step in steps:
        run.save(step, pico.tensors(step), pico.values(step))


def fresh(run):
    """The same folder as another process would see it after the first one died."""
    run.close()
    return RunState(run.out, resume=True)


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5,), (3, 5, 2)], ids=str)
def test_a_tensor_comes_back_bit_for_bit(run, dtype, shape):
    tensor = (torch.arange(torch.Size(shape).numel()).reshape(shape) % 7).to(dtype)
    run.save(1, {"state": {"x": tensor}}, {})
    back = run.load(1).tensors("state")["x"]
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_views_and_negative_zero_come_back_bit_for_bit(run):
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    base[0, 0] = -0.0
    run.save(1, {"state": {"t": base.T, "column": base[:, 3], "all": base}}, {})
    back = run.load(1).tensors("state")
    assert torch.equal(back["t"].view(torch.int32), base.T.contiguous().view(torch.int32))
    assert torch.equal(back["column"], base[:, 3])
    assert torch.signbit(back["all"][0, 0])


def test_loaded_tensors_may_be_changed_without_changing_the_checkpoint(run):
    save(run, 1)
    run.load(1).tensors("model")["weight"].zero_()
    assert run.load(1).tensors("model")["weight"].any()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_loaded_tensors_hold_no_file(run):
    save(run, 1)
    held = run.load(1).tensors("model")
    assert held
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()


def test_values_come_back_equal(run):
    given = {"f": [0.1, 1e-300, -0.0], "i": 2**70, "n": None, "text": "é\n", "nested": {"a": [1]}}
    run.save(1, {}, given)
    back = run.load(1).values
    assert back == given
    assert str(back["f"][2]) == "-0.0"


def test_the_file_is_a_plain_safetensors_file_with_one_metadata_key(run):
    path = run.save(1, pico.tensors(1), {}) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {"weight", "half"}


def test_the_bytes_do_not_depend_on_the_order_of_names(tmp_path):
    stems = pico.tensors(2)
    turned = {stem: dict(reversed(stems[stem].items())) for stem in reversed(stems)}
    found = []
    for name, given in (("a", stems), ("b", turned)):
        with RunState(tmp_path / name) as run:
            path = run.save(2, given, dict(reversed(pico.values(2).items())))
            found.append(pico.contents(path))
    assert found[0] == found[1]


def test_wide_tensors_come_first_so_that_each_is_aligned(run):
    path = run.save(1, {"s": {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(2)}}, {})
    raw = (path / "s.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["b"]["data_offsets"] == [0, 8]
    assert header["a"]["data_offsets"] == [8, 11]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_tensor_is_refused_by_name_and_nothing_is_left(run, bad, dtype):
    save(run, 1)
    broken = pico.tensors(2)
    broken["model"]["weight"] = torch.tensor([1.0, bad]).to(dtype)
    with pytest.raises(Diverged, match=r"HAM-E702.*model: weight"):
        run.save(2, broken, {})
    assert pico.sound_steps(run.folder) == ([1], [])
    assert not list(run.folder.glob(".stage-*"))


def test_a_non_finite_value_is_refused_by_its_key(run):
    with pytest.raises(Diverged, match=r"values\.best\[1\]"):
        run.save(1, {}, {"best": [1.0, float("nan")]})
    assert run.checkpoints.steps() == []


def test_the_newest_two_stay(run):
    save(run, 5, 10, 15, 20)
    assert run.checkpoints.steps() == [15, 20]


def test_a_step_saved_twice_is_one_checkpoint_and_not_written_again(run):
    save(run, 7)
    before = (run.checkpoints.path(7) / "MANIFEST.json").stat()
    save(run, 7)
    assert (run.checkpoints.path(7) / "MANIFEST.json").stat().st_ino == before.st_ino
    assert run.checkpoints.steps() == [7]


def test_a_step_that_was_resumed_from_is_not_written_again(run):
    save(run, 1, 2)
    with fresh(run) as again:
        again.newest_valid()
        inode = again.checkpoints.path(2).stat().st_ino
        save(again, 2)
        assert again.checkpoints.path(2).stat().st_ino == inode


def test_after_a_resume_old_checkpoints_go_only_when_two_are_known_to_be_sound(run):
    save(run, 1, 2)
    with fresh(run) as again:
        again.newest_valid()
        (again.checkpoints.path(1) / "values.json").write_text("{}")
        save(again, 3)
        assert again.checkpoints.steps() == [2, 3]


def test_checkpoints_that_nobody_has_read_do_not_make_room_for_one_new(run):
    save(run, 1, 2)
    with fresh(run) as again:
        save(again, 3)
        assert again.checkpoints.steps() == [1, 2, 3]


FILES = ("model.safetensors", "masks.safetensors", "values.json", "MANIFEST.json")


def cut_to(part):
    def damage(path: Path):
        size = {"0": 0, "1": 1, "half": path.stat().st_size // 2, "size-1": path.stat().st_size - 1}
        os.truncate(path, size[part])

    return damage


def flip(where):
    def damage(path: Path):
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1 << 5
        path.write_bytes(data)

    return damage


def grow(path: Path):
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES = {
    **{f"cut to {part}": cut_to(part) for part in ("0", "1", "half", "size-1")},
    **{f"a bit at {where}": flip(where) for where in (0, 0.3, 0.9, 1)},
    "deleted": Path.unlink,
    "grown": grow,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_is_named_once_and_the_one_before_is_used(run, name, damage):
    save(run, 1, 2)
    damage(run.checkpoints.path(2) / name)
    with fresh(run) as again:
        found, notes = again.newest_valid(["model", "masks", "values.step"])
        assert found.step == 1
        assert torch.equal(found.tensors("model")["weight"], pico.tensors(1)["model"]["weight"])
        assert len(notes) == 1
        assert f"step-00000002/{name}" in notes[0]
        assert "step 1" in notes[0]
        assert again.checkpoints.path(2).exists()


def test_every_single_bit_of_every_file_is_guarded(run):
    """Also of the manifest itself, whose own bytes no hash covers."""
    run.save(1, {"s": {"x": torch.tensor([1.5])}}, {"a": 1})
    folder = run.checkpoints.path(1)
    sound = run.checkpoints.load(1)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for bit in range(len(whole) * 8):
            bent = bytearray(whole)
            bent[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bent)
            with pytest.raises(NoRunCheckpoint, match="E805"):
                run.checkpoints.load(1)
        path.write_bytes(whole)
    assert run.checkpoints.load(1) == sound


def swap(first: Path, second: Path):
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


@pytest.mark.parametrize("name", FILES)
def test_a_file_swapped_with_that_of_another_checkpoint_is_seen(run, name):
    save(run, 1, 2)
    swap(run.checkpoints.path(1) / name, run.checkpoints.path(2) / name)
    with fresh(run) as again, pytest.raises(NoRunCheckpoint, match="E802"):
        again.newest_valid()


def test_two_files_of_one_checkpoint_swapped_are_seen(run):
    save(run, 1, 2)
    folder = run.checkpoints.path(2)
    swap(folder / "model.safetensors", folder / "masks.safetensors")
    with fresh(run) as again:
        assert again.newest_valid()[0].step == 1


def test_two_checkpoints_swapped_are_seen(run):
    save(run, 1, 2)
    swap(run.checkpoints.path(1), run.checkpoints.path(2))
    with fresh(run) as again, pytest.raises(NoRunCheckpoint, match="it is of step 1"):
        again.newest_valid()


def test_with_every_checkpoint_damaged_nothing_is_deleted_and_the_way_out_is_told(run):
    save(run, 1, 2)
    for step in (1, 2):
        os.truncate(run.checkpoints.path(step) / "model.safetensors", 3)
    before = pico.contents(run.folder / "checkpoints")
    with fresh(run) as again:
        with pytest.raises(NoRunCheckpoint) as caught:
            again.newest_valid()
        assert caught.value.exit_code == 8
        assert caught.value.code == "E802"
        assert any("--overwrite" in hint for hint in caught.value.hints)
    assert pico.contents(run.folder / "checkpoints") == before


def test_a_folder_without_a_manifest_is_damaged(run):
    save(run, 1)
    (run.checkpoints.folder / "step-00000009").mkdir()
    found, notes = run.newest_valid()
    assert found.step == 1
    assert "MANIFEST.json: it is missing" in notes[0]


def test_a_damaged_step_is_replaced_when_the_run_reaches_it_again(run):
    save(run, 1, 2)
    os.truncate(run.checkpoints.path(2) / "model.safetensors", 3)
    with fresh(run) as again:
        assert again.newest_valid()[0].step == 1
        save(again, 2)
        found, notes = again.newest_valid()
        assert (found.step, notes) == (2, ())


def test_a_step_that_was_gone_back_behind_is_written_anew(run):
    save(run, 1, 2)
    run.load(1)
    run.save(2, pico.tensors(7), pico.values(2))
    found = run.load(2).tensors("model")["weight"]
    assert torch.equal(found, pico.tensors(7)["model"]["weight"])


def test_damaged_later_checkpoints_go_once_two_sound_ones_are_there(run):
    save(run, 5, 10)
    os.truncate(run.checkpoints.path(10) / "model.safetensors", 3)
    with fresh(run) as again:
        again.newest_valid()
        save(again, 7)
        assert again.checkpoints.steps() == [5, 7]


def test_a_checkpoint_that_another_process_put_there_is_never_overwritten(run):
    save(run, 1)
    shutil.copytree(run.checkpoints.path(1), run.checkpoints.path(2))
    before = pico.contents(run.checkpoints.path(2))
    with pytest.raises(OutputLocked, match="E602"):
        save(run, 2)
    assert pico.contents(run.checkpoints.path(2)) == before


def test_a_save_whose_stage_is_swept_by_another_process_says_so(run, monkeypatch):
    original = os.fsync

    def sweep(handle):
        for stage in run.folder.glob(".stage-*"):
            shutil.rmtree(stage)
        original(handle)

    monkeypatch.setattr(os, "fsync", sweep)
    with pytest.raises(OutputLocked, match="E602"):
        save(run, 1)


@pytest.mark.parametrize("part", ["model", "masks"])
def test_a_part_dropped_from_folder_and_manifest_is_named(run, part):
    save(run, 1, 2)
    folder = run.checkpoints.path(2)
    (folder / f"{part}.safetensors").unlink()
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["files"][f"{part}.safetensors"]
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=2))
    with fresh(run) as again, pytest.raises(NoRunCheckpoint, match=rf"E804.*: {part}") as caught:
        again.newest_valid()
    assert caught.value.exit_code == 8


def test_a_part_that_the_manifest_never_named_is_missing_when_required(run):
    run.save(1, {"model": pico.tensors(1)["model"]}, {"step": 1})
    with pytest.raises(NoRunCheckpoint, match=r"E804.*: masks"):
        run.newest_valid(["model", "masks"])
    with pytest.raises(NoRunCheckpoint, match=r"E804.*: values\.losses"):
        run.newest_valid(["values.losses"])
    with pytest.raises(NoRunCheckpoint, match=r"E804.*: masks"):
        run.load(1).tensors("masks")


def test_a_missing_or_surplus_tensor_is_named(run):
    save(run, 1)
    checkpoint = run.load(1)
    with pytest.raises(NoRunCheckpoint, match=r"E804.*: bias"):
        checkpoint.tensors("model", ["weight", "half", "bias"])
    with pytest.raises(NoRunCheckpoint, match="this run has no half"):
        checkpoint.tensors("model", ["weight"])
    with pytest.raises(NoRunCheckpoint, match="E804"):
        checkpoint.tensors("model", [])


def test_a_link_or_a_pipe_in_a_checkpoint_is_damage_and_does_not_hang(run):
    save(run, 1, 2, 3)
    target = run.checkpoints.path(3) / "model.safetensors"
    target.rename(run.folder / "elsewhere")
    target.symlink_to(run.folder / "elsewhere")
    manifest = run.checkpoints.path(2) / "MANIFEST.json"
    manifest.unlink()
    os.mkfifo(manifest)
    with fresh(run) as again, pytest.raises(NoRunCheckpoint, match="E802"):
        again.newest_valid()


def test_a_manifest_that_leads_outside_is_damage(run):
    save(run, 1)
    manifest = run.checkpoints.path(1) / "MANIFEST.json"
    content = json.loads(manifest.read_text())
    content["files"]["../../run.json"] = {"bytes": 1, "sha256": ""}
    manifest.write_text(json.dumps(content))
    with pytest.raises(NoRunCheckpoint, match="odd file name"):
        run.load(1)


def test_what_cannot_be_read_back_is_not_committed(run, monkeypatch):
    save(run, 1)
    original = os.write

    def lose_a_bit(handle, data):
        bent = bytearray(data)
        bent[-1] ^= 1
        return original(handle, bent)

    monkeypatch.setattr(os, "write", lose_a_bit)
    with pytest.raises(ResourceError, match=r"E503.*does not hold what was written"):
        save(run, 2)
    monkeypatch.undo()
    assert pico.sound_steps(run.folder) == ([1], [])


def test_nothing_to_go_on_from_is_told_or_none(run):
    assert run.newest_valid(must_exist=False) == (None, ())
    with pytest.raises(NoRunCheckpoint, match="E801") as caught:
        run.newest_valid()
    assert caught.value.exit_code == 8

import os
import stat
from pathlib import Path

import pytest

from hamcli.errors import NoRunCheckpoint, OutputLocked, ResourceError, UsageError
from hamcli.runstate import RunState, check_space, disk_errors, finished, remove_leftovers
from tests.runstate import pico


def published(out, **given):
    with RunState(out, **given) as run:
        run.begin(pico.identity())
        run.save(1, pico.tensors(1), pico.values(1))
        stage = run.stage()
        pico.fill(stage)
        notes = run.publish(stage)
        run.finish()
    return notes


def test_a_finished_run_leaves_out_and_nothing_else(tmp_path):
    assert pico.live(tmp_path / "o") == []
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        "model.safetensors",
        "report.json",
    }


def test_while_a_run_is_under_way_its_folder_has_the_promised_layout(tmp_path):
    with RunState(tmp_path / "o") as run:
        run.begin(pico.identity())
        run.save(1, pico.tensors(1), pico.values(1))
        run.stage()
        names = sorted(path.name for path in run.folder.iterdir())
        assert names[0].startswith(".stage-")
        assert names[1:] == ["checkpoints", "ham.log", "lock", "run.json"]
        assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-00000001"]
    assert not list(run.folder.glob(".stage-*"))


def test_keep_run_leaves_the_run_folder(tmp_path):
    with RunState(tmp_path / "o") as run:
        run.save(1, {}, {})
        run.finish(keep_run=True)
    assert run.checkpoints.steps() == [1]


def test_leaving_by_an_exception_finishes_nothing_and_keeps_the_checkpoints(tmp_path):
    def fail():
        with RunState(tmp_path / "o") as run:
            run.begin(pico.identity())
            run.save(1, pico.tensors(1), pico.values(1))
            pico.fill(run.stage())
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        fail()
    assert not (tmp_path / "o").exists()
    assert pico.sound_steps(tmp_path / "o.run") == ([1], [])
    assert not list((tmp_path / "o.run").glob(".stage-*"))


@pytest.mark.parametrize("debug", ["0", "1"])
def test_what_ended_a_run_stands_in_its_log_and_where_if_asked_for(tmp_path, monkeypatch, debug):
    def fail():
        with RunState(tmp_path / "o") as run:
            run.begin(pico.identity())
            raise ResourceError("E501", "disk full", tmp_path)

    monkeypatch.setenv("HAM_DEBUG", debug)
    with pytest.raises(ResourceError):
        fail()
    log = (tmp_path / "o.run" / "ham.log").read_text()
    assert "HAM-E501" in log
    assert ("Traceback" in log) == (debug == "1")


def test_a_run_that_saved_nothing_leaves_only_what_it_logged(tmp_path):
    with RunState(tmp_path / "silent"):
        pass
    with RunState(tmp_path / "spoke") as run:
        run.begin(pico.identity())
        run.stage()
    assert [path.name for path in tmp_path.iterdir()] == ["spoke.run"]
    assert [path.name for path in (tmp_path / "spoke.run").iterdir()] == ["ham.log"]


def test_an_unfinished_run_is_not_dropped_by_accident(tmp_path):
    with RunState(tmp_path / "o") as run:
        run.begin(pico.identity())
        run.save(7, pico.tensors(7), {})
    with pytest.raises(UsageError, match=r"E113.*step 7") as caught:
        RunState(tmp_path / "o")
    assert caught.value.exit_code == 2
    assert run.checkpoints.steps() == [7]


def test_overwrite_without_resume_starts_over_and_drops_the_old_checkpoints(tmp_path):
    with RunState(tmp_path / "o") as run:
        run.begin(pico.identity())
        run.save(7, pico.tensors(7), {})
    with RunState(tmp_path / "o", overwrite=True) as again:
        assert again.checkpoints.steps() == [7]  # not before the run begins
        again.begin(pico.identity(seed=5))
        with pytest.raises(NoRunCheckpoint, match="E801"):
            again.newest_valid()


def test_a_foreign_run_folder_is_left_alone(tmp_path):
    folder = tmp_path / "o.run"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("mine")
    (folder / ".stage-x").mkdir()
    with pytest.raises(UsageError, match="E114"):
        RunState(tmp_path / "o", overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"holiday.jpg", ".stage-x"}


def test_an_empty_run_folder_is_used(tmp_path):
    (tmp_path / "o.run").mkdir()
    RunState(tmp_path / "o").close()


def test_what_is_not_ours_in_the_run_folder_outlives_the_run(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("mine")
    with RunState(tmp_path / "o") as run:
        run.begin(pico.identity())
        run.save(1, pico.tensors(1), pico.values(1))
    (run.folder / ".stage-x").mkdir()
    (run.folder / "notes.txt").write_text("mine")
    (run.folder / f".stage-{'a' * 32}").symlink_to(outside)
    (run.folder / "checkpoints" / "mine").mkdir()
    assert pico.live(tmp_path / "o") == []
    assert (tmp_path / "o" / "report.json").exists()
    left = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")}
    assert left == {
        ".stage-x",
        "notes.txt",
        f".stage-{'a' * 32}",
        "checkpoints",
        "checkpoints/mine",
    }
    assert (outside / "keep").exists()


def test_own_stages_of_a_killed_run_are_swept_by_the_next(tmp_path):
    run = RunState(tmp_path / "o")
    run.save(1, {}, {})
    stage = run.stage()
    (stage / "half").write_text("x")
    run._lock.release()  # as the kernel does
    RunState(tmp_path / "o", resume=True).close()
    assert not stage.exists()


# ---- publish ----


def test_an_old_folder_of_ham_is_replaced_and_gone(tmp_path):
    out = tmp_path / "o"
    out.mkdir()
    pico.fill(out, content="old")
    (out / "extra").write_text("x")
    assert published(out, overwrite=True) == ()
    assert (out / "model.safetensors").read_text() == "weights"
    assert not (out / "extra").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_a_foreign_folder_is_replaced_but_never_emptied(tmp_path):
    out, elsewhere = tmp_path / "o", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").write_text("mine too")
    (out / "photo.jpg").write_text("mine")
    (out / "report.json").write_text('{"of": "another program"}')
    (out / "model").symlink_to(elsewhere)
    notes = published(out, overwrite=True)
    assert "kept" in notes[0]
    (kept,) = (tmp_path / "o.run").iterdir()
    assert (kept / "photo.jpg").read_text() == "mine"
    assert (elsewhere / "model.safetensors").exists()
    assert not (out / "photo.jpg").exists()
    assert published(out, overwrite=True) == ()
    assert (kept / "photo.jpg").read_text() == "mine"


def test_an_empty_out_is_used_without_overwrite(tmp_path):
    (tmp_path / "o").mkdir()
    published(tmp_path / "o")
    assert (tmp_path / "o" / "report.json").exists()


def test_an_out_that_appeared_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "o"
    with RunState(out) as run:
        run.save(1, {}, {})
        stage = run.stage()
        pico.fill(stage)
        out.mkdir()
        (out / "other").write_text("theirs")
        with pytest.raises(OutputLocked, match="E602"):
            run.publish(stage)
    assert pico.contents(out) == {"other": b"theirs"}
    assert run.checkpoints.steps() == [1]


def test_when_the_rename_fails_the_old_folder_is_back(tmp_path, monkeypatch):
    out = tmp_path / "o"
    out.mkdir()
    pico.fill(out, content="old")
    original = Path.rename

    def fail(self, target):
        if self.name.startswith(".stage-") and Path(target) == out:
            raise OSError(5, "Input/output error")
        return original(self, target)

    with RunState(out, overwrite=True) as run:
        stage = run.stage()
        pico.fill(stage)
        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(ResourceError, match="E503"):
            run.publish(stage)
    assert (out / "model.safetensors").read_text() == "old"


def test_an_old_folder_set_aside_by_a_killed_run_comes_back(tmp_path):
    out = tmp_path / "o"
    pico.die_with_old_aside(out)
    assert not out.exists()
    with pytest.raises(UsageError, match="E112"):
        RunState(out)
    assert (out / "model.safetensors").read_text() == "old"


def test_a_link_in_the_stage_is_a_bug_and_is_not_published(tmp_path):
    with RunState(tmp_path / "o") as run:
        stage = run.stage()
        (stage / "x").symlink_to(tmp_path)
        with pytest.raises(AssertionError):
            run.publish(stage)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with RunState(tmp_path / "o") as run:
            run.begin(pico.identity())
            run.save(1, pico.tensors(1), pico.values(1))
            stage = run.stage()
            pico.fill(stage)
            (stage / "1_Pooling").mkdir(mode=0o700)
            (stage / "1_Pooling" / "config.json").touch(mode=0o600)
            (stage / "model.safetensors").chmod(0o600)
            run.publish(stage)
            run.finish(keep_run=True)
    finally:
        os.umask(before)
    for path in [
        p for top in ("o", "o.run") for p in [tmp_path / top, *(tmp_path / top).rglob("*")]
    ]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~mask, path


# ---- already complete ----


def test_a_finished_folder_tells_what_it_was_made_from(tmp_path):
    published(tmp_path / "o")
    found = finished(tmp_path / "o")
    assert found.is_of(pico.identity())
    assert found.is_of(pico.identity(threads=9))
    assert not found.is_of(pico.identity(recipe={}))
    assert not found.is_of(pico.identity(model={}))


@pytest.mark.parametrize("spoil", ["gone", "cut", "grown", "no report", "bad report", "not ham's"])
def test_a_folder_that_is_not_whole_is_not_finished(tmp_path, spoil):
    out = tmp_path / "o"
    published(out)
    if spoil == "gone":
        (out / "model.safetensors").unlink()
    elif spoil == "cut":
        os.truncate(out / "model.safetensors", 3)
    elif spoil == "grown":
        os.truncate(out / "model.safetensors", 30)
    elif spoil == "no report":
        (out / "report.json").unlink()
    else:
        (out / "report.json").write_text("{" if spoil == "bad report" else '{"a": 1}')
    assert finished(out) is None


def test_there_is_nothing_finished_where_there_is_nothing(tmp_path):
    assert finished(tmp_path / "o") is None


def test_running_again_on_a_finished_folder_changes_nothing(tmp_path):
    out = tmp_path / "o"
    pico.live(out)
    before = {path: path.stat() for path in [out, *out.rglob("*")]}
    pico.live(out)
    assert {path: path.stat() for path in [out, *out.rglob("*")]} == before


def test_leftovers_of_a_run_killed_at_its_end_are_removed(tmp_path):
    out = tmp_path / "o"
    with RunState(out) as run:
        run.begin(pico.identity())
        run.save(1, pico.tensors(1), pico.values(1))
        stage = run.stage()
        pico.fill(stage)
        run.publish(stage)
        run._lock.release()
        run._lock = None
    assert (tmp_path / "o.run").exists()
    remove_leftovers(out)
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    remove_leftovers(out)


# ---- space and log ----


def test_too_little_space_is_told_in_mib_before_anything_is_written(tmp_path):
    with pytest.raises(ResourceError) as caught:
        check_space(tmp_path / "not" / "there", 2**60 + 1)
    assert caught.value.code == "E504"
    assert caught.value.exit_code == 5
    assert f"{2**40 + 1} MiB needed" in caught.value.line()
    assert "MiB free" in caught.value.line()
    assert str(tmp_path) in caught.value.line()
    check_space(tmp_path, 1)


def test_the_need_counts_kept_and_new_checkpoints_and_the_model(tmp_path, monkeypatch):
    from hamcli.runstate import disk

    monkeypatch.setattr(disk, "free_bytes", lambda _: 3 * 1000 + 50)
    with RunState(tmp_path / "o") as run:
        run.check_space(1000, 50)
        with pytest.raises(ResourceError, match="E504"):
            run.check_space(1000, 51)
        run.save(1, pico.tensors(1), {})
        run.check_space(1000, 51)


def test_the_log_is_appended_to_and_holds_no_control_characters(tmp_path):
    with RunState(tmp_path / "o") as run:
        run.save(1, {}, {})
        run.log("first \x1b[31mred\nand second")
    with RunState(tmp_path / "o", resume=True) as run:
        run.log("third")
    lines = (run.folder / "ham.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "saved step 1",
        r"first \x1b[31mred",
        "and second",
        "third",
    ]


def test_a_log_that_cannot_be_written_is_no_failure(tmp_path):
    with RunState(tmp_path / "o") as run:
        (run.folder / "ham.log").mkdir()
        run.log("lost")
        run.save(1, {}, {})


def test_errors_of_the_disk_are_told_in_one_form(tmp_path):
    from safetensors import SafetensorError

    for error, code in [
        (OSError(28, "No space left on device"), "E501"),
        (OSError(122, "Disk quota exceeded"), "E501"),
        (OSError(27, "File too large"), "E501"),
        (PermissionError(13, "Permission denied"), "E502"),
        (OSError(30, "Read-only file system"), "E502"),
        (OSError(5, "Input/output error"), "E503"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "E501"),
        (SafetensorError("I/O error: Input/output error (os error 5)"), "E503"),
    ]:
        with pytest.raises(ResourceError) as caught, disk_errors("cannot write", tmp_path):
            raise error
        assert caught.value.code == code
        assert caught.value.exit_code == 5


def test_other_errors_pass_through(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(SafetensorError), disk_errors("cannot write", tmp_path):
        raise SafetensorError("invalid header")
    with pytest.raises(KeyError), disk_errors("cannot write", tmp_path):
        raise KeyError("x")
    with pytest.raises(UsageError), disk_errors("cannot write", tmp_path):
        raise UsageError("E100", "x")


def test_the_package_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, hamcli.runstate, hamcli.signals;"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"

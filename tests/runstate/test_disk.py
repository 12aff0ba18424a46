"""What is written is what was handed in, and durable before it has its name."""

import hashlib
import os
import stat
from pathlib import Path

import pytest

from hamcli.errors import OutputLocked, ResourceError
from hamcli.runstate import RunState, check_space, disk
from hamcli.runstate.disk import read_back, rename_new, umask, write_file
from tests.runstate import pico


@pytest.mark.parametrize("lengths", [(), (0,), (3, 20, 2), (8, 8, 8), (7, 1, 1), (20, 1, 9, 30, 2)])
def test_a_file_is_its_chunks_one_after_the_other(lengths, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_CHUNK", 8)
    whole, taken = os.write, []

    def some(handle, piece):  # a disk may take less than it is given
        taken.append(len(piece))
        return whole(handle, piece[:5])

    monkeypatch.setattr(os, "write", some)
    text = bytes(range(256))
    chunks = [text[place * 40 : place * 40 + size] for place, size in enumerate(lengths)]
    content = b"".join(chunks)
    found = write_file(tmp_path / "file", map(memoryview, chunks))
    assert found == (len(content), hashlib.sha256(content).hexdigest())
    assert found == read_back(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert max(taken, default=0) <= 8  # memory is that of a chunk


def test_small_chunks_are_written_together(tmp_path, monkeypatch):
    calls, whole = [], os.write
    monkeypatch.setattr(os, "write", lambda to, piece: calls.append(1) or whole(to, piece))
    write_file(tmp_path / "file", [b"x"] * 100)
    assert len(calls) == 1


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", [b"x"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_is_not_read_back(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError, match=r"link|symbolic"):
        read_back(tmp_path / "link")


def test_a_folder_that_is_there_is_not_renamed_onto(tmp_path):
    for name in ("stage", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OutputLocked, match="E602"):
        rename_new(tmp_path / "stage", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "final"


def test_space_that_is_just_enough_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda _: 2**20)
    check_space(tmp_path, 2**20)
    with pytest.raises(ResourceError, match=r"E504.*2 MiB needed, 1 MiB free"):
        check_space(tmp_path, 2**20 + 1)


def test_asking_for_the_umask_changes_nothing():
    before = os.umask(0o027)
    try:
        assert umask() == 0o027
        assert umask() == 0o027
    finally:
        os.umask(before)


def test_a_group_that_is_inherited_stays(tmp_path):
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o2775)
    with RunState(place / "o") as run:
        stage = run.stage()
        if not stage.stat().st_mode & stat.S_ISGID:
            pytest.skip("this file system does not hand groups on")
        pico.fill(stage)
        run.publish(stage)
        run.finish()
    assert (place / "o").stat().st_mode & stat.S_ISGID


# ---- order ----


@pytest.fixture
def order(monkeypatch):
    """What is synced and renamed, in order: ("sync", path) and ("rename", old, new)."""
    done = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_sync(handle):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def noting(change):
        def change_and_note(old, new, **how):
            done.append(("rename", Path(old), Path(new)))
            change(old, new, **how)

        return change_and_note

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", noting(rename))
    monkeypatch.setattr(os, "replace", noting(replace))
    if not Path("/proc/self/fd").exists():
        pytest.skip("reads /proc")
    return done


def assert_durable(order, final, names, *, old_stays=True):
    """All below `final` was synced before it got its name, which was synced after."""
    place = next(i for i, one in enumerate(order) if one[0] == "rename" and one[2] == final)
    stage = order[place][1]
    before = {one[1] for one in order[:place] if one[0] == "sync"}
    assert {stage / name for name in names} <= before
    assert ("sync", final.parent) in order[place:]
    if old_stays and stage.parent != final.parent:
        assert ("sync", stage.parent) in order[place:]


def test_a_checkpoint_is_durable_before_it_has_its_name(tmp_path, order):
    with RunState(tmp_path / "o") as run:
        assert ("sync", tmp_path) in order  # the run folder's own name
        run.begin(pico.identity())
        # the folder that it comes from is removed at once
        assert_durable(order, run.folder / "run.json", [""], old_stays=False)
        order.clear()
        final = run.save(1, pico.tensors(1), pico.values(1))
        assert_durable(order, final, [".", *(path.name for path in final.iterdir())])
        assert ("sync", run.folder) in order  # the name of the folder of checkpoints
        assert order.index(("sync", run.folder)) < [one[0] for one in order].index("rename")


def test_a_finished_folder_is_durable_before_the_old_one_goes(tmp_path, order):
    out = tmp_path / "o"
    out.mkdir()
    pico.fill(out, content="old")
    with RunState(out, overwrite=True) as run:
        stage = run.stage()
        pico.fill(stage)
        (stage / "inner").mkdir()
        (stage / "inner" / "file").write_text("x")
        names = [path.relative_to(stage).as_posix() for path in stage.rglob("*")]
        order.clear()
        run.publish(stage)
        assert_durable(order, out, [".", *names])
        # aside, durably, before the new one takes the name
        kinds = [one[0] for one in order]
        aside = next(i for i, one in enumerate(order) if one[0] == "rename" and one[1] == out)
        assert order[aside + 1] == ("sync", run.folder)
        assert order[aside + 2][:2] == ("rename", stage)
        # and out of sight in one rename, after that
        assert kinds[aside + 3 :] == ["sync", "sync", "rename"]
        assert order[-1][1].name.startswith(".old-")
        assert order[-1][2].name.startswith(".stage-")
        run.finish()


def test_what_a_killed_run_set_aside_is_durably_back(tmp_path, order):
    out = tmp_path / "o"
    pico.die_with_old_aside(out)
    order.clear()
    RunState(out, overwrite=True).close()
    place = next(i for i, one in enumerate(order) if one[0] == "rename" and one[2] == out)
    assert order[place + 1] == ("sync", tmp_path)

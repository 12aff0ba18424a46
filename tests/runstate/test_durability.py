"""What lies on the disk when it counts: truly full disks, and small ones."""

import os
import resource
import subprocess

import pytest

from hamcli.errors import ResourceError
from hamcli.runstate import RunState
from tests.runstate import pico


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def big(step, megabytes):
    import torch

    return {"model": {"w": torch.full((int(megabytes * 2**18),), float(step))}}


def test_a_disk_that_fills_up_midway_costs_the_new_checkpoint_only(small_disk):
    with RunState(small_disk / "o") as run:
        run.begin(pico.identity())
        run.save(1, big(1, 0.25), {})
        run.save(2, big(2, 0.25), {})
        (small_disk / "eaten").write_bytes(b"x" * 2**18)
        with pytest.raises(ResourceError) as caught:
            run.save(3, big(3, 0.25), {})
        assert caught.value.code == "E501"
        assert caught.value.exit_code == 5
        assert "No space left on device" in caught.value.line()
        assert str(run.checkpoints.path(3)) in caught.value.line()
        assert not list(run.folder.glob(".stage-*"))
        (small_disk / "eaten").unlink()
        run.save(3, big(3, 0.25), {})
        assert run.checkpoints.steps() == [2, 3]
    with RunState(small_disk / "o", resume=True) as again:
        again.begin(pico.identity())
        found, notes = again.newest_valid(["model"])
        assert (found.step, notes) == (3, ())
        assert bool((found.tensors("model")["w"] == 3).all())


def test_a_run_can_end_on_a_full_disk(small_disk):
    """Removing needs no space; what was saved before is whole."""
    with RunState(small_disk / "o") as run:
        run.begin(pico.identity())
        run.save(1, big(1, 0.25), {})
        run.save(2, big(2, 0.25), {})
        stage = run.stage()
        pico.fill(stage)
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "eaten").write_bytes(b"x" * 2**21)
        run.publish(stage)
        run.finish()
    assert {path.name for path in small_disk.iterdir()} == {"o", "eaten"}


def test_a_disk_too_small_for_the_run_is_told_before_it_begins(small_disk):
    with RunState(small_disk / "o") as run:
        run.begin(pico.identity())
        with pytest.raises(ResourceError, match="E504") as caught:
            run.check_space(2**20, 2**20)
        assert "4 MiB needed" in caught.value.line()
    assert [path.name for path in (small_disk / "o.run").iterdir()] == ["ham.log"]


def test_a_limit_on_file_size_is_told_like_a_full_disk(tmp_path):
    with RunState(tmp_path / "o") as run:
        run.begin(pico.identity())
        run.save(1, pico.tensors(1), {})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        try:
            with pytest.raises(ResourceError, match=r"E501.*File too large"):
                run.save(2, big(2, 1), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert pico.sound_steps(run.folder) == ([1], [])
        assert not list(run.folder.glob(".stage-*"))


def test_a_read_only_disk_is_code_5(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ResourceError, match="E502"):
        RunState(small_disk / "o")

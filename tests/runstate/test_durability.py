"""What lies on the disk when it counts: the order of fsync and rename, and truly full disks."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hamcli.errors import ResourceError
from hamcli.runstate import RunState
from tests.runstate import pico

ROOT = Path(__file__).parents[2]

TWO_LIVES = """
import os, sys
from pathlib import Path
from hamcli.runstate import checkpoints
from tests.runstate import fault_server, pico
checkpoints.write_tensors = fault_server.write_bytes
pico.live(Path(sys.argv[1]) / "sound" / "o", tensors_at=fault_server.bytes_at)
os.fsync = lambda handle: None
pico.live(Path(sys.argv[1]) / "mutant" / "o", tensors_at=fault_server.bytes_at)
"""

CALL = re.compile(r"^(?:\[?\w* ?\d*\]? *)?(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
WRITES = {"write", "pwrite64", "writev", "ftruncate"}


class Audit:
    """LevelDB's rule: what is renamed into place was synced after its last write, names too."""

    def __init__(self, below: Path) -> None:
        self.below = str(below)
        self.dirty: set[str] = set()  # files with bytes, folders with names, not synced yet
        self.unsettled: set[str] = set()  # folders that got a committed name, not synced yet
        self.faults: list[str] = []
        self.commits: list[str] = []

    def read(self, line: str) -> None:
        found = CALL.match(line)
        if not found or int(found[3]) < 0:
            return
        call, text = found[1], found[2]
        named = [one for one in re.findall(r'"([^"]*)"', text) if one.startswith(self.below)]
        handle = re.match(r"\d+<([^>]*)>", text)
        if call in WRITES and handle and handle[1].startswith(self.below):
            self.dirty.add(handle[1])
        elif call == "fsync" and handle:
            self.dirty.discard(handle[1])
            self.unsettled.discard(handle[1])
        elif call in ("mkdir", "openat") and named and ("O_CREAT" in text or call == "mkdir"):
            self.dirty |= {named[0], str(Path(named[0]).parent)}
        elif call in ("rename", "renameat", "renameat2") and len(named) == 2:
            self.rename(*named)

    def rename(self, old: str, new: str) -> None:
        below_old = {path for path in self.dirty if path == old or path.startswith(old + "/")}
        if ".stage-" not in new:  # what is on its way out needs no sync
            self.settle()
            self.commits.append(new)
            self.faults += [f"{path} not synced before it became {new}" for path in below_old]
            self.unsettled.add(str(Path(new).parent))
        self.dirty -= below_old

    def settle(self) -> None:
        """A commit must be durable before the next one, and in the end."""
        self.faults += [f"{path} not synced after a rename" for path in self.unsettled]
        self.unsettled.clear()


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_everything_is_synced_before_its_rename_and_its_name_after(tmp_path):
    for name in ("sound", "mutant"):
        (tmp_path / name).mkdir()
    trace = tmp_path / "trace"
    calls = "openat,write,pwrite64,writev,ftruncate,fsync,rename,renameat,renameat2,mkdir"
    command = ["strace", "-f", "-y", "-s", "4096", "-o", trace, "-e", f"trace={calls}"]
    command += [sys.executable, "-c", TWO_LIVES, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not trace.exists() or "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    audits = {name: Audit(tmp_path / name) for name in ("sound", "mutant")}
    for line in trace.read_text().splitlines():
        for audit in audits.values():
            audit.read(line)
    for audit in audits.values():
        audit.settle()
    commits = [Path(one).name for one in audits["sound"].commits]
    assert commits == ["run.json", "step-00000001", "step-00000002", "step-00000003", "o"]
    assert audits["sound"].faults == []
    assert len(audits["mutant"].faults) > 10  # the audit sees a run that syncs nothing


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

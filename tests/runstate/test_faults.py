"""A whole run, killed or failed at each call that changes the disk, and gone on with afterwards."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runstate import pico

HERE = Path(__file__).parent
LAST_CALLS = 50  # up to the export a run that replaces another is like one that does not
KILL, ENOSPC, EIO = 0, -28, 5


class Server:
    """The fork server of fault_server.py."""

    def __init__(self, shim: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.runstate.fault_server"],
            cwd=HERE.parents[1],
            env={**os.environ, "LD_PRELOAD": str(shim)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def live(self, out: Path, *, at: int = 10**9, error: int = KILL, **more) -> dict:
        job = {"out": str(out), "at": at, "error": error, **more}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not (compiler := shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler for the fault injector")
    shim = tmp_path_factory.mktemp("shim") / "faults.so"
    source = HERE / "faults.c"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("the fault injector does not build here")
    server = Server(shim)
    yield server
    server.close()


def new_out(tmp_path, number, *, old=False):
    out = tmp_path / str(number) / "o"
    out.parent.mkdir()
    if old:
        out.mkdir()
        pico.fill(out, content="old", recipe={})
    return out


def reference(server, tmp_path, *, old=False):
    """Bytes of the finished folder, and how many calls change the disk on the way."""
    out = new_out(tmp_path, "reference", old=old)
    found = server.live(out, overwrite=old)
    assert (found["status"], found["notes"]) == (0, [])
    return pico.contents(out), found["calls"]


def faults_of(out: Path, whole: dict, old: dict | None) -> list[str]:
    """What is wrong with the disk at the instant a run stopped."""
    steps, wrong = pico.sound_steps(pico_run(out))
    there = pico.contents(out) if out.exists() else None
    if there not in (None, whole, old):
        wrong.append(f"OUT is neither absent nor complete: {sorted(there)}")
    if there is None and old is not None and not list(pico_run(out).glob(".old-*")):
        wrong.append("the old OUT is lost")
    if there != whole and max(steps, default=0) >= 2 and len(steps) < 2:
        wrong.append(f"only {steps} left")
    return wrong


def pico_run(out: Path) -> Path:
    return out.with_name("o.run")


def recovery_faults(server, out: Path, whole: dict, **more) -> list[str]:
    """What is wrong after the same command was given again, with nothing in its way."""
    found = server.live(out, **more)
    wrong = [] if (found["status"], found["notes"]) == (0, []) else [f"again: {found}"]
    if pico.contents(out) != whole:
        wrong.append("the bytes are not those of an uninterrupted run")
    if [path.name for path in out.parent.iterdir()] != ["o"]:
        wrong.append(f"left over: {sorted(str(path) for path in out.parent.rglob('*'))}")
    return wrong


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_kill_at_any_call_loses_nothing_and_the_run_goes_on_to_the_same_bytes(
    server, tmp_path, old
):
    whole, calls = reference(server, tmp_path, old=old)
    assert calls > 80
    highest = 0
    for at in range(calls - LAST_CALLS if old else 1, calls + 1):
        out = new_out(tmp_path, at, old=old)
        before = pico.contents(out) if old else None
        found = server.live(out, at=at, overwrite=old)
        assert found["status"] == -9, at
        assert faults_of(out, whole, before) == [], at
        steps = pico.sound_steps(pico_run(out))[0]
        if pico.contents(out) != whole:
            assert max(steps, default=0) >= highest, at  # what was committed is never lost
            highest = max(steps, default=0)
        assert recovery_faults(server, out, whole, overwrite=old) == [], at
        shutil.rmtree(out.parent)


def test_kills_during_a_resumed_run_lose_nothing(server, tmp_path):
    whole, calls = reference(server, tmp_path)
    for at in range(2, calls, 12):
        out = new_out(tmp_path, at)
        for again in (at, at // 2 + 3, 20, 9, 4):
            server.live(out, at=again)
            assert faults_of(out, whole, None) == [], (at, again)
        assert recovery_faults(server, out, whole) == [], at
        shutil.rmtree(out.parent)


def test_a_full_disk_at_any_call_is_code_5_with_nothing_half_written(server, tmp_path):
    whole, _ = reference(server, tmp_path)
    for at in itertools.count(1):
        out = new_out(tmp_path, at)
        found = server.live(out, at=at, error=ENOSPC)
        if not found["struck"]:
            assert found["status"] == 0
            assert at > 40
            break  # from here on nothing needs space
        if found["status"] != 0:
            assert found["status"] == 5, (at, found)
            assert "HAM-E501" in found["notes"][0], (at, found)
            assert "No space left" in found["notes"][0]
        else:
            assert "ham.log" in found["struck"], (at, found)
        assert faults_of(out, whole, None) == [], at
        assert not list(out.parent.rglob(".stage-*")), at
        assert recovery_faults(server, out, whole) == [], at
        shutil.rmtree(out.parent)


# A log, a lock that is let go, folders that are there or go again: these may fail unheard.
HARMLESS = re.compile(
    r"ham\.log$|o\.run/lock( \(deleted\))?$|^(mkdir|rmdir) .*(o\.run|checkpoints)$"
)


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_disk_error_at_any_call_is_code_5_and_never_a_success(server, tmp_path, old):
    whole, calls = reference(server, tmp_path, old=old)
    for at in range(calls - LAST_CALLS if old else 1, calls + 1):
        out = new_out(tmp_path, at, old=old)
        before = pico.contents(out) if old else None
        found = server.live(out, at=at, error=EIO, overwrite=old)
        assert found["struck"], at
        if found["status"] == 0:  # a log, or a lock that is let go, may fail unheard
            assert HARMLESS.search(found["struck"]), (at, found)
        else:
            assert found["status"] == 5, (at, found)
            assert "HAM-E503" in found["notes"][0], (at, found)
        assert faults_of(out, whole, before) == [], (at, found)
        assert recovery_faults(server, out, whole, overwrite=old) == [], (at, found)
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("mutant", ["in place", "rotate first"])
def test_the_harness_sees_a_writer_that_is_not_atomic(server, tmp_path, mutant):
    whole, calls = reference(server, tmp_path)
    for at in range(1, calls + 1):
        out = new_out(tmp_path, at)
        server.live(out, at=at, mutant=mutant)
        if faults_of(out, whole, None):
            return
    pytest.fail("a bad writer went unseen")


def test_the_harness_sees_an_fsync_whose_failure_is_swallowed(server, tmp_path):
    _, calls = reference(server, tmp_path)
    for at in range(1, calls + 1):
        found = server.live(new_out(tmp_path, at), at=at, error=EIO, mutant="swallow")
        if found["status"] == 0 and found["struck"].startswith("fsync"):
            return
    pytest.fail("a swallowed fsync went unseen")

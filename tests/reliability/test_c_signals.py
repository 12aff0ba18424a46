"""C: signals. A run that is asked to stop saves, says how to go on, and does go on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.reliability import faults, judge, stops
from tests.reliability.assertions import assert_clean_streams, assert_stopped
from tests.reliability.server import cold
from tests.reliability.trials import Job, in_lanes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PREEMPTING = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
ENDLESS = ("--steps", "100000", "--set", "training.checkpoint_every=1000")
STEP_IN_LOG = "ham: step "


@pytest.fixture(scope="module")
def longer(server, memory):
    """8 steps, a checkpoint only when a signal asks for one, or at the end."""
    more = ("--steps", "8", "--set", "training.checkpoint_every=100")
    return Job(server, memory / "c", *more, steps=8)


def goes_on(job, out):
    assert job.recovered(out) == []


@pytest.mark.parametrize("name", PREEMPTING)
def test_C1_preempt(longer, name):
    out = longer.new_out(f"c1-{name}")
    # micro-steps 7 and 8 are of step 4: the signal comes in the middle of it
    done = longer.run(out, **stops.in_micro_step(7, name))
    assert_stopped(done, 75, 4)
    assert judge.sound_steps(out) == ([4], [])
    assert not out.exists()
    goes_on(longer, out)


def test_C1_preempt_the_console_script_itself(longer, tmp_path):
    """In an interpreter of its own, without any hook: the signal comes from outside."""
    process = cold(longer.words(tmp_path / "o", *ENDLESS), cwd=tmp_path)
    told = ""
    for line in process.stderr:
        told += line
        if STEP_IN_LOG in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 75, told + rest
    (step,), wrong = judge.sound_steps(tmp_path / "o")
    assert wrong == []
    last = rest.splitlines()[-1]
    assert last.startswith(f"ham: saved step {step}; to go on: ham sparsify ")


def test_C2_interrupt_once(longer):
    out = longer.new_out("c2-once")
    assert_stopped(longer.run(out, **stops.at_step(3, "SIGINT")), 130, 3)
    goes_on(longer, out)


def test_C2_interrupt_twice_ends_at_once(longer):
    out = longer.new_out("c2-twice")
    assert_stopped(longer.run(out, **stops.at_step(2)), 75, 2)
    done = longer.run(out, "--resume", **stops.in_micro_step(3, "SIGINT", "SIGINT"))
    assert done.code == 130
    assert "HAM-E902" in done.stderr
    assert_clean_streams(done)
    assert judge.sound_steps(out) == ([2], [])  # nothing more was saved, what was is whole
    goes_on(longer, out)


def test_C2_interrupt_five_times_in_50_ms(longer):
    out = longer.new_out("c2-five")
    started = longer.server.start(longer.words(out, *ENDLESS))
    started.wait_for(lambda: STEP_IN_LOG in started.stderr_so_far() or saved(out))
    for _ in range(5):
        started.signal(signal.SIGINT)
        time.sleep(0.01)
    done = started.wait(30)
    assert done.code == 130
    assert_clean_streams(done)
    assert judge.sound_steps(out)[1] == []


def saved(out):
    return (judge.run_folder(out) / "run.json").exists()


PARTS = {
    "opening": None,
    "reading data": None,
    "measuring the dense": None,
    "writing and recounting": 8,
    "measuring the written": 8,
    "writing the report": 8,
}


@pytest.mark.parametrize("part", PARTS)
def test_C3_at_odd_moments(longer, part):
    """75 in every part of a run; what is asked for while the report is written may still end it."""
    out = longer.new_out(f"c3-{part}")
    done = longer.run(out, **stops.at_stage(part))
    if part == "writing the report" and done.code == 0:
        assert longer.faults_of_result(out) == []
        return
    assert_stopped(done, 75, PARTS[part])
    assert not out.exists()
    goes_on(longer, out)


def test_C3_a_save_completes_and_is_not_made_twice(job):
    """TERM at every call of one save: it comes to its end, and one checkpoint results."""
    whole = job.run(job.new_out("c3-calls"), shim=faults.Fault(job.place / "c3-calls" / "o"))
    ends = [
        at for at, call in enumerate(whole.calls, 1) if call.endswith("/checkpoints/step-00000002")
    ]
    begin = 1 + max(
        at for at, call in enumerate(whole.calls[: ends[0]], 1) if call.endswith("ham.log")
    )

    def trial(at):
        out = job.new_out(f"c3-save-{at}")
        fault = faults.Fault(out, at, signal=signal.SIGTERM)
        assert_stopped(job.run(out, shim=fault), 75, 2)
        assert judge.sound_steps(out) == ([1, 2], [])
        assert job.recovered(out) == []

    in_lanes(trial, range(begin, ends[0] + 1, 2))


@pytest.mark.nightly
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0])
def test_C3_before_the_handlers_stand(job, tmp_path, seconds):
    process = cold(job.words(tmp_path / "o"), cwd=tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert judge.names(tmp_path) == []


def test_C4_term_then_kill(longer):
    out = longer.new_out("c4")
    started = longer.server.start(longer.words(out, *ENDLESS))
    started.wait_for(lambda: STEP_IN_LOG in started.stderr_so_far() or saved(out))
    time.sleep(0.2)
    started.signal(signal.SIGTERM)
    time.sleep(0.002)
    started.signal(signal.SIGKILL)  # in the middle of the save
    started.wait()
    assert judge.sound_steps(out)[1] == []
    # and as a scheduler does it: the save had its time
    out = longer.new_out("c4-patient")
    started = longer.server.start(longer.words(out), **stops.in_micro_step(5))
    deadline = time.monotonic() + 20
    while not started.has_ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    started.signal(signal.SIGKILL)
    assert started.wait().code == 75
    goes_on(longer, out)


def family(pid):
    """Processes below one, from /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, queue = [], [pid]
    while queue:
        for child in parents.get(queue.pop(), ()):
            found.append(child)
            queue.append(child)
    return found


def shared():
    return {name for name in os.listdir("/dev/shm") if not name.startswith("ham-")}


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_C5_process_tree(longer, tmp_path, number):
    """A run has no data workers of its own; whatever it starts must end with it."""
    before = shared()
    process = cold(longer.words(tmp_path / "o", *ENDLESS), cwd=tmp_path)
    for line in process.stderr:
        if STEP_IN_LOG in line:
            break
    children = family(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert shared() <= before


def test_C5_sees_an_orphan():
    process = subprocess.Popen(["sh", "-c", "sleep 30 & wait"])
    deadline = time.monotonic() + 5
    while not family(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    (child,) = family(process.pid)
    process.kill()
    process.wait()
    assert Path(f"/proc/{child}").exists()
    os.kill(child, signal.SIGKILL)

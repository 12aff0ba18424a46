"""E: two runs for one output."""

import json
import os
import signal
import socket
import time

import pytest

from tests.reliability import judge, stops
from tests.reliability.assertions import assert_clean_error
from tests.reliability.hooks import HERE
from tests.reliability.trials import Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def longer(server, memory):
    """A run that is still at work when the other one looks."""
    more = ("--steps", "16", "--set", "training.checkpoint_every=4")
    return Job(server, memory / "e", *more, steps=16)


def race(job, number, hook):
    """Two runs that are released together, and what they left."""
    out = job.new_out(f"race-{number}-{hook.rpartition(':')[2]}")
    go = out.with_name("go")
    options = {"before": hook, "env": {"GO": str(go)}}
    started = [job.server.start(job.words(out), **options) for _ in range(2)]
    time.sleep(0.05)
    go.touch()
    return out, started, [one.wait() for one in started]


def test_E1_two_starts(longer, figure):
    lost = 0
    for number in range(20):
        out, started, ended = race(longer, number, f"{HERE}:wait_for_go")
        winner = next(at for at, done in enumerate(ended) if done.code == 0)
        loser = ended[1 - winner]
        if loser.code == 0:  # it looked when all was done: a busy machine
            assert "already complete" in loser.stderr
        else:
            lost += 1
            name = f"process {started[winner].pid} on {socket.gethostname()}"
            assert_clean_error(loser, 6, f"HAM-E601.*{name}")
            assert loser.seconds < ended[winner].seconds
        assert longer.faults_of_result(out) == []
        out.with_name("go").unlink()
        assert [path.name for path in out.parent.iterdir()] == ["o"]
    assert lost >= 10
    figure(races=20, one_wins_and_the_other_exits_6=lost)


@pytest.mark.nightly
def test_E2_lock_is_noop(longer, figure):
    codes = []
    for number in range(20):
        out, _, ended = race(longer, number, f"{HERE}:wait_for_go_without_locks")
        for done in ended:
            if done.code:
                assert done.code in (6, 8), done.stderr
                assert_clean_error(done, done.code, "HAM-E60[12]|HAM-E8")
        codes.append(sorted(done.code for done in ended))
        assert judge.sound_steps(out)[1] == []  # no checkpoint is of two runs
        if not out.exists():  # both gave way
            assert longer.go_on(out).code == 0
        assert longer.faults_of_result(out) == []
    figure(races=20, mixed=0, both_gave_way=sum(0 not in one for one in codes))


def test_E3_stale_lock(longer):
    out = longer.new_out("e3")
    started = longer.server.start(longer.words(out), **stops.at_step(6, "SIGSTOP"))
    started.wait_for(lambda: judge.sound_steps(out)[0] == [4] and is_stopped(started.pid))
    assert_clean_error(longer.run(out, "--resume"), 6, f"HAM-E601.*process {started.pid} on")
    started.signal(signal.SIGKILL)
    assert started.wait().code == -signal.SIGKILL
    lock = judge.run_folder(out) / "lock"
    mark = json.loads(lock.read_text())
    assert mark["pid"] == started.pid
    # its number is that of another process now, which was born at another time
    lock.write_text(json.dumps({**mark, "pid": os.getpid()}))
    done = longer.run(out, "--resume")
    assert done.code == 0, done.stderr
    assert longer.faults_of_result(out) == []


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"

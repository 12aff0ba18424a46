"""A: a run that is killed anywhere goes on to the bytes of the run that was not."""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.reliability import faults, judge, mutants
from tests.reliability.assertions import assert_clean_error, assert_clean_streams
from tests.reliability.audit import Audit, traced
from tests.reliability.mutants import named
from tests.reliability.server import cold, cold_environment
from tests.reliability.trials import in_lanes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LAST_CALLS = 60  # up to the export a run that replaces an OUT is like one that does not
CHAIN_LIMIT = 8
TAKES_AWAY = ("unlink ", "rmdir ", "rename ")


def calls_of(job, name, *more):
    """What an uninterrupted run does to the disk, in order."""
    out = job.new_out(name)
    if more:
        make_old(job, out)
    done = job.run(out, *more, shim=faults.Fault(out))
    assert done.code == 0, done.stderr
    job.end(out)
    return done.calls


def make_old(job, out):
    """An OUT of an earlier run."""
    shutil.copytree(job.place / "reference" / "o", out)
    (out / "old").write_text("old")
    return judge.contents(out)


def killed_at(job, at, *, overwrites=False, **options):
    """What is wrong with a run that is killed at one call, then and after going on."""
    out = job.new_out(f"at-{at}-{overwrites}-{len(options)}")
    before = make_old(job, out) if overwrites else None
    more = ("--overwrite",) if overwrites else ()
    done = job.run(out, *more, shim=faults.killed(out, at), **options)
    wrong = [] if done.code == -signal.SIGKILL else [f"it ended with {done.code}: {done.stderr}"]
    wrong += job.interrupted(out, before)
    steps = judge.sound_steps(out)[0]
    if not wrong:
        wrong = job.recovered(out, *more)
    job.end(out)
    return max(steps, default=0), [f"call {at}: {one}" for one in wrong]


def test_A1_kill_everywhere(job, figure):
    calls = calls_of(job, "a1-calls")
    assert 100 < len(calls) < 400
    found = in_lanes(lambda at: killed_at(job, at), range(1, len(calls) + 1))
    assert [one for _, wrong in found for one in wrong] == []
    told = [step for step, _ in found]
    first_gone = next(at for at, call in enumerate(calls) if call == "rename ")
    assert told[:first_gone] == sorted(told[:first_gone])  # what was committed is never lost
    assert max(told) == job.steps
    figure(kills=len(found), identical=len(found))


def test_A1_kill_everywhere_while_an_old_output_is_replaced(job):
    calls = len(calls_of(job, "a1-old-calls", "--overwrite"))
    found = in_lanes(
        lambda at: killed_at(job, at, overwrites=True), range(calls - LAST_CALLS, calls + 1)
    )
    assert [one for _, wrong in found for one in wrong] == []


@pytest.mark.parametrize("mutant", [mutants.write_in_place, mutants.rotate_first])
def test_A1_sees_a_bad_writer(job, mutant):
    calls = calls_of(job, f"a1-{mutant.__name__}")
    first = next(
        at for at, call in enumerate(calls, 1) if call.startswith("mkdir .run/checkpoints")
    )
    for at in range(first, len(calls)):
        if killed_at(job, at, before=named(mutant))[1]:
            return
    pytest.fail("a bad writer went unseen")


def killed_chain(job, name, draw, seconds, **options):
    """Up to 8 kills at random moments, then a run to the end; what is wrong, and what was seen."""
    out = job.new_out(name)
    wrong, highest, half_written = [], 0, 0
    for _ in range(draw.randint(1, CHAIN_LIMIT)):
        steps, broken = judge.sound_steps(out)
        more = ["--resume"] if steps or broken else []
        started = job.server.start(job.words(out, *more), **options)
        time.sleep(draw.uniform(0, seconds))
        started.signal(signal.SIGKILL)
        started.wait()
        half_written += bool(list(judge.run_folder(out).glob(".stage-*")))
        wrong += job.interrupted(out)
        steps, _ = judge.sound_steps(out)
        if judge.contents(out):
            break  # nothing is left to kill
        if max(steps, default=0) < highest:
            wrong.append(f"step {highest} is lost, {steps} are left")
        highest = max(steps, default=0)
    if not wrong:
        wrong = job.recovered(out, **options)
    job.end(out)
    return wrong, half_written


def chains(job, name, numbers, seconds_limit, **options):
    """Chains of kills, each with a seed of its own, until one is enough or the time is over."""
    began = time.monotonic()
    usual = job.run(job.new_out(f"{name}-usual")).seconds

    def chain(number):
        if time.monotonic() - began > seconds_limit:
            return None
        return killed_chain(job, f"{name}-{number}", random.Random(number), usual, **options)

    return [found for found in in_lanes(chain, numbers) if found is not None]


def test_A2_kill_random(job, figure):
    found = chains(job, "a2", range(60), seconds_limit=50)
    assert [one for wrong, _ in found for one in wrong] == []
    assert len(found) >= 10  # on the busiest machine
    assert sum(half for _, half in found) > 0  # the write path was really hit
    figure(chains=len(found), identical=len(found))


@pytest.mark.nightly
def test_A2_kill_random_200(job, figure):
    found = chains(job, "a2-long", range(1000, 1200), seconds_limit=3600)
    assert [one for wrong, _ in found for one in wrong] == []
    assert len(found) == 200
    halves = sum(half for _, half in found)
    assert halves > 20
    figure(chains=200, identical=200, kills_with_something_half_written=halves)


def test_A2_sees_a_writer_that_is_not_atomic(job, figure):
    found = chains(job, "a2-bad", range(20), 60, before=named(mutants.write_straight))
    flagged = sum(bool(wrong) for wrong, _ in found)
    assert flagged > 0
    figure(chains=len(found), flagged=flagged)


@pytest.fixture(scope="module")
def stopped(job):
    """A run that was killed when its third checkpoint was there and its first one gone."""
    out = job.new_out("stopped")
    done = job.run(out, shim=faults.killed(out, at_export(job)))
    assert done.code == -signal.SIGKILL
    assert judge.sound_steps(out) == ([2, 3], [])
    return out


def at_export(job):
    """The first call after the last rotation."""
    return first_of_export(calls_of(job, "at-export"))


def first_of_export(calls):
    return next(at for at, call in enumerate(calls, 1) if call.endswith("/config.json"))


def copied(job, stopped, name):
    """A trial that begins where a run was stopped."""
    out = job.new_out(name)
    shutil.copytree(judge.run_folder(stopped), judge.run_folder(out))
    return out


def test_A4_kill_during_resume(job, stopped, figure):
    out = copied(job, stopped, "a4-calls")
    whole = job.run(out, "--resume", shim=faults.Fault(out))
    early = range(1, len(whole.calls) * 3 // 10)
    chosen = sorted(random.Random(4).sample(early, 14))
    moments = [random.Random(at).uniform(0, 0.3 * whole.seconds) for at in range(6)]

    def trial(kill):
        out = copied(job, stopped, f"a4-{kill}")
        if isinstance(kill, int):
            done = job.run(out, "--resume", shim=faults.killed(out, kill))
        else:
            started = job.server.start(job.words(out, "--resume"))
            time.sleep(kill)
            started.signal(signal.SIGKILL)
            done = started.wait()
        wrong = [] if done.code == -signal.SIGKILL else [f"it ended with {done.code}"]
        steps, broken = judge.sound_steps(out)
        wrong += broken + job.interrupted(out)
        if max(steps, default=0) < 3:
            wrong.append(f"step 3 is lost, {steps} are left")
        wrong += job.recovered(out)
        job.end(out)
        return wrong

    found = in_lanes(trial, [*chosen, *moments])
    assert [one for wrong in found for one in wrong] == []
    figure(kills=len(found))


def test_A6_rotate_safe(job, figure):
    calls = calls_of(job, "a6-calls")
    last_save = next(at for at, call in enumerate(calls, 1) if call.endswith("/step-00000003"))
    during = range(last_save + 1, first_of_export(calls))
    rotation = [at for at in during if calls[at - 1].startswith(TAKES_AWAY)]
    assert len(rotation) >= 6  # one rename, five files, a folder

    def trial(at):
        out = job.new_out(f"a6-{at}")
        job.run(out, shim=faults.killed(out, at))
        steps, wrong = judge.sound_steps(out)
        if len(steps) < 2:
            wrong.append(f"only {steps} left")
        wrong += job.recovered(out)
        job.end(out)
        return wrong

    assert [one for wrong in in_lanes(trial, rotation) for one in wrong] == []
    figure(kills=len(rotation))


NAMES = [*sorted(judge.PARTS), "MANIFEST.json"]


def cut(part):
    def damage(path):
        size = {"0": 0, "1": 1, "half": path.stat().st_size // 2, "size-1": path.stat().st_size - 1}
        os.truncate(path, size[part])

    return damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1 << 4
    path.write_bytes(data)


DAMAGES = {
    **{f"cut at {part}": cut(part) for part in ("0", "1", "half", "size-1")},
    "one bit": flip,
    "deleted": lambda path: path.unlink(),
}


def swap(first, second):
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def damaged(job, stopped, case, **options):
    """What is wrong with going on from a newest checkpoint of which one file is damaged."""
    name, kind = case
    out = copied(job, stopped, f"a7-{name}-{kind}-{len(options)}")
    newest = judge.run_folder(out) / "checkpoints" / "step-00000003"
    if kind == "swapped":
        swap(newest / name, newest / "optimizer.safetensors")
    else:
        DAMAGES[kind](newest / name)
    done = job.run(out, "--resume", **options)
    assert_clean_streams(done)
    wrong = [] if done.code == 0 else [f"{done.code}: {done.stderr}"]
    warnings = [line for line in done.stderr.splitlines() if "damaged" in line]
    # a bit of the manifest may be one of another file's hash, which is the one that is told then
    told_of = NAMES if name == "MANIFEST.json" else [name]
    if len(warnings) != 1 or not warnings[0].startswith("ham: warning: "):
        wrong.append(f"warnings: {warnings}")
    elif "from step 2" not in warnings[0] or not any(
        f"step-00000003/{one}" in warnings[0] for one in told_of
    ):
        wrong.append(f"the warning names no file or no step: {warnings[0]}")
    told = {"report.json", "report.html", "README.md"}  # where the warning stands too
    if out.exists():
        wrong += [one for one in job.faults_of_result(out) if one not in told]
    job.end(out)
    return [f"{name} {kind}: {one}" for one in wrong]


def test_A7_damaged_latest(job, stopped, figure):
    cases = [*itertools.product(NAMES, DAMAGES), ("model.safetensors", "swapped")]
    found = in_lanes(lambda case: damaged(job, stopped, case), cases)
    assert [one for wrong in found for one in wrong] == []
    figure(damages=len(cases))


def test_A7_sees_a_reader_that_trusts_any_bytes(job, stopped):
    case = ("optimizer.safetensors", "one bit")
    assert damaged(job, stopped, case, before=named(mutants.trust_any_bytes))


def all_damaged(job, stopped, name, **options):
    out = copied(job, stopped, name)
    for newest in (judge.run_folder(out) / "checkpoints").iterdir():
        flip(newest / "model.safetensors")
    before = judge.contents(judge.run_folder(out) / "checkpoints")
    done = job.run(out, "--resume", **options)
    return out, before, done


def test_A8_all_damaged(job, stopped):
    out, before, done = all_damaged(job, stopped, "a8")
    assert_clean_error(done, 8, "HAM-E802.*every run checkpoint is damaged.*nothing was deleted")
    assert "  hint: --overwrite without --resume starts over" in done.stderr
    assert judge.contents(judge.run_folder(out) / "checkpoints") == before
    assert not out.exists()
    again = job.run(out)  # nor does the same command without --resume begin anew
    assert_clean_error(again, 2, "HAM-E113")
    assert judge.contents(judge.run_folder(out) / "checkpoints") == before


def test_A8_sees_a_silent_start_from_step_0(job, stopped):
    _, _, done = all_damaged(job, stopped, "a8-bad", before=named(mutants.start_over_silently))
    with pytest.raises(AssertionError):
        assert_clean_error(done, 8, "HAM-E802")


# ---- what only an interpreter of its own shows ----

TWO_LIVES = """
import os, sys
from hamcli.cli import main
for number, words in enumerate((sys.argv[1].split("|"), sys.argv[2].split("|"))):
    if number:
        os.fsync = lambda handle: None
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_A5_fsync_order(job, tmp_path, figure):
    lives = []
    for name in ("sound", "mutant"):
        (tmp_path / name).mkdir()
        lives.append("|".join(job.words(tmp_path / name / "o")))
    trace = tmp_path / "trace"
    code = traced([sys.executable, "-c", TWO_LIVES, *lives], trace, env=cold_environment())
    assert code == 0
    audits = {name: Audit(tmp_path / name) for name in ("sound", "mutant")}
    for line in trace.read_text().splitlines():
        for audit in audits.values():
            audit.read(line)
    for audit in audits.values():
        audit.settle()
    commits = [Path(one).name for one in audits["sound"].commits]
    steps = [f"step-{step:08d}" for step in range(1, job.steps + 1)]
    assert commits == ["run.json", *steps, "o"]
    assert audits["sound"].faults == []
    assert len(audits["mutant"].faults) > 10  # the audit sees a run that syncs nothing
    figure(
        commits=len(commits), violations=0, violations_of_the_mutant=len(audits["mutant"].faults)
    )


MOMENTS = {
    "import": lambda out: True,
    "load": lambda out: judge.run_folder(out).exists(),
    "save": lambda out: (judge.run_folder(out) / "checkpoints").exists(),
    "export": lambda out: list(judge.run_folder(out).glob(".stage-*/config.json")),
}


@pytest.mark.nightly
@pytest.mark.parametrize("moment", MOMENTS)
def test_A3_kill_cold(job, moment, figure):
    for number in range(2):
        out = job.new_out(f"a3-{moment}-{number}")
        process = cold(job.words(out), cwd=out.parent)
        while not MOMENTS[moment](out):
            assert process.poll() is None, process.communicate()
        time.sleep({"import": 0.5 + number, "load": 0.05 * number}.get(moment, 0.004 * number))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert judge.contents(out) == {}, "killed too late"
        assert job.interrupted(out) == []
        steps, _ = judge.sound_steps(out)
        again = cold(job.words(out, *(["--resume"] if steps else [])), cwd=out.parent)
        assert again.communicate()[1].count("Traceback") == 0
        assert again.returncode == 0
        assert job.faults_of_result(out) == []
        assert judge.names(out.parent) == sorted(["o", *(f"o/{name}" for name in job.whole)])
        job.end(out)
    figure(kills=2)


@pytest.mark.nightly
@pytest.mark.parametrize("nth", [1, 2])
def test_A3_kill_cold_at_a_rename_that_makes_its_own_system_call(job, tmp_path, nth):
    """That of safetensors, which the preloaded library does not see."""
    out = job.new_out(f"a3-raw-{nth}")
    inject = ["-e", f"inject=renameat,renameat2:signal=KILL:when={nth}"]
    words = [sys.executable, "-m", "hamcli", *job.words(out)]
    code = traced(words, tmp_path / "trace", *inject, env=cold_environment())
    last = [line for line in (tmp_path / "trace").read_text().splitlines() if "renameat" in line]
    if code == 0:
        assert len(last) < nth  # there are no more of them
        return
    assert code in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert job.interrupted(out) == []
    assert job.recovered(out) == []

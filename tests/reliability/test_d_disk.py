"""D: full and broken disks, permissions, modes, and folders that are not ours."""

import hashlib
import os
import re
import stat
import subprocess

import pytest

from tests.reliability import faults, judge, mutants, stops, tiny
from tests.reliability.assertions import assert_clean_error, assert_stopped
from tests.reliability.hooks import HERE
from tests.reliability.mutants import named
from tests.reliability.test_a_crash import LAST_CALLS, calls_of, make_old
from tests.reliability.trials import in_lanes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NOBODY = 65534
# A log, a lock that is let go, folders that are there or go again: these may fail unheard.
# transformers makes a staging folder that is there again and again.
HARMLESS = re.compile(
    r"ham\.log$|^\w+ \.run/lock( \(deleted\))?$|^(mkdir|rmdir) .*(\.run|checkpoints)$"
    r"|^mkdir \.run/\.stage-[0-9a-f]{32}$"
    # safetensors drops the error of this close; the file is fsynced, reopened and recounted then
    r"|^close \.run/\.stage-[0-9a-f]{32}/model\.safetensors$"
)


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of some KiB."""
    places = []

    def make(kib):
        place = tmp_path / f"disk-{kib}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small file system needs root")
        places.append(place)
        return place

    yield make
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def test_D1_enospc_preflight(job, small_disk):
    place = small_disk(512)
    done = job.run(place / "o")
    assert_clean_error(done, 5, r"HAM-E504.*not enough disk space: \S+: \d+ MiB needed, 0 MiB free")
    assert str(place / "o.run") in done.stderr
    assert "step 1" not in done.stderr
    assert judge.names(place) == ["o.run", "o.run/ham.log"]


def test_D2_enospc_midway(job, small_disk):
    place = small_disk(4096)
    out = place / "o"
    eaten = place / "eaten"
    done = job.run(out, before=f"{HERE}:eat_the_disk", env={"EAT": str(eaten), "EAT_AT_STEP": "2"})
    assert_clean_error(done, 5, "HAM-E501.*No space left on device")
    assert judge.sound_steps(out) == ([1], [])
    assert not list(judge.run_folder(out).glob(".stage-*"))
    eaten.unlink()
    assert job.go_on(out).code == 0
    assert job.faults_of_result(out) == []


@pytest.mark.parametrize("kib", [1, 50, 100, 190])
def test_D2_a_limit_on_the_size_of_files(job, kib):
    """`ulimit -f`: of copies in TMPDIR, of the configs, of the weights, of a run checkpoint."""
    out = job.new_out(f"d2-limit-{kib}")
    done = job.run(out, file_limit_bytes=kib * 1024)
    assert_clean_error(done, 5, "HAM-E501.*File too large")
    assert not list(judge.run_folder(out).glob(".stage-*"))
    assert job.interrupted(out) == []
    assert job.recovered(out) == []


def failed_at(job, at, fault, code, *, overwrites=False, **options):
    """What is wrong with a run of which one call fails; None when it came to no such call."""
    out = job.new_out(f"fail-{code}-{at}-{overwrites}-{len(options)}")
    before = make_old(job, out) if overwrites else None
    more = ("--overwrite",) if overwrites else ()
    done = job.run(out, *more, shim=fault(out, at), **options)
    if not done.struck:
        job.end(out)
        return None
    wrong = []
    if done.code == 0:
        wrong += [] if HARMLESS.search(done.struck) else ["the failure was called a success"]
    else:
        try:
            assert_clean_error(done, 5, code)
        except AssertionError as error:
            wrong.append(str(error))
        if list(out.parent.rglob(".stage-*")) and not done.struck.startswith(("unlink", "rmdir")):
            wrong.append(f"left over: {judge.names(out.parent)}")
    wrong += job.interrupted(out, before)
    if not wrong:
        wrong += job.recovered(out, *more)
    if not wrong:
        job.end(out)
    return [f"{at} {done.struck}: {one}" for one in wrong]


def found_by(job, fault, code, numbers, **options):
    found = in_lanes(lambda at: failed_at(job, at, fault, code, **options), numbers)
    return [one for wrong in found if wrong for one in wrong], sum(one is not None for one in found)


def calls_that_need_space(job, name):
    calls = calls_of(job, name)
    return [call for call in calls if call.startswith(("create", "write", "mkdir"))]


def test_D2_enospc_at_each_call(job, figure):
    most = len(calls_that_need_space(job, "d2-calls"))
    wrong, count = found_by(job, faults.full, "HAM-E501.*No space left", range(1, most + 1))
    assert wrong == []
    assert count > 60
    figure(calls=count, clean=count)


@pytest.mark.nightly
def test_D3_eio_everywhere(job, figure):
    most = len(calls_of(job, "d3-calls"))
    wrong, count = found_by(job, faults.broken, "HAM-E503", range(1, most + 1))
    assert wrong == []
    old = len(calls_of(job, "d3-old", "--overwrite"))
    chosen = range(old - LAST_CALLS, old + 1)
    more, again = found_by(job, faults.broken, "HAM-E503", chosen, overwrites=True)
    assert more == []
    figure(calls=count + again, clean=count + again)


def test_D3_sees_an_fsync_whose_failure_is_swallowed(job):
    calls = calls_of(job, "d3-bad")
    at = 1 + max(at for at, call in enumerate(calls) if re.search(r"fsync .*model\.saf", call))
    assert failed_at(job, at, faults.broken, "HAM-E503", before=named(mutants.swallow_fsync))


# ---- permissions ----


def refused_before_the_model(job, out, code, pattern, **options):
    done = job.run(out, before=f"{HERE}:never_load_a_model", **options)
    assert_clean_error(done, code, pattern)
    return done


@pytest.mark.parametrize("kind", ["read-only", "another's", "run another's"])
def test_D4_no_permission(job, tmp_path, kind):
    if os.getuid() != 0:
        pytest.skip("acting as another user needs root")
    tmp_path.chmod(0o777)
    out = tmp_path / "o"
    if kind == "read-only":
        tmp_path.chmod(0o555)
    elif kind == "another's":
        out.mkdir(mode=0o755)
    else:
        judge.run_folder(out).mkdir(mode=0o755)
    before = judge.names(tmp_path)
    refused_before_the_model(job, out, 5, "HAM-E502", user=NOBODY)
    assert judge.names(tmp_path) == before


def test_D4_a_file_is_a_mistake_of_the_user_and_a_missing_parent_is_told(job, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused_before_the_model(job, tmp_path / "file", 2, "HAM-E111.*it is a file")
    assert (tmp_path / "file").read_text() == "mine"
    done = refused_before_the_model(job, tmp_path / "none" / "o", 5, "HAM-E505")
    assert "  hint: mkdir -p " in done.stderr
    assert judge.names(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_D5_modes(job, mask):
    out = job.new_out(f"d5-{mask}")
    assert job.run(out, "--keep-run", umask=mask).code == 0
    paths = [out, judge.run_folder(out), *out.rglob("*"), *judge.run_folder(out).rglob("*")]
    assert len(paths) > 20
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


# ---- folders ----


def hashes(folder):
    return {name: hashlib.sha256(data).hexdigest() for name, data in judge.contents(folder).items()}


def in_place(place):
    """A model of one's own and the outputs that would write into it."""
    model = place / "model"
    (place / "around").mkdir()
    (place / "link").symlink_to("model")
    linked = place / "linked"
    linked.mkdir()
    os.link(model / "model.safetensors", linked / "model.safetensors")
    return {
        "the model": model,
        "inside": model / "o",
        "around": place,
        "a link": place / "link",
        "by another way": place / "around" / ".." / "model",
        "hard links": linked,
    }


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_D6_in_place(job, tmp_path, overwrite):
    import shutil

    shutil.copytree(job.server.tiny / "untied", tmp_path / "model")
    for name, out in in_place(tmp_path).items():
        before = hashes(tmp_path)
        words = tiny.sparsify(job.server.tiny, out, *overwrite)
        words[1] = str(tmp_path / "model")
        done = job.server.run(words, cwd=tmp_path)
        assert_clean_error(done, 2, "HAM-E11[012]")
        assert hashes(tmp_path) == before, name


def foreign(place):
    """An OUT full of somebody's files, and what lies elsewhere."""
    out, elsewhere = place / "o", place / "elsewhere"
    for folder in (out, elsewhere, out / ".stage-x", judge.run_folder(out)):
        folder.mkdir()
    (out / "photo.jpg").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("mine")
    (elsewhere / "model.safetensors").write_text("mine")
    (out / "model").symlink_to(elsewhere)
    return out


def test_D7_foreign_dir(job, tmp_path):
    out = foreign(tmp_path)
    before = hashes(tmp_path)
    assert_clean_error(job.run(out), 2, "HAM-E112.*not empty")
    assert hashes(tmp_path) == before
    done = job.run(out, "--overwrite")
    assert done.code == 0, done.stderr
    assert job.faults_of_result(out) == []
    assert (tmp_path / "elsewhere" / "model.safetensors").read_text() == "mine"
    (kept,) = judge.run_folder(out).glob("replaced-*")  # nothing of the user's is ever deleted
    assert (kept / "photo.jpg").read_text() == "mine"
    assert (kept / "model").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"o", "o.run", "elsewhere"}


def test_D7_a_foreign_run_folder_is_left_alone(job, tmp_path):
    out = tmp_path / "o"
    run = judge.run_folder(out)
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert_clean_error(job.run(out, "--overwrite"), 2, "HAM-E114")
    assert judge.names(run) == ["notes.txt"]


def test_HAM_DEBUG_writes_the_traceback_to_the_log_too(job):
    """Without it there is none anywhere."""
    out = job.new_out("debug")
    assert_stopped(job.run(out, **stops.at_step(1)), 75, 1)
    log = judge.run_folder(out) / "ham.log"
    assert "HAM-E901" in log.read_text()
    assert "Traceback" not in log.read_text()
    hook = stops.at_step(2)
    hook["env"]["HAM_DEBUG"] = "1"
    done = job.run(out, "--resume", **hook)
    assert done.code == 75
    assert "Traceback" in done.stderr
    assert "Traceback" in log.read_text()

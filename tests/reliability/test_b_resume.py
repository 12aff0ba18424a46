"""B: a run that goes on is the same run, and the same command gives the same bytes."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import judge, mutants, stops, tiny
from tests.reliability.assertions import assert_clean_error, assert_stopped
from tests.reliability.hooks import HERE
from tests.reliability.mutants import named
from tests.reliability.server import cold_environment
from tests.reliability.trials import Job, in_lanes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = ("--steps", "20", "--set", "training.checkpoint_every=7")
METHODS = ("random", "ac-dc", "rigl", "cyclic", "str", "spred", "pilot", "sign-in", "ast")
SGD = ("--set", "optimizer.base=sgd", "--set", "optimizer.momentum=0.9")


def resumed_at(job, step, *, before=None):
    """What is not as in the uninterrupted run after a stop at one step."""
    out = job.new_out(f"stop-{step}-{before}")
    assert_stopped(job.run(out, **stops.at_step(step)), 75, step)
    assert judge.sound_steps(out)[0][-1] == step
    done = job.run(out, "--resume", before=before)
    wrong = [] if done.code == 0 else [f"{done.code}: {done.stderr}"]
    wrong += (
        [] if f"going on from step {step} of" in done.stderr else ["it does not say from where"]
    )
    wrong += job.faults_of_result(out) if out.exists() else ["no result"]
    job.end(out)
    return [f"stopped at {step}: {one}" for one in wrong]


@pytest.fixture(scope="module")
def long_job(server, memory):
    """20 steps: two epochs and more, warm-up and decay."""
    return Job(server, memory / "b1", *LONG, steps=20)


def test_B1_resume_every_step(long_job, figure):
    found = in_lanes(lambda step: resumed_at(long_job, step), range(1, 21))
    assert [one for wrong in found for one in wrong] == []
    figure(stops=20, identical=20)


@pytest.mark.parametrize("method", METHODS)
def test_B1_resume_every_step_of_every_method(server, tmp_path, method):
    job = Job(server, tmp_path, "--method", method, "--steps", "6", steps=6)
    found = in_lanes(lambda step: resumed_at(job, step), (1, 3, 4, 6))
    assert [one for wrong in found for one in wrong] == []


@pytest.mark.parametrize("more", [SGD, ("--set", "optimizer.sam=0.05")], ids=["sgd", "sam"])
def test_B1_resume_with_other_optimizers(server, tmp_path, more):
    job = Job(server, tmp_path, *more, model="tied")
    found = in_lanes(lambda step: resumed_at(job, step), (1, 2))
    assert [one for wrong in found for one in wrong] == []


@pytest.mark.parametrize(
    "mutant",
    [
        mutants.forget_moments,
        mutants.forget_one_moment,
        mutants.forget_one_weight,
        mutants.go_on_a_step_late,
    ],
)
def test_B1_sees_a_broken_restore(long_job, mutant):
    assert resumed_at(long_job, 10, before=named(mutant))


# ---- what a checkpoint consists of ----


@pytest.fixture(scope="module")
def stopped(job):
    """A run that was stopped after its second step."""
    out = job.new_out("b2-stopped")
    assert_stopped(job.run(out, **stops.at_step(2)), 75, 2)
    return out


def newest(out):
    return judge.run_folder(out) / "checkpoints" / "step-00000002"


def parts_of(out):
    return json.loads((newest(out) / "MANIFEST.json").read_text())["parts"]


def mend(folder, *, without=None):
    """A manifest that fits the files as they are now."""
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"] = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
        if path.name != "MANIFEST.json"
    }
    manifest["parts"] = [part for part in manifest["parts"] if part != without]
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def without_part(folder, part):
    """Take a part away and mend the manifest."""
    if part.startswith("values."):
        values = json.loads((folder / "values.json").read_text())
        del values[part.removeprefix("values.")]
        (folder / "values.json").write_text(json.dumps(values))
    else:
        (folder / f"{part}.safetensors").unlink()
    mend(folder, without=part)


def without_tensor(path, name):
    """Take one tensor away and mend the manifest."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = header.pop(name)["data_offsets"]
    for key, entry in header.items():
        if key != "__metadata__":
            entry["data_offsets"] = [
                at - (end - begin) if at >= end else at for at in entry["data_offsets"]
            ]
    data = raw[8 + length :]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[:begin] + data[end:])
    mend(path.parent)


def copied(job, stopped, name):
    out = job.new_out(name)
    shutil.copytree(judge.run_folder(stopped), judge.run_folder(out))
    return out


def test_B2_state_is_complete(job, stopped, figure):
    parts = parts_of(stopped)
    assert {"model", "optimizer", "sparsifier", "values.groups"} <= set(parts)
    for part in parts:
        out = copied(job, stopped, f"b2-{part}")
        without_part(newest(out), part)
        before = judge.contents(judge.run_folder(out) / "checkpoints")
        done = job.run(out, "--resume")
        assert_clean_error(done, 8, rf"HAM-E804.*a part of the run checkpoint is missing.*{part}")
        assert judge.contents(judge.run_folder(out) / "checkpoints") == before
    figure(parts=len(parts))


def tensors_to_drop(stopped):
    """Of each file of tensors one name of each kind."""
    for path in sorted(newest(stopped).glob("*.safetensors")):
        kinds = {}
        for name in judge.read_file(path):
            kind = name.rpartition(".")[2] if path.stem == "optimizer" else name
            kinds.setdefault(kind, name)
        yield from ((path.name, name) for name in kinds.values())


def test_B2_a_missing_tensor_is_named(job, stopped):
    cases = list(tensors_to_drop(stopped))
    assert len(cases) > 20

    def trial(case):
        file, name = case
        out = copied(job, stopped, f"b2-{file}-{name}")
        without_tensor(newest(out) / file, name)
        assert_clean_error(job.run(out, "--resume"), 8, rf"HAM-E804.*{name}")
        job.end(out)

    in_lanes(trial, cases)


# ---- the same bytes ----

RECIPE_AND_ITS_HASH = {"recipe.yaml", "report.json", "report.html", "README.md"}


def test_B3_same_seed_same_bytes(job, tmp_path, figure):
    made = [job.whole]
    for number, odd in enumerate(
        (
            {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "LANG": "C", "TMPDIR": str(tmp_path)},
            {"PYTHONHASHSEED": "77", "TZ": "America/Lima", "LANG": "en_US.UTF-8", "LC_ALL": "C"},
        )
    ):
        folder = tmp_path / f"cold é {number}"
        folder.mkdir()
        command = [sys.executable, "-m", "hamcli", *job.words(Path("other"))]
        done = subprocess.run(
            command, cwd=folder, env=cold_environment() | odd, capture_output=True, check=False,
            umask=0o027 if number else -1,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made.append(judge.result(folder / "other"))
    here = tmp_path / "here"
    here.mkdir()
    odd = {"TMPDIR": str(here), "TZ": "Europe/Berlin", "HOME": None, "USER": "somebody"}
    words = job.words(Path("x"))
    assert job.server.run(words, cwd=here, env=odd, umask=0o077).code == 0
    made.append(judge.result(here / "x"))
    moved = tmp_path / "moved" / "tiny"
    shutil.copytree(job.server.tiny, moved)  # the same inputs at another place
    recipe = (moved / "recipe.yaml").read_text().replace(str(job.server.tiny), str(moved))
    (moved / "recipe.yaml").write_text(recipe)
    assert job.server.run(tiny.sparsify(moved, tmp_path / "y")).code == 0
    made.append(judge.result(tmp_path / "y"))
    for one in made[1:-1]:
        assert judge.differences(one, made[0]) == []
    # the effective recipe says where the data lies, so that it can be run again
    assert set(judge.differences(made[-1], made[0])) <= RECIPE_AND_ITS_HASH
    leaks = (str(tmp_path), str(job.server.tiny), "somebody")
    for name, data in judge.contents(tmp_path / "y").items():
        if name == "recipe.yaml":
            continue
        assert not any(leak.encode() in data for leak in leaks), name
    figure(runs=len(made))


def test_B3_another_seed_gives_other_bytes(job):
    out = job.new_out("b3-seed")
    assert job.run(out, "--seed", "1").code == 0
    assert "model.safetensors" in job.faults_of_result(out)


def test_B4_header_determinism(server, tmp_path, figure):
    done = server.run([str(tmp_path)], before=f"{HERE}:export_fifty_times")
    assert done.code == 0, done.stderr
    hashes = done.stdout.split()
    assert len(hashes) == 50
    assert len(set(hashes)) == 1
    figure(exports=50, hashes=1)


def test_B4_sees_metadata_in_random_order(server, tmp_path):
    done = server.run([str(tmp_path)], before=f"{HERE}:save_fifty_times_with_eight_keys")
    assert len(set(done.stdout.split())) > 1


# ---- another world ----


@pytest.mark.parametrize("what", ["recipe", "model", "data"])
def test_B5_changed_world(job, stopped, tmp_path, what):
    out = copied(job, stopped, f"b5-{what}")
    folder = tmp_path / "inputs"
    shutil.copytree(job.server.tiny, folder)
    recipe = (folder / "recipe.yaml").read_text().replace(str(job.server.tiny), str(folder))
    key = "model.safetensors"
    if what == "recipe":
        recipe, key = recipe.replace("lr: 1e-3", "lr: 2e-3"), "optimizer.lr"
    (folder / "recipe.yaml").write_text(recipe)
    if what == "model":
        raw = bytearray((folder / "untied" / key).read_bytes())
        raw[-1] ^= 1
        (folder / "untied" / key).write_bytes(raw)
    elif what == "data":
        tiny.write_data(folder / "data.jsonl", seed=1)
        key = "data.jsonl"
    before = judge.contents(judge.run_folder(out) / "checkpoints")
    done = job.server.run(tiny.sparsify(folder, out, "--resume"))
    assert_clean_error(done, 8, f"HAM-E803.*{key}")
    columns = [line for line in done.stderr.splitlines() if "(saved) | " in line]
    assert len(columns) == 1
    assert columns[0].startswith("  hint: ")
    assert columns[0].endswith(" (now)")
    assert key in columns[0]
    assert judge.contents(judge.run_folder(out) / "checkpoints") == before


@pytest.mark.parametrize("what", ["version", "threads", "processes"])
def test_B5_changed_world_that_only_warns(job, stopped, what):
    out = copied(job, stopped, f"b5-{what}")
    done = job.run(out, "--resume", "--keep-run", before=f"{HERE}:other_{what}")
    assert done.code == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "when the run began" in line]
    assert len(warnings) == 1
    sessions = json.loads((judge.run_folder(out) / "run.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[0] != sessions[1]
    assert any(
        "when the run began" in text for text in judge.result(out)["report.json"]["warnings"]
    )


def test_B6_finished_is_noop(job, figure):
    out = job.new_out("b6")
    assert job.run(out).code == 0
    before = {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}
    done = job.run(out)
    assert done.code == 0
    assert "already complete" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())} == before
    assert [path.name for path in out.parent.iterdir()] == ["o"]
    again = job.run(out, "--resume")
    assert again.code == 0
    assert "already complete" in again.stderr
    figure(cpu_seconds=round(done.cpu_seconds, 2))

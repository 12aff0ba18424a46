"""F: hostile or broken models; code 4, the input untouched, little memory, and in time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hamcli.checkpoint.headers import read_header
from hamcli.errors import InputRefused
from tests.reliability import hostile_models, judge, tiny, witness
from tests.reliability.assertions import assert_clean_error
from tests.reliability.header_fuzz import READERS
from tests.reliability.hostile_models import CASES, Case
from tests.reliability.server import PLAIN, ROOT, Outcome, Server, answer_of, cold

MIB = 2**20
CPU_SECONDS = 2.0


def fuzz(count: int, reader: str = "ours") -> dict[str, Any]:
    """What came of `count` damaged files, in a process without torch."""
    return answer_of("header_fuzz", count, reader)


def faults_of(found: dict[str, Any]) -> dict[str, int]:
    """What a sound reader never does."""
    bad = {key: found[key] for key in ("trace", "unclear", "differs", "signals") if found[key]}
    return bad | ({"growth": found["growth"]} if found["growth"] > 64 * MIB else {})


# ---- F1 ----


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_F1_header_fuzz(count: int, figure: Any) -> None:
    found = fuzz(count)
    assert not faults_of(found), found["worst"]
    # a flipped bit in a name or in the data is a sound file; had we refused all, little were proved
    assert found["same"] > count / 20
    assert found["refused"] > count / 2
    figure(**{key: value for key, value in found.items() if key != "worst"})


@pytest.mark.parametrize(
    ("reader", "fault"),
    [
        ("trusting", "trace"),
        ("trusting", "differs"),
        ("allocating", "growth"),
        ("pointing", "signals"),
    ],
)
def test_F1_a_reader_that_trusts_the_header_is_flagged(reader: str, fault: str) -> None:
    assert set(READERS) == {"ours", "trusting", "allocating", "pointing"}
    assert fault in faults_of(fuzz(500, reader))


@pytest.mark.slow
def test_F1_a_dozen_by_the_console_script(tmp_path: Path, figure: Any) -> None:
    """The same by cold processes, so that nothing of the harness stands between."""
    from tests.reliability.header_fuzz import mutants, seeds

    raws = [path.read_bytes() for path in seeds(tmp_path)]
    refused = 0
    for raw in mutants(raws, 12, seed=5):
        path = tmp_path / "mutant.safetensors"
        path.write_bytes(raw)
        process = cold(["check", str(path)], cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        if process.returncode:
            refused += 1
            assert_clean_error(Outcome(process.returncode, out, err, 0.0, 0), 4, "mutant")
    figure(cold=12, refused=refused)
    assert refused >= 6


# ---- every hostile folder, through the whole command ----


def refuse(
    server: Server, case: Case, tmp_path: Path, *words: str
) -> tuple[Outcome, witness.Watched]:
    """Run the command on the case; hold it to all that F promises."""
    folder = case.folder(server.tiny / "untied", tmp_path)
    before = state(folder)
    size = sum(size for _, size, _ in before)
    argv = words or tuple(tiny.sparsify(server.tiny, tmp_path / "out"))
    argv = tuple(str(folder) if word == str(server.tiny / "untied") else word for word in argv)
    done, seen = witness.run(server, argv, tmp_path, timeout=60)
    assert_clean_error(done, 4, case.pattern)
    assert state(folder) == before
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / hostile_models.CANARY).exists()
    assert not seen.sockets
    assert not seen.processes
    assert not seen.pickles
    assert done.grown_bytes <= 64 * MIB + 2 * size, f"{done.grown_bytes / MIB:.0f} MiB"
    assert done.cpu_seconds <= CPU_SECONDS
    return done, seen


def state(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of what lies in a folder; links are not followed."""
    found = [(path, path.lstat()) for path in sorted([folder, *folder.rglob("*")])]
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]


def of(test: str) -> list[Case]:
    return [case for case in CASES if case.test == test]


def each(test: str) -> Any:
    return pytest.mark.parametrize("case", of(test), ids=lambda case: case.name)


@pytest.mark.slow
@each("F2")
def test_F2_truncated_shards(server: Server, case: Case, tmp_path: Path) -> None:
    refuse(server, case, tmp_path)


def test_F2_truncate_sweep(tmp_path: Path, figure: Any) -> None:
    """Each shard cut at 64 places: the file, its true size and the size it should have."""
    from tests.reliability.header_fuzz import seeds

    places = 0
    for path in seeds(tmp_path):
        whole = path.read_bytes()
        for size in hostile_models.sweep(len(whole), 64):
            path.write_bytes(whole[:size])
            with pytest.raises(InputRefused, match="E413") as caught:
                read_header(path)
            line = caught.value.line()
            assert path.name in line
            assert f"{size} bytes" in line
            assert size < 8 or any(char.isdigit() for char in line.partition(f"{size} bytes")[2])
            places += 1
    figure(files=5, places=places, refused=places)


@pytest.mark.slow
@each("F3")
def test_F3_entry_bomb(server: Server, case: Case, tmp_path: Path) -> None:
    done, _ = refuse(server, case, tmp_path)
    assert done.grown_bytes <= 100 * MIB
    assert done.cpu_seconds < 1


@pytest.mark.slow
def test_F5_traversal(server: Server, tmp_path: Path, figure: Any) -> None:
    """Refused before anything outside is opened; nothing hangs on a pipe or a device."""
    slowest = 0.0
    for number, case in enumerate(of("F5")):
        place = tmp_path / str(number)
        place.mkdir()
        done, seen = refuse(server, case, place)
        slowest = max(slowest, done.cpu_seconds)
        opened = [path for path in seen.opened if path.endswith(OUTSIDE)]
        assert opened == [], case
        assert any(path.endswith(hostile_models.INDEX) for path in seen.opened)
        shutil.rmtree(place)
    names = len(hostile_models.NAMES)
    figure(names=names, cases=len(of("F5")), slowest_cpu_seconds=round(slowest, 3))
    assert names >= 40


OUTSIDE = ("outside.safetensors", "passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_F5_traversal_as_the_kernel_sees_it(server: Server, tmp_path: Path) -> None:
    """Python's hook does not see what native code opens; strace does."""
    case = next(one for one in of("F5") if one.name == "a sound shard outside")
    folder = case.folder(server.tiny / "untied", tmp_path)
    log = tmp_path / "strace.log"
    command = ["strace", "-f", "-e", "trace=open,openat,openat2", "-o", str(log)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "hamcli", "plan", str(folder)],
        cwd=tmp_path,
        env={**os.environ, **PLAIN, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert_clean_error(Outcome(done.returncode, done.stdout, done.stderr, 0.0, 0), 4, "E411")
    text = log.read_text()
    assert hostile_models.INDEX in text  # the control: what was opened is there
    assert "outside.safetensors" not in text


@pytest.mark.slow
@each("F6")
def test_F6_symlinks(server: Server, case: Case, tmp_path: Path) -> None:
    refuse(server, case, tmp_path)


@pytest.mark.slow
def test_F6_the_hubs_cache_works_and_no_link_is_exported(server: Server, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("ab" * 20)
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (server.tiny / "untied").iterdir():
        shutil.copy(path, blobs / f"blob-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-of-{path.name}")
    words = [str(snapshot), "--recipe", str(server.tiny / "recipe.yaml"), "--out"]
    assert server.run(["prune", *words, str(tmp_path / "linked")]).code == 0
    words[0] = str(server.tiny / "untied")
    assert server.run(["prune", *words, str(tmp_path / "plain")]).code == 0
    assert not [path for path in (tmp_path / "linked").rglob("*") if path.is_symlink()]
    linked, plain = (judge.contents(tmp_path / name) for name in ("linked", "plain"))
    assert linked["model.safetensors"] == plain["model.safetensors"]


@pytest.mark.slow
def test_F7_not_what_it_says(server: Server, tmp_path: Path, figure: Any) -> None:
    for number, case in enumerate(of("F7")):
        place = tmp_path / str(number)
        place.mkdir()
        try:
            refuse(server, case, place)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
        shutil.rmtree(place)
    figure(cases=len(of("F7")), refused=len(of("F7")))


@pytest.mark.slow
def test_F7_a_config_that_asks_for_too_much_builds_no_module(
    server: Server, tmp_path: Path
) -> None:
    for name in ("10,000 layers", "vocabulary of 10^9", "size of 10^9"):
        case = next(one for one in of("F7") if one.name == f"config: {name}")
        place = tmp_path / name
        place.mkdir()
        folder = case.folder(server.tiny / "untied", place)
        words = ["plan", str(folder), "--recipe", str(server.tiny / "recipe.yaml")]
        mutant = "tests.reliability.test_f_models:forbid_modules"
        assert_clean_error(server.run(words, before=mutant), 4, case.pattern)
    # the control: a sound model does build some
    words[1] = str(server.tiny / "untied")
    assert server.run(words, before=mutant).code == 77


def forbid_modules() -> None:
    """In a case: end at once where a network is built."""
    from torch import nn

    nn.Linear.__init__ = lambda *_, **__: os._exit(77)  # type: ignore[method-assign]


@pytest.mark.slow
@each("F8")
def test_F8_pickle_only(server: Server, case: Case, tmp_path: Path) -> None:
    done, seen = refuse(server, case, tmp_path)
    if "E407" in done.stderr:
        assert not [path for path in seen.opened if path.endswith((".bin", ".pt", ".ckpt", ".pkl"))]
    if "LFS" not in case.name:
        assert "hint: convert it" in done.stderr


@pytest.mark.slow
def test_F8_stray_pickles_beside_sound_weights_are_never_opened(
    server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(server.tiny / "untied", folder)
    strays = ["optimizer.pt", "pytorch_model.bin", "training_args.bin", "rng_state.pth", "x.pkl"]
    for name in strays:
        (folder / name).write_bytes(hostile_models.PICKLE)
    words = ["prune", str(folder), "--recipe", str(server.tiny / "recipe.yaml"), "--out", "out"]
    done, seen = witness.run(server, words, tmp_path)
    assert done.code == 0, done.stderr
    assert not [path for path in seen.opened if Path(path).name in strays]
    assert not {path.name for path in (tmp_path / "out").iterdir()} & set(strays)
    assert not (tmp_path / hostile_models.CANARY).exists()
    assert not seen.pickles


def test_F8_the_pickles_of_the_tests_do_act(tmp_path: Path) -> None:
    """The control: whoever loads one makes the canary."""
    code = "import sys, pickle; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run(
        [sys.executable, "-c", code], input=hostile_models.PICKLE, cwd=tmp_path, check=True
    )
    assert (tmp_path / hostile_models.CANARY).exists()


@pytest.mark.slow
@each("F9")
def test_F9_pickle_allowed(server: Server, case: Case, tmp_path: Path) -> None:
    """There is no flag that allows pickles, so the hardest are refused like any."""
    _, seen = refuse(server, case, tmp_path)
    assert not [path for path in seen.opened if path.endswith(".bin")]


def test_F9_no_flag_allows_pickles() -> None:
    words = subprocess.run(
        [sys.executable, "-m", "hamcli", "recipe", "schema"],
        env={**os.environ, **PLAIN, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    source = (ROOT / "hamcli" / "cli").rglob("*.py")
    text = words + "".join(path.read_text() for path in source)
    assert "pickle" not in text
    assert "trust_remote_code" not in text


# ---- F4 ----


@pytest.mark.nightly
@pytest.mark.parametrize("change", ["cut", "replaced", "grown", "emptied"])
def test_F4_changes_while_read(server: Server, tmp_path: Path, change: str, figure: Any) -> None:
    """The weights change at the n-th time that they are opened: whole bytes, or code 4."""
    codes = []
    for at in range(1, 9):
        folder = tmp_path / f"model{at}"
        shutil.copytree(server.tiny / "untied", folder)
        out = tmp_path / f"out{at}"
        words = [
            "prune",
            str(folder),
            "--recipe",
            str(server.tiny / "recipe.yaml"),
            "--out",
            str(out),
        ]
        here = "tests.reliability.test_f_models:change_while_read"
        more = {"HAM_TESTS_CHANGE": f"{change} {at} {folder / 'model.safetensors'}"}
        done = server.run(words, before=here, env=more)
        codes.append(done.code)
        if done.code:
            assert_clean_error(done, 4, "E41|E43")
            assert not out.exists()
    assert 4 in codes
    figure(changes=len(codes), refused=codes.count(4), signals=sum(code < 0 for code in codes))


def change_while_read() -> None:
    """In a case: spoil the file when it is opened for the n-th time."""
    kind, at, path = os.environ["HAM_TESTS_CHANGE"].split(" ", 2)
    left = [int(at)]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or str(args[0]) != path:
            return
        left[0] -= 1
        if left[0] == 0:
            spoil(kind, Path(path))

    sys.addaudithook(hook)


def spoil(kind: str, path: Path) -> None:
    size = path.stat().st_size
    if kind == "cut":
        os.truncate(path, size // 2)
    elif kind == "emptied":
        os.truncate(path, 0)
    elif kind == "grown":
        os.truncate(path, size + 4096)
    else:
        content = hostile_models.tensors(path)
        os.unlink(path)
        hostile_models.pack(
            path, {name: (d, s, bytes(len(v))) for name, (d, s, v) in content.items()}
        )

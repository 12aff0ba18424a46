"""K: pipes that close, no terminal, odd environments, no network, a dry run that tells the same."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import hostile_models, hostile_recipes, judge, tiny, witness
from tests.reliability.assertions import assert_clean_error
from tests.reliability.server import Server, cold

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the tiny job writes when nothing is odd."""
    out = tmp_path_factory.mktemp("reference") / "out"
    done = server.run(tiny.sparsify(server.tiny, out))
    assert done.code == 0, done.stderr
    return judge.result(out)


def assert_same(out: Path, reference: dict[str, bytes]) -> None:
    assert judge.differences(judge.result(out), reference) == []


# ---- K1 ----


@pytest.mark.parametrize("closed", [[1], [2], [1, 2], [0, 1, 2]])
def test_K1_closed_streams(
    server: Server, tmp_path: Path, reference: dict[str, bytes], closed: list[int]
) -> None:
    out = tmp_path / "out"
    done = server.run(tiny.sparsify(server.tiny, out), cwd=tmp_path, closed=closed)
    assert done.code == 0, done.stderr
    assert_same(out, reference)


@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("words", [[], ["--json"], ["-v"]])
def test_K1_closed_pipe(
    server: Server, tmp_path: Path, reference: dict[str, bytes], which: str, words: list[str]
) -> None:
    """The reader goes before the first byte; the run goes on to its end."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {name: writer for name in ("stdout", "stderr") if which in (name, "both")}
    out = tmp_path / "out"
    done = server.run(tiny.sparsify(server.tiny, out, *words), cwd=tmp_path, **streams)
    os.close(writer)
    assert done.code == 0, done.stderr
    assert_same(out, reference)


def test_K1_full_device(server: Server, tmp_path: Path, reference: dict[str, bytes]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    out = tmp_path / "out"
    done = server.run(tiny.sparsify(server.tiny, out), cwd=tmp_path, stderr=full)
    assert done.code == 0
    assert_same(out, reference)
    # the folder is whole, what was to be shown of it is not
    again = tmp_path / "again"
    done = server.run(tiny.sparsify(server.tiny, again), cwd=tmp_path, stdout=full, stderr=full)
    assert done.code == 5
    assert_same(again, reference)
    # an error is still told by its code
    assert server.run(["check", "absent"], cwd=tmp_path, stdout=full, stderr=full).code == 4
    # half a document is no result
    path = str(server.tiny / "untied")
    assert server.run(["inspect", path, "--json"], cwd=tmp_path, stdout=full).code == 5
    os.close(full)


@pytest.mark.parametrize("command", ["inspect", "recipe show", "--help"])
def test_K1_head(server: Server, tmp_path: Path, command: str) -> None:
    """`ham ... | head -1` by the real console script, the reader gone after a line."""
    argument = {"inspect": [str(server.tiny / "untied")], "recipe show": ["quick"]}.get(command, [])
    process = cold([*command.split(), *argument], cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


# ---- K2 ----


@pytest.mark.parametrize(
    "env", [{"CI": "true"}, {"TERM": "dumb"}, {"TERM": None}, {"NO_COLOR": None, "TERM": "xterm"}]
)
def test_K2_not_a_tty(server: Server, tmp_path: Path, env: dict[str, str | None]) -> None:
    done = server.run(
        tiny.sparsify(server.tiny, tmp_path / "out"), cwd=tmp_path, env=env, closed=[0]
    )
    assert done.code == 0, done.stderr
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text
        assert "\r" not in text
        assert "\b" not in text
    progress = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert len(progress) <= 1 + done.seconds / 10, progress
    assert "%|" not in done.stderr


def test_K2_forced_colour_is_not_taken_from_a_pipe(server: Server, tmp_path: Path) -> None:
    """JSON stays JSON whatever the environment asks for."""
    env = {"NO_COLOR": None, "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm-256color"}
    done = server.run(["inspect", str(server.tiny / "untied"), "--json"], cwd=tmp_path, env=env)
    assert json.loads(done.stdout)


# ---- K3 ----

FOLDERS = {
    "space": "a b",
    "emoji": "\U0001f416",
    "newline": "a\nb",
    "long": "x" * 200,
    "quotes": "a'b\"c$d",
    "dash": "-rf",
    "percent": "%s{0}",
    "not UTF-8": os.fsdecode(b"a\xffb"),
}


@pytest.mark.parametrize("name", FOLDERS.values(), ids=FOLDERS.keys())
def test_K3_odd_paths(
    server: Server, tmp_path: Path, reference: dict[str, bytes], name: str
) -> None:
    place = tmp_path / name
    place.mkdir()
    done = server.run(tiny.sparsify(server.tiny, place / "out"), cwd=place)
    assert done.code == 0, done.stderr
    assert done.stderr.replace("\n", "").isprintable()
    assert_same(place / "out", reference)


@pytest.mark.parametrize(
    "env",
    [
        {"HOME": None},
        {"HOME": "/nonexistent"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"},
        {"TMPDIR": "/nonexistent"},
        {"COLUMNS": "0", "LINES": "x"},
        {"TZ": "Nowhere/Here"},
        {"XDG_CACHE_HOME": "/nonexistent", "HF_HOME": "/nonexistent"},
    ],
    ids=lambda env: "-".join(env),
)
def test_K3_odd_env(
    server: Server, tmp_path: Path, reference: dict[str, bytes], env: dict[str, str | None]
) -> None:
    done = server.run(tiny.sparsify(server.tiny, tmp_path / "out"), cwd=tmp_path, env=env)
    assert done.code == 0, done.stderr
    assert_same(tmp_path / "out", reference)


def test_K3_working_folder_that_is_gone(
    server: Server, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """Full paths work; a relative one is told to have nowhere to lie."""
    gone = tmp_path / "gone"
    gone.mkdir()
    here = "tests.reliability.test_k_terminal:remove_the_working_folder"
    done = server.run(tiny.sparsify(server.tiny, tmp_path / "out"), cwd=gone, before=here)
    assert done.code == 0, done.stderr
    assert_same(tmp_path / "out", reference)
    gone.mkdir()
    done = server.run(tiny.sparsify(server.tiny, Path("out")), cwd=gone, before=here)
    assert_clean_error(done, 5, "")


def remove_the_working_folder() -> None:
    Path.cwd().rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone may become another user")
def test_K3_working_folder_that_is_read_only(
    server: Server, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    tmp_path.chmod(0o755)
    read_only, place = tmp_path / "read-only", tmp_path / "place"
    read_only.mkdir(mode=0o555)
    place.mkdir()
    place.chmod(0o777)
    model = shutil.copytree(server.tiny / "untied", tmp_path / "model")
    for path in model.iterdir():
        path.chmod(0o644)
    job = tiny.sparsify(server.tiny, place / "out")
    job[1] = str(model)
    done = server.run(job, cwd=read_only, user=65534, env={"HOME": "/nonexistent"})
    assert done.code == 0, done.stderr
    # the rest tells the model's path, which is another
    weights = (place / "out" / "model.safetensors").read_bytes()
    assert weights == reference["model.safetensors"]


# ---- K4 ----


@pytest.mark.parametrize(
    "env",
    [
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        {"HF_HUB_OFFLINE": "1"},
        {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    ],
    ids=lambda env: next(iter(env)),
)
@pytest.mark.parametrize("command", ["plan", "prune"])
def test_K4_offline(server: Server, tmp_path: Path, env: dict[str, str], command: str) -> None:
    words = [command, "nobody/no-such-model-here", "--recipe", str(server.tiny / "recipe.yaml")]
    more = {**env, "HF_HOME": str(tmp_path / "cache")}
    done = server.run(words, cwd=tmp_path, env=more, timeout=60)
    assert_clean_error(done, 4, "E40[23]")
    assert "  hint: " in done.stderr
    assert done.cpu_seconds < 5
    assert done.seconds < 30  # of a busy machine; the wait itself is bounded at 3.5 s


def test_K4_a_local_model_never_touches_the_network(
    server: Server, tmp_path: Path, figure: Any
) -> None:
    sockets = 0
    model, out = str(server.tiny / "untied"), tmp_path / "out"
    for words in (
        tiny.sparsify(server.tiny, out),
        ["prune", model, "--target", "0.5", "--out", str(tmp_path / "pruned")],
        ["plan", model, "--recipe", str(server.tiny / "recipe.yaml")],
        ["eval", str(out), "--against", model, "--recipe", str(server.tiny / "recipe.yaml")],
        ["inspect", model],
        ["check", str(out)],
    ):
        done, seen = witness.run(server, words, tmp_path)
        assert done.code == 0, (words, done.stderr)
        assert seen.written_outside(tmp_path, Path("/tmp"), *caches()) == []
        sockets += len(seen.sockets)
    figure(commands=6, sockets=sockets)
    assert sockets == 0


def caches() -> list[Path]:
    """Where compiled code may be kept."""
    return [Path.home() / ".cache", hostile_cache(), Path(__file__).parents[2]]


def hostile_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "/nonexistent"))


# ---- K5 ----


def test_K5_dry_run_of_every_hostile_model(server: Server, tmp_path: Path, figure: Any) -> None:
    """`ham plan` tells the same as the run would, and writes nothing."""
    refused = 0
    for number, case in enumerate(hostile_models.CASES):
        place = tmp_path / str(number)
        place.mkdir()
        folder = case.folder(server.tiny / "untied", place)
        before = sorted(place.rglob("*"))
        words = ["plan", str(folder), "--recipe", str(server.tiny / "recipe.yaml")]
        done = server.run(words, cwd=place, timeout=60)
        assert done.code, case
        assert_clean_error(done, 4, case.pattern)
        assert sorted(place.rglob("*")) == before
        refused += 1
        shutil.rmtree(place)
    figure(hostile_models=len(hostile_models.CASES), refused_alike=refused)


def test_K5_dry_run_of_every_hostile_recipe(server: Server, tmp_path: Path, figure: Any) -> None:
    places = hostile_recipes.write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    model = str(server.tiny / "untied")
    for number, (name, place) in enumerate(places.items()):
        if "\0" in place:
            continue  # no word of a command line can hold it
        told = []
        run = ["sparsify", model, "--out", str(tmp_path / "out")]
        for words in (["plan", model], run)[: 2 if number % 4 == 0 else 1]:
            done = server.run([*words, "--recipe", place], cwd=tmp_path)
            assert done.code, name
            assert_clean_error(done, 2, "E2")
            told.append(done.stderr)
        assert len(set(told)) == 1, name
    assert sorted(tmp_path.rglob("*")) == before
    figure(hostile_recipes=len(places), refused_alike=len(places))


def test_K5_a_sound_plan_writes_nothing(server: Server, tmp_path: Path) -> None:
    words = ["plan", str(server.tiny / "untied"), "--recipe", str(server.tiny / "recipe.yaml")]
    done, seen = witness.run(server, words, tmp_path)
    assert done.code == 0, done.stderr
    assert seen.written_outside(Path("/tmp"), *caches()) == []
    assert list(tmp_path.iterdir()) == []

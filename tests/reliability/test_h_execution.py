"""H: no code of strangers runs, no secret is written, names from files do nothing on a screen."""

import ast
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import hostile_models, judge, tiny, witness
from tests.reliability.assertions import assert_clean_error, assert_clean_streams, is_json
from tests.reliability.server import PLAIN, ROOT, SECRET, Server

EVIL = "open({canary!r}, 'w').close()\nclass C: pass\nM = T = P = C\n"


def make_evil(folder: Path, canary: Path) -> None:
    """Everything in a folder that ever ran code or reached out."""
    for name in ("evil.py", "modeling_llama.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(EVIL.format(canary=str(canary)))
    auto_map = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.M",
        "AutoTokenizer": ["evil.T", None],
        "AutoImageProcessor": "evil.P",
    }
    hostile_models.with_config(
        auto_map=auto_map,
        trust_remote_code=True,
        _attn_implementation_internal="org/kernel",
        _attn_implementation="org/kernel",
        _name_or_path="/home/someone/secret",
        kernel_config={"kernel_mapping": {"RMSNorm": "org/kernel:evil"}},
        transformers_weights="../elsewhere.safetensors",
        custom_pipelines={"x": {"impl": "evil.C"}},
        tokenizer_class="EvilTokenizer",
    )(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "auto_map": auto_map,
                "trust_remote_code": True,
                "vocab_file": "/etc/passwd",
                "tokenizer_file": "/etc/passwd",
                "fast_tokenizer_files": ["../secret.json"],
                "chat_template": "{{ cycler.__init__.__globals__.os.system('touch ham-canary') }}",
            }
        )
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/evil", "peft_type": "LORA"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "org/evil"}))


@pytest.fixture
def evil(server: Server, tmp_path: Path) -> Path:
    folder = tmp_path / "evil"
    shutil.copytree(server.tiny / "untied", folder)
    make_evil(folder, tmp_path / "canary")
    return folder


def assert_nothing_ran(seen: witness.Watched, folder: Path, tmp_path: Path) -> None:
    assert not (tmp_path / "canary").exists()
    assert not list(tmp_path.rglob(hostile_models.CANARY))
    assert not seen.sockets
    assert not seen.pickles
    assert not seen.questions
    bad = (".py", "passwd", "secret.json", "elsewhere.safetensors")
    assert not [path for path in seen.opened_below(folder) if path.endswith(bad)]
    assert "/etc/passwd" not in seen.opened


# ---- H1 ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "code"), [("llama", 0), ("evil", 4), ("../evil", 4), ("auto", 4)]
)
def test_H1_remote_code(
    server: Server, evil: Path, tmp_path: Path, model_type: str, code: int
) -> None:
    """The built-in class or code 4; on a terminal, where transformers would ask."""
    hostile_models.with_config(model_type=model_type)(evil)
    words = ["prune", str(evil), "--recipe", str(server.tiny / "recipe.yaml"), "--out", "out"]
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 10)  # whoever asks gets a yes
    done, seen = witness.run(server, words, tmp_path, stdin=theirs, timeout=60)
    os.close(theirs)
    os.close(ours)
    if code:
        assert_clean_error(done, code, "E422.*not run")
    else:
        assert done.code == 0, done.stderr
    assert_nothing_ran(seen, evil, tmp_path)


@pytest.mark.slow
def test_H1_a_loader_that_trusts_is_caught(server: Server, evil: Path, tmp_path: Path) -> None:
    """The control: the evil file does act when it is imported, and the hook sees a question."""
    subprocess.run([sys.executable, "-c", "import evil"], cwd=evil, check=True)
    assert (tmp_path / "canary").exists()
    here = "tests.reliability.test_h_execution:ask"
    done, seen = witness.run(server, [], tmp_path, env={"HAM_TESTS_THEN": here})
    assert done.code == 0
    assert seen.questions
    assert seen.pickles
    assert seen.sockets


def ask() -> None:
    """In a case: all that must not be done."""
    import pickle  # noqa: TID251 - to be caught at it
    import socket

    with suppress(EOFError, OSError):
        input("code? ")
    pickle.loads(pickle.dumps(Path("x")))  # noqa: S301
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    os._exit(0)


# ---- H2 ----


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "sparsify"])
def test_H2_export_clean(server: Server, evil: Path, tmp_path: Path, command: str) -> None:
    words = [command, str(evil), "--recipe", str(server.tiny / "recipe.yaml"), "--out", "out"]
    done = server.run(words, cwd=tmp_path)
    assert done.code == 0, done.stderr
    found = judge.contents(tmp_path / "out")
    assert set(found) <= LISTED, set(found) - LISTED
    for name, raw in found.items():
        for word in (b"auto_map", b"_name_or_path", b"evil", b"/home/someone", b"trust_remote"):
            shown = name in ("README.md", "report.html", "report.json", "recipe.yaml")
            assert word not in raw or (shown and word == b"evil"), (name, word)
        assert str(tmp_path).encode() not in raw or name == "recipe.yaml", name
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


LISTED = {
    "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "report.json",
    "report.html", "README.md", "recipe.yaml",
}  # fmt: skip

# ---- H3 ----

FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "click",
    "runpy", "code", "imp",
}  # fmt: skip
FORBIDDEN_WORDS = ("shell", "trust_remote_code", "allow_pickle")
FORBIDDEN_CALLS = re.compile(
    r"(eval|exec|compile|input|__import__|torch\.(load|save)|yaml\.(load|load_all|unsafe_load|"
    r"full_load)|os\.(system|popen)|np\.load|numpy\.load|torch\.hub\.load|"
    r"importlib\.import_module|torch\.distributed\.checkpoint\.\w+)"
)


def faults_of_source(text: str) -> list[str]:
    """Imports and calls that no line of the package may have."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if FORBIDDEN_CALLS.fullmatch(called) else []
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (
                    keyword.arg in ("shell", "trust_remote_code", "allow_pickle")
                    and value is not False
                ):
                    found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


def test_H3_no_pickle_in_the_source() -> None:
    files = sorted((ROOT / "hamcli").rglob("*.py"))
    assert len(files) > 100
    for path in files:
        # the package's own names are imported late, from a fixed table
        fine = ["importlib.import_module"] if path.parent.name == "hamcli" else []
        assert [one for one in faults_of_source(path.read_text()) if one not in fine] == [], path
    assert "weights_only" not in "".join(path.read_text() for path in files)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "torch.load(x)", "eval(x)", "exec(x)",
        "yaml.load(x, Loader=y)", "subprocess.run(x, shell=True)", "input()", "np.load(x)",
        "f(trust_remote_code=True)", "f(trust_remote_code=flag)", "importlib.import_module(x)",
    ],
)  # fmt: skip
def test_H3_the_scan_sees_each_of_them(line: str) -> None:
    assert faults_of_source(line)


@pytest.mark.slow
def test_H3_no_pickle(server: Server, tmp_path: Path, figure: Any) -> None:
    """Nothing is unpickled in the whole job, nor in a resume of it, packing or a check."""
    out = tmp_path / "out"
    job = tiny.sparsify(server.tiny, out, "--keep-run")
    pickles = 0
    for words in (
        job,
        ["export", str(out), "--format", "packed", "--out", str(tmp_path / "packed")],
        ["check", str(tmp_path / "packed"), "--min-sparsity", "0.5"],
        ["inspect", str(out)],
        tiny.sparsify(server.tiny, out, "--overwrite", "--resume"),
    ):
        done, seen = witness.run(server, words, tmp_path)
        assert done.code == 0, done.stderr
        pickles += len(seen.pickles)
        assert not seen.sockets
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [
        path for path in files if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK")
    ]
    figure(commands=5, pickle_opcodes_executed=pickles, sockets=0)
    assert pickles == 0


# ---- H4 ----

OTHER_SECRETS = {
    "HUGGING_FACE_HUB_TOKEN": "hf_otherSecret0123456789",
    "WANDB_API_KEY": "wandbSecret0123456789",
    "AWS_SECRET_ACCESS_KEY": "awsSecret0123456789",
}


@pytest.mark.slow
@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize(
    ("more", "codes"),
    [
        ([], (0,)),
        (["--set", "optimizer.lr=1e30"], (7,)),
        (["--set", "targets.include=[nothing]"], (2,)),
        (["--set", f"model.token={SECRET}"], (2,)),
        (["--set", f"data.hf_token={SECRET}"], (2,)),
        (["--set", f"data.source=https://me:{SECRET}@huggingface.co/datasets/x"], (4,)),
        (["--set", f"data.evaluation=hf://me:{SECRET}@datasets/x.jsonl"], (4,)),
        (["--set", f"model.id=https://me:{SECRET}@huggingface.co/x"], (4,)),
    ],
)
def test_H4_secrets(
    server: Server, tmp_path: Path, more: list[str], codes: tuple[int, ...], debug: str
) -> None:
    environment = {**OTHER_SECRETS, "HAM_DEBUG": debug}
    job = tiny.sparsify(server.tiny, tmp_path / "out", "--keep-run")
    if any("model.id" in word for word in more):
        job.pop(1)
    plan = ["plan", *job[1 : job.index("--out")]]
    for words in ([*job, *more], [*plan, *more]):
        done = server.run(words, cwd=tmp_path, env=environment)
        assert done.code in (*codes, 0 if words[0] == "plan" and codes == (7,) else codes[0])
        told = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
        told |= judge.contents(tmp_path)
        for name, raw in told.items():
            for secret in (SECRET, *OTHER_SECRETS.values()):
                assert secret.encode() not in raw, name


@pytest.mark.slow
def test_H4_a_command_that_is_told_for_going_on_holds_no_secret(
    server: Server, tmp_path: Path
) -> None:
    """What is to be typed again is shown; the environment is not."""
    here = "tests.reliability.test_h_execution:stop_at_once"
    done = server.run(
        tiny.sparsify(server.tiny, tmp_path / "out"), cwd=tmp_path, before=here, env=OTHER_SECRETS
    )
    assert done.code == 75, done.stderr
    assert "ham sparsify" in done.stderr or "same command" in done.stderr, done.stderr
    for secret in (SECRET, *OTHER_SECRETS.values()):
        assert secret not in done.stderr


def stop_at_once() -> None:
    """In a case: a SIGTERM as soon as the handlers stand."""
    import signal

    from hamcli import signals

    whole = signals.stop_on_signals

    def stopped(*args: Any, **words: Any) -> Any:
        context = whole(*args, **words)
        enter = context.__enter__

        class Entered:
            def __enter__(self) -> Any:
                stop = enter()
                os.kill(os.getpid(), signal.SIGTERM)
                return stop

            def __exit__(self, *args: Any) -> Any:
                return context.__exit__(*args)

        return Entered()

    for module in list(sys.modules.values()):
        if getattr(module, "stop_on_signals", None) is whole:
            module.stop_on_signals = stopped  # type: ignore[attr-defined]


# ---- H5 ----

NAMES = {
    "escape": "a\x1b[2J\x1b]0;x\x07b",
    "carriage return": "a\rham: done",
    "C1": "a\x9b31mb",
    "right to left": "a\u202egpj.b",
    "newline": "a\nham: error[HAM-E001]: no",
    "script": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "pipe": "a|b|c",
    "markup": "[red]a[/red]",
    "link": "[x](javascript:alert(1))",
    "formula": "=cmd|' /C calc'!A0",
    "template": "{{ 7 * 7 }}{% raw %}",
    "quotes": "\"'`$(touch ham-canary)",
    "long": "x" * 200,
}


class Tags(HTMLParser):
    """The tags of a page, and attributes that act."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.acting: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name.startswith("on") or "javascript:" in (value or ""):
                self.acting.append(f"{tag} {name}={value}")


def assert_prints_clean(text: str) -> None:
    assert "\x1b" not in text
    assert "\r" not in text
    bad = [char for char in text if char != "\n" and not char.isprintable()]
    assert not bad, bad


def assert_pages_are_escaped(folder: Path) -> None:
    for path in folder.glob("*.html"):
        page = Tags(path.read_text())
        assert not page.tags & {"script", "img", "iframe", "object", "embed", "link"}, page.tags
        assert not page.acting
    card = (folder / "README.md").read_text()
    assert not re.search(r"(?<!\\)<(script|img)", card)
    assert not re.search(r"(?<!\\)\]\(javascript:", card)
    assert_prints_clean(card)
    report = (folder / "report.json").read_text()
    assert is_json(report)
    assert_prints_clean(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_H5_output_injection(server: Server, tmp_path: Path, name: str) -> None:
    """A name that acts on a screen, a page or a sheet, as folder, file, label and tensor."""
    place = tmp_path / (name.replace("/", "_"))
    place.mkdir()
    model, data = place / "model", place / f"{name.replace('/', '_')}.jsonl"
    shutil.copytree(server.tiny / "untied", model)
    shutil.copy(server.tiny / "data.jsonl", data)
    hostile_models.with_config(id2label={"0": name}, label2id={name: 0}, _name_or_path=name)(model)
    job = tiny.sparsify(server.tiny, place / "out", "--set", f"data.source={json.dumps(str(data))}")
    job[1] = str(model)
    plan = ["plan", *job[1 : job.index("--out")], *job[job.index("--out") + 2 :]]
    commands = [job, plan, ["inspect", str(model)], ["check", str(place / "out")]]
    for words in commands:
        for more in ([], ["--json"]):
            words = [*words, "--overwrite"] if more and words is job else words
            done = server.run([*words, *more], cwd=tmp_path)
            assert done.code == 0, (words, done.stderr)
            assert_prints_clean(done.stderr)
            assert_prints_clean(done.stdout)
            assert not more or is_json(done.stdout)
    assert_pages_are_escaped(place / "out")
    assert not list(tmp_path.rglob(hostile_models.CANARY))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_H5_a_tensor_with_such_a_name_is_shown_escaped_or_refused(
    server: Server, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "m.safetensors"
    hostile_models.pack(path, {name: ("F32", [2, 2], bytes(16))})
    for words in (["inspect", str(path)], ["inspect", str(path), "--json"], ["check", str(path)]):
        done = server.run(words, cwd=tmp_path)
        assert_prints_clean(done.stdout + done.stderr)
        assert_clean_streams(done) if "--json" in words else None
        assert done.code == (0 if name.isprintable() else 4)
        if done.code:
            assert_clean_error(done, 4, "E414")
        elif "--json" in words:
            assert json.loads(done.stdout)["tensors"][0]["name"] == name


def test_H5_no_sheet_is_written() -> None:
    """There is no CSV whose cell could begin with `=`."""
    for path in (ROOT / "hamcli").rglob("*.py"):
        text = path.read_text()
        assert "csv.writer" not in text, path
        assert "DictWriter" not in text, path
        assert "to_csv" not in text, path


def test_H5_the_page_check_sees_what_acts() -> None:
    page = Tags("<p onclick=x><script>1</script><a href='javascript:1'>")
    assert page.tags == {"p", "script", "a"}
    assert len(page.acting) == 2
    assert PLAIN["HF_TOKEN"] == SECRET

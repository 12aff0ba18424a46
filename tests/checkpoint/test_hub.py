import hashlib
import http.server
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hamcli.checkpoint.hub import parse_hub_name
from hamcli.checkpoint.source import find_model
from tests.checkpoint.pico import llama, refusal, save

COMMIT = "c0ffee" * 6 + "c0de"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("hub") / "model")


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one model needs."""

    folder: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(path)
        names = sorted(file.name for file in self.folder.iterdir())
        if path.startswith("/api/models/org/name/tree/"):
            body = json.dumps([self._entry(name) for name in names]).encode()
        elif path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
            siblings = [{"rfilename": name} for name in names]
            body = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
            body = (self.folder / path.rpartition("/")[2]).read_bytes()
        elif path.startswith("/api/models/org/name/revision/"):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, has_body)
        elif path.startswith("/api/models/org/closed"):
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"}, has_body)
        else:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, has_body)
        tag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._send(200, body, tag, has_body)

    def _entry(self, name: str) -> dict[str, Any]:
        size = (self.folder / name).stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": "0" * 40}

    def _send(self, status: int, body: bytes, headers: dict[str, str], has_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[_Hub]]:
    folder = Path(shutil.copytree(model_folder, tmp_path / "served"))

    class Hub(_Hub):
        requests: list[str] = []  # noqa: RUF012 - one list for one server

    Hub.folder = folder
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_id_is_pinned_to_its_commit(hub: type[_Hub], model_folder: Path) -> None:
    source = find_model("org/name")
    assert source.revision == COMMIT
    assert source.folder.name == COMMIT
    assert source.files == find_model(str(model_folder)).files


def test_only_files_of_the_list_are_fetched(hub: type[_Hub]) -> None:
    for name in ("pytorch_model.bin", "modeling_evil.py", "model.fp16.safetensors", "x.gguf"):
        (hub.folder / name).write_bytes(b"evil")
    find_model("org/name@main")
    fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors"}


def test_what_was_fetched_is_there_offline(
    hub: type[_Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    online = find_model("org/name")
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("org/name", "org/name@main", f"org/name@{COMMIT}"):
        assert find_model(name).files == online.files
    assert find_model("org/name", offline=True).revision == COMMIT
    assert hub.requests == []


def test_cache_answers_when_the_hub_is_gone(
    hub: type[_Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    online = find_model("org/name")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert find_model("org/name").files == online.files


@pytest.mark.parametrize(
    ("name", "text"),
    [("org/none", "no such model"), ("org/name@v9", "no such revision"), ("org/closed", "closed")],
)
def test_what_the_hub_refuses_is_told(hub: type[_Hub], name: str, text: str) -> None:
    refusal("E403", text, find_model, name)


def test_pickles_alone_are_refused_before_anything_is_fetched(hub: type[_Hub]) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    refusal("E407", "never opened", find_model, "org/name")
    assert not [path for path in hub.requests if "/resolve/" in path]


def test_offline_and_absent_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refusal("E402", "offline", find_model, "org/name")
    assert "cache" in line


def test_hub_that_never_answers_is_given_up_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        refusal("E402", "neither a folder here nor in the hub", find_model, "org/name")
        # the promise of RELIABILITY K4 is five seconds; a busy machine may need more
        assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None)),
        ("gpt2", ("gpt2", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/na.me-x_y@refs/pr/3", ("org/na.me-x_y", "refs/pr/3")),
    ],
)
def test_hub_names_are_taken_apart(text: str, parts: tuple[str, str | None]) -> None:
    name = parse_hub_name(text)
    assert name is not None
    assert (name.repo, name.revision) == parts
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a/b/c",
        "../x",
        "org/..",
        "org/name@",
        "org/name@../x",
        "a b/c",
        "a/b@c d",
        "a--b/c",
        "é",
    ],
)
def test_what_cannot_be_a_hub_name_is_none(text: str) -> None:
    assert parse_hub_name(text) is None

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hamcli.checkpoint.headers import read_header
from tests.checkpoint.pico import entry, refusal, write_header, write_raw


def two_tensors(path: Path) -> Path:
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path
    )
    return path


def test_header_says_what_the_file_holds(tmp_path: Path) -> None:
    header = read_header(two_tensors(tmp_path / "m.safetensors"))
    start = header.tensors[0].begin
    assert [(one.name, one.dtype, one.shape) for one in header.tensors] == [
        ("a", "F32", (2, 3)),
        ("b", "BF16", (4,)),
    ]
    assert [(one.begin - start, one.end - start, one.total) for one in header.tensors] == [
        (0, 24, 6),
        (24, 32, 4),
    ]
    assert header.tensors[-1].end == header.file_bytes


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    path = two_tensors(tmp_path / "m.safetensors")
    with path.open("ab") as file:
        file.write(b"x")
    refusal("E413", "its header says", read_header, path)


F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
LIES: dict[str, dict[str, Any]] = {
    "overlap": {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)},
    "hole": {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 5, 9)},
    "late start": {"a": entry("F32", [1], 4, 8)},
    "dtype": {"a": entry("F16", [1], 0, 4)},
    "unknown dtype": {"a": entry("F31", [1], 0, 4)},
    "shape": {"a": entry("F32", [2], 0, 4)},
    "negative": {"a": entry("F32", [-1], 0, 4)},
    "bool": {"a": entry("F32", [True], 0, 4)},
    "float": {"a": {**F4, "shape": [1.0]}},
    "huge beside zero": {"a": entry("F32", [0, 2**62], 0, 0)},
    "overflow": {"a": entry("F32", [2**62, 4], 0, 0)},
    "rank": {"a": entry("F32", [1] * 17, 0, 4)},
    "backwards": {"a": entry("F32", [1], 4, 0)},
    "three offsets": {"a": {**F4, "data_offsets": [0, 4, 4]}},
    "extra key": {"a": {**F4, "code": "x"}},
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "list": {"a": [1]},
    "empty name": {"": F4},
    "escape": {"a\x1b[31m": F4},
    "newline": {"a\nb": F4},
    "right to left": {"a\u202eb": F4},
    "long name": {"a" * 513: F4},
    "metadata": {"a": F4, "__metadata__": {"format": 1}},
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused(tmp_path: Path, lie: str) -> None:
    refusal("E414", "", read_header, write_header(tmp_path / "m.safetensors", LIES[lie], bytes(4)))


RAW = {
    "not JSON": b"{nonsense",
    "a list": b"[]",
    "nan": b'{"a": NaN}',
    "latin": b'{"\xff": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16-le"),
    "twice": b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": 1}',
    "deep": b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "deep objects": b'{"a":' * 90_000 + b"1" + b"}" * 90_000,
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("kind", RAW)
def test_headers_that_are_no_object_are_refused(tmp_path: Path, kind: str) -> None:
    refusal("E414", "", read_header, write_raw(tmp_path / "m.safetensors", RAW[kind]))


def test_a_hundred_thousand_entries_are_allowed(tmp_path: Path) -> None:
    header = {f"t{index}": entry("U8", [0], 0, 0) for index in range(100_000)}
    path = write_header(tmp_path / "m.safetensors", header)
    assert len(read_header(path).tensors) == 100_000
    header["one more"] = entry("U8", [0], 0, 0)
    refusal("E414", "100001 entries", read_header, write_header(path, header))


@pytest.mark.parametrize(
    ("magic", "word"),
    [
        (b"PK\x03\x04" + bytes(40), "zip"),
        (b"\x80\x02}q\x00." + bytes(40), "pickle"),
        (b"GGUF" + bytes(40), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "LFS"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, magic: bytes, word: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(magic)
    refusal("E408", word, read_header, path)


def test_a_header_of_128_bytes_is_no_pickle(tmp_path: Path) -> None:
    text = json.dumps({"a": F4}).encode()
    path = write_raw(tmp_path / "m.safetensors", text.ljust(0x80), bytes(4))
    assert read_header(path).tensors[0].name == "a"


def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refusal("E410", "regular", read_header, tmp_path / "pipe")


def test_device_is_refused() -> None:
    refusal("E410", "regular", read_header, Path("/dev/zero"))

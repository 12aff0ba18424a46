"""Model folders that are attacks or broken, each made from the tiny one, and how each is refused.

Every case is refused with code 4 by any command that opens it; `pattern` is searched in the line.
They are made with struct and json alone.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARDS = 3
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@dataclass(frozen=True)
class Case:
    """One hostile folder."""

    test: str
    """Of the plan, `F5` say."""
    name: str
    make: Callable[[Path], None]
    """Spoils a copy of the tiny model."""
    pattern: str
    """Of the line that refuses it."""
    is_sharded: bool = False

    def __str__(self) -> str:
        return f"{self.test}: {self.name}"

    def folder(self, tiny: Path, place: Path) -> Path:
        """A spoilt copy of the tiny model, in a folder of its own."""
        folder = place / "model"
        shutil.copytree(tiny, folder)
        if self.is_sharded:
            split(folder)
        self.make(folder)
        return folder


# ---- files by hand ----


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(
    path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None
) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> dtype, shape, bytes."""
    header, data = read(path)
    header.pop("__metadata__", None)
    return {
        name: (one["dtype"], one["shape"], data[slice(*one["data_offsets"])])
        for name, one in header.items()
    }


def pack(path: Path, content: dict[str, tuple[str, list[int], bytes]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, values) in content.items():
        end = len(data) + len(values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), end]}
        data += values
    write(path, header, data)


def split(folder: Path) -> None:
    """The single file as shards with an index."""
    content = tensors(folder / WEIGHTS)
    names = list(content)
    weight_map = {}
    for part in range(SHARDS):
        shard = f"model-{part + 1:05d}-of-{SHARDS:05d}.safetensors"
        chosen = names[part::SHARDS]
        pack(folder / shard, {name: content[name] for name in chosen})
        weight_map.update(dict.fromkeys(chosen, shard))
    size = sum(len(values) for _, _, values in content.values())
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )
    (folder / WEIGHTS).unlink()


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


# ---- ways to spoil ----


def cut_at(size: Callable[[int], int], part: int = 0) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = shards(folder)[part]
        os.truncate(path, size(path.stat().st_size))

    return make


def with_tensors(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        content = tensors(folder / WEIGHTS)
        edit(content)
        pack(folder / WEIGHTS, content)

    return make


def with_header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        header, data = read(folder / WEIGHTS)
        edit(header)
        write(folder / WEIGHTS, header, data)

    return make


def with_config(**changes: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


def with_index(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index)
        (folder / INDEX).write_text(json.dumps(index))

    return make


def with_shard_named(name: Any) -> Callable[[Path], None]:
    return with_index(lambda index: index["weight_map"].update({QUERY: name}))


def with_raw(name: str, raw: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(raw)

    return make


def only(name: str, raw: bytes) -> Callable[[Path], None]:
    """A file of another format in place of the weights; nobody may read it."""

    def make(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(raw)

    return make


def in_place_of_shard(make_it: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = shards(folder)[0]
        path.unlink()
        make_it(path)

    return make


def ask_for_outside(folder: Path) -> None:
    """The index names a sound shard beside the folder."""
    shutil.copy(shards(folder)[0], folder.parent / "outside.safetensors")
    with_shard_named("../outside.safetensors")(folder)


def link(name: str, target: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / name
        elsewhere = folder.parent / f"elsewhere-{name}"
        shutil.move(path, elsewhere)
        path.symlink_to(target(elsewhere))

    return make


def link_folder(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    (folder / "1_Pooling").symlink_to(outside)


# ---- bombs ----


def entry_bomb(entries: int) -> Callable[[Path], None]:
    one = ',"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'

    def make(folder: Path) -> None:
        text = "".join(one % number for number in range(entries))
        write(folder / WEIGHTS, ("{" + text[1:] + "}").encode(), b"")

    return make


def length_bomb(folder: Path) -> None:
    write(folder / WEIGHTS, b"{}", b"", length=100 * 2**20 + 1)


def sparse_length_bomb(folder: Path) -> None:
    """The header is as long as it says: a hole on the disk."""
    length_bomb(folder)
    os.truncate(folder / WEIGHTS, 110 * 2**20)


def shape_bomb(folder: Path) -> None:
    write(
        folder / WEIGHTS,
        {QUERY: {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
        b"",
    )


def index_bomb(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "' + "x" * 50 * 2**20 + '"}}')


def index_of_many(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": [' + "{}," * 5_000_000 + "{}]}}")


def deep_header(folder: Path) -> None:
    write(folder / WEIGHTS, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")


def deep_json(name: str) -> Callable[[Path], None]:
    return with_raw(name, b'{"a":' * 100_000 + b"1" + b"}" * 100_000)


# ---- pickles that act ----


def acting(canary: str) -> bytes:
    """Protocol 2: os.system("touch CANARY") when loaded."""
    command = f"touch {canary}".encode()
    return b"\x80\x02cposix\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85R."


CANARY = "ham-canary"
PICKLE = acting(CANARY)
ZIP = b"PK\x03\x04" + b"\0" * 26 + PICKLE
HARD_PICKLES: dict[str, bytes] = {
    "reduce": PICKLE,
    "deflate bomb": b"PK\x03\x04\x14\0\0\0\x08\0" + b"\xff" * 64,
    "stride 0": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\0K\0K\0K\0tR.",
    "sparse lie": b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n(K\0K\0tR.",
    "nested": b"\x80\x02" + b"(" * 100_000 + b".",
    "cut": PICKLE[: len(PICKLE) // 2],
}

# ---- names ----

NAMES: list[Any] = [
    "../model.safetensors", "../../etc/passwd", "/etc/passwd", "/etc/model.safetensors",
    "..\\model.safetensors", "C:\\model.safetensors", "C:model.safetensors", "a/b.safetensors",
    "./model.safetensors", "..", ".", "", " ", "model.safetensors\0", "model.safetensors\n",
    "model.safetensors\0.bin", "a\nb.safetensors", "model\u2024\u2024.safetensors",
    "\uff0e\uff0e\uff0fmodel.safetensors", "%2e%2e%2fmodel.safetensors", "..%2fmodel.safetensors",
    "~/model.safetensors", "$HOME.safetensors", "-rf.safetensors", ".hidden.safetensors",
    "a..safetensors", "model.bin", "/dev/zero", "/dev/stdin", "/proc/self/mem", "CON.safetensors ",
    "file:///etc/passwd.safetensors", "http://127.0.0.1:9/x.safetensors",
    "x" * 10_000 + ".safetensors", "\x1b]0;x\x07.safetensors", "\u202esafetensors.bin",
    7, None, True, 1.5, ["model.safetensors"], {"a": 1},
]  # fmt: skip


def cases() -> Iterator[Case]:
    yield from truncated()
    yield Case("F3", "a million entries", entry_bomb(10**6), "E414.*header of")
    yield Case("F3", "half a million entries", entry_bomb(5 * 10**5), "E414.*too many")
    yield Case("F3", "header of 100 MB and a byte", length_bomb, "E41[34]")
    yield Case("F3", "header of 100 MB that is there", sparse_length_bomb, "E414")
    yield Case("F3", "shape [0, 2^62]", shape_bomb, "E414.*too large")
    yield Case("F3", "index of 50 MB", index_bomb, "E417.*index", is_sharded=True)
    yield Case("F3", "index of millions", index_of_many, "E412", is_sharded=True)
    yield Case("F3", "header 100,000 deep", deep_header, "E414.*deep")
    yield Case("F3", "config 100,000 deep", deep_json("config.json"), "E406.*deep")
    yield Case("F3", "index 100,000 deep", deep_json(INDEX), "E412.*deep", is_sharded=True)
    for number, name in enumerate(NAMES):
        text = f"{number} {str(name)[:16].encode('ascii', 'replace')!r}"
        yield Case("F5", text, with_shard_named(name), "E411", is_sharded=True)
    yield Case("F5", "a sound shard outside", ask_for_outside, "E411", is_sharded=True)
    yield Case("F5", "folder", in_place_of_shard(Path.mkdir), "E410", is_sharded=True)
    yield Case("F5", "FIFO", in_place_of_shard(os.mkfifo), "E410", is_sharded=True)
    zero = in_place_of_shard(lambda path: path.symlink_to("/dev/zero"))
    yield Case("F5", "link to /dev/zero", zero, "E410", is_sharded=True)
    yield from linked()
    yield from lying_tensors()
    yield from lying_configs()
    yield from other_formats()


def truncated() -> Iterator[Case]:
    for part in range(SHARDS):
        for name, size in (("0", lambda size: 0), ("half", lambda size: size // 2)):
            yield Case("F2", f"shard {part} at {name}", cut_at(size, part), "E413", is_sharded=True)
    yield Case("F2", "one byte short", cut_at(lambda size: size - 1), "E413", is_sharded=True)
    yield Case("F2", "gone", in_place_of_shard(lambda path: None), "E415", is_sharded=True)


def linked() -> Iterator[Case]:
    def absolute(path: Path) -> Path:
        return path

    yield Case("F6", "weights elsewhere", link(WEIGHTS, absolute), "E410.*link")
    yield Case("F6", "config elsewhere", link("config.json", absolute), "E410.*link")
    yield Case("F6", "tokenizer elsewhere", link("tokenizer.json", absolute), "E410.*link")
    yield Case("F6", "loop", link(WEIGHTS, lambda path: WEIGHTS), "E410.*link")
    yield Case("F6", "link that dangles", link(WEIGHTS, lambda path: "/absent"), "E410.*link")
    yield Case("F6", "link to a device", link(WEIGHTS, lambda path: "/dev/zero"), "E410.*link")
    yield Case("F6", "folder elsewhere", link_folder, "E410")


def lying_tensors() -> Iterator[Case]:
    def retyped(dtype: str, width: int) -> Callable[[dict[str, Any]], Any]:
        return lambda content: content.update({QUERY: (dtype, [32, 32], b"\1" * (1024 * width))})

    def poisoned(word: bytes) -> Callable[[dict[str, Any]], Any]:
        def edit(content: dict[str, Any]) -> None:
            dtype, shape, values = content[QUERY]
            content[QUERY] = dtype, shape, values[:400] + word + values[404:]

        return edit

    def halved(content: dict[str, Any]) -> None:
        dtype, _, values = content[QUERY]
        content[QUERY] = dtype, [16, 32], values[: len(values) // 2]

    def reshaped(content: dict[str, Any]) -> None:
        dtype, _, values = content[QUERY]
        content[QUERY] = dtype, [64, 16], values

    def renamed(content: dict[str, Any]) -> None:
        content[QUERY.replace("q_proj", "Q_proj")] = content.pop(QUERY)

    edits: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
        ("missing", lambda content: content.pop(QUERY), f"E425.*{QUERY}"),
        ("missing norm", lambda content: content.pop(NORM), f"E425.*{NORM}"),
        ("missing head", lambda content: content.pop("lm_head.weight"), "E425.*lm_head"),
        ("extra", lambda c: c.update({"model.odd": ("F32", [1], bytes(4))}), "E427.*model.odd"),
        ("another name", renamed, "E42[57].*_proj"),
        ("wrong shape", halved, f"E429.*{QUERY}"),
        ("as many elements", reshaped, f"E429.*{QUERY}"),
        ("int8", retyped("I8", 1), f"E428.*{QUERY}"),
        ("bool", retyped("BOOL", 1), f"E428.*{QUERY}"),
        ("int64", retyped("I64", 8), f"E428.*{QUERY}"),
        ("fp8", retyped("F8_E4M3", 1), f"E428.*{QUERY}"),
        ("fp4", lambda c: c.update({QUERY: ("F4", [32, 32], bytes(512))}), f"E428.*{QUERY}"),
        ("one NaN", poisoned(b"\0\0\xc0\x7f"), f"E430.*{QUERY}.*1 of 1024"),
        ("one infinity", poisoned(b"\0\0\x80\xff"), f"E430.*{QUERY}.*1 of 1024"),
        ("nothing at all", lambda content: content.clear(), "E42"),
    ]  # fmt: skip
    for name, edit, pattern in edits:
        yield Case("F7", name, with_tensors(edit), pattern)
    lie = with_header(lambda header: header[QUERY].update(dtype="F16"))
    yield Case("F7", "lying dtype", lie, f"E414.*{QUERY}")

    def doubled(folder: Path) -> None:
        first, second = shards(folder)[:2]
        content = tensors(second)
        content.update(list(tensors(first).items())[:1])
        pack(second, content)

    yield Case("F7", "in two shards", doubled, "E412.* in .* and in ", is_sharded=True)
    size = with_index(lambda index: index["metadata"].update(total_size=1))
    yield Case("F7", "wrong total_size", size, "E412.*total_size", is_sharded=True)
    absent = with_index(lambda index: index["weight_map"].update(odd=index["weight_map"][NORM]))
    yield Case("F7", "in the index only", absent, "E412.*odd", is_sharded=True)
    untold = with_index(lambda index: index["weight_map"].pop(NORM))
    yield Case("F7", "not in the index", untold, f"E412.*{NORM}", is_sharded=True)


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("10,000 layers", {"num_hidden_layers": 10_000}, "E420.*num_hidden_layers"),
    ("3 layers", {"num_hidden_layers": 3, "layer_types": None}, "E425.*layers.2"),
    ("1 layer", {"num_hidden_layers": 1, "layer_types": None}, "E427.*layers.1"),
    ("vocabulary of 10^9", {"vocab_size": 10**9}, "E420.*vocab_size"),
    ("vocabulary of 65", {"vocab_size": 65}, "E429"),
    ("10^30 layers", {"num_hidden_layers": 10**30}, "E420"),
    ("10^400 layers", {"num_hidden_layers": 10**400}, "E420"),
    ("not a number of layers", {"num_hidden_layers": float("nan")}, "E420"),
    ("infinitely many heads", {"num_attention_heads": float("inf")}, "E4[23]"),
    ("no heads", {"num_attention_heads": 0}, "E431"),
    ("negative size", {"hidden_size": -1}, "E4"),
    ("size of 10^9", {"hidden_size": 10**9}, "E420"),
    ("size as text", {"hidden_size": "32"}, "E4"),
    ("head of 10^9", {"head_dim": 10**9}, "E4"),
    ("10^9 key-value heads", {"num_key_value_heads": 10**9}, "E4"),
    ("positions of 10^12", {"max_position_embeddings": 10**12}, "E420"),
    ("code as activation", {"hidden_act": "__import__('os').system('touch ham-canary')"}, "E431"),
    ("unknown architecture", {"model_type": "evil"}, "E422.*not run"),
    ("no architecture", {"model_type": None}, "E406"),
    ("quantised", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "E421"),
    ("quantised by code", {"quantization_config": {"quant_method": "../evil"}}, "E421"),
    ("rope that is nonsense", {"rope_scaling": {"rope_type": "evil", "factor": -1}}, "E4"),
    ("rope parameters", {"rope_parameters": "x"}, "E4"),
]  # fmt: skip


def lying_configs() -> Iterator[Case]:
    for name, changes, pattern in CONFIGS:
        yield Case("F7", f"config: {name}", with_config(**changes), pattern)
    for name, raw in (
        ("a list", b"[]"),
        ("cut", b'{"model_type": '),
        ("binary", bytes(range(256))),
    ):
        yield Case("F7", f"config: {name}", with_raw("config.json", raw), "E406")


def other_formats() -> Iterator[Case]:
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"):
        yield Case("F8", name, only(name, PICKLE), "E407.*never opened")
    for name in ("model.gguf", "model.h5", "model.onnx"):
        yield Case("F8", name, only(name, b"GGUF" + bytes(64)), "E407")
    for name, raw, kind in (
        ("zip", ZIP, "zip"),
        ("pickle", PICKLE + bytes(64), "pickle"),
        ("GGUF", b"GGUF" + bytes(64), "GGUF"),
        ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        ("LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
    ):
        yield Case("F8", f"safetensors that is {name}", with_raw(WEIGHTS, raw), f"E408.*{kind}")
    for name, raw in HARD_PICKLES.items():
        yield Case("F9", name, only("pytorch_model.bin", raw), "E407.*never opened")


CASES = list(cases())


def sweep(size: int, places: int, seed: int = 0) -> list[int]:
    """`places` sizes to cut a file of `size` bytes at, 0 and size - 1 among them."""
    fixed = [0, 1, 7, 8, 9, size // 2, size - 2, size - 1]
    others = random.Random(seed).sample(range(10, size - 2), places - len(fixed))
    return sorted({*fixed, *others})

"""Thousands of damaged safetensors files against a reader, in forked children with little memory.

`python -m tests.reliability.header_fuzz COUNT [READER]` prints what came of it as JSON. The same
COUNT gives the same files. READER is ours, or one of the bad ones below that the harness must flag.
No torch is imported, so that memory is that of the reader.
"""

import ctypes
import json
import mmap
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from hamcli.checkpoint.packed.files import pack_file, read_any_header
from hamcli.checkpoint.recount import count_zeros
from hamcli.errors import InputRefused
from tests.reliability.children import in_child

BATCH = 250
ADDRESS_SPACE = 512 * 2**20
"""What a child may map beyond what it began with."""

ODD_VALUES: list[Any] = [
    0, 1, -1, 7, 2**31, 2**53 + 1, 2**62, 2**63, 10**30, 0.5, 1e308, None, True, "F16", "F31", "",
    [], [0, 4], [[]], [0, 2**62], [2**40, 2**40], {}, {"dtype": "F32"}, "a" * 5000,
]  # fmt: skip
ODD_NAMES = ["", "\0", "a\x1b[2J", "a\nb", "\u202ea", "../a", "__metadata__", "x" * 5000, "\ud800"]
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"NaN", b"1e999", b"-0", b"\\u0000", b"\xff"]

Reader = Callable[[Path], dict[str, tuple[str, list[int]]]]
"""Reads the whole file; name -> dtype and shape."""


# ---- files ----


def seeds(folder: Path) -> list[Path]:
    """Sound files of several kinds, a packed one last."""
    chance = random.Random(0)
    sparse = np.array([chance.choice([0, 0, 0, 1.5, -2]) for _ in range(4096)], "<f4")
    kinds: list[dict[str, Any]] = [
        {"a": ("F32", [2, 3], b"\1" * 24), "b": ("BF16", [4], bytes(8))},
        {f"layers.{i}.weight": ("F16", [4, 4], bytes(range(32))) for i in range(12)},
        {"none": ("F32", [0, 3], b""), "one": ("I64", [], bytes(8)),
         "yes": ("BOOL", [3], b"\1\0\1"), "half": ("F8_E4M3", [2], b"\x7f\0"),
         "wide": ("F64", [1], bytes(8))},
        {"model.weight": ("F32", [64, 64], sparse.tobytes()), "model.bias": ("F32", [2], bytes(8))},
    ]  # fmt: skip
    paths = []
    for index, tensors in enumerate(kinds):
        paths.append(folder / f"seed{index}.safetensors")
        paths[-1].write_bytes(sound_file(tensors, {"format": "pt"} if index % 2 else None))
    packed = folder / "seed4.safetensors"
    pack_file(paths[-1], packed)
    return [*paths, packed]


def sound_file(tensors: dict[str, Any], metadata: dict[str, str] | None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, values) in tensors.items():
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += values
    return joined(json.dumps(header).encode(), data)


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length % 2**64) + header + data


# ---- damage that knows the structure ----


def mutants(raws: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged files; one in five is damaged twice."""
    chance = random.Random(seed)
    for _ in range(count):
        raw = chance.choice(raws)
        for _ in range(2 if chance.random() < 0.2 else 1):
            raw = chance.choice(MUTATIONS)(raw, chance)
        yield raw


def parts(raw: bytes) -> tuple[bytes, bytes]:
    """Header text and data, as far as an earlier damage left them."""
    length = struct.unpack("<Q", raw[:8].ljust(8, b"\0"))[0]
    return raw[8 : 8 + length], raw[8 + length :]


def flip_bit(raw: bytes, chance: random.Random) -> bytes:
    data = bytearray(raw or b"\0")
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(raw: bytes, chance: random.Random) -> bytes:
    return raw[: chance.randrange(len(raw) + 1)]


def trail(raw: bytes, chance: random.Random) -> bytes:
    return raw + bytes(chance.choice([1, 7, 8, 4096]))


def lie_about_length(raw: bytes, chance: random.Random) -> bytes:
    header, data = parts(raw)
    near = [0, 1, 8, len(header) - 1, len(header) + 1, len(header) + 8, len(raw)]
    return joined(header, data, chance.choice([*near, 32 * 2**20, 2**27, 2**31, 2**63, -1]))


def splice(raw: bytes, chance: random.Random) -> bytes:
    header, data = parts(raw)
    at = chance.randrange(len(header) + 1)
    gone = chance.choice([0, 0, 1, 2, 8])
    return joined(header[:at] + chance.choice(TOKENS) + header[at + gone :], data)


def pad(raw: bytes, chance: random.Random) -> bytes:
    header, data = parts(raw)
    return joined(header + chance.choice([b" ", b"\0", b"\n", b"{}"]) * chance.randrange(9), data)


def nest(raw: bytes, chance: random.Random) -> bytes:
    depth = chance.choice([10, 1000, 20_000])
    inner = chance.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])
    header, data = parts(raw)
    return joined(header.rstrip()[:-1] + b', "deep": ' + inner + b"}", data)


def duplicate(raw: bytes, chance: random.Random) -> bytes:
    header, data = parts(raw)
    twin = b'"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return joined(b"{" + twin + b", " + twin + b", " + header.lstrip()[1:], data)


def change_entry(raw: bytes, chance: random.Random) -> bytes:
    """One value of one entry becomes odd."""

    def edit(header: dict[str, Any], name: str) -> None:
        entry = header[name]
        key = chance.choice(["dtype", "shape", "data_offsets", "extra"])
        if isinstance(entry.get(key), list) and entry[key] and chance.random() < 0.5:
            entry[key][chance.randrange(len(entry[key]))] = chance.choice(ODD_VALUES)
        elif chance.random() < 0.1:
            entry.pop(key, None)
        else:
            entry[key] = chance.choice(ODD_VALUES)

    return edited(raw, chance, edit)


def swap_entries(raw: bytes, chance: random.Random) -> bytes:
    def edit(header: dict[str, Any], name: str) -> None:
        other = chance.choice(sorted(header))
        key = chance.choice(["dtype", "shape", "data_offsets"])
        if isinstance(header[other], dict) and key in header[other]:
            header[name][key], header[other][key] = header[other][key], header[name].get(key)

    return edited(raw, chance, edit)


def rename(raw: bytes, chance: random.Random) -> bytes:
    def edit(header: dict[str, Any], name: str) -> None:
        header[chance.choice(ODD_NAMES)] = header.pop(name)

    return edited(raw, chance, edit)


def drop(raw: bytes, chance: random.Random) -> bytes:
    return edited(raw, chance, lambda header, name: header.pop(name) and None)


def change_metadata(raw: bytes, chance: random.Random) -> bytes:
    def edit(header: dict[str, Any], name: str) -> None:
        told = header.get("__metadata__")
        keys = sorted(told) if isinstance(told, dict) else []
        if keys and chance.random() < 0.7:
            key = chance.choice(keys)
            text = str(told[key])
            told[key] = chance.choice([text[: len(text) // 2], text[::-1], text * 2, "", 7, None])
        else:
            header["__metadata__"] = chance.choice(
                [*ODD_VALUES, {"format": 1}, {"ham.packed": "1"}]
            )

    return edited(raw, chance, edit)


def edited(raw: bytes, chance: random.Random, edit: Callable[[dict[str, Any], str], None]) -> bytes:
    """The file with its header changed, if what came before left one to change."""
    header, data = parts(raw)
    try:
        entries = json.loads(header)
        edit(entries, chance.choice([name for name in sorted(entries) if name != "__metadata__"]))
        return joined(json.dumps(entries).encode("utf-8", "surrogatepass"), data)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return raw


MUTATIONS = [
    flip_bit, flip_bit, cut, trail, lie_about_length, splice, splice, pad, nest, duplicate,
    change_entry, change_entry, change_entry, swap_entries, rename, drop, change_metadata,
]  # fmt: skip


# ---- readers: ours, and three that trust what they read ----


def ours(path: Path) -> dict[str, tuple[str, list[int]]]:
    header = read_any_header(path)
    counts = count_zeros(path)
    assert counts.keys() == {tensor.name for tensor in header.tensors}
    return {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in header.tensors}


def trusting(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Believes that the header is well formed."""
    header, _ = parts(path.read_bytes())
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}


def allocating(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Makes room for as much as the file says, before it looks whether it is there."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8].ljust(8, b"\0"))
    if length < 2**30:
        np.ones(length, np.uint8)
    return ours(path)


def pointing(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Reads through a bare pointer into a map of the file."""
    with path.open("r+b") as file:
        raw = mmap.mmap(file.fileno(), 0) if path.stat().st_size else b""
    start = ctypes.addressof(ctypes.c_char.from_buffer(raw)) if raw else 0
    (length,) = struct.unpack("<Q", raw[:8].ljust(8, b"\0"))
    ctypes.string_at(start, min(length, 2**40))
    return ours(path)


READERS: dict[str, Reader] = {
    "ours": ours,
    "trusting": trusting,
    "allocating": allocating,
    "pointing": pointing,
}


# ---- what came of it ----


def judge(path: Path, read: Reader) -> tuple[str, str]:
    """`refused`, `same`, or what is wrong: `trace`, `unclear`, `differs`; and why."""
    try:
        found = read(path)
    except InputRefused as error:
        (line, *_) = error.lines()
        clean = line.isprintable() and len(line) <= 300 and path.name in line
        return ("refused", "") if clean else ("unclear", line)
    except Exception:  # noqa: BLE001 - a trace is what the harness looks for
        return "trace", traceback.format_exc()
    try:
        told = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError as error:
        return "differs", f"the library refuses: {error}"
    if found.keys() != told.keys():
        return "differs", "other names than the library finds"
    if "ham.packed" in parts(path.read_bytes())[0].decode("utf-8", "replace"):
        return "same", ""  # its tensors are not those of the file
    theirs = {name: (entry["dtype"], list(entry["shape"])) for name, entry in told.items()}
    return ("same", "") if theirs == found else ("differs", "other tensors than the library")


def batch(raws: list[bytes], path: Path, read: Reader, answer: int) -> None:
    """In a child: judge each file, tell the counts and the growth of memory."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: dict[str, int] = {}
    worst = ""
    for raw in raws:
        path.write_bytes(raw)
        kind, why = judge(path, read)
        counts[kind] = counts.get(kind, 0) + 1
        worst = worst or (f"{kind}: {why}" if kind not in ("refused", "same") else "")
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    os.write(answer, json.dumps({"counts": counts, "growth": growth, "worst": worst}).encode())


def fuzz(count: int, read: Reader, folder: Path) -> dict[str, Any]:
    """Judge `count` damaged files in batches, each in a child of its own."""
    raws = list(mutants([path.read_bytes() for path in seeds(folder)], count))
    kinds = ("refused", "same", "trace", "unclear", "differs")
    found: dict[str, Any] = {"files": count, **dict.fromkeys(kinds, 0), "signals": 0, "growth": 0}
    found["worst"] = ""
    began = time.process_time()
    for first in range(0, count, BATCH):
        status, told = in_child(
            lambda answer, first=first: batch(  # type: ignore[misc]
                raws[first : first + BATCH], folder / "mutant.safetensors", read, answer
            )
        )
        found["signals"] += status != 0
        for kind, number in told.get("counts", {}).items():
            found[kind] += number
        found["growth"] = max(found["growth"], told.get("growth", 0))
        found["worst"] = found["worst"] or told.get("worst", "")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["cpu_seconds"] = round(time.process_time() - began + used.ru_utime + used.ru_stime, 1)
    return found


def main() -> None:
    count, read = int(sys.argv[1]), READERS[sys.argv[2] if len(sys.argv) > 2 else "ours"]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ham-tests-", dir=memory) as folder:
        print(json.dumps(fuzz(count, read, Path(folder))))


if __name__ == "__main__":
    main()

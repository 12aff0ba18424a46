"""Recipes that are attacks or mistakes, and what each of them is worth.

`python -m tests.reliability.hostile_recipes FOLDER` reads every one of them, each in a fork of its
own, without torch, and prints how it ended, its CPU seconds and its memory as JSON.
"""

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.reliability.children import in_child

TRIES = 3
"""Forks a case; the least CPU time of them is that of the work, not of the neighbours."""


def alias_bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines)


def merge_bomb(levels: int = 20) -> str:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} {{<<: [*a{level - 1}, *a{level - 1}], y{level}: 1}}")
    return "\n".join(lines)


REFUSED: dict[str, str | bytes] = {
    # what hangs, or fills the memory of, a plain reader
    "alias bomb": alias_bomb(),
    "merge bomb": merge_bomb(),
    "alias of itself": "a: &a [*a]",
    "alias of a mapping": "sparsity: &s {target: 0.5}\ntraining: *s",
    "anchor alone": "sparsity: &s {target: 0.5}",
    "deep list": "[" * 10_000,
    "deep mapping": "{a: " * 10_000,
    "deep block": "\n".join(" " * depth + "a:" for depth in range(300)),
    "deep dashes": "- " * 20_000,
    "deep set": "? " * 5_000,
    "thirty-three deep": "sparsity: " + "[" * 32 + "]" * 32,
    "too many items": "targets: {include: [" + "a," * 20_000 + "]}",
    "too many keys": "\n".join(f"k{number}: 1" for number in range(5_000)),
    "two thousand unknown keys": "\n".join(f"k{number}: 1" for number in range(2_000)),
    "two thousand wrong globs": "targets: {include: [" + "1," * 2_000 + "]}",
    "too large": "# " + "x" * 300_000,
    "too large by a byte": "#" * (64 * 1024 + 1),
    "a key of 60 kB": "? " + "x" * 60_000 + "\n: 1",
    "a value of 60 kB": "sparsity: {method: " + "x" * 60_000 + "}",
    "folded lines": "a: >\n" + "  x\n" * 15_000,
    "number of 60,000 digits": "training: {steps: " + "9" * 60_000 + "}",
    "float of 60,000 digits": "optimizer: {lr: 0." + "1" * 60_000 + "}",
    # code
    "python object": "a: !!python/object:os.system [x]",
    "python apply": "a: !!python/object/apply:os.system ['touch canary']",
    "python name": "a: !!python/name:os.system",
    "python module": "a: !!python/module:os",
    "local tag": "sparsity: !include other.yaml",
    "standard tag": "sparsity: {target: !!float 0.5}",
    "binary": "model: {id: !!binary aGFt}",
    "tag of an address": "sparsity: !<tag:yaml.org,2002:map> {target: 0.5}",
    # numbers that are none
    "not a number": "sparsity: {target: .nan}",
    "infinite": "optimizer: {lr: .inf}",
    "infinite by exponent": "optimizer: {lr: 1e999}",
    "boolean for a number": "sparsity: {target: true}",
    "number in quotes": "sparsity: {target: '0.9'}",
    "percent": "sparsity: {target: 90%}",
    "percent as a number": "sparsity: {target: 90}",
    "octal": "training: {steps: 0777}",
    "sexagesimal": "training: {steps: 1:30}",
    "underscores": "training: {steps: 1_000}",
    "hexadecimal": "training: {steps: 0x10}",
    "negative": "training: {steps: -1}",
    "float for a count": "training: {steps: 1e3}",
    "number beyond int64": "training: {seed: 99999999999999999999}",
    "bad date": "training: {steps: 2024-99-99}",
    # what is no recipe
    "list": "- 1\n- 2",
    "text": "sparsity",
    "two documents": "sparsity: {target: 0.5}\n---\nsparsity: {target: 0.6}",
    "unclosed": "sparsity: {target: 0.5",
    "tab": "sparsity:\n\ttarget: 0.5",
    "NUL": "sparsity: {target: 0.5}\n\0",
    "escape": "sparsity: {method: '\x1b[31m'}",
    "right to left": "sparsity: {method: \u202enus}",
    "UTF-16": "sparsity: {target: 0.5}".encode("utf-16"),
    "Latin-1": "# \xe9\nsparsity: {target: 0.5}".encode("latin-1"),
    "random bytes": bytes(range(256)),
    "zip": b"PK\x03\x04" + bytes(60),
    "key that is a list": "{[1, 2]: 3}",
    "key that is null": "~: 1",
    "key that is a number": "1: 1",
    "merge key": "<<: {sparsity: {target: 0.5}}",
    # mistakes
    "duplicate key": "sparsity: {target: 0.5, target: 0.6}",
    "duplicate section": "sparsity: {target: 0.5}\ntraining: {steps: 5}\nsparsity: {target: 0.6}",
    "unknown section": "sparsiti: {target: 0.5}",
    "unknown key": "sparsity: {targt: 0.5}",
    "key of another section": "training: {target: 0.5}",
    "section that is a number": "sparsity: 0.9",
    "section that is null": "sparsity:",
    "section that is a list": "sparsity: [0.9]",
    "secret": "model: {hf_token: hf_abcdefgh}",
    "secret in a section": "hub: {password: hf_abcdefgh}",
    "values that do not fit": "sparsity: {pattern: '2:4', target: 0.9}",
}

ACCEPTED: dict[str, tuple[str | bytes, float]] = {
    # what is accepted, and the target that it then means
    "empty": ("", 0.9),
    "comments": ("# nothing\n\n# at all\n", 0.9),
    "byte order mark": ("\ufeffsparsity: {target: 0.5}", 0.5),
    "carriage returns": ("sparsity:\r\n  target: 0.5\r\n", 0.5),
    "document markers": ("---\nsparsity: {target: 0.5}\n...\n", 0.5),
    "JSON": ('{"sparsity": {"target": 0.5}}', 0.5),
    "no leading zero": ("sparsity: {target: .5}", 0.5),
    "exponent": ("sparsity: {target: 5e-1}", 0.5),
    "thirty-one deep": ("# " + "[" * 31 + "\nsparsity: {target: 0.5}", 0.5),
}

WHOLE_FILE = {
    "too large", "too large by a byte", "UTF-16", "Latin-1", "random bytes", "zip", "list", "text",
}  # fmt: skip
"""Faults that stand at no line."""

SPECIAL = {
    "no such file": lambda folder: folder / "absent.yaml",
    "FIFO": lambda folder: made(os.mkfifo, folder / "pipe.yaml"),
    "folder": lambda folder: made(os.mkdir, folder / "folder.yaml"),
    "endless device": lambda folder: made(linked_to_zero, folder / "zero.yaml"),
    "dash": lambda folder: "-",
    "loop of links": lambda folder: made(linked_to_itself, folder / "loop.yaml"),
    "name of 10 kB": lambda folder: "x" * 10_000 + ".yaml",
    "name with NUL": lambda folder: "a\0b.yaml",
    "name with escape": lambda folder: "\x1b[2J.yaml",
}


def linked_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def linked_to_itself(path: Path) -> None:
    path.symlink_to(path)


def made(make: Any, path: Path) -> Path:
    make(path)
    return path


def write(folder: Path) -> dict[str, str]:
    """Name of each refused case -> what to give to `--recipe`."""
    places = {name: str(place(folder)) for name, place in SPECIAL.items()}
    for number, (name, text) in enumerate(REFUSED.items()):
        path = folder / f"r{number}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        places[name] = str(path)
    return places


def read_one(place: str) -> dict[str, Any]:
    """How one recipe ended: code and lines of its error; what it cost."""
    from hamcli.errors import HamError
    from hamcli.recipe import read_recipe, recipe_layer

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    code, lines = "", []
    try:
        read_recipe([recipe_layer(place)])
    except HamError as error:
        code, lines = error.code, error.lines()
    except BaseException:  # noqa: BLE001 - a trace is what is looked for
        code, lines = "trace", [traceback.format_exc()]
    seconds = time.process_time() - began
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"code": code, "lines": lines, "seconds": seconds, "growth": growth}


def main() -> None:
    folder = Path(sys.argv[1])
    places = write(folder)
    for number, (name, (text, _)) in enumerate(ACCEPTED.items()):
        path = folder / f"a{number}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        places[name] = str(path)
    read_one("quick")  # what is made once is made now
    read_one(places["unknown key"])
    found = {}
    for name, place in places.items():

        def work(answer: int, place: str = place) -> None:
            os.write(answer, json.dumps(read_one(place)).encode())

        tries = [in_child(work) for _ in range(TRIES)]
        status, told = tries[0]
        seconds = min(one.get("seconds", 9.9) for _, one in tries)
        found[name] = {"status": status, **told, "seconds": seconds}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

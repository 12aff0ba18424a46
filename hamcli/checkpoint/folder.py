"""Which files of a model folder are read at all, and how: plain files inside it, by fixed names.

The folder is a stranger's. A link is followed only where the hub's own cache has one; everything
else that is not a plain file is refused before it is opened.
"""

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from hamcli.checkpoint.headers import open_regular, read_exactly
from hamcli.errors import InputRefused, ResourceError

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "vocab.bpe",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "bpe.codes",
    "dict.txt",
    "tekken.json",
)
TOKENIZER = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
SENTENCE = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt")

SIDE_FILES = (GENERATION, *TOKENIZER, *PROCESSOR, *SENTENCE, *LICENCES)

JSON_LIMIT = 32 * 2**20
JSON_ITEM_LIMIT = 500_000
SIDE_FILE_LIMIT = 256 * 2**20

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.safetensors")
_CHUNK = 2**20


def find_file(folder: Path, name: str) -> Path | None:
    """The plain file `name` of `folder`, by a path without links; None when there is none.

    A link is followed when it is one of the hub's cache, from `snapshots/COMMIT/` to a file
    directly in `blobs/`.

    Raises:
        InputRefused: It is another kind of link, a folder, a pipe or a device.
    """
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise ResourceError("E541", "cannot read the model", path, "permission denied") from error
    except (OSError, ValueError) as error:
        raise InputRefused("E410", "cannot open a file of the model", path, str(error)) from error
    if stat.S_ISLNK(mode):
        return _cached_blob(folder, path)
    if not stat.S_ISREG(mode):
        raise InputRefused("E410", "not a regular file", path, right="a plain file")
    if path.parent != folder and not path.resolve().is_relative_to(folder.resolve()):
        raise InputRefused("E410", "a folder of the model leads outside", path)
    return path


def is_shard_name(name: object) -> bool:
    """Whether `name` can only be a safetensors file directly inside its folder."""
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None and ".." not in name


def read_json(path: Path, what: str, *, code: str) -> dict[str, Any]:
    """The JSON object in the file at `path`, at most 32 MB and half a million items.

    Raises:
        InputRefused: With `code`, when it is too large, not JSON or not an object.
    """
    raw = read_bytes(path, JSON_LIMIT)
    if raw.count(b",") > JSON_ITEM_LIMIT or raw.count(b"{") + raw.count(b"[") > JSON_ITEM_LIMIT:
        # a few bytes of JSON can become hundreds in memory
        raise InputRefused(code, f"{what} cannot be read", path, "too many entries")
    try:
        value = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise InputRefused(code, f"{what} cannot be read", path, "it is nested too deep") from None
    except ValueError as error:
        raise InputRefused(code, f"{what} cannot be read", path, str(error)[:120]) from error
    if not isinstance(value, dict):
        raise InputRefused(code, f"{what} cannot be read", path, "it is not a JSON object")
    return value


def read_bytes(path: Path, limit: int = SIDE_FILE_LIMIT) -> bytes:
    """The whole file at `path`, which a `find_file` gave, up to `limit` bytes.

    Raises:
        InputRefused: It is longer than that.
    """
    with open_regular(path) as handle:
        size = os.fstat(handle).st_size
        if size > limit:
            raise InputRefused("E417", "file too large", path, f"{size} bytes", f"at most {limit}")
        data = bytearray(size)
        return bytes(data[: read_exactly(handle, memoryview(data), 0)])


def sha256(path: Path) -> str:
    """The SHA-256 of the file at `path`, in hexadecimal, a megabyte at a time."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with open_regular(path) as handle:
        offset = 0
        while count := read_exactly(handle, buffer, offset):
            digest.update(buffer[:count])
            offset += count
    return digest.hexdigest()


def _cached_blob(folder: Path, path: Path) -> Path:
    """What a link of the hub's cache points at."""
    snapshots = folder.parent
    target = Path(os.path.normpath(path.parent / path.readlink()))
    is_cache = snapshots.name == "snapshots" and target.parent == snapshots.parent / "blobs"
    if not is_cache or not target.is_file() or target.is_symlink():
        raise InputRefused(
            "E410",
            "link in a model folder",
            path,
            "links are followed only inside the hub's cache",
            "a plain file",
            ["copy the folder with its links resolved: cp -rL MODEL NEW"],
        )
    return target

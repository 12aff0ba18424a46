"""A model folder, dense <-> packed: weight files packed, config.json marked, the rest as it is.

The mark is one text right behind the first brace of config.json, so that taking it out again gives
the same bytes. The index of shards stays as it is; its `total_size` is that of the dense tensors.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hamcli.checkpoint.folder import CONFIG, read_bytes, read_json
from hamcli.checkpoint.headers import FLOATS, Header, read_header
from hamcli.checkpoint.packed.files import pack_file
from hamcli.errors import InputRefused

METHOD = "ham"
"""The `quant_method` under which transformers finds the loader."""
_KEY = "quantization_config"
_MARK = f'"{_KEY}": {{"quant_method": "{METHOD}", "version": 1}}'.encode()
_MARKED = re.compile(rb'(?:"(?:torch_)?dtype": "[a-z0-9]+", )?' + re.escape(_MARK) + rb"(?:, )?")
_TORCH_DTYPES = dict(zip(FLOATS, ("float64", "float32", "float16", "bfloat16"), strict=True))


def is_marked(config: dict[str, object]) -> bool:
    """Whether a config.json is that of a packed folder."""
    said = config.get(_KEY)
    return isinstance(said, dict) and said.get("quant_method") == METHOD


def without_mark(config: dict[str, object]) -> dict[str, object]:
    """The config of the dense folder."""
    return {key: value for key, value in config.items() if key != _KEY or not is_marked(config)}


def mark_config(path: Path, first: Header) -> bytes:
    """The bytes of the packed folder's config.json, from that of the dense one at `path`.

    Args:
        path: The dense folder's config.json.
        first: The header of its first weight file, dense.

    Raises:
        InputRefused: The model is quantised: transformers unpacks a model in one way, not in two.
    """
    config = read_json(path, "the model's config", code="E406")
    if config.get(_KEY):
        why = "the config has a quantization_config"
        raise InputRefused("E444", "already packed or quantised", path, why, "a dense model")
    raw = read_bytes(path)
    begin = raw.index(b"{") + 1
    mark = _dtype_mark(config, first) + _MARK
    return raw[:begin] + mark + (b", " if config else b"") + raw[begin:]


def _dtype_mark(config: Mapping[str, Any], first: Header) -> bytes:
    """The dtype that transformers finds in the dense tensors, where config.json names none.

    It takes that of the first one, by name, and packed ones do not tell theirs.
    """
    if config.get("dtype") is not None or config.get("torch_dtype") is not None:
        return b""
    names = sorted(one.name for one in first.tensors if one.dtype in FLOATS)
    free = [key for key in ("dtype", "torch_dtype") if key not in config]  # no key stands twice
    if not names or not free:
        return b""
    dtypes = {one.name: one.dtype for one in first.tensors}
    return f'"{free[0]}": "{_TORCH_DTYPES[dtypes[names[0]]]}", '.encode()


def unmark_config(path: Path) -> bytes:
    """The bytes of the dense folder's config.json, from that of the packed one at `path`.

    Raises:
        InputRefused: Somebody has written it anew, so the mark is no longer where it was put.
    """
    raw = read_bytes(path)
    begin = raw.find(b"{") + 1
    if mark := _MARKED.match(raw, begin):
        return raw[:begin] + raw[mark.end() :]
    config = read_json(path, "the model's config", code="E406")
    if not is_marked(config):
        return raw
    raise InputRefused(
        "E445",
        "config.json was changed after packing",
        f"{path}: {_KEY}",
        "it no longer stands where ham put it",
        "the config.json of the packed folder as ham wrote it, its other keys edited at will",
    )


def pack_in_place(folder: Path, weights: Sequence[Path], *, marked: bool = True) -> None:
    """Make a finished dense folder, which nobody reads yet, a packed one.

    Args:
        folder: The folder.
        weights: Its weight files, by name.
        marked: Whether it has a config.json, to be marked.

    Raises:
        InputRefused: The model is quantised.
        OSError: The disk.
    """
    config = folder / CONFIG
    text = mark_config(config, read_header(weights[0])) if marked else None
    for path in weights:
        packed = path.with_name(path.name + ".packing")
        pack_file(path, packed)
        os.replace(packed, path)
    if text is not None:
        config.write_bytes(text)

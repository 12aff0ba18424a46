"""A model folder, dense <-> packed: weight files packed, config.json marked, the rest as it is.

The mark is one text right behind the first brace of config.json, so that taking it out again gives
the same bytes. The index of shards stays as it is; its `total_size` is that of the dense tensors.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from hamcli.checkpoint.folder import CONFIG, read_bytes, read_json
from hamcli.checkpoint.packed.files import pack_file
from hamcli.errors import InputRefused

METHOD = "ham"
"""The `quant_method` under which transformers finds the loader."""
_KEY = "quantization_config"
_MARK = f'"{_KEY}": {{"quant_method": "{METHOD}", "version": 1}}, '.encode()


def is_marked(config: dict[str, object]) -> bool:
    """Whether a config.json is that of a packed folder."""
    said = config.get(_KEY)
    return isinstance(said, dict) and said.get("quant_method") == METHOD


def without_mark(config: dict[str, object]) -> dict[str, object]:
    """The config of the dense folder."""
    return {key: value for key, value in config.items() if key != _KEY or not is_marked(config)}


def mark_config(path: Path) -> bytes:
    """The bytes of the packed folder's config.json, from that of the dense one at `path`.

    Raises:
        InputRefused: The model is quantised: transformers unpacks a model in one way, not in two.
    """
    config = read_json(path, "the model's config", code="E406")
    if config.get(_KEY):
        why = "the config has a quantization_config"
        raise InputRefused("E444", "already packed or quantised", path, why, "a dense model")
    raw = read_bytes(path)
    begin = raw.index(b"{") + 1
    rest = raw[begin:]
    mark = _MARK if config else _MARK.rstrip(b", ")
    return raw[:begin] + mark + rest


def unmark_config(path: Path) -> bytes:
    """The bytes of the dense folder's config.json, from that of the packed one at `path`.

    Raises:
        InputRefused: Somebody has written it anew, so the mark is no longer where it was put.
    """
    raw = read_bytes(path)
    begin = raw.find(b"{") + 1
    for mark in (_MARK, _MARK.rstrip(b", ")):
        if raw[begin:].startswith(mark):
            return raw[:begin] + raw[begin + len(mark) :]
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


def pack_in_place(folder: Path, weights: Iterable[Path], *, marked: bool = True) -> None:
    """Make a finished dense folder, which nobody reads yet, a packed one.

    Args:
        folder: The folder.
        weights: Its weight files.
        marked: Whether it has a config.json, to be marked.

    Raises:
        InputRefused: The model is quantised.
        OSError: The disk.
    """
    config = folder / CONFIG
    text = mark_config(config) if marked else None
    for path in weights:
        packed = path.with_name(path.name + ".packing")
        pack_file(path, packed)
        os.replace(packed, path)
    if text is not None:
        config.write_bytes(text)

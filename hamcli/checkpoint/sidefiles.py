"""Files beside the weights that go into a result: byte for byte, but for code and paths."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hamcli.checkpoint.config import clean_tokenizer_config
from hamcli.checkpoint.folder import (
    GENERATION,
    LICENCES,
    PROCESSOR,
    SENTENCE,
    TOKENIZER,
    find_file,
    read_bytes,
    read_json,
)
from hamcli.checkpoint.source import Source

_SENTENCE_MODULE = "sentence_transformers."
_SENTENCE_FOLDERS = ("", "1_Pooling", "2_Normalize")


def has_any(source: Source | None, names: Sequence[str]) -> bool:
    """Whether the source has a file of one of these names."""
    return source is not None and any(find_file(source.folder, name) for name in names)


def copy_side_files(source: Source, stage: Path, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """Copy tokenizer, processor, sentence-transformers and licence files, without code and paths.

    Args:
        source: Whose they are.
        stage: Where they go.
        extra: More names to copy where they are there.

    Returns:
        Notes on what was left out.
    """
    names = [*TOKENIZER, *PROCESSOR, *LICENCES, *extra]
    is_sentence, note = _sentence_files(source)
    if is_sentence:
        names += SENTENCE
    if (stage / GENERATION).exists():
        names.append(GENERATION)
    for name in names:
        if (path := find_file(source.folder, name)) is not None:
            target = stage / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(_clean_bytes(path, name))
    return (note,) if note else ()


def _clean_bytes(path: Path, name: str) -> bytes:
    """The file as it is, unless it names code or paths."""
    raw = read_bytes(path)
    if not name.endswith("_config.json"):
        return raw
    value = read_json(path, name, code="E432")
    cleaned = clean_tokenizer_config(value)
    return raw if cleaned == value else pretty(cleaned)


def _sentence_files(source: Source) -> tuple[bool, str]:
    """Whether the folder is a sentence-transformers one whose other modules have no weights."""
    path = find_file(source.folder, "modules.json")
    if path is None:
        return False, ""
    try:
        modules = json.loads(read_bytes(path, 2**20))
        fits = all(
            module["path"] in _SENTENCE_FOLDERS and module["type"].startswith(_SENTENCE_MODULE)
            for module in modules
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        fits = False
    if fits:
        return True, ""
    return False, "modules.json is left out: its other modules have weights or code of their own"


def pretty(value: Any) -> bytes:
    """JSON as it is written: sorted keys, two spaces."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

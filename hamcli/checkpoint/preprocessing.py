"""The tokenizer and image processor of a model, made of cleaned copies of their files."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hamcli.checkpoint.config import clean_tokenizer_config
from hamcli.checkpoint.folder import (
    CONFIG,
    PROCESSOR,
    TOKENIZER,
    VOCABULARIES,
    find_file,
    read_bytes,
    read_json,
)
from hamcli.checkpoint.source import Source
from hamcli.errors import HamError
from hamcli.runstate.disk import disk_errors


def find_tokenizer(source: Source, task: str, model: Any) -> tuple[Any | None, str]:
    """The tokenizer, or None and why: for data that need none this is no error."""
    if task == "image-classification":
        return None, "images need none"
    names = [name for name in TOKENIZER if find_file(source.folder, name)]
    if not {*VOCABULARIES, "tokenizer_config.json"}.intersection(names):
        return None, f"no tokenizer files in {source.folder}"
    from transformers import AutoTokenizer

    tokenizer, why = _from_view(source, names, AutoTokenizer, config=model.config)
    if tokenizer is None:
        return None, why
    if misfit := _misfit(tokenizer, model):
        return None, misfit
    tokenizer.name_or_path = source.id
    return tokenizer, ""


def _misfit(tokenizer: Any, model: Any) -> str:
    """Why the tokenizer cannot be the model's: AutoTokenizer may make an empty one in silence."""
    embedding = model.get_input_embeddings()
    rows = getattr(getattr(embedding, "weight", None), "shape", (0,))[0]
    if rows == 0:
        return ""
    tokens = len(tokenizer)
    if tokenizer.vocab_size > rows or 2 * tokens < rows:
        return f"the tokenizer found has {tokens} tokens, the model {rows}"
    return ""


def padding_id(tokenizer: Any) -> int:
    """The token that fills short rows."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(one) for one in known if one is not None), 0)


def settle_padding(model: Any, tokenizer: Any | None) -> tuple[str, ...]:
    """Name the token that fills short rows where the config of a text classifier names none.

    One on a decoder classifies by the last token before them, and takes no batch of rows without.

    Returns:
        What a user should hear of it.
    """
    config = model.config.get_text_config()
    if tokenizer is None or getattr(config, "pad_token_id", None) is not None:
        return ()
    config.pad_token_id = padding_id(tokenizer)
    return (f"the config names no token for padding: {config.pad_token_id} is taken",)


def find_image_processor(source: Source, model: Any) -> tuple[Any | None, str]:
    """The image processor, or None and why."""
    if getattr(model, "main_input_name", "") != "pixel_values":
        return None, "no images"
    names = [name for name in PROCESSOR if find_file(source.folder, name)]
    if not names:
        return None, f"no {PROCESSOR[0]} in {source.folder}"
    from transformers import AutoImageProcessor

    return _from_view(source, names, AutoImageProcessor, backend="pil")


def _from_view(
    source: Source, names: Sequence[str], auto_class: Any, **arguments: Any
) -> tuple[Any | None, str]:
    """What `auto_class` makes of copies of the files `names`, in a folder that holds nothing else.

    So a file of another name, a path in a config or a link cannot be followed.
    """
    with tempfile.TemporaryDirectory(prefix="ham-") as folder:
        view = Path(folder)
        try:
            copies = {name: _clean_copy(source.folder, name) for name in names}
            copies[CONFIG] = _json(source.config).encode()
            with disk_errors("cannot copy the tokenizer or image processor", view):
                for name, data in copies.items():
                    (view / name).write_bytes(data)
            made = auto_class.from_pretrained(
                view, trust_remote_code=False, local_files_only=True, **arguments
            )
        except HamError:  # what a file holds is refused, or the disk is full
            raise
        except Exception as error:  # noqa: BLE001 - these files are a stranger's too
            first = (str(error).strip().splitlines() or [""])[0]
            return None, f"{type(error).__name__}: {first.replace(folder, '')[:160]}"
    return made, ""


def _clean_copy(folder: Path, name: str) -> bytes:
    path = find_file(folder, name)
    assert path is not None  # listed a moment ago
    if name.endswith("_config.json"):
        return _json(clean_tokenizer_config(read_json(path, name, code="E432"))).encode()
    return read_bytes(path)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)

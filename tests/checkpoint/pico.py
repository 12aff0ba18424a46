"""Models of a few thousand weights, and files written by hand."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from hamcli.checkpoint.source import find_model
from hamcli.errors import HamError

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EVIL = "import pathlib; pathlib.Path({canary!r}).write_text('ran')\n"


def llama(**changes: Any) -> Any:
    import transformers

    config = transformers.LlamaConfig(**SMALL, **SPECIAL, num_key_value_heads=2, **changes)
    return seeded(transformers.LlamaForCausalLM, config)


def bert(class_name: str = "BertForMaskedLM", **changes: Any) -> Any:
    import transformers

    return seeded(getattr(transformers, class_name), transformers.BertConfig(**SMALL, **changes))


def gpt2(**changes: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    config = transformers.GPT2Config(**sizes | changes, bos_token_id=1, eos_token_id=2)
    return seeded(transformers.GPT2LMHeadModel, config)


def mixtral() -> Any:
    import transformers

    config = transformers.MixtralConfig(
        **SMALL, **SPECIAL, num_key_value_heads=2, num_local_experts=11
    )
    return seeded(transformers.MixtralForCausalLM, config)


def vit() -> Any:
    import transformers

    sizes: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 4, "num_labels": 3}
    sizes.pop("vocab_size")
    return seeded(transformers.ViTForImageClassification, transformers.ViTConfig(**sizes))


def seeded(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config).eval()


def save(model: Any, folder: Path, **arguments: Any) -> Path:
    model.save_pretrained(folder, **arguments)
    return folder


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(path: Path, header: bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file by hand, with a length that may lie."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def write_header(path: Path, header: dict[str, Any], data: bytes = b"") -> Path:
    return write_raw(path, json.dumps(header).encode(), data)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Any) -> None:
    """Rewrite model.safetensors after `edit` changed its dictionary of tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(code: str, text: str = "", action: Any = find_model, *args: Any, **kwargs: Any) -> str:
    """The one printable line with which `action(*args)` refuses; its code and a part of it."""
    with pytest.raises(HamError) as caught:
        action(*args, **kwargs)
    line = caught.value.lines()[0]
    assert caught.value.code == code, line
    assert text in line, line
    assert line.isprintable()
    assert len(line) <= 300
    return line

"""A model's own config.json: what of it may reach transformers, and whether it can be true.

A config decides which classes are built and how large. It is cleaned of everything that names
code, kernels, devices or places, and held against the headers of the weights, before a module
exists. What it means otherwise is transformers' business.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hamcli.checkpoint.headers import FLOATS, Header
from hamcli.errors import InputRefused

TASKS = (
    "causal-lm",
    "masked-lm",
    "text-classification",
    "token-classification",
    "image-classification",
    "feature-extraction",
)

_TASK_OF_SUFFIX = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForMaskedLM", "masked-lm"),
    ("ForPreTraining", "masked-lm"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForImageClassification", "image-classification"),
    ("ForImageClassificationWithTeacher", "image-classification"),
    ("Model", "feature-extraction"),
)

_DROPPED = {
    # code of the folder, kernels from the hub, places on the author's machine
    "auto_map",
    "custom_pipelines",
    "custom_generate",
    "trust_remote_code",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "_from_auto",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "attn_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "experts_implementation",
    "kernel_config",
    "use_kernels",
    "fusion_config",
    "transformers_weights",
    "distributed_config",
    "device_map",
}
_FILE_KEY = re.compile(r".*_files?")

_LAYER_KEYS = {
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_encoder_blocks",
    "num_hidden_groups",
    "inner_group_num",
    "depths",
    "depth",
    "layers",
}
_EXPERT_KEYS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
_SIZE_KEYS = {
    "vocab_size",
    "hidden_size",
    "hidden_sizes",
    "intermediate_size",
    "embedding_size",
    "type_vocab_size",
    "d_model",
    "d_ff",
    "ffn_dim",
    "n_embd",
    "n_inner",
    "dim",
    "hidden_dim",
    "num_channels",
    "num_labels",
    "_num_labels",
}
_POSITION_KEYS = {"max_position_embeddings", "n_positions", "max_source_positions"}
_LAYER_LIMIT = 4_096
_SIZE_FLOOR = 2**20
"""A size below it may be a leftover that nothing is built from."""
_POSITION_LIMIT = 2**24
_DEPTH_LIMIT = 16
_SHARES_LAYERS = {"albert"}


def clean_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without the keys that name code, kernels, devices or places, at any depth."""
    return {key: _cleaned(value) for key, value in config.items() if key not in _DROPPED}


def clean_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's or processor's config without code, and without files named by path.

    transformers finds the files by their own names; a `vocab_file` here could lead anywhere.
    """
    cleaned = clean_config(config)
    return {key: value for key, value in cleaned.items() if not _FILE_KEY.fullmatch(key)}


def infer_task(config: dict[str, Any]) -> str:
    """The task of the first of the config's `architectures`.

    Raises:
        InputRefused: There is none, or its kind of head has no task here.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if isinstance(name, str):
        for suffix, task in _TASK_OF_SUFFIX:
            if name.endswith(suffix):
                return task
    raise InputRefused(
        "E423",
        "cannot tell the model's task",
        "config.json: architectures",
        f"{str(name)[:80]!r} has no task here" if name else "there are none",
        f"--task with one of {', '.join(TASKS)}",
        ["--task feature-extraction keeps the body of any model and drops its head"],
    )


def main_dtype(headers: Sequence[Header]) -> str:
    """The floating-point dtype of most elements, as safetensors spells it.

    Raises:
        InputRefused: There are no floating-point weights.
    """
    totals = dict.fromkeys(FLOATS, 0)
    for header in headers:
        for tensor in header.tensors:
            if tensor.dtype in totals:
                totals[tensor.dtype] += tensor.total
    dtype = max(FLOATS, key=lambda name: totals[name])
    if totals[dtype] == 0:
        raise InputRefused(
            "E428",
            "no floating-point weights",
            headers[0].path,
            "all tensors are integers or 8-bit floats",
            "the model before it was quantised",
        )
    return dtype


def check_config(config: dict[str, Any], headers: Sequence[Header], where: object) -> None:
    """Refuse a config that the weights in `headers` cannot belong to, or that asks for more.

    This keeps a lie from costing minutes or gigabytes; the exact comparison, tensor by tensor,
    follows when the model is loaded.

    Raises:
        InputRefused: Naming the key, the value and what the weights hold.
    """
    if not isinstance(config.get("model_type"), str):
        raise InputRefused(
            "E406", "config names no architecture", where, "model_type is missing", "a model_type"
        )
    layers, experts, width = _measure(headers)
    if config["model_type"] in _SHARES_LAYERS:
        layers = _LAYER_LIMIT // 4
    for key, value in _walk(config):
        if key == "quantization_config" and value:
            _refuse_quantised(where)
        if key == "use_pretrained_backbone" and value:
            raise InputRefused(
                "E421", "config names other weights", where, "use_pretrained_backbone", "false"
            )
        if key in _LAYER_KEYS:
            _check_number(key, value, min(4 * layers + 16, _LAYER_LIMIT), where, "layers", layers)
        elif key in _EXPERT_KEYS:
            _check_number(key, value, 4 * experts + 16, where, "experts", experts)
        elif key in _SIZE_KEYS:
            limit = max(4 * width, _SIZE_FLOOR)
            _check_number(key, value, limit, where, "rows or columns", width)
        elif key in _POSITION_KEYS:
            _check_number(key, value, _POSITION_LIMIT, where, "rows or columns", width)


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return clean_config(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return value


def _walk(config: dict[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict) and depth < _DEPTH_LIMIT:
            yield from _walk(value, depth + 1)


def _measure(headers: Sequence[Header]) -> tuple[int, int, int]:
    """The largest number of repeated layers, of experts, and the largest side of a tensor."""
    num_tensors = sum(len(header.tensors) for header in headers)
    repeats = experts = width = 1
    for header in headers:
        for tensor in header.tensors:
            indices = [
                int(part) + 1
                for part in tensor.name.split(".")
                if part.isascii() and part.isdigit() and len(part) < 8
            ]
            repeats = max([repeats, *indices])
            width = max([width, *tensor.shape])
            if len(tensor.shape) == 3:
                experts = max(experts, tensor.shape[0])
    # an index beyond the number of tensors counts nothing that is there
    repeats = min(repeats, num_tensors)
    return repeats, max(repeats, experts), width


def _check_number(key: str, value: Any, limit: int, where: object, what: str, found: int) -> None:
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            continue  # another meaning of the key, or nonsense that transformers refuses by type
        if number is not None and not -1 <= number <= limit:
            raise InputRefused(
                "E420",
                "config does not fit the weights",
                f"{where}: {key}",
                f"{str(number)[:40]}, while the weights hold {found} {what}",
                "the config.json that belongs to these weights",
            )
    if isinstance(value, list) and len(value) > limit:
        raise InputRefused(
            "E420", "config does not fit the weights", f"{where}: {key}", f"{len(value)} entries"
        )


def _refuse_quantised(where: object) -> None:
    raise InputRefused(
        "E421",
        "quantised checkpoint",
        f"{where}: quantization_config",
        "its weights are no plain floating-point numbers",
        "the model before it was quantised",
    )

"""A checked `Source` -> a transformers model in eval mode, its tokenizer and image processor.

transformers never sees the folder: it is given a cleaned config and tensors that are read here, by
the offsets of the checked headers. So no shard name, link, adapter, pickle or code file of the
folder can be followed, and what it reports about names is held to be an error, not a warning.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from typing import Any

import torch
from torch import nn

from hamcli.checkpoint.config import TASKS, clean_config, infer_task
from hamcli.checkpoint.folder import (
    CONFIG,
)
from hamcli.checkpoint.headers import FLOATS
from hamcli.checkpoint.preprocessing import (
    find_image_processor,
    find_tokenizer,
)
from hamcli.checkpoint.reading import (
    TORCH_DTYPES,
    LazyTensor,
    lazy_tensors,
)
from hamcli.checkpoint.source import Source
from hamcli.errors import HamError, InputRefused, ResourceError

__all__ = ["LoadedModel", "build_skeleton", "has_head", "load_model", "quiet_transformers"]

DTYPE_NAMES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

_MAPPING_OF_TASK = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "feature-extraction": "MODEL_MAPPING",
}
_NEW_HEAD_TASKS = ("text-classification", "token-classification", "image-classification")
_SPARE_BYTES = 32 * 2**20
"""What a model may need beyond its file: a new head, tables that are not saved."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for use, in eval mode."""

    model: nn.Module
    tokenizer: Any | None
    image_processor: Any | None
    task: str
    new_head: bool
    """Whether its head was made here, from a fixed seed."""
    dropped: tuple[str, ...]
    """Tensors of the file that the model has no place for: a head of another task."""
    no_tokenizer: str
    """Why there is no tokenizer; empty when there is one."""
    no_image_processor: str
    notes: tuple[str, ...]
    """What a user should hear: a dropped head, a dtype that is not the config's."""

    @property
    def class_name(self) -> str:
        """Of the model; FSDP puts a class of its own in front."""
        kinds = type(self.model).__mro__
        return next(kind.__name__ for kind in kinds if not kind.__name__.startswith("FSDP"))


def build_skeleton(source: Source) -> nn.Module:
    """The network that the config describes, with shapes and no memory behind them.

    Raises:
        InputRefused: transformers does not know it, or the file could never fill it.
    """
    task = infer_task(source.config)
    with quiet_transformers():
        config = _build_config(source)
        model_class = _model_class(source, config, task)
        skeleton: Any = _skeleton(
            source, model_class, config, _arguments(source, model_class, task)
        )
        skeleton.tie_weights()
    return skeleton  # type: ignore[no-any-return]


def has_head(source: Source, task: str) -> bool:
    """Whether the checkpoint was saved with the head of `task`."""
    try:
        return infer_task(source.config) == task
    except InputRefused:
        return False


def load_model(
    source: Source,
    task: str,
    *,
    dtype: str = "auto",
    id2label: Mapping[int, str] | None = None,
    allow_new_head: bool = False,
    seed: int = 0,
) -> LoadedModel:
    """Build the network of `source` for `task` and read its weights.

    Args:
        source: A checked model.
        task: One of `TASKS`, or `"auto"`.
        dtype: Of the parameters: that of most weights in the file, or a name of `DTYPE_NAMES`.
        id2label: The classes that a new head must have. A head of another size is replaced, one
            of the same size is kept with its own names.
        allow_new_head: Whether a head may be made where the file has none for `task`.
        seed: Of a new head's weights.

    Raises:
        InputRefused: The weights are not those of the config, or are not finite.
        ResourceError: There is not enough memory, or a file may not be read.
    """
    task = infer_task(source.config) if task == "auto" else task
    if task not in TASKS:
        raise InputRefused("E423", "no such task", task, right=" or ".join(TASKS))
    with quiet_transformers():
        loaded = _load(source, task, dtype, id2label, allow_new_head, seed)
        tokenizer, no_tokenizer = find_tokenizer(source, task, loaded.model)
        processor, no_processor = find_image_processor(source, loaded.model)
    return LoadedModel(
        model=loaded.model,
        tokenizer=tokenizer,
        image_processor=processor,
        task=task,
        new_head=loaded.new_head,
        dropped=loaded.dropped,
        no_tokenizer=no_tokenizer,
        no_image_processor=no_processor,
        notes=loaded.notes,
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars, no warnings, and no network from transformers inside; all as before afterwards."""
    from huggingface_hub import constants
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline = constants.HF_HUB_OFFLINE
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # a local model asks no server, whatever its config names
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Network:
    """The model alone, with what loading it told."""

    model: nn.Module
    new_head: bool
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def _load(
    source: Source,
    task: str,
    dtype: str,
    id2label: Mapping[int, str] | None,
    allow_new_head: bool,
    seed: int,
) -> _Network:
    torch_dtype = _torch_dtype(source, dtype)
    config = _build_config(source)
    model_class = _model_class(source, config, task)
    replace_head = _adopt_labels(config, source, task, id2label)
    arguments = _arguments(source, model_class, task)
    skeleton = _skeleton(source, model_class, config, arguments)
    body = _Body(skeleton)
    tensors = {
        name: tensor
        for name, tensor in lazy_tensors(source).items()
        if not (replace_head and body.is_head(name) and not _is_pooler(name))
    }
    _refuse_twins(source, tensors, body.prefix)
    model, info = _read_weights(source, model_class, config, arguments, torch_dtype, tensors, seed)
    new_head = _check_missing(source, task, body, model, info, allow_new_head, replace_head)
    dropped = _check_unexpected(source, body, info)
    _check_mismatched(source, info)
    _check_dtypes(source, model, tensors)
    _check_finite(source, model)
    notes = _notes(source, torch_dtype, task, dropped, new_head)
    return _Network(model, new_head, dropped, notes)


# ---- what is built ----


def _torch_dtype(source: Source, dtype: str) -> torch.dtype:
    if dtype == "auto":
        return TORCH_DTYPES[source.dtype]
    return DTYPE_NAMES[dtype]


def _build_config(source: Source) -> Any:
    from transformers import CONFIG_MAPPING

    model_type = source.config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise InputRefused(
            "E422",
            "unknown architecture",
            f"{source.id}: model_type",
            f"transformers has no {model_type[:80]!r}; code that comes with a model is not run",
            "a model that transformers itself knows",
        )
    # as AutoConfig does it
    if model_type == "mistral" and "layer_types" in source.config:
        model_type = "ministral"
    with _hostile(source, "its config cannot be used"):
        return CONFIG_MAPPING[model_type].from_dict(clean_config(source.config))


def _model_class(source: Source, config: Any, task: str) -> Any:
    from transformers.models.auto import modeling_auto

    mapping = getattr(modeling_auto, _MAPPING_OF_TASK[task])
    if type(config) not in mapping:
        raise InputRefused(
            "E424",
            "architecture without this task",
            f"{source.id}: {config.model_type}",
            f"transformers has no {task} model of it",
            f"--task with another of {', '.join(TASKS)}",
        )
    classes = mapping[type(config)]
    if not isinstance(classes, list | tuple):
        return classes
    named = config.architectures or []
    return next((one for one in classes if one.__name__ in named), classes[0])


def _adopt_labels(
    config: Any, source: Source, task: str, id2label: Mapping[int, str] | None
) -> bool:
    """Give the config the classes asked for; True when the file's head has another number."""
    if id2label is None:
        return False
    same = has_head(source, task) and config.num_labels == len(id2label)
    if not same:
        config.id2label = {int(index): name for index, name in id2label.items()}
        config.label2id = {name: index for index, name in config.id2label.items()}
    return not same


def _arguments(source: Source, model_class: Any, task: str) -> dict[str, Any]:
    """No pooler where the file has none: nobody would notice that it is random."""
    takes_it = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    has_it = any(_is_pooler(name) for name in source.names)
    if task == "feature-extraction" and takes_it and not has_it:
        return {"add_pooling_layer": False}
    return {}


def _skeleton(source: Source, model_class: Any, config: Any, arguments: dict[str, Any]) -> Any:
    """The network without memory behind it, refused when the file could never fill it."""
    with _hostile(source, "its config cannot be built"), torch.device("meta"):
        skeleton = model_class(copy.deepcopy(config), **arguments)
    need = sum(param.numel() * 4 for param in skeleton.parameters())
    need += sum(buffer.numel() * buffer.element_size() for buffer in skeleton.buffers())
    if need > 8 * source.total + _SPARE_BYTES:
        raise InputRefused(
            "E420",
            "config does not fit the weights",
            source.folder / CONFIG,
            f"it describes {need // 4:,} parameters, the file holds {source.total:,}",
            "the config.json that belongs to these weights",
        )
    return skeleton


class _Body:
    """Which names belong to the base model, and which to a head on it."""

    def __init__(self, skeleton: Any) -> None:
        self.class_name = type(skeleton).__name__
        self.prefix: str = skeleton.base_model_prefix
        base = getattr(skeleton, self.prefix, None) if self.prefix else None
        body = base if isinstance(base, nn.Module) else skeleton
        self.inside = _first_names(body)
        self.heads = _first_names(skeleton) - {self.prefix} if body is not skeleton else set()

    def is_head(self, name: str) -> bool:
        """Whether `name`, in the file's or the model's naming, belongs to a task."""
        first = name.partition(".")[0]
        # a pooler lies inside the base model, and still only some tasks train it
        return _is_pooler(name) or (first != self.prefix and first not in self.inside)


def _first_names(module: nn.Module) -> set[str]:
    names = {name for name, _ in module.named_children()}
    return names | {name for name, _ in module.named_parameters(recurse=False)}


def _is_pooler(name: str) -> bool:
    return "pooler" in name.split(".")


# ---- reading ----


def _read_weights(
    source: Source,
    model_class: Any,
    config: Any,
    arguments: dict[str, Any],
    dtype: torch.dtype,
    tensors: dict[str, LazyTensor],
    seed: int,
) -> tuple[Any, dict[str, Any]]:
    with _hostile(source, "its weights cannot be loaded"), torch.random.fork_rng(devices=[]):
        # whatever is not in the file is made from this seed
        torch.manual_seed(seed)
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **arguments,
        )
    model.eval()
    return model, info


# ---- what was found ----


def _refuse_twins(source: Source, tensors: Mapping[str, Any], prefix: str) -> None:
    """One tensor under two names, with and without the base model's prefix: which one counts?"""
    for name in tensors:
        if prefix and f"{prefix}.{name}" in tensors:
            raise InputRefused(
                "E412", "one tensor under two names", source.id, f"{name} and {prefix}.{name}"
            )


def _check_missing(
    source: Source,
    task: str,
    body: _Body,
    model: Any,
    info: dict[str, Any],
    allow_new_head: bool,
    replace_head: bool,
) -> bool:
    """Whether the head is new; refuse every other missing tensor."""
    missing = set(info["missing_keys"])
    if not missing:
        return False
    inside = sorted(name for name in missing if not body.is_head(name))
    if inside or (has_head(source, task) and not replace_head):
        name = (inside or sorted(missing))[0]
        raise InputRefused(
            "E425",
            "tensor missing",
            f"{source.id}: {name}",
            f"the config describes it, the file lacks it ({len(missing)} in all)",
            "the weights that belong to this config.json",
        )
    if task == "feature-extraction" and all(_is_pooler(name) for name in missing):
        return False
    if not allow_new_head or task not in _NEW_HEAD_TASKS:
        trained = "train a head by giving labelled --data"
        raise InputRefused(
            "E426",
            f"no head for {task}",
            source.id,
            f"the file has no {min(missing)}",
            trained if task in _NEW_HEAD_TASKS else "--task of the head that it has",
            ["--task feature-extraction keeps the body of any model and drops its head"],
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    head = {name for name, _ in model.named_parameters() if body.is_head(name)}
    if kept := sorted(name for name in head - missing - tied if not _is_pooler(name)):
        raise InputRefused(
            "E425",
            "tensor missing",
            f"{source.id}: {min(missing)}",
            f"a part of the head is there, {kept[0]}",
            "all of the head or none",
        )
    return True


def _check_unexpected(source: Source, body: _Body, info: dict[str, Any]) -> tuple[str, ...]:
    """The tensors of another head; refuse every other that the model has no place for."""
    unexpected = sorted(info["unexpected_keys"])
    inside = [name for name in unexpected if not _may_drop(source, body, name)]
    if inside:
        raise InputRefused(
            "E427",
            "tensor that the config does not describe",
            f"{source.id}: {inside[0]}",
            f"{len(inside)} in all",
            "the config.json that belongs to these weights",
        )
    return tuple(unexpected)


def _may_drop(source: Source, body: _Body, name: str) -> bool:
    """Whether `name` is of another head.

    A model of the same class as the file may still lack a pooler, or a second head beside its own:
    plain BERT comes with both. Anything else there is an extra tensor.
    """
    is_same = body.class_name in (source.config.get("architectures") or ())
    first = name.partition(".")[0]
    return body.is_head(name) and (not is_same or _is_pooler(name) or first in body.heads)


def _check_mismatched(source: Source, info: dict[str, Any]) -> None:
    mismatched = sorted(info["mismatched_keys"], key=str)
    if mismatched:
        name, in_file, in_model = (*mismatched[0], None, None)[:3]
        raise InputRefused(
            "E429",
            "tensor of the wrong shape",
            f"{source.id}: {name}",
            f"{_shape(in_file)} in the file, {_shape(in_model)} by the config",
            "the config.json that belongs to these weights",
        )


def _shape(shape: Any) -> str:
    return "?" if shape is None else str(list(shape))


def _check_dtypes(source: Source, model: Any, tensors: Mapping[str, LazyTensor]) -> None:
    """Refuse integers and 8-bit floats that were cast into a floating-point weight."""
    integer_slots = {
        name.rpartition(".")[2]
        for name, tensor in model.state_dict().items()
        if not tensor.is_floating_point()
    }
    for name, tensor in tensors.items():
        is_float = tensor.info.dtype in FLOATS
        if tensor.was_read and not is_float and name.rpartition(".")[2] not in integer_slots:
            raise InputRefused(
                "E428",
                "tensor of the wrong dtype",
                f"{source.id}: {name}",
                f"{tensor.info.dtype} where the model has a floating-point weight",
                "the model before it was quantised",
            )


def _check_finite(source: Source, model: Any) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise InputRefused(
                "E430",
                "tensor that is not finite",
                f"{source.id}: {name}",
                f"{count} of {tensor.numel()} values are NaN or infinite as {tensor.dtype}",
                "a sound checkpoint, or a wider --set model.dtype",
            )


def _notes(
    source: Source, dtype: torch.dtype, task: str, dropped: Sequence[str], new_head: bool
) -> tuple[str, ...]:
    notes = []
    said = source.config.get("dtype") or source.config.get("torch_dtype")
    true = str(TORCH_DTYPES[source.dtype]).removeprefix("torch.")
    if isinstance(said, str) and said.removeprefix("torch.") != true:
        notes.append(f"the config says {said[:40]}, the weights are {true}: {dtype} is used")
    if dropped:
        notes.append(f"{len(dropped)} tensors of another head are dropped: {dropped[0]}, ...")
    if new_head:
        notes.append(f"the head for {task} is new and must be trained")
    return tuple(notes)


@contextmanager
def _hostile(source: Source, what: str) -> Iterator[None]:
    """Whatever transformers or torch raise over a stranger's config, as one refusal."""
    try:
        yield
    except HamError:
        raise
    except MemoryError as error:
        raise ResourceError("E543", "not enough memory for the model", source.id) from error
    except Exception as error:
        if "not enough memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise ResourceError("E543", "not enough memory for the model", source.id) from error
        why = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise InputRefused("E431", "model refused by transformers", source.id, why) from error

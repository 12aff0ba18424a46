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
from hamcli.checkpoint.fitting import (
    Body,
    check_dtypes,
    check_finite,
    check_mismatched,
    check_missing,
    check_unexpected,
    has_head,
    is_pooler,
    refuse_twins,
)
from hamcli.checkpoint.folder import (
    CONFIG,
)
from hamcli.checkpoint.preprocessing import (
    find_image_processor,
    find_tokenizer,
    settle_padding,
)
from hamcli.checkpoint.reading import (
    TORCH_DTYPES,
    LazyTensor,
    lazy_tensors,
)
from hamcli.checkpoint.source import Source
from hamcli.errors import HamError, InputRefused, ResourceError

__all__ = ["LoadedModel", "build_skeleton", "load_model", "quiet_transformers"]

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
    is_classifier = task == "text-classification"
    padding = settle_padding(loaded.model, tokenizer) if is_classifier else ()
    return LoadedModel(
        model=loaded.model,
        tokenizer=tokenizer,
        image_processor=processor,
        task=task,
        new_head=loaded.new_head,
        dropped=loaded.dropped,
        no_tokenizer=no_tokenizer,
        no_image_processor=no_processor,
        notes=(*loaded.notes, *padding),
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
    body = Body(skeleton)
    tensors = {
        name: tensor
        for name, tensor in lazy_tensors(source).items()
        if not (replace_head and body.is_head(name) and not is_pooler(name))
    }
    refuse_twins(source, tensors, body.prefix)
    model, info = _read_weights(source, model_class, config, arguments, torch_dtype, tensors, seed)
    new_head = check_missing(source, task, body, model, info, allow_new_head, replace_head)
    dropped = check_unexpected(source, body, info)
    check_mismatched(source, info)
    check_dtypes(source, model, tensors)
    check_finite(source, model)
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
    has_it = any(is_pooler(name) for name in source.names)
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

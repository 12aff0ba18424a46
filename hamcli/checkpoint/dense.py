"""A model -> a folder of safetensors, zeros and all, that stock transformers loads.

The stage must be fresh. What is written has fixed names, no code, no path of this machine, and the
modes of the user's umask; durability and the final rename are the run state's work.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hamcli.checkpoint.config import clean_config
from hamcli.checkpoint.folder import (
    CONFIG,
    GENERATION,
    INDEX,
    LICENCES,
    PROCESSOR,
    SENTENCE,
    TOKENIZER,
    is_shard_name,
    sha256,
)
from hamcli.checkpoint.headers import read_header
from hamcli.checkpoint.loading import DTYPE_NAMES, quiet_transformers
from hamcli.checkpoint.reading import TORCH_DTYPES
from hamcli.checkpoint.sidefiles import copy_side_files, has_any, pretty
from hamcli.checkpoint.source import Source
from hamcli.errors import ResourceError

ON_DISK_FROM = 2**20
"""Bytes from which a gathered tensor waits on the disk."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """One file of the folder."""

    path: str
    """Relative to the folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class WrittenFiles:
    """What lies in the folder now."""

    files: tuple[WrittenFile, ...]
    names: dict[str, tuple[str, ...]]
    """Parameter of the model -> its tensors in the files. Usually the same name; the experts of a
    mixture are one tensor in memory and many on disk, a tied weight is stored under one name."""
    dtype: str
    """Of the weights, `float32` or so."""
    notes: tuple[str, ...]


def write_model(
    model: nn.Module,
    source: Source | None,
    stage: Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    tokenizer: Any | None = None,
    image_processor: Any | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> WrittenFiles:
    """Write `model` into the fresh folder `stage`.

    Args:
        model: A transformers model; it is left as it is.
        source: Where it came from. Its tokenizer and processor files are copied, byte for byte
            but for what names code or paths; without it the objects given are saved.
        stage: A folder that is empty or does not exist.
        dtype: Of the weights in the file; `"auto"` is that of the source.
        max_shard_size: Largest weight file.
        tokenizer: Saved where the source has no files of one.
        image_processor: The same.
        gather: Of a model that is cut over processes, a parameter to the whole tensor; it is asked
            for each of `stored_tensors`, in their order. The tensors wait on the disk until all
            are there, which takes the room of the model once more.

    Raises:
        ResourceError: The disk is full, or may not be written.
    """
    stage.mkdir(parents=True, exist_ok=True)
    assert not any(stage.iterdir()), "save_pretrained deletes shards that it finds"
    main = _main_dtype(model)
    target = _target_dtype(source, dtype, main)
    try:
        state = _state(model, main, target, gather, stage)
        with quiet_transformers():
            _save(model, state, stage, max_shard_size)
            if not has_any(source, TOKENIZER) and tokenizer is not None:
                tokenizer.save_pretrained(stage)
            if not has_any(source, PROCESSOR) and image_processor is not None:
                image_processor.save_pretrained(stage)
        notes = copy_side_files(source, stage) if source is not None else ()
        _clean_written(stage, target)
        _drop_unlisted(stage)
        _apply_umask(stage)
        files = _record(stage)
    except MemoryError as error:
        raise ResourceError("E543", "not enough memory to write the model", stage) from error
    except OSError as error:
        _raise_disk_error(stage, error)
    except Exception as error:
        # safetensors tells a full disk in its own words
        if "No space left" in str(error) or "os error" in str(error).lower():
            _raise_disk_error(stage, error)
        raise
    names = file_names(model, stage)
    return WrittenFiles(files, names, _dtype_name(target), notes)


def file_names(model: nn.Module, folder: Path) -> dict[str, tuple[str, ...]]:
    """Parameter of `model` -> the tensors of the files in `folder` that hold it.

    Where transformers splits or joins parameters for the disk, its own conversion is asked, with
    tensors that have a shape and no memory.
    """
    shapes = {
        tensor.name: tensor.shape
        for file in sorted(folder.glob("*.safetensors"))
        for tensor in read_header(file).tensors
    }
    names: dict[str, tuple[str, ...]] = {}
    converted: dict[str, Tensor] = {}
    groups = _tied_groups(model)
    for name, param in model.named_parameters():
        stored = [one for one in groups[id(param)] if shapes.get(one) == tuple(param.shape)]
        if stored:
            names[name] = (stored[0],)
        else:
            converted[name] = param
    names |= _converted_names(model, converted, shapes)
    return names


# ---- weights ----


def _main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most parameters."""
    totals: dict[torch.dtype, int] = {}
    for param in model.parameters():
        totals[param.dtype] = totals.get(param.dtype, 0) + param.numel()
    return max(totals, key=lambda one: totals[one])


def _target_dtype(source: Source | None, dtype: str, main: torch.dtype) -> torch.dtype:
    if dtype != "auto":
        return DTYPE_NAMES[dtype]
    return main if source is None else TORCH_DTYPES[source.dtype]


def stored_tensors(model: nn.Module) -> list[Tensor]:
    """What `write_model` writes, tied tensors once, in the order in which it asks for them."""
    return list({id(one): one for one in model.state_dict(keep_vars=True).values()}.values())


def _gathered_state(
    model: nn.Module,
    main: torch.dtype,
    target: torch.dtype,
    gather: Callable[[Tensor], Tensor],
    folder: Path,
) -> dict[str, Tensor]:
    """As `_state`, one tensor after the other: a model that is cut fits in no single memory."""
    made = {
        id(one): _on_disk(_stored(gather(one), target if one.dtype == main else one.dtype), folder)
        for one in stored_tensors(model)
    }
    return {name: made[id(one)] for name, one in model.state_dict(keep_vars=True).items()}


def _on_disk(tensor: Tensor, folder: Path) -> Tensor:
    """A copy whose memory is a file without a name, which the system may write out at any time.

    Its room is taken before it is mapped, where the system can, so that a full disk is an error and
    no signal.
    """
    if tensor.nbytes < ON_DISK_FROM:
        return tensor.clone()
    path = folder / ".gathered"
    try:
        with path.open("xb") as out:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(out.fileno(), 0, tensor.nbytes)
            else:
                out.truncate(tensor.nbytes)
        held = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        path.unlink(missing_ok=True)
    return held.reshape(tensor.shape).copy_(tensor)


def _state(
    model: nn.Module,
    main: torch.dtype,
    target: torch.dtype,
    gather: Callable[[Tensor], Tensor] | None,
    folder: Path,
) -> dict[str, Tensor]:
    """The state to write, on the CPU; what was tied is still one tensor.

    Parameters that are wider than the rest stay so: transformers keeps them wide on purpose.
    """
    if gather is not None:
        return _gathered_state(model, main, target, gather, folder)
    made: dict[tuple[Any, ...], Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        key = place if tensor.numel() else (name,)
        if key not in made:
            made[key] = _stored(tensor, target if tensor.dtype == main else tensor.dtype)
        state[name] = made[key]
    return state


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.detach().to("cpu", dtype)
    if not stored.is_floating_point():
        return stored
    zero = stored == 0
    if bool((zero & torch.signbit(stored)).any()):
        # a weight that underflows in the narrower dtype may leave -0.0, which is no plain zero
        stored = torch.where(zero, 0.0, stored)
    return stored


def _save(model: Any, state: dict[str, Tensor], stage: Path, max_shard_size: str) -> None:
    config_dtype = model.config.dtype
    try:
        model.save_pretrained(stage, state_dict=state, max_shard_size=max_shard_size)
    finally:
        model.config.dtype = config_dtype


def _tied_groups(model: nn.Module) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(param), []).append(name)
    return groups


def _converted_names(
    model: Any, params: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, ...]]:
    if not params:
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    ghosts = {name: torch.empty_like(param, device="meta") for name, param in params.items()}
    names = {}
    joined = {}
    for name, ghost in ghosts.items():
        try:
            made = revert_weight_conversion(model, {name: ghost})
        except Exception:  # noqa: BLE001 - it needs its partners: several become one
            made = {}
        if made and all(shapes.get(one) == tuple(part.shape) for one, part in made.items()):
            names[name] = tuple(sorted(made, key=_natural))
        else:
            joined[name] = ghost
    if joined:
        made = revert_weight_conversion(model, joined)
        names |= dict.fromkeys(joined, tuple(sorted(set(made) & set(shapes), key=_natural)))
    return names


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts `experts.10` after `experts.9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


# ---- what a library wrote ----


def _clean_written(stage: Path, dtype: torch.dtype) -> None:
    path = stage / CONFIG
    config = clean_config(json.loads(path.read_text(encoding="utf-8")))
    config["dtype"] = _dtype_name(dtype)
    path.write_bytes(pretty(config))
    index = stage / INDEX
    if index.exists():
        index.write_bytes(pretty(json.loads(index.read_text(encoding="utf-8"))))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _apply_umask(stage: Path) -> None:
    """Safetensors makes files that only their owner reads, whatever the umask."""
    mask = os.umask(0)
    os.umask(mask)
    for path in stage.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _drop_unlisted(stage: Path) -> None:
    """Remove what a library wrote beyond the fixed list of names."""
    allowed = {CONFIG, GENERATION, INDEX, *TOKENIZER, *PROCESSOR, *SENTENCE, *LICENCES}
    for path in _files(stage):
        name = path.relative_to(stage).as_posix()
        if name not in allowed and not is_shard_name(name):
            path.unlink()


def _record(stage: Path) -> tuple[WrittenFile, ...]:
    return tuple(
        WrittenFile(path.relative_to(stage).as_posix(), path.stat().st_size, sha256(path))
        for path in _files(stage)
    )


def _files(stage: Path) -> list[Path]:
    return [path for path in sorted(stage.rglob("*")) if not path.is_dir()]


def _raise_disk_error(stage: Path, error: Exception) -> None:
    free = shutil.disk_usage(stage).free // 2**20
    raise ResourceError(
        "E542", "cannot write the model", stage, f"{error} ({free} MiB free)"
    ) from error

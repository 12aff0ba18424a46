"""Named tensors <-> one safetensors file, streamed, the same bytes each time.

Written here rather than by the library, so that one tensor at a time is copied, the sha256 is that
of the tensors and not of what the disk made of them, and a write that fails is an OSError. Modes
and the order of metadata are ours too: https://github.com/huggingface/safetensors/issues/782, 584.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hamcli.checkpoint.headers import read_header
from hamcli.errors import Diverged
from hamcli.runstate.disk import write_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> tuple[int, str]:
    """Write and fsync a new safetensors file; returns its bytes and sha256.

    Raises:
        Diverged: E702, a tensor holds NaN or infinity.
        OSError: The disk failed.
    """
    ordered = {name: tensors[name] for name in writing_order(tensors)}
    return write_file(path, _chunks(path, ordered))


def writing_order(tensors: Mapping[str, "Tensor"]) -> list[str]:
    """Names in the order in which `write_tensors` asks for the data of each.

    Widest first, which keeps each tensor aligned to its element, as the library does.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _chunks(path: Path, tensors: Mapping[str, "Tensor"]) -> Iterator[bytes | memoryview]:
    yield _header(tensors)
    for name, tensor in tensors.items():
        yield _data(path, name, tensor)


def _header(tensors: Mapping[str, "Tensor"]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _data(path: Path, name: str, tensor: "Tensor") -> memoryview:
    import torch

    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # cut over processes, which all give their part now
        tensor = tensor.full_tensor()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise Diverged(
            "E702",
            "non-finite values are not saved",
            f"{path.stem}: {name}",
            "it holds NaN or infinity",
            "a lower optimizer.lr, or optimizer.max_grad_norm above 0",
        )
    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file, from its checked header; imports no torch."""
    return {tensor.name for tensor in read_header(path).tensors}


def read_tensors(path: Path) -> dict[str, "torch.Tensor"]:
    """All tensors of a file, on the CPU, in memory of their own."""
    from safetensors.torch import load_file

    # pread: a map would keep the file on disk after its rotation, and may die of SIGBUS
    loaded: dict[str, torch.Tensor] = load_file(path, backend="pread")
    return loaded

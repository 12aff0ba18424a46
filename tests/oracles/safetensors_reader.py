"""The independent judge: 30 lines of struct and numpy that share nothing with hamcli."""

import json
import struct
from pathlib import Path

import numpy as np

_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Name -> values; bfloat16 as float32."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        values = np.frombuffer(raw[begin:end], _TYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of every safetensors file in `folder`."""
    return {
        name: values
        for path in sorted(folder.glob("*.safetensors"))
        for name, values in read_file(path).items()
    }


def count_negative_zeros(values: np.ndarray) -> int:
    return int(np.count_nonzero((values == 0) & np.signbit(values)))

"""Size and speed of the packed form beside zip, gzip, zstandard and the entropy limit, in one run.

    python benchmarks/packed_size.py                    # MiniLM, all matrices pruned together
    python benchmarks/packed_size.py MODEL_FOLDER --rounds 3

The limit is what an ideal coder needs that knows, for each tensor, how many elements are zero and
how often each value occurs: the entropy of the mask plus that of the upper 16 bits of the values;
lower bits count as they are. Times are of one thread's own CPU time, in rounds that take all ways
in turn, over that of a copy of the same dense bytes: the fastest round over the fastest, and in the
file the spread. Prints a table and writes benchmarks/results/DATE-packed-size.json.
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.numpy import load_file
from safetensors.torch import save_file

from hamcli.checkpoint.packed import native
from hamcli.checkpoint.packed.blocks import merge_in_numpy, split_in_numpy
from hamcli.checkpoint.packed.files import pack_file, restore_file
from hamcli.checkpoint.packed.planes import UNSIGNED
from hamcli.checkpoint.packed.tensors import (
    BLOCK_ELEMENTS,
    decode_into,
    encode_blocks,
    head_of,
    read_head,
)
from hamcli.checkpoint.source import find_model

RESULTS = Path(__file__).parent / "results"
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)


def weights_of(model: str) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a model, in fp32."""
    tensors = {}
    for path in find_model(model, hashed=False).weights:
        for name, values in load_file(path).items():
            if values.dtype.kind == "f":
                tensors[name] = torch.from_numpy(values.astype(np.float32))
    return tensors


def pruned(
    tensors: dict[str, torch.Tensor], sparsity: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The smallest weights of all matrices together are zero, exactly so many."""
    sizes = torch.cat([one.abs().flatten() for one in tensors.values() if one.dim() > 1])
    limit = sizes.kthvalue(max(1, round(sparsity * len(sizes)))).values
    return {
        name: (torch.where(one.abs() > limit, one, 0.0) if one.dim() > 1 else one).to(dtype)
        for name, one in tensors.items()
    }


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor, flat."""
    return tensor.reshape(-1).view(torch.uint8).numpy().view(UNSIGNED[tensor.element_size()])


def entropy_bytes(counts: np.ndarray) -> float:
    """Bytes of an ideal code of symbols that occur so often."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum()) / 8


def limit_bytes(tensors: dict[str, torch.Tensor]) -> float:
    """The entropy limit of all tensors."""
    total = 0.0
    for tensor in tensors.values():
        bits = bits_of(tensor)
        values = bits[bits != 0]
        low_bytes = bits.itemsize - 2
        counts = np.bincount((values >> (8 * low_bytes)).astype(np.int64), minlength=1)
        mask = np.array([len(values), len(bits) - len(values)])
        total += entropy_bytes(counts) + entropy_bytes(mask) + low_bytes * len(values)
    return total


def sizes_of(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Bytes of the dense file, of its packed form, and of what else one would use."""
    with tempfile.TemporaryDirectory() as folder:
        dense, packed = Path(folder) / "dense.safetensors", Path(folder) / "packed.safetensors"
        save_file(tensors, dense, metadata={"format": "pt"})
        pack_file(dense, packed)
        restore_file(packed, Path(folder) / "back.safetensors")
        raw = dense.read_bytes()
        assert (Path(folder) / "back.safetensors").read_bytes() == raw
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        return {
            "dense": len(raw),
            "limit": limit_bytes(tensors),
            "packed": packed.stat().st_size,
            "zip": len(packer.compress(raw) + packer.flush()),
            "gzip": len(gzip.compress(raw, 6)),
            "zstd1": len(zstandard.ZstdCompressor(level=1).compress(raw)),
        }


def times_of(tensors: dict[str, torch.Tensor], dtype: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a copy, and of packing and unpacking, for all matrices."""
    dense = [bits_of(tensor) for tensor in tensors.values() if tensor.dim() > 1]
    out = [np.ones_like(one) for one in dense]
    payloads = [pack(one, dtype, split_in_numpy) for one in dense]
    ways: dict[str, Callable[[], None]] = {
        "copy": lambda: [np.copyto(to, one) for to, one in zip(out, dense, strict=True)],
        "encode, numpy": lambda: [pack(one, dtype, split_in_numpy) for one in dense],
        "decode, numpy": lambda: unpack_all(payloads, out, merge_in_numpy),
    }
    if native.prepare(print):
        ways["encode, native"] = lambda: [pack(one, dtype, native.split_natively) for one in dense]
        ways["decode, native"] = lambda: unpack_all(payloads, out, native.merge_natively)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.thread_time()
            way()
            seconds[name].append(time.thread_time() - begun)
    for to, one in zip(out, dense, strict=True):
        assert np.array_equal(to, one)
    return seconds


def pack(bits: np.ndarray, dtype: str, split: Any) -> bytes:
    """A packed tensor."""
    blocks = encode_blocks(
        dtype, (bits[at : at + BLOCK_ELEMENTS] for at in range(0, len(bits), BLOCK_ELEMENTS)), split
    )
    return b"".join([head_of(dtype, (len(bits),), blocks), *blocks])


def unpack_all(payloads: list[bytes], out: list[np.ndarray], merge: Any) -> None:
    """Unpack into memory that is there."""
    for payload, to in zip(payloads, out, strict=True):
        view = memoryview(payload)

        def read(begin: int, length: int, view: memoryview = view) -> memoryview:
            return view[begin : begin + length]

        decode_into(read_head(read, len(view), ""), read, to, "", merge)


def environment() -> dict[str, Any]:
    """Device and versions."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=here,
    ).stdout.strip()
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "device": names[0].partition(": ")[2] if names else platform.processor(),
        "threads": 1,
        "load": os.getloadavg()[0],
        "numpy": np.__version__,
        "zstandard": zstandard.__version__,
        "torch": torch.__version__,
        "commit": commit,
    }


TITLE = (
    "            dense over              packed over     native          numpy   (over a copy)\n"
    "            packed   limit     zip  zstd-1   limit    zip   encode  decode  encode  decode"
)


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin:minilm")
    parser.add_argument("--rounds", type=int, default=7)
    words = parser.parse_args()
    torch.set_num_threads(1)
    weights = weights_of(words.model)
    rows = []
    print(TITLE)
    for dtype, torch_dtype in DTYPES.items():
        for sparsity in SPARSITIES:
            tensors = pruned(weights, sparsity, torch_dtype)
            sizes, seconds = sizes_of(tensors), times_of(tensors, dtype, words.rounds)
            rows.append(row_of(dtype, sparsity, sizes, seconds))
            print(line(rows[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    made = {"environment": environment(), "model": words.model, "rounds": words.rounds}
    path = RESULTS / f"{datetime.date.today().isoformat()}-packed-size.json"
    path.write_text(json.dumps(made | {"rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


def row_of(
    dtype: str, sparsity: float, sizes: dict[str, float], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Sizes, times and their ratios."""
    copy = min(seconds["copy"])
    return {
        "dtype": dtype,
        "sparsity": sparsity,
        "bytes": sizes,
        "packed_over_limit": sizes["packed"] / sizes["limit"],
        "packed_over_zip": sizes["packed"] / sizes["zip"],
        "over_copy": {name: min(taken) / copy for name, taken in seconds.items() if name != "copy"},
        "seconds": {
            name: [min(taken), statistics.median(taken), max(taken)]
            for name, taken in seconds.items()
        },
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    size, over = row["bytes"], row["over_copy"]
    ratios = [size["dense"] / size[name] for name in ("packed", "limit", "zip", "zstd1")]
    ratios += [row["packed_over_limit"], row["packed_over_zip"]]
    ratios += [
        over.get(f"{what}, {how}", float("nan"))
        for how in ("native", "numpy")
        for what in ("encode", "decode")
    ]
    digits = [2, 2, 2, 2, 3, 3, 2, 2, 2, 2]
    cells = (f"{ratio:7.{places}f}" for ratio, places in zip(ratios, digits, strict=True))
    return f"{row['dtype']:4} {sparsity_text(row):>5} {' '.join(cells)}"


def sparsity_text(row: dict[str, Any]) -> str:
    """`90%`."""
    return f"{row['sparsity']:.0%}"


if __name__ == "__main__":
    main()

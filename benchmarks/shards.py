"""Memory of each process, cut over two by FSDP2 and in one, beside what `ham plan` says.

    python benchmarks/shards.py [--hidden 512] [--layers 24]

A Llama with random weights is made, and trained for a few steps of two short lines in one process
and in two, on this machine's CPU. Resident memory is read from /proc: its peak in the steps, less
what the process held before the model was opened.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SETTINGS = {
    "training.batch_size": 2,
    "training.steps": 4,
    "data.max_length": 8,
    "evaluation.examples": 2,
    "training.checkpoint_every": 100,
}


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def child(model: str, data: str, out: str, kind: str) -> None:
    """One process of one of the runs."""
    import accelerate  # noqa: F401 - what is imported later would count as the model's
    from transformers import LlamaForCausalLM  # noqa: F401

    from hamcli.pipeline import sparsify
    from hamcli.progress import Silent

    class Watcher(Silent):
        base = peak = 0

        def stage(self, text: str) -> None:
            if text.startswith("opening"):
                Watcher.base = status("VmRSS")

        def step(self, record: object) -> None:
            if record.step == 2:  # type: ignore[attr-defined]
                Path("/proc/self/clear_refs").write_text("5")
            Watcher.peak = status("VmHWM")

    sparsify(model=model, data=data, task="causal-lm", target=0.9, out=out, parallel=kind,
             settings=SETTINGS, progress=Watcher())  # fmt: skip
    rank = os.environ.get("RANK", "0")
    found = {"base": Watcher.base, "peak": Watcher.peak - Watcher.base}
    Path(f"{out}.{kind}.{rank}").write_text(json.dumps(found))


def main() -> None:
    """Run all three, and print them beside their plans."""
    from tests.parallel.pico import environment, make_data, make_llama, torchrun

    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_llama(place / "m", hidden=words.hidden, layers=words.layers)
        data = make_data(place)
        # freed memory goes back to the system at once, or it would count
        known = environment(MALLOC_MMAP_THRESHOLD_="65536", PYTHONPATH=str(ROOT))
        found = {}
        for kind, size in (("none", 1), ("ddp", 2), ("fsdp", 2)):
            run = [
                str(Path(__file__).resolve()),
                "child",
                str(place / "m"),
                str(data),
                str(place / f"out-{kind}"),
                kind,
            ]
            launch = torchrun(size, *run) if size > 1 else [sys.executable, *run]
            subprocess.run(launch, env=known, check=True, timeout=500)
            told = [
                json.loads((place / f"out-{kind}.{kind}.{rank}").read_text())
                for rank in range(size)
            ]
            found[kind] = max(one["peak"] for one in told)
        planned = {
            kind: plan(place / "m", data, kind, size)
            for kind, size in (("none", 1), ("ddp", 2), ("fsdp", 2))
        }
    rows = {
        kind: {
            "measured": found[kind],
            "planned": planned[kind],
            "to one process": round(found[kind] / found["none"], 3),
        }
        for kind in found
    }
    for kind, row in rows.items():
        told = [f"{key} {row[key] / 1e6:8.1f} MB" for key in ("measured", "planned")]
        print(f"{kind:5}", *told, f"to one process {row['to one process']:.2f}")
    import torch

    told = {
        "rows": rows,
        "hidden": words.hidden,
        "layers": words.layers,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": "cpu",
    }
    print(json.dumps(told))


def plan(model: Path, data: Path, kind: str, size: int) -> int:
    """Bytes that `ham plan` says, with activations."""
    words = [
        "plan",
        model,
        "--data",
        data,
        "--task",
        "causal-lm",
        "--target",
        "0.9",
        "--json",
        "--parallel",
        kind,
        "--world",
        size,
    ]
    words += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "hamcli", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found = json.loads(done.stdout)
    return found["memory_bytes"] + found["memory"]["activations"]


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()

"""Inference of a sparse model on the CPU: hamcli.load beside dense torch, onnxruntime and OpenVINO.

    python benchmarks/runtime.py                          # MiniLM at 90 %, 1 and 2 threads
    python benchmarks/runtime.py FOLDER --threads 1 --rounds 5

One thread is timed by the process's own CPU time, more by the wall clock. Prints a table and
writes benchmarks/results/DATE-NAME.json.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

from hamcli.benchmarking.runtime import RuntimeCost, bench_runtime
from hamcli.progress import Silent

RESULTS = Path(__file__).parent / "results"


class Stages(Silent):
    """Tells on stderr what is being done."""

    def stage(self, text: str) -> None:
        """A new part begins."""
        print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """Something that may be wrong."""
        print(f"warning: {text}", file=sys.stderr)


def show(found: RuntimeCost) -> None:
    """One line for each cell, and what follows from them."""
    share = found.zeros / found.total
    print(f"{found.model}: {share:.1%} of the weights in matrices are zero, {found.rounds} rounds")
    for one in found.cells:
        low, high = one.ratio_spread
        print(f"  {one.threads} thread(s), {one.shape:8s} {one.runtime:12s} "
              f"{one.seconds * 1e3:8.2f} ms {one.ratio:6.2f}  {low:.2f}..{high:.2f}  "
              f"fastest {one.fastest_ratio:.2f}  error {one.error:.1e}")  # fmt: skip
    for line in found.conclusions:
        print(line)


def commit() -> str:
    """The commit that was measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = Path(__file__).parent
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a finished folder; default MiniLM at 90 %%")
    parser.add_argument("--target", type=float, help="prune in one shot first")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", default="runtime", help="of the file, after the date")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = bench_runtime(
        options.model,
        target=options.target,
        threads=options.threads,
        rounds=options.rounds,
        progress=Stages(),
    )
    show(found)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{datetime.date.today():%Y-%m-%d}-{options.name}.json"
    record = {"commit": commit(), **found.as_json()}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}")


if __name__ == "__main__":
    main()

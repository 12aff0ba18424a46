"""Training with two and more threads, alone and beside a busy neighbour: how threads should wait.

    python benchmarks/thread_waiting.py [--threads 2] [--rounds 5] [--seconds 4] [--out FILE]

libgomp lets a thread that waits for the others spin 300,000 turns before it sleeps; `ham` lets it
spin fewer (hamcli/threads.py). Each round runs the same encoder once with every count, each in a
process of its own, first on the machine as it is, then beside one process a core that does nothing
but count. Printed: milliseconds a step, and the speed over that with libgomp's own count, both
medians over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hamcli.threads import SPINS

COUNTS = ("300000", SPINS, "0")
OWN = COUNTS[0]
JOB = """
import sys, time, torch
threads, seconds = int(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(threads)
layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True)
model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
batch = torch.randn(16, 48, 384)
step = lambda: model(batch).square().mean().backward()
step()
begin, steps = time.perf_counter(), 0
while time.perf_counter() - begin < seconds:
    step()
    steps += 1
print((time.perf_counter() - begin) / steps)
"""


def seconds_a_step(count: str, threads: int, seconds: float) -> float:
    """Of training in a process whose threads spin `count` turns."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    words = [sys.executable, "-c", JOB, str(threads), str(seconds)]
    environment = known | {"GOMP_SPINCOUNT": count}
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


@contextmanager
def neighbours(number: int) -> Iterator[None]:
    """Processes that keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()


def measure(threads: int, rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Seconds a step: situation -> count -> one a round."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, number in (("alone", 0), ("beside a busy process a core", os.cpu_count() or 1)):
        times: dict[str, list[float]] = {count: [] for count in COUNTS}
        with neighbours(number):
            for _ in range(rounds):
                for count in COUNTS:
                    times[count].append(seconds_a_step(count, threads, seconds))
        found[name] = times
    return found


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    found = measure(words.threads, words.rounds, words.seconds)
    for name, times in found.items():
        print(f"{words.threads} threads, {name}")
        for count, seconds in times.items():
            pairs = zip(times[OWN], seconds, strict=True)
            ratio = statistics.median(own / other for own, other in pairs)
            print(f"  {count:>7} spins  {statistics.median(seconds) * 1e3:7.1f} ms  {ratio:.2f} x")
    if words.out is not None:
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": words.threads,
            "seconds_a_step": found,
        }
        words.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

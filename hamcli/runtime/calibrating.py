"""Which kernel is fastest here, by trying; what was found is kept in the user's cache.

The key is all that matters to a kernel's time: shape, sparsity, rows and threads; the file's name
stands for the machine, torch and the extension.
"""

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hamcli.native.building import SOURCES, user_cache
from hamcli.runtime.modules import SparseLinear

ROUNDS = 5
SHORTEST_SECONDS = 2e-4  # of one measurement: shorter calls are repeated
GAIN = 1.1  # over dense, below which dense stays
SPARSITY_STEP = 0.05
MOST_ROWS = 4096


class Calibration:
    """Times of the kernels, measured when first asked for.

    Args:
        path: JSON file that keeps them; None keeps them in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._times = _read(path)
        self._chosen: dict[tuple[object, ...], str] = {}
        self._is_new = False

    def choose(self, module: SparseLinear, rows: int) -> str:
        """Name of the fastest kernel for about that many rows at torch's threads, or "dense"."""
        rows, threads = _rounded(rows), torch.get_num_threads()
        known = (*_kind(module), rows, threads)
        if known not in self._chosen:
            self._chosen[known] = fastest(self.times(module, rows))
        return self._chosen[known]

    def times(self, module: SparseLinear, rows: int) -> dict[str, float]:
        """Seconds of each kernel, "dense" among them."""
        sparsity = math.floor(module.sparsity / SPARSITY_STEP + 1e-9) * SPARSITY_STEP
        layout = "T" if module.is_transposed else ""
        key = (
            f"{module.out_features}x{module.in_features}{layout} sparsity {sparsity:.2f} "
            f"rows {rows} threads {torch.get_num_threads()}"
        )
        wanted = {"dense", *module.backends}
        found = self._times.get(key, {})
        if not wanted <= set(found):
            found = _measure(module, rows)
            self._times[key] = found
            self._is_new = True
        return {name: found[name] for name in sorted(wanted)}

    def save(self) -> None:
        """Write what is new; a cache that cannot be written is no error."""
        if self.path is None or not self._is_new:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({**_read(self.path), **self._times}, file, indent=1, sort_keys=True)
                Path(name).replace(self.path)
            finally:
                Path(name).unlink(missing_ok=True)  # of a disk that is full
        except OSError:
            return
        self._is_new = False


def _kind(module: SparseLinear) -> tuple[object, ...]:
    """All of a module that its times depend on, or the choice among them."""
    shape = (module.out_features, module.in_features, module.is_transposed)
    return (*shape, module.sparsity, module.backends)


def fastest(times: dict[str, float]) -> str:
    """The fastest kernel, if it gains enough over dense."""
    name = min(times, key=times.__getitem__)
    return name if times["dense"] >= GAIN * times[name] else "dense"


def cache_path() -> Path | None:
    """Where this machine's times are kept."""
    cache = user_cache()
    if cache is None:
        return None
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update(source.read_bytes())
    here = (torch.__version__, torch.backends.cpu.get_cpu_capability(), _cpu_name(), os.cpu_count())
    digest.update(repr(here).encode())
    return cache / "ham" / "runtime" / f"{digest.hexdigest()[:16]}.json"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.machine())


def _rounded(rows: int) -> int:
    """The nearest power of two."""
    return int(min(MOST_ROWS, 2 ** round(math.log2(max(1, rows)))))


def _measure(module: SparseLinear, rows: int) -> dict[str, float]:
    """Least seconds of each kernel, taken in turns."""
    generator = torch.Generator().manual_seed(0)
    jobs: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        x = torch.randn(rows, module.in_features, generator=generator)
        jobs["dense"] = lambda: module.multiply_dense(x)
        for name in module.backends:
            # its checks are part of what it costs
            jobs[name] = lambda name=name: module.multiply(name, x)  # type: ignore[misc]
        # one thread's own time is not disturbed by other processes
        now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        repeats = {name: _repeats(job) for name, job in jobs.items()}
        best = dict.fromkeys(jobs, math.inf)
        for _ in range(ROUNDS):
            for name, job in jobs.items():
                began = now()
                for _ in range(repeats[name]):
                    job()
                best[name] = min(best[name], (now() - began) / repeats[name])
    return best


def _repeats(job: Callable[[], Any]) -> int:
    job()
    began = time.perf_counter()
    job()
    return max(1, math.ceil(SHORTEST_SECONDS / max(1e-7, time.perf_counter() - began)))


def _read(path: Path | None) -> dict[str, dict[str, float]]:
    """The file's times; none where it is missing or not what it should be."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: times for key, times in found.items() if _are_times(times)}


def _are_times(found: object) -> bool:
    return isinstance(found, dict) and all(
        isinstance(one, float) and 0 < one < math.inf for one in found.values()
    )

"""Times and peak memory of several jobs, side by side in one process."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Clock = Literal["wall", "cpu"]  # cpu: the process's own time, which other processes disturb less
Job = Callable[[], object]


def time_rounds(jobs: Mapping[str, Job], *, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each job in each round; a round goes through all jobs in turn.

    Args:
        jobs: Name → what is timed.
        rounds: How often each job is timed.
        clock: "cpu" where there is one thread and other processes disturb.
    """
    now = time.perf_counter if clock == "wall" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            began = now()
            job()
            times[name].append(now() - began)
    return times


@dataclass(frozen=True, slots=True)
class VariantCost:
    """Time and memory of one of several jobs beside another.

    Attributes:
        name: Which.
        seconds: Median.
        spread: Tenth and ninetieth percentile of it.
        ratio: Median over that of the other.
        fastest_ratio: Least time over that of the other: what a loaded machine hides least.
        ratio_spread: Tenth and ninetieth percentile of the ratio inside one round.
        extra_bytes: Peak memory above what was there before; None where unknown.
    """

    name: str
    seconds: float
    spread: tuple[float, float]
    ratio: float
    fastest_ratio: float
    ratio_spread: tuple[float, float]
    extra_bytes: int | None


def cost_of(
    name: str, times: Mapping[str, Sequence[float]], beside: str, extra_bytes: int | None
) -> VariantCost:
    """The cost of the job `name` over that of the job `beside`, from the times of all."""
    own, measure = times[name], times[beside]
    return VariantCost(
        name=name,
        seconds=statistics.median(own),
        spread=spread(own),
        ratio=statistics.median(own) / statistics.median(measure),
        fastest_ratio=min(own) / min(measure),
        ratio_spread=ratio_spread(own, measure),
        extra_bytes=extra_bytes,
    )


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Tenth and ninetieth percentile."""
    if len(values) < 2:
        return values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def ratio_spread(own: Sequence[float], measure: Sequence[float]) -> tuple[float, float]:
    """Tenth and ninetieth percentile of the ratio inside one round."""
    return spread([one / other for one, other in zip(own, measure, strict=True)])


def extra_peak_bytes(job: Job) -> int | None:
    """How far the process's memory rises above where it stood while `job` runs, on Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(reset, os.W_OK):
        job()
        return None
    job()  # libraries, threads and what is made once
    # memory that was freed but kept would hide what is taken
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _kilobytes(status, "VmRSS")
    job()
    return max(0, _kilobytes(status, "VmHWM") - before) * 1024


def available_bytes() -> int | None:
    """Memory that this machine could still give, on Linux."""
    path = Path("/proc/meminfo")
    return _kilobytes(path, "MemAvailable") * 1024 if path.exists() else None


def _kilobytes(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])

"""Speed of a written model on this CPU, sparse beside dense, as the report has it; seconds of work.

`hamcli.benchmarking.runtime` measures more, and beside other engines.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hamcli.benchmarking.measuring import Clock, time_rounds
from hamcli.errors import InputRefused
from hamcli.report.records import NO_SPEED, SpeedRecord
from hamcli.runtime import dense_inside, is_linear, use_runtime_
from hamcli.runtime.calibrating import Calibration, cache_path
from hamcli.runtime.inputs import longest, random_inputs
from hamcli.runtime.loading import LEAST_SPARSITY

TOKENS = 128
LEAST_WEIGHTS = 1_000_000  # in modules that could gain: a smaller model takes no time worth saving
MOST_WEIGHTS = 1_000_000_000  # of the model: a larger one takes more than seconds
ROUNDS = 7
ROUND_SECONDS = 0.05

Found = tuple[SpeedRecord | None, str | None]
"""What was measured, or None and why not."""


def speed_of(model: nn.Module, *, wanted: bool, dtype: str, is_cpu: bool) -> Found:
    """Measure one text of 128 tokens, or one image, by `hamcli.load`'s modules and by dense ones.

    Args:
        model: As reloaded from the files, in fp32; some of its modules become sparse.
        wanted: Whether the recipe asks for it.
        dtype: Of the written weights, as safetensors spells it.
        is_cpu: Whether the run is one on the CPU.
    """
    if reason := _reason(model, wanted, dtype, is_cpu):
        return None, f"{reason} {NO_SPEED}"
    try:
        inputs = random_inputs(model, 1, longest(model, TOKENS))
    except InputRefused as error:
        return None, f"Not measured: {error.why}. {NO_SPEED}"
    tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
    calibration = Calibration(cache_path())
    rows = (tokens or 1,)
    if not use_runtime_(model, "auto", rows=rows, calibration=calibration, may_build=False):
        return None, f"No module gained a tenth when measured here. {NO_SPEED}"
    dense, sparse = _seconds(model, inputs)
    calibration.save()
    if sparse >= dense:
        ratio = dense / sparse
        return None, f"With hamcli.load it ran at {ratio:.2f} of the dense speed here. {NO_SPEED}"
    what = f"texts of {tokens} tokens" if tokens else "images"
    threads = torch.get_num_threads()
    unit = f"{what} a second, {threads} thread{'s' if threads > 1 else ''}"
    return SpeedRecord("hamcli.load", 1 / dense, 1 / sparse, dense / sparse, unit), None


def _reason(model: nn.Module, wanted: bool, dtype: str, is_cpu: bool) -> str:
    """Why it is not measured, in words that do not depend on time."""
    if not wanted:
        return "Not measured: evaluation.speed is off."
    if not is_cpu:
        return "Not measured: the sparse kernels are those of a CPU."
    if dtype != "F32":
        return f"Not measured: no kernel on a CPU takes weights in {dtype}."
    total = sum(param.numel() for param in model.parameters())
    if total > MOST_WEIGHTS:
        return f"Not measured: {total:,} weights take more than seconds; see ham bench runtime."
    able = sum(_weights(one) for one in model.modules() if is_linear(one))
    if able < LEAST_WEIGHTS:
        return (
            f"Not measured: {able:,} weights lie in linear modules at least half of zeros, "
            f"fewer than {LEAST_WEIGHTS:,}."
        )
    return ""


def _weights(module: nn.Module) -> int:
    """Weights of a module that is sparse enough to gain, else 0."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    zeros = weight.numel() - int(weight.count_nonzero())
    return weight.numel() if zeros >= LEAST_SPARSITY * weight.numel() else 0


def _seconds(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Median of a call, dense and sparse, in rounds that take both in turn."""

    def sparse() -> None:
        with torch.inference_mode():
            model(**inputs)

    def dense() -> None:
        with dense_inside(model):
            sparse()

    # one thread's own time is not disturbed by other processes
    clock: Clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    repeats = max(_repeats(dense), _repeats(sparse))
    jobs = {"dense": _repeated(dense, repeats), "sparse": _repeated(sparse, repeats)}
    times = time_rounds(jobs, rounds=ROUNDS, clock=clock)
    medians = [statistics.median(times[name]) / repeats for name in ("dense", "sparse")]
    return medians[0], medians[1]


def _repeats(job: Callable[[], None]) -> int:
    job()
    began = time.perf_counter()
    job()
    return max(1, round(ROUND_SECONDS / max(1e-6, time.perf_counter() - began)))


def _repeated(job: Callable[[], None], count: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            job()

    return repeated

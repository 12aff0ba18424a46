"""`ham bench step`: what HAM costs on one model, in this process, on this machine."""

import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hamcli import native
from hamcli.benchmarking.measuring import Clock, available_bytes
from hamcli.benchmarking.selection import SelectionCost, bench_selection
from hamcli.benchmarking.step import Base, StepCost, bench_step
from hamcli.checkpoint.headers import FLOATS
from hamcli.checkpoint.loading import load_model
from hamcli.checkpoint.source import Source, find_model, infer_task
from hamcli.errors import InputRefused, ResourceError
from hamcli.optim import jit
from hamcli.progress import Progress
from hamcli.runtime.inputs import longest

SEQUENCES, TOKENS = 16, 64
BYTES_PER_WEIGHT = 30  # weights, gradients, two moments, mask, and what the slower forms take


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What HAM costs on a model.

    Attributes:
        model: As named.
        step: An optimizer step.
        selection: A choice of which weights become zero.
        training: What forward and backward were taken of, or why they were not, in words.
        conclusion: One sentence.
        environment: CPU, cores, load of the machine, vector unit, versions.
    """

    model: str
    step: StepCost
    selection: SelectionCost
    training: str
    conclusion: str
    environment: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_model(
    model: str,
    *,
    progress: Progress,
    config: str | None = None,
    base: Base = "adamw",
    dtype: str = "float32",
    threads: int | None = None,
    rounds: int = 15,
) -> ModelCost:
    """Time an optimizer step and a selection on tensors of a model's shapes.

    The shapes come from the headers of its files. A text model is also loaded, for the time that
    forward and backward take. One thread is timed by the process's own time, more by the wall.

    Args:
        model: Hub id, folder, .safetensors file or builtin:minilm.
        progress: Who watches.
        config: config.json of a bare file.
        base: Base optimizer.
        dtype: Of the weights, as torch names it; low-precision ones have fp32 masters.
        threads: Of torch, which is left as it was; None for as many as it has.
        rounds: How often each form is timed.

    Raises:
        InputRefused: The model cannot be opened, or has no floating-point weights.
        ResourceError: E544, it does not fit into memory.
    """
    where = environment()
    warn_if_busy(progress, where["load"][0], where["cores"])
    progress.stage(f"opening {model}")
    source = find_model(model, config=config, hashed=False)
    shapes = _shapes(source)
    _refuse_too_large(shapes, model)
    native.prepare(progress.stage)
    jit.prepare(progress.stage)
    weights_dtype = getattr(torch, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    clock: Clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    try:
        train, training = _training(source, progress)
        progress.stage(f"timing a step, {rounds} rounds")
        step = bench_step(
            shapes,
            base=base,
            dtype=weights_dtype,
            rounds=rounds,
            clock=clock,
            train=train,
        )
        del train
        progress.stage(f"timing a selection, {rounds} rounds")
        chosen = bench_selection(
            shapes,
            dtype=weights_dtype,
            rounds=rounds,
            clock=clock,
        )
    finally:
        torch.set_num_threads(before)
    return ModelCost(model, step, chosen, training, conclude(step), where)


def warn_if_busy(progress: Progress, load: float, cores: int | None) -> None:
    """Say that other processes disturb what is measured.

    Args:
        progress: Who watches.
        load: Processes that ran or waited on average in the last minute.
        cores: Of the machine; None where unknown.
    """
    if cores is not None and load > cores / 2:
        progress.warn(
            f"the machine is busy (load {load:.1f} on {cores} cores): ratios of wall time are "
            "unreliable, those of --threads 1 count CPU time and are steadier"
        )


def conclude(step: StepCost) -> str:
    """One sentence on what the step costs."""
    ours = step.ours
    assert ours is not None, "the form that the optimizer takes is always timed"
    text = f"HAM with {step.base} takes {ours.ratio:.2f} times as long as torch's fused {step.base}"
    if ours.extra_bytes is not None:
        text += f", {ours.extra_bytes / 2**20:.1f} MiB of memory"
    if step.step_share is not None:
        text += f" and {step.step_share:.1%} of a training step"
    return text + " here."


def environment() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "device": _processor(),
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """What the CPU calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor()


def _shapes(source: Source) -> list[tuple[int, ...]]:
    """Shapes of the floating-point tensors in the files, the empty ones left out."""
    shapes = [
        tensor.shape
        for header in source.headers
        for tensor in header.tensors
        if tensor.dtype in FLOATS and tensor.total > 0
    ]
    if not any(len(shape) >= 2 for shape in shapes):
        raise InputRefused(
            "E433",
            "no weights to step",
            source.id,
            "no floating-point tensor has two or more dimensions",
            "a model with matrices",
        )
    return shapes


def _refuse_too_large(shapes: list[tuple[int, ...]], model: str) -> None:
    needed = BYTES_PER_WEIGHT * sum(math.prod(shape) for shape in shapes)
    available = available_bytes()
    if available is not None and needed > available:
        raise ResourceError(
            "E544",
            "not enough memory",
            model,
            f"weights, gradients and state take {needed / 1e9:.1f} GB, "
            f"{available / 1e9:.1f} GB are free",
            "a smaller model of the same kind costs the same per weight",
        )


def _training(source: Source, progress: Progress) -> tuple[Callable[[], None] | None, str]:
    """Forward and backward of the model on random tokens; None and why if it takes no tokens."""
    try:
        task = infer_task(source.config)
        progress.stage("loading the model")
        network = load_model(source, task, dtype="float32").model
    except InputRefused as error:
        return None, f"not measured: {error.what}"
    config = network.config
    vocabulary = getattr(config, "vocab_size", None)
    takes_tokens = network.main_input_name == "input_ids"
    takes_tokens = takes_tokens and not getattr(config, "is_encoder_decoder", False)
    if not takes_tokens or not isinstance(vocabulary, int):
        return None, f"not measured: {type(network).__name__} does not take tokens alone"
    length = longest(network, TOKENS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (SEQUENCES, length), generator=generator)
    network.train()

    def train() -> None:
        network.zero_grad()
        network(input_ids=tokens)[0].float().square().mean().backward()

    return train, f"{type(network).__name__}, {SEQUENCES} x {length} random tokens, fp32"

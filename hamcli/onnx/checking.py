"""A written ONNX file against the model it came from: outputs, weights and zeros."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from hamcli.errors import InputRefused
from hamcli.onnx.graph import PlainModel, weights_of

TOLERANCE = 1e-4
"""Greatest error of an output, over its greatest magnitude, that is not refused."""


@dataclass(frozen=True, slots=True)
class WeightCount:
    """Zeros among the matrices of a file, counted in its initializers.

    Attributes:
        zeros: Of the matrices.
        total: Elements of the matrices.
        left_out: Parameters that are not in the file, since no output depends on them.
    """

    zeros: int
    total: int
    left_out: tuple[str, ...] = ()


def open_session(path: Path, threads: int = 1) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def greatest_error(model: nn.Module, path: Path, trials: Iterable[Mapping[str, Tensor]]) -> float:
    """Greatest relative error of any output of the file, in onnxruntime, over all trials.

    Args:
        model: As it was written.
        path: The file.
        trials: Inputs, of other shapes than those that it was traced with.

    Raises:
        InputRefused: E472, it is above `TOLERANCE`, an output has another shape, or onnxruntime
            cannot run the file.
    """
    with _running(path):
        session = open_session(path)
    worst = 0.0
    for inputs in trials:
        plain = PlainModel(model, tuple(inputs))
        with torch.no_grad():
            expected = plain.named_outputs(*inputs.values())
        with _running(path):
            found = session.run(list(expected), {name: one.numpy() for name, one in inputs.items()})
        for name, one in zip(expected, found, strict=True):
            error = relative_error(torch.from_numpy(one), expected[name])
            if not error <= TOLERANCE:
                shape = "x".join(map(str, next(iter(inputs.values())).shape))
                _refuse(path, f"{name} is off by {error:.2g} for inputs of {shape}")
            worst = max(worst, error)
    return worst


@contextmanager
def _running(path: Path) -> Iterator[None]:
    """Refuse what onnxruntime cannot run, as a loop that was traced for one length."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - its kinds of errors have no parent of their own
        _refuse(path, f"onnxruntime: {type(error).__name__}: {str(error)[:160]}")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Greatest difference over the greatest magnitude; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    scale = float(expected.abs().max()) or 1.0
    return float((found - expected).abs().max()) / scale


def count_weights(
    model: nn.Module,
    path: Path,
    zeros_on_disk: Mapping[str, int],
    inputs: Mapping[str, Tensor] | None = None,
) -> WeightCount:
    """Zeros of the matrices of `model` as they lie in the file.

    Equal tensors may lie there once, under one of their names; what no output depends on may not
    lie there at all.

    Args:
        model: As it was written.
        path: The file.
        zeros_on_disk: Name of a tensor in the checkpoint -> its zeros.
        inputs: Of the model, to see what its outputs depend on; None where all must be there.

    Raises:
        InputRefused: E472, a parameter is missing, has other bits, or has other zeros than the
            checkpoint.
    """
    weights = weights_of(path)
    contents = {_content(one) for one in weights.values()}
    zeros = total = 0
    left_out: list[str] = []
    for name, param in model.named_parameters():
        values = param.detach().numpy()
        in_file = weights.get(name)
        if in_file is None and _content(values) in contents:
            in_file = values
        if in_file is None and inputs and _is_without_effect(model, param, inputs):
            left_out.append(name)
            continue
        if in_file is None or _content(in_file) != _content(values):
            _refuse(path, f"{name} is not in it bit for bit")
        count = in_file.size - int(np.count_nonzero(in_file))
        on_disk = _of_checkpoint(name, zeros_on_disk, getattr(model, "base_model_prefix", ""))
        if on_disk is not None and count != on_disk:
            _refuse(path, f"{name} has {count:,} zeros, {on_disk:,} in the checkpoint")
        if param.dim() >= 2:
            zeros, total = zeros + count, total + param.numel()
    return WeightCount(zeros, total, tuple(left_out))


def _is_without_effect(model: nn.Module, param: Tensor, inputs: Mapping[str, Tensor]) -> bool:
    """Whether no output depends on a parameter, as on the token of hidden patches of DINOv2."""
    with torch.enable_grad():
        found = PlainModel(model, tuple(inputs)).named_outputs(*inputs.values())
        outputs = [one.sum() for one in found.values() if one.requires_grad]
        return torch.autograd.grad(outputs, [param], allow_unused=True)[0] is None


def _content(values: Any) -> tuple[Sequence[int], bytes]:
    return values.shape, np.ascontiguousarray(values).tobytes()


def _of_checkpoint(name: str, zeros: Mapping[str, int], prefix: str) -> int | None:
    """Zeros of a parameter in the checkpoint, which may name it with or without the prefix."""
    spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((zeros[one] for one in spellings if one in zeros), None)


def _refuse(path: Path, why: str) -> NoReturn:
    raise InputRefused(
        "E472", "the ONNX file is not the model", path.name, why, "--format dense or packed"
    )

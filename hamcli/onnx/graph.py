"""A torch model -> an ONNX file whose weights are the model's, bit for bit and by name.

The graph is traced, without folding, so that no weight is turned, joined with a norm or computed
ahead: engines do that when they load it. `checking` proves that it holds for other shapes too.
"""

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hamcli.errors import InputRefused, UsageError

OPSET = 18
LIMIT_BYTES = 2**31 - 2**24  # of a protobuf, less what the graph takes
_PREFIX = "model."
_STDOUT = 1


def require_onnx(where: str) -> None:
    """Refuse to begin where onnx or onnxruntime are missing.

    Raises:
        UsageError: E120.
    """
    try:
        import onnx  # noqa: F401 - only whether they are there
        import onnxruntime  # noqa: F401
    except ImportError as error:
        missing = str(error.name or "onnx").partition(".")[0]
        raise UsageError(
            "E120", f"{missing} is not installed", where, "", 'pip install "hamcli[onnx]"'
        ) from error


class PlainModel(nn.Module):
    """A transformers model with tensors in and tensors out, and no cache.

    Args:
        model: In eval mode.
        names: Of its inputs, in the order in which they come.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.options = {} if self.names == ("pixel_values",) else {"use_cache": False}

    def named_outputs(self, *values: Tensor) -> dict[str, Tensor]:
        """Name -> output, those that are tensors."""
        inputs = dict(zip(self.names, values, strict=True))
        found = self.model(**inputs, return_dict=True, **self.options)
        return {name: one for name, one in found.items() if isinstance(one, Tensor)}

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The outputs alone."""
        return tuple(self.named_outputs(*values).values())


def write_graph(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> tuple[str, ...]:
    """Write `model` as `path`; the names of its outputs.

    Args:
        model: In eval mode, fp32, on the CPU.
        inputs: Two rows or more; the numbers of rows and tokens are left open in the graph.
        path: A file that does not exist.

    Raises:
        InputRefused: E471, torch cannot write it; E473, it is too large for one file.
    """
    import onnx

    weights = sum(one.numel() * one.element_size() for one in model.state_dict().values())
    if weights > LIMIT_BYTES:
        raise InputRefused(
            "E473", "too large for an ONNX file", type(model).__name__, f"{weights:,} bytes",
            f"at most {LIMIT_BYTES:,}",
        )  # fmt: skip
    plain = PlainModel(model, tuple(inputs))
    try:
        with torch.no_grad(), _silence():
            outputs = plain.named_outputs(*inputs.values())
            torch.onnx.export(
                plain,
                tuple(inputs.values()),
                str(path),
                dynamo=False,  # the other one needs a minute and folds weights
                opset_version=OPSET,
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,  # the model is in eval mode
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=_open_axes(inputs, outputs),
            )
    except OSError:
        raise
    except Exception as error:  # whatever the exporter raises over an operator it does not know
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputRefused(
            "E471", "cannot be written as ONNX", type(model).__name__,
            f"{type(error).__name__}: {first[:160]}", "--format dense or packed",
        ) from error  # fmt: skip
    graph = onnx.load(str(path))
    _strip_prefix(graph.graph)
    path.write_bytes(graph.SerializeToString(deterministic=True))
    return tuple(outputs)


def weights_of(path: Path) -> dict[str, Any]:
    """Name -> values of each initializer of a file, as numpy has them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    return {one.name: numpy_helper.to_array(one) for one in graph.initializer}


def _open_axes(
    inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> dict[str, dict[int, str]]:
    """Which axes have any length: the rows, and the tokens."""
    first = next(iter(inputs.values()))
    axes = {name: {0: "batch"} for name in (*inputs, *outputs)}
    if first.dim() == 2:
        for name, one in {**inputs, **outputs}.items():
            if one.dim() >= 2 and one.shape[1] == first.shape[1]:
                axes[name][1] = "tokens"
    return axes


def _strip_prefix(graph: Any) -> None:
    """Give the weights the names that the model has for them."""
    names = {one.name for one in graph.initializer if one.name.startswith(_PREFIX)}
    for one in graph.initializer:
        one.name = _plain_name(one.name, names)
    _rename_inputs(graph, names)


def _rename_inputs(graph: Any, names: set[str]) -> None:
    for node in graph.node:
        node.input[:] = [_plain_name(name, names) for name in node.input]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename_inputs(inner, names)


def _plain_name(name: str, names: set[str]) -> str:
    return name.removeprefix(_PREFIX) if name in names else name


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Tracing warns of each branch, and prints a whole graph, from C++, where it fails."""
    with warnings.catch_warnings(), open(os.devnull, "wb") as nowhere:
        warnings.simplefilter("ignore")
        try:
            stdout = os.dup(_STDOUT)
        except OSError:  # closed: nobody reads
            yield
            return
        sys.stdout.flush()
        os.dup2(nowhere.fileno(), _STDOUT)
        try:
            yield
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(stdout, _STDOUT)
            os.close(stdout)

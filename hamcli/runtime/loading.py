"""Loading a model to be run: sparse modules where they pay on this machine, else dense ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from hamcli import native
from hamcli.errors import UsageError
from hamcli.runtime.calibrating import Calibration, cache_path
from hamcli.runtime.kernels import BACKENDS, make_kernel
from hamcli.runtime.modules import SparseLinear, is_conv1d, is_linear

Runtime = Literal["auto", "dense", "csr", "native"]
RUNTIMES = ("auto", "dense", *BACKENDS)
ROWS = (1, 32, 128, 1024)  # tokens of a batch for which modules are chosen when loaded
LEAST_SPARSITY = 0.5  # below it no kernel here was ever faster than dense


def load(
    model: str | PathLike[str],
    runtime: Runtime = "auto",
    *,
    task: str = "auto",
    rows: Sequence[int] = ROWS,
) -> Any:
    """A transformers model ready for inference, in eval mode, on the CPU.

    With another runtime than dense no parameter requires a gradient any more. Weights of other
    dtypes than fp32 stay dense: none of the kernels takes them.

    Args:
        model: Hub id, folder or .safetensors file.
        runtime: "auto" measures each module and replaces it where that gains 10 % or more; "csr"
            and "native" replace every module that has a zero and that the kernel can take.
        task: What the model does, or "auto": what its config says.
        rows: For "auto": tokens of a whole batch that the model will see; for other numbers the
            choice is made when they first come.

    Raises:
        UsageError: There is no such runtime, or "native" cannot be had here.
        InputRefused: The model is not there, or not what it says.
    """
    from hamcli.checkpoint.loading import load_model
    from hamcli.checkpoint.source import find_model

    _check(runtime)
    loaded = load_model(find_model(str(model), hashed=False), task).model.eval()
    use_runtime_(loaded, runtime, rows=rows, calibration=Calibration(cache_path()))
    return loaded


def use_runtime_(
    model: nn.Module,
    runtime: Runtime,
    *,
    rows: Sequence[int] = ROWS,
    calibration: Calibration | None = None,
    may_build: bool = True,
) -> tuple[str, ...]:
    """Replace modules of `model` in place; the names of those that were.

    Args:
        model: In eval mode, on a CPU.
        runtime: As in `load`.
        rows: As in `load`.
        calibration: Times measured before, and where new ones go.
        may_build: Whether the extension may be built.
    """
    _check(runtime)
    if runtime == "dense":
        return ()
    times = calibration or Calibration()
    model.requires_grad_(False)
    backends = BACKENDS if runtime == "auto" else (runtime,)
    replaced = []
    for name, dense in list(model.named_modules()):
        if name and _can_be_sparse(dense, LEAST_SPARSITY if runtime == "auto" else 0.0):
            sparse = _sparse(dense, backends, times if runtime == "auto" else None, may_build)
            if sparse.backends and (runtime != "auto" or _pays(sparse, times, rows)):
                _put(model, name, sparse)
                replaced.append(name)
    times.save()
    return tuple(replaced)


@contextmanager
def dense_inside(model: nn.Module) -> Iterator[None]:
    """All modules dense inside, for a comparison in one process."""
    modules = [one for one in model.modules() if isinstance(one, SparseLinear)]
    for one in modules:
        one.is_off = True
    try:
        yield
    finally:
        for one in modules:
            one.is_off = False


def _check(runtime: str) -> None:
    if runtime not in RUNTIMES:
        raise UsageError("E123", "no such runtime", runtime, right=" or ".join(RUNTIMES))
    if runtime == "native" and not native.status().is_available:
        raise UsageError("E124", "no native runtime here", runtime, native.status().reason, "csr")


def _can_be_sparse(module: nn.Module, least: float) -> bool:
    if not is_linear(module):
        return False
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.numel() == 0:
        return False
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    return sparsity > 0 and sparsity >= least


def _sparse(
    dense: nn.Module, backends: Sequence[str], times: Calibration | None, may_build: bool
) -> SparseLinear:
    weight = dense.weight
    assert isinstance(weight, torch.Tensor)
    is_transposed = is_conv1d(dense)
    rows_of_out = weight.T if is_transposed else weight
    made = {name: make_kernel(name, rows_of_out, may_build=may_build) for name in backends}
    kernels = {name: kernel for name, kernel in made.items() if kernel is not None}
    if times is not None:
        return SparseLinear(dense, is_transposed, kernels, times.choose)
    return SparseLinear(dense, is_transposed, kernels, lambda module, _: module.backends[0])


def _pays(module: SparseLinear, times: Calibration, rows: Sequence[int]) -> bool:
    return any(times.choose(module, one) != "dense" for one in rows)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

"""Loading a model to be run: sparse modules where they pay on this machine, else dense ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from hamcli import native
from hamcli.errors import InputRefused, UsageError
from hamcli.runtime.calibrating import Calibration, cache_path
from hamcli.runtime.kernels import BACKENDS, SEMI_STRUCTURED, make_kernel
from hamcli.runtime.modules import SparseLinear, is_conv1d, is_linear
from hamcli.runtime.semi_structured import DTYPES, refusal

Runtime = Literal["auto", "dense", "csr", "native", "semi-structured"]
RUNTIMES = ("auto", "dense", *BACKENDS, SEMI_STRUCTURED)
ROWS = (1, 32, 128, 1024)  # tokens of a batch for which modules are chosen when loaded
LEAST_SPARSITY = 0.5  # below it no kernel here was ever faster than dense


def load(
    model: str | PathLike[str],
    runtime: Runtime = "auto",
    *,
    task: str = "auto",
    dtype: str = "auto",
    rows: Sequence[int] = ROWS,
) -> Any:
    """A transformers model ready for inference, in eval mode, on the CPU.

    With another runtime than dense no parameter requires a gradient any more. On the CPU weights of
    other dtypes than fp32 stay dense: none of the kernels takes them.

    Args:
        model: Hub id, folder or .safetensors file.
        runtime: "auto" measures each module and replaces it where that gains 10 % or more; "csr"
            and "native" replace every module that has a zero and that the kernel can take;
            "semi-structured" loads onto the CUDA device, and replaces every module that is 2:4.
        task: What the model does, or "auto": what its config says.
        dtype: Of the parameters, as "float16"; "auto" = that of most weights in the files.
        rows: For "auto": tokens of a whole batch that the model will see; for other numbers the
            choice is made when they first come.

    Raises:
        UsageError: There is no such runtime or dtype, or the runtime cannot be had here.
        InputRefused: The model is not there, or not what it says. E475, it has no module that is
            2:4 as torch takes it, or is not in half precision.
    """
    from hamcli.checkpoint.loading import DTYPE_NAMES, load_model
    from hamcli.checkpoint.source import find_model

    _check(runtime)
    if dtype not in ("auto", *DTYPE_NAMES):
        raise UsageError("E125", "no such dtype", dtype, right=" or ".join(["auto", *DTYPE_NAMES]))
    source = find_model(str(model), hashed=False, takes_config=False)
    loaded = load_model(source, task, dtype=dtype).model.eval()
    if runtime == SEMI_STRUCTURED:
        _refuse_other_dtypes(loaded, str(model))
        loaded = loaded.to("cuda")
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
        model: In eval mode, on a CPU; for semi-structured on CUDA.
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
    least = LEAST_SPARSITY if runtime == "auto" else 0.0
    replaced = []
    for name, dense in list(model.named_modules()):
        if name and _can_be_sparse(dense, least, is_cuda=runtime == SEMI_STRUCTURED):
            sparse = _sparse(dense, backends, times if runtime == "auto" else None, may_build)
            if sparse.backends and (runtime != "auto" or _pays(sparse, times, rows)):
                _put(model, name, sparse)
                replaced.append(name)
    times.save()
    if runtime == SEMI_STRUCTURED and not replaced:
        _refuse_none(model)
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
    if runtime == SEMI_STRUCTURED and not torch.cuda.is_available():
        raise UsageError(
            "E124", "no semi-structured runtime here", runtime, "torch sees no CUDA device", "auto"
        )


def _refuse_other_dtypes(model: nn.Module, name: str) -> None:
    found = next((one.dtype for one in model.parameters() if one.dtype not in DTYPES), None)
    if found is not None:
        _refuse(name, f"weights are {str(found).removeprefix('torch.')}", 'dtype="float16"')


def _refuse_none(model: nn.Module) -> NoReturn:
    """No module is 2:4; the first linear one tells why."""
    linear = [(name, one) for name, one in model.named_modules() if is_linear(one)]
    name, first = linear[0] if linear else ("", model)
    why = refusal(_rows_of_out(first)) if linear else "it has no linear module"
    _refuse(name, why or "it has no zeros", "a model made with --pattern 2:4")


def _refuse(where: str, why: str, right: str) -> NoReturn:
    raise InputRefused("E475", "no model for semi-structured products", where, why, right)


def _rows_of_out(dense: nn.Module) -> torch.Tensor:
    """The weight of a linear module as [out, in]."""
    weight = dense.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if is_conv1d(dense) else weight


def _can_be_sparse(module: nn.Module, least: float, *, is_cuda: bool) -> bool:
    if not is_linear(module):
        return False
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    is_right = weight.dtype in DTYPES if is_cuda else weight.dtype == torch.float32
    if not is_right or weight.is_cuda != is_cuda or weight.numel() == 0:
        return False
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    return sparsity > 0 and sparsity >= least


def _sparse(
    dense: nn.Module, backends: Sequence[str], times: Calibration | None, may_build: bool
) -> SparseLinear:
    is_transposed, weight = is_conv1d(dense), _rows_of_out(dense)
    made = {name: make_kernel(name, weight, may_build=may_build) for name in backends}
    kernels = {name: kernel for name, kernel in made.items() if kernel is not None}
    if times is not None:
        return SparseLinear(dense, is_transposed, kernels, times.choose)
    return SparseLinear(dense, is_transposed, kernels, lambda module, _: module.backends[0])


def _pays(module: SparseLinear, times: Calibration, rows: Sequence[int]) -> bool:
    return any(times.choose(module, one) != "dense" for one in rows)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

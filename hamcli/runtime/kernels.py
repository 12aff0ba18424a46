"""Products with a sparse matrix: torch's CSR, the extension's with 16-bit columns, and 2:4."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hamcli import native
from hamcli.runtime.semi_structured import refusal

BACKENDS = ("csr", "native")
SEMI_STRUCTURED = "semi-structured"
MOST_COLUMNS = 1 << 16
VECTORS = 4  # of a panel; more gained nothing at 384 to 1,536 columns

Kernel = Callable[[Tensor, Tensor | None], Tensor]
"""x [rows, in], bias [out] or None -> x W^T + bias [rows, out], flat, of the weight's dtype."""


def make_kernel(backend: str, weight: Tensor, *, may_build: bool = True) -> Kernel | None:
    """The product with `weight`; None where this backend cannot do it.

    Args:
        backend: One of `BACKENDS`, or `SEMI_STRUCTURED`.
        weight: [out, in], fp32, on a CPU; for semi-structured in half precision, on CUDA.
        may_build: Whether the extension may be built for it, which takes a minute.
    """
    weight = weight.detach().contiguous()
    if backend == "csr":
        return _csr(weight)
    if backend == SEMI_STRUCTURED:
        return None if refusal(weight) else _semi_structured(weight)
    operators = native.operators() if may_build else native.operators_if_built()
    if operators is None or weight.shape[1] > MOST_COLUMNS:
        return None
    return _native(operators, weight)


def _native(operators: Any, weight: Tensor) -> Kernel:
    begins, columns, values = operators.csr_pack(weight)

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        found: Tensor = operators.csr_linear(x, begins, columns, values, bias, VECTORS)
        return found

    return multiply


def _csr(weight: Tensor) -> Kernel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout a beta
        found = weight.to_sparse_csr()
        # MKL takes 32-bit indices as they are; 64-bit ones are slower
        matrix = torch.sparse_csr_tensor(
            found.crow_indices().int(),
            found.col_indices().int(),
            found.values(),
            size=found.shape,
            check_invariants=True,
        )

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        # the matrix on the left, and both transposes flat: the other way round is slower than dense
        y = (matrix @ x.T.contiguous()).T.contiguous()
        return y if bias is None else y.add_(bias)

    return multiply


def _semi_structured(weight: Tensor) -> Kernel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        matrix = torch.sparse.to_sparse_semi_structured(weight)

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, matrix, bias)

    return multiply

"""A linear module that multiplies by a sparse matrix where that is faster."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from hamcli.runtime.kernels import Kernel

MOST_PLANS = 1024

Choose = Callable[["SparseLinear", int], str]
"""A module and the number of rows -> name of a kernel, or "dense"."""


class SparseLinear(nn.Module):
    """Stands for an `nn.Linear` or a `Conv1D` of transformers, with the same parameters.

    The dense weight stays the parameter, so that state_dict, ties and save_pretrained give it back
    bit for bit; the sparse forms beside it hold what is not zero. Dense runs when a gradient
    is asked for, when the weight was changed or moved, and for inputs of another dtype or device.

    Args:
        dense: The module to stand for.
        is_transposed: Whether its weight is [in, out], as that of Conv1D.
        kernels: Name -> product with the weight.
        choose: Which of them, or dense, for a number of rows.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, dense: nn.Module, is_transposed: bool, kernels: Mapping[str, Kernel], choose: Choose
    ) -> None:
        super().__init__()
        weight, bias = dense.weight, dense.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.is_transposed = is_transposed
        shape = weight.shape if not is_transposed else weight.shape[::-1]
        self.out_features, self.in_features = shape
        self.nx, self.nf = self.in_features, self.out_features  # as Conv1D calls them
        self.sparsity = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        self.is_off = False
        self.training = dense.training
        self._kernels, self._choose = dict(kernels), choose
        self._device_type = weight.device.type
        self._plans: dict[tuple[int, int], Kernel | None] = {}
        self._made_of = _state(weight)

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the kernels that this weight has."""
        return tuple(self._kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in]; [..., out]."""
        if self.is_off or not self._may_be_sparse(x):
            return self.multiply_dense(x)
        kernel = self._kernel_for(x.numel() // self.in_features)
        return self.multiply_dense(x) if kernel is None else self._run(kernel, x)

    def multiply(self, name: str, x: Tensor) -> Tensor:
        """As `forward`, with all its checks, by the kernel of that name."""
        if self.is_off or not self._may_be_sparse(x):
            return self.multiply_dense(x)
        return self._run(self._kernels[name], x)

    def _kernel_for(self, rows: int) -> Kernel | None:
        """What was chosen for that many rows at torch's threads; None for dense."""
        asked = rows, torch.get_num_threads()
        if asked not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[asked] = self._kernels.get(self._choose(self, rows))
        return self._plans[asked]

    def _run(self, kernel: Kernel, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        bias = self._parameters["bias"]
        if x.requires_grad:
            rows = rows.detach()
        if bias is not None and bias.requires_grad:
            bias = bias.detach()  # type: ignore[assignment]  # a tensor like the parameter
        found = kernel(rows if rows.is_contiguous() else rows.contiguous(), bias)
        return found if x.dim() == 2 else found.view(*x.shape[:-1], self.out_features)

    def multiply_dense(self, x: Tensor) -> Tensor:
        """The product as the dense module makes it."""
        if not self.is_transposed:
            return functional.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, self.in_features)
        bias = self.bias
        found = rows @ self.weight if bias is None else torch.addmm(bias, rows, self.weight)
        return found.view(*x.shape[:-1], self.out_features)

    def _may_be_sparse(self, x: Tensor) -> bool:
        # a few microseconds here are a tenth of a small product
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return False
        return (
            x.dtype == weight.dtype
            and x.device == weight.device
            and x.numel() > 0
            and not torch.is_autocast_enabled(self._device_type)
            and _state(weight) == self._made_of
        )

    def extra_repr(self) -> str:
        """What printing shows."""
        made = ", ".join(self.backends)
        return f"{self.in_features}, {self.out_features}, sparsity={self.sparsity:.3f}, {made}"


def _state(weight: Tensor) -> tuple[object, ...]:
    """Another one where a weight was changed in place, moved or exchanged."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.device


def is_linear(module: nn.Module) -> bool:
    """Whether a module is exactly a Linear of torch, or a Conv1D of transformers."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")

"""Weights, gradients and distances for the optimizer's tests."""

import torch
from torch import Tensor


def normal(
    *shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def ulps(value: Tensor, exact: Tensor) -> Tensor:
    """Distance in units of the last digit of `exact` in the dtype of `value`."""
    near = exact.to(value.dtype)
    spacing = torch.nextafter(near.abs(), torch.full_like(near, torch.inf)) - near.abs()
    return (value.double() - exact.double()).abs() / spacing.double()


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns: -0.0 differs from 0.0, and NaN equals itself."""
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(size)

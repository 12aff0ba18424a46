"""Flat minima: the ascent of SAM, and balancedness-aware regularisation (BAR) of factor pairs.

sam   gradient at w + rho * g / ||g||, used at w: two passes a step (Foret et al., arXiv
      2010.01412)
bar   of factors x, y whose product alone matters: the one with the greater gradient norm grows,
      x <- (1 + a lr) x, y <- (1 - a lr) y, else the other way round; what SAM does there to
      first order, without its second pass (Li et al., NeurIPS 2024: nBAR)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hamcli.optim.sharded import local

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def uphill(
    model: nn.Module,
    rho: float,
    zeros: Sequence[Tensor] = (),
    total: Callable[[float], float] = float,
) -> Iterator[None]:
    """Inside, the model stands rho uphill of where its gradients were taken, and has none.

    What is zero in `zeros` stays zero, and batch-norm statistics stay as they are. Afterwards the
    weights are what they were, to the bit, and the gradients those of the place uphill.

    Args:
        model: Holds gradients; of parameters that are cut over processes, each has its part.
        rho: Length of the ascent.
        zeros: Parameters of the model.
        total: What lies here of a sum to the sum over all parts.
    """
    params = [param for param in model.parameters() if param.grad is not None]
    held = {id(tensor) for tensor in zeros}
    parts = [local(param.detach()) for param in params]
    kept = [part.clone() for part in parts]
    with torch.no_grad():
        grads = []
        for param, part in zip(params, parts, strict=True):
            assert param.grad is not None
            grad = local(param.grad)
            grads.append(torch.where(part != 0, grad, 0.0) if id(param) in held else grad)
            param.grad = None
        squares = [float(grad.float().square().sum(dtype=torch.float64)) for grad in grads]
        norm = total(sum(squares)) ** 0.5
        for part, grad in zip(parts, grads, strict=True):
            if norm > 0:
                part.add_(grad, alpha=rho / norm)
        del grads
    norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
        with torch.no_grad():
            for part, values in zip(parts, kept, strict=True):
                part.copy_(values)


def adapter_pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Trained LoRA factors, lora_A beside lora_B of the same module."""
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return [
        (param, named[other])
        for name, param in named.items()
        if "lora_A" in name and (other := name.replace("lora_A", "lora_B")) in named
    ]


@torch.no_grad()
def balance_(
    pairs: Sequence[tuple[Tensor, Tensor]], amount: float, state: Mapping[Any, Any] | None = None
) -> None:
    """One step of nBAR, in place, on factors that hold the gradients of this step.

    Args:
        pairs: Factors x, y.
        amount: a * lr, at least 0 and below 1.
        state: Of the optimizer; an fp32 master of a low-precision factor is scaled too.
    """
    for x, y in pairs:
        if x.grad is None or y.grad is None:
            continue
        is_first = bool(torch.linalg.vector_norm(x.grad) >= torch.linalg.vector_norm(y.grad))
        up, down = (x, y) if is_first else (y, x)
        for tensor, factor in ((up, 1 + amount), (down, 1 - amount)):
            tensor.mul_(factor)
            if state is not None and "ham_master" in state.get(tensor, {}):
                state[tensor]["ham_master"].mul_(factor)

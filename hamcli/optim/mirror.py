"""The mirror step alone, for a loop that has an optimizer of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hamcli.optim import cpu
from hamcli.optim.exponents import require
from hamcli.optim.sharded import local


@torch.no_grad()
def ham_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    lr: float,
    alpha: float,
    beta: float,
    clamp: float = 5.0,
    masks: Sequence[Tensor | None] | None = None,
) -> None:
    """The mirror step of HAM alone, in place, for the post-step hook of any optimizer.

    w <- w * exp(clamp(-lr * (alpha * sign(w) * g + beta), -clamp, clamp)), then the mask (arXiv
    2506.02630), computed in fp32 at least and rounded once. Stateless, hence what rounding drops is
    lost: exponents below about 2e-3 in bf16, below 3e-8 in fp32. `HAM` keeps the decay.

    Args:
        params: Weights after the base optimizer's step. Written.
        grads: The gradients that step used; where None only the mask acts.
        lr: Learning rate of this step.
        alpha: Pull along the gradient; 200 in the paper.
        beta: Pull towards zero; 1e-3 in the paper.
        clamp: Greatest |exponent|.
        masks: Bool, True where kept, or None where all are; one for each parameter.

    Raises:
        ValueError: A parameter is not of floating point, a gradient is sparse or of another shape
            than its parameter, a mask is not bool or of another shape, or the lists differ in
            length; nothing is written.

    Example:
        >>> def mirror(optimizer, args, kwargs):
        ...     for group in optimizer.param_groups:
        ...         ws = [p for p in group["params"] if p.ndim >= 2]
        ...         ham_step_(ws, [w.grad for w in ws], lr=group["lr"], alpha=200, beta=1e-3)
        >>> handle = torch.optim.AdamW(model.parameters()).register_step_post_hook(mirror)
    """
    none: list[Tensor | None] = [None] * len(params)
    triples = [
        (local(param).detach(), grad, None if mask is None else local(mask))
        for param, grad, mask in zip(params, grads, masks or none, strict=True)
    ]
    for param, grad, mask in triples:
        _refuse_unfit(param, None if grad is None else local(grad), mask)
    for param, grad, mask in triples:
        cpu.mirror_(
            [param],
            [param if grad is None else local(grad).detach()],
            masks=[mask],
            a=[0.0 if grad is None else lr * alpha],
            b=0.0 if grad is None else lr * beta,
            clamp=clamp,
        )


def _refuse_unfit(param: Tensor, grad: Tensor | None, mask: Tensor | None) -> None:
    """What would be read beyond its end, in another order, or rounded to zero."""
    shape = tuple(param.shape)
    require(param.is_floating_point(), f"a parameter is {param.dtype}: floating point is needed")
    if grad is not None:
        require(not grad.is_sparse, "ham_step_ takes no sparse gradients")
        require(
            grad.shape == param.shape,
            f"a gradient has shape {tuple(grad.shape)}, its parameter {shape}",
        )
    if mask is not None:
        require(mask.dtype == torch.bool, f"a mask is {mask.dtype}: torch.bool is needed")
        require(
            mask.shape == param.shape,
            f"a mask has shape {tuple(mask.shape)}, its parameter {shape}",
        )

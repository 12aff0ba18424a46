"""The mirror step alone, for a loop that has an optimizer of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hamcli.optim import cpu
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

    Example:
        >>> def mirror(optimizer, args, kwargs):
        ...     for group in optimizer.param_groups:
        ...         ws = [p for p in group["params"] if p.ndim >= 2]
        ...         ham_step_(ws, [w.grad for w in ws], lr=group["lr"], alpha=200, beta=1e-3)
        >>> handle = torch.optim.AdamW(model.parameters()).register_step_post_hook(mirror)
    """
    triples = zip(params, grads, masks or [None] * len(params), strict=True)
    for param, grad, mask in triples:
        cpu.mirror_(
            [local(param).detach()],
            [local(param if grad is None else grad).detach()],
            masks=[None if mask is None else local(mask)],
            a=[0.0 if grad is None else lr * alpha],
            b=0.0 if grad is None else lr * beta,
            clamp=clamp,
        )

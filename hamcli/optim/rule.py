"""The equations of HAM for one tensor, in plain torch: what every other form is proved against.

    base step     w <- AdamW, Adam or SGD with gradient g at w
    mirror step   w <- w * exp(e),  e = clamp(-lr * (alpha * sign(w) * g + beta), -clamp, clamp)
    mask          w <- w where kept, else +0.0

in this order, with

    w      weights; sign(w) is taken after the base step
    g      gradient at the weights before the base step, clipped or not: what the base step saw,
           without its weight decay
    lr     learning rate of this step
    alpha  weight of the pull along the gradient, relative to |w|
    beta   weight of the pull towards zero
    a, b   lr * alpha and lr * beta: all that the inner forms know of the three

Hyperbolic Aware Minimization, Jacobs et al., ICLR 2026 (arXiv 2506.02630). Where we differ: the
published wrapper clips the gradient after the step and prints on NaN; here neither is done. The
arithmetic is that of the tensors' dtype, so float64 inputs give the oracle. The base steps repeat
the order of operations of torch's own for-loop forms, bit for bit.
"""

import torch
from torch import Tensor

# Below this exponent w + w * expm1(e) cancels; above it w * exp(e) would lose small exponents.
CANCELS = -0.5


def adam_step(
    w: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights and both moments after a step of AdamW (`decoupled`) or Adam.

    AdamW: arXiv 1711.05101; Adam: arXiv 1412.6980.

    Args:
        w: Weights.
        g: Gradient at `w`.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        step: Number of this step, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled (AdamW) or added to the gradient (Adam).
        decoupled: Which of the two.
    """
    if weight_decay != 0:
        if decoupled:
            w = w * (1 - lr * weight_decay)
        else:
            g = g.add(w, alpha=weight_decay)
    exp_avg = torch.lerp(exp_avg, g, 1 - beta1)
    exp_avg_sq = torch.addcmul(exp_avg_sq * beta2, g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add(eps)
    w = torch.addcdiv(w, exp_avg, denominator, value=-(lr / (1 - beta1**step)))
    return w, exp_avg, exp_avg_sq


def sgd_step(
    w: Tensor,
    g: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> tuple[Tensor, Tensor | None]:
    """The weights and the momentum buffer after a step of SGD without dampening.

    Args:
        w: Weights.
        g: Gradient at `w`.
        momentum_buffer: None before the first step.
        lr: Learning rate.
        momentum: 0 for none; the buffer is then returned as it came.
        nesterov: Whether the step looks ahead along the momentum.
        weight_decay: Added to the gradient.
    """
    if weight_decay != 0:
        g = g.add(w, alpha=weight_decay)
    if momentum != 0:
        if momentum_buffer is None:
            momentum_buffer = g.clone()
        else:
            momentum_buffer = (momentum_buffer * momentum).add(g, alpha=1)
        g = g.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    return w.add(g, alpha=-lr), momentum_buffer


def exponent(w: Tensor, g: Tensor, *, a: float, b: float, clamp: float) -> Tensor:
    """The exponent: clamp(-(a * sign(w) * g + b)), with a = lr * alpha and b = lr * beta."""
    return torch.clamp(-(a * (torch.sign(w) * g) + b), -clamp, clamp)


def multiply(w: Tensor, e: Tensor) -> Tensor:
    """The product w * exp(e), rounded about once: neither small exponents nor digits are lost."""
    return torch.where(e < CANCELS, w * torch.exp(e), w + w * torch.expm1(e))


def mirror_step(
    w: Tensor, g: Tensor, *, lr: float, alpha: float, beta: float, clamp: float = 5.0
) -> Tensor:
    """The mirror step: w * exp(clamp(-lr * (alpha * sign(w) * g + beta), -clamp, clamp)).

    Args:
        w: Weights after the base step.
        g: The gradient that the base step saw.
        lr: Learning rate of this step.
        alpha: Pull along the gradient, relative to |w|.
        beta: Pull towards zero.
        clamp: Greatest |exponent|.
    """
    return multiply(w, exponent(w, g, a=lr * alpha, b=lr * beta, clamp=clamp))


def masked(w: Tensor, mask: Tensor | None) -> Tensor:
    """The weights where `mask` keeps them, else +0.0; `w` itself if there is no mask."""
    # where, not a product: 0 * nan is nan, and -w * 0 is -0.0
    return w if mask is None else torch.where(mask, w, 0.0)

"""HAM's update of one tensor, written slowly: the oracle that every fast form is proved against.

    base step     w' = base(w, g)
    mirror step   w  = w' * exp(clamp(-(a * sign(w') * g + b), -clamp, clamp))
    mask          w  = w where kept, else +0

w: weights; g: gradient at the point the base step started from, already clipped; lr: learning rate;
a = lr * alpha and b = lr * beta for raw scaling. Zeros stay zero and no sign flips in the mirror
step. Source: Hyperbolic Aware Minimization (arXiv 2506.02630); `expm1` is ours, so that writing
back to fp32 rounds once. Works in any floating dtype; float64 is what tests use.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def mirror_step(
    w: Tensor, g: Tensor, *, a: float, b: float, clamp: float, mask: Tensor | None = None
) -> Tensor:
    """The mirror step and the mask; returns new weights.

    Args:
        w: Weights after the base step, any shape.
        g: Gradient, same shape.
        a: Strength of the gradient term, lr * alpha, at least 0.
        b: Pull towards zero, lr * beta, at least 0.
        clamp: Limit of |exponent|.
        mask: True where kept.
    """
    exponent = torch.clamp(-(a * torch.sign(w) * g + b), -clamp, clamp)
    moved = w + w * torch.expm1(exponent)
    return moved if mask is None else torch.where(mask, moved, 0.0)


@dataclass(slots=True)
class AdamMoments:
    """First and second moment and the number of steps done."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0


def adam_step(
    w: Tensor,
    g: Tensor,
    moments: AdamMoments,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> Tensor:
    """One step of Adam (arXiv 1412.6980) or, decoupled, AdamW (arXiv 1711.05101)."""
    moments.step += 1
    if decoupled:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    moments.exp_avg = beta1 * moments.exp_avg + (1 - beta1) * g
    moments.exp_avg_sq = beta2 * moments.exp_avg_sq + (1 - beta2) * g * g
    bias1 = 1 - beta1**moments.step
    bias2 = 1 - beta2**moments.step
    denominator = moments.exp_avg_sq.sqrt() / math.sqrt(bias2) + eps
    return w - lr / bias1 * moments.exp_avg / denominator


def sgd_step(
    w: Tensor,
    g: Tensor,
    buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> tuple[Tensor, Tensor | None]:
    """One step of SGD with momentum as torch defines it; returns weights and momentum buffer."""
    g = g + weight_decay * w
    if momentum == 0.0:
        return w - lr * g, None
    buffer = g.clone() if buffer is None else momentum * buffer + g
    return w - lr * (g + momentum * buffer if nesterov else buffer), buffer

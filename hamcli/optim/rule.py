"""The update of one tensor, written out: base step, mirror step, mask. The oracle of the fast backends.

After the base optimizer has turned w into w', the mirror step and the mask are

    e = clamp(-(a * sign(w') * g + b), -clamp, clamp)
    w <- w' * exp(e)          where the mask keeps the weight
    w <- +0.0                 where it does not

    w      weight                                g      gradient at w, the one the base step used
    a      lr * alpha of this step               b      lr * beta, or the decay that is due
    alpha  strength of the gradient's part       beta   strength of the decay
    m, v   the base optimizer's first and second moment

HAM: Hyperbolic Aware Minimization, arXiv 2506.02630. The exponent is formed in the tensor's own dtype
and applied as w + w * expm1(e), which rounds once; the published wrapper multiplies by exp(e).
Base steps follow torch.optim.AdamW, Adam and SGD. Groups, state and devices are for `ham`.
"""

import math

import torch
from torch import Tensor


def adam_step(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW (`decoupled`) or Adam: the new w, m and v. `step` counts from 1."""
    if decoupled:
        w = w * (1 - lr * weight_decay)
    elif weight_decay != 0:
        g = g + weight_decay * w
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    scale = math.sqrt(1 - beta2**step)
    return w - (lr / (1 - beta1**step)) * m / (v.sqrt() / scale + eps), m, v


def sgd_step(
    w: Tensor,
    g: Tensor,
    m: Tensor | None,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> tuple[Tensor, Tensor | None]:
    """One step of SGD: the new w and momentum buffer, which is the gradient on the first step."""
    if weight_decay != 0:
        g = g + weight_decay * w
    if momentum == 0:
        return w - lr * g, m
    m = g.clone() if m is None else momentum * m + g
    return w - lr * (g + momentum * m if nesterov else m), m


def exponent(w: Tensor, g: Tensor, *, a: float, b: float, clamp: float) -> Tensor:
    """The exponent e of the mirror step, for w after the base step."""
    return (-(a * w.sign() * g + b)).clamp(-clamp, clamp)


def mirror_step(
    w: Tensor, g: Tensor, *, lr: float, alpha: float, beta: float, clamp: float = 5.0
) -> Tensor:
    """The mirror step: zeros stay zero and no sign changes."""
    e = exponent(w, g, a=lr * alpha, b=lr * beta, clamp=clamp)
    return w + w * e.expm1()


def apply_mask(w: Tensor, mask: Tensor | None) -> Tensor:
    """`w` where `mask` is True, +0.0 elsewhere."""
    # where, not a product: 0 * nan is nan, and -w * 0 is -0.0
    return w if mask is None else torch.where(mask, w, 0.0)

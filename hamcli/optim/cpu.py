"""The mirror step over lists of tensors in plain torch, chunk by chunk, in place.

A chunk and its scratch stay in a core's cache, so the step reads and writes each weight once and
needs no full-size temporary. Works on any device.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 16  # elements: two chunks of fp32 scratch fit in a core's second-level cache


@torch.no_grad()
def mirror_step_(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    strengths: Sequence[float],
    *,
    b: float,
    clamp: float,
) -> None:
    """The mirror step of `rule.mirror_step`, in place on `ws`.

    Args:
        ws: Floating-point weights after the base step, changed in place.
        gs: Gradients, one a weight tensor, of the same shape.
        strengths: a = lr * alpha, one a tensor.
        b: Pull towards zero, lr * beta.
        clamp: Limit of |exponent|.
    """
    for w, g, a in zip(ws, gs, strengths, strict=True):
        if a == 0.0 and b == 0.0:
            continue
        for w_part, g_part in chunks(w, g):
            e = torch.sign(w_part)
            e.mul_(g_part).mul_(-a)
            if b:
                e.sub_(b)
            w_part.addcmul_(w_part, torch.expm1(e.clamp_(-clamp, clamp), out=e))


def chunks(w: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both tensors in pieces of CHUNK elements; whole where they cannot be flattened."""
    if not (w.is_contiguous() and g.is_contiguous()):
        yield w, g
        return
    flat_w, flat_g = w.view(-1), g.view(-1)
    for begin in range(0, flat_w.numel(), CHUNK):
        yield flat_w[begin : begin + CHUNK], flat_g[begin : begin + CHUNK]


@torch.no_grad()
def mask_(tensors: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    """Set to +0, in place, what the masks (True where kept) drop; None keeps all."""
    for tensor, mask in zip(tensors, masks, strict=True):
        if mask is not None:
            # not a product: 0 * nan is nan, and -w * 0 stores -0.0
            tensor.masked_fill_(~mask, 0.0)

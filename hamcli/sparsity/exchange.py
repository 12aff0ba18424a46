"""Drop the weakest connections and grow as many where the loss asks for them: RigL."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hamcli.sparsity.across import Across, totals
from hamcli.sparsity.score import magnitude
from hamcli.sparsity.select import exact_mask


def annealed(fraction: float, step: int, last: int) -> float:
    """Share of the connections exchanged at `step`: fraction / 2 * (1 + cos(pi step / last)).

    Evci et al., arXiv 1911.11134.
    """
    return fraction / 2 * (1 + math.cos(math.pi * step / last)) if last > 0 else 0.0


@torch.no_grad()
def exchanged(
    mask: Tensor,
    score: Tensor,
    gradient: Tensor,
    fraction: float,
    across: Across | None = None,
) -> Tensor:
    """A mask with as many kept as `mask`, of which `fraction` are new (RigL, arXiv 1911.11134).

    What goes are the smallest scores among the kept; what comes are the greatest |gradient| among
    the masked, never what has just gone, and never where the gradient is zero: that connection
    would stay at zero. Where fewer can come, fewer go.

    Args:
        mask: Bool, True where kept.
        score: 0 or more, of the shape of `mask`.
        gradient: Of the loss by every weight, masked ones too.
        fraction: Of the kept, 0 to 1.
        across: The processes that hold the other rows of the tensor; None where it is whole.
    """
    wanted = (~mask) & (gradient != 0) & gradient.isfinite()
    kept, free, size = totals(
        [int(mask.count_nonzero()), int(wanted.count_nonzero()), mask.numel()], across
    )
    count = min(math.floor(fraction * kept), free)
    if count == 0:
        return mask.clone()
    most = torch.finfo(score.dtype).max
    staying = exact_mask(torch.where(mask, score, most), count, across)
    growth = torch.where(wanted, gradient.abs().float(), -1.0)
    grown = exact_mask(growth, size - count, across)
    return (mask & staying) | grown


def exchange_all(
    params: Sequence[Tensor],
    masks: Sequence[Tensor],
    fraction: float,
    across: Across | None = None,
) -> list[Tensor]:
    """The same for each tensor, by |w| and by the gradient that it holds; none, no exchange."""
    return [
        mask.clone()
        if param.grad is None
        else exchanged(mask, magnitude(param), param.grad, fraction, across)
        for param, mask in zip(params, masks, strict=True)
    ]

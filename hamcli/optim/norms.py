"""How large gradients are, as the scalings of the mirror step ask: sums over what masks keep.

On a CPU the backends count in one pass. A device adds up all tensors of a step before anybody
waits for it, and is waited for once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hamcli.optim.sharded import over_shards

Norms = tuple[float, float, int]
"""Sum of |g|, sum of g squared, and how many."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Gradients whose size is asked for.

    Attributes:
        params: As the user holds them, distributed or not.
        grads: The parts that lie here.
        masks: bool, True where kept, of the same shapes; None for no mask.
        power: Which sum is needed, of |g| or of its square, 1 or 2; 0 where nobody asks.
        count: Of gradients on a CPU, both sums; None where the sums are formed on their device.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    power: int
    count: Callable[[Sequence[Tensor], Sequence[Tensor | None]], list[Norms]] | None


def norms_of(asked: Sequence[Asked]) -> list[list[Norms]]:
    """Of each gradient; zeros where nobody asks, and for the sum that is not needed on a device."""
    sums = {
        place: _sums_there(one.grads, one.masks, one.power)
        for place, one in enumerate(asked)
        if one.power and one.count is None
    }
    on_host = _fetched(sums)
    found = []
    for place, one in enumerate(asked):
        if not one.power:
            found.append([(0.0, 0.0, 0)] * len(one.params))
        elif one.count is not None:
            found.append(one.count(one.grads, one.masks))
        else:
            found.append(_told(one, on_host[place]))
    return [_whole(one, here) for one, here in zip(asked, found, strict=True)]


@torch.no_grad()
def _sums_there(
    grads: Sequence[Tensor], masks: Sequence[Tensor | None], power: int
) -> Tensor:  # [gradients + masks] float64, on their device
    """The norm of each gradient, then how many each mask keeps; nothing waits for the device."""
    double = any(grad.dtype == torch.float64 for grad in grads)
    wide = torch.float64 if double else torch.float32
    free = [grad for grad, mask in zip(grads, masks, strict=True) if mask is None]
    of_free = iter(torch._foreach_norm(free, power, dtype=wide) if free else ())
    norms, counts = [], []
    for grad, mask in zip(grads, masks, strict=True):
        if mask is None:
            norms.append(next(of_free))
            continue
        # where, not a product: 0 * nan is nan
        kept = torch.where(mask, grad, 0.0)
        norms.append(torch.linalg.vector_norm(kept, power, dtype=wide))
        counts.append(mask.sum())
    return torch.stack([one.double() for one in (*norms, *counts)])


def _fetched(sums: dict[int, Tensor]) -> dict[int, list[float]]:
    """The numbers of all tensors; each device is waited for once."""
    found = {}
    for device in dict.fromkeys(one.device for one in sums.values()):
        places = [place for place, one in sums.items() if one.device == device]
        numbers = iter(torch.cat([sums[place] for place in places]).tolist())
        for place in places:
            found[place] = [next(numbers) for _ in range(sums[place].numel())]
    return found


def _told(one: Asked, numbers: Sequence[float]) -> list[Norms]:
    kept = iter(numbers[len(one.grads) :])
    found: list[Norms] = []
    for grad, mask, norm in zip(one.grads, one.masks, numbers, strict=False):
        count = grad.numel() if mask is None else int(next(kept))
        found.append((norm, 0.0, count) if one.power == 1 else (0.0, norm**2, count))
    return found


def _whole(one: Asked, here: list[Norms]) -> list[Norms]:
    return over_shards(here, one.params) if one.power else here

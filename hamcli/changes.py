"""What a run did to the weights: their magnitudes before and after, signs, what a threshold cut."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hamcli.parallel.world import World
from hamcli.report.records import Histogram
from hamcli.sparsity.targets import Targets

BINS = 80
HISTOGRAM_LIMIT = 2_000_000  # weights; beyond it every n-th counts


@dataclass(frozen=True, slots=True)
class Change:
    """The targets now, beside the dense model's.

    Attributes:
        histogram: Magnitudes near zero.
        sign_flips: Share of the surviving weights whose sign is not the dense model's.
    """

    histogram: Histogram
    sign_flips: float


def change_of(before: Sequence[Tensor], targets: Targets, world: World) -> Change:
    """What happened to the targets; the same in all processes where they are cut.

    Args:
        before: The dense weights, shaped as the targets'.
        targets: As they are now.
        world: The processes of the run.
    """
    stride = _stride(targets.total)
    samples = [_sampled(one, stride, targets) for one in (before, targets.params)]
    alive, flipped = _sign_flips(before, targets.params)
    if world.is_sharded:
        samples = [[world.whole(one) for one in of_all] for of_all in samples]
        alive, flipped = (int(one) for one in world.add([alive, flipped]))
    return Change(
        _histogram(samples[0], samples[1], stride), sign_flips=flipped / alive if alive else 0.0
    )


def histogram_of(before: Sequence[Tensor], targets: Targets) -> Histogram:
    """The histogram of targets that are whole, `before` and now."""
    stride = _stride(targets.total)
    samples = [_sampled(one, stride, targets) for one in (before, targets.params)]
    return _histogram(samples[0], samples[1], stride)


def greatest_dropped(before: Sequence[Tensor], masks: Sequence[Tensor]) -> float | None:
    """Largest dense magnitude among what the masks (True where kept) drop; None of nothing."""
    dropped = [
        float(weights.abs()[~mask.cpu()].max())
        for weights, mask in zip(before, masks, strict=True)
        if not bool(mask.all())
    ]
    return max(dropped, default=None)


def _sampled(tensors: Sequence[Tensor], stride: int, targets: Targets) -> list[Tensor]:
    """Every `stride`-th weight of each, fp32 on the CPU; of parts, those that the whole gives."""
    made = []
    for one, target in zip(tensors, targets, strict=True):
        begin = 0
        if target.part is not None:
            begin = -target.part.begin * math.prod(target.part.shape[1:]) % stride
        made.append(one.detach().flatten()[begin::stride].float().cpu())
    return made


def _stride(total: int) -> int:
    """Which weights the histogram of `total` weights counts: every so manieth."""
    return max(1, total // HISTOGRAM_LIMIT)


def _histogram(before: Sequence[Tensor], after: Sequence[Tensor], stride: int) -> Histogram:
    """Weights near zero, within one root mean square of the dense ones, of samples."""
    first, second = torch.cat(list(before)), torch.cat(list(after))
    scale = float(first.square().mean().sqrt()) or 1.0
    edges = torch.linspace(-1, 1, BINS + 1)
    return Histogram(
        edges=tuple(round(float(edge), 6) for edge in edges),
        before=_bins(first / scale),
        after=_bins(second / scale),
        before_zeros=int((first == 0).sum()),
        after_zeros=int((second == 0).sum()),
        total=first.numel(),
        unit="weight / RMS of the dense targets"
        + (f", every {stride}th weight" if stride > 1 else ""),
    )


def _bins(values: Tensor) -> tuple[int, ...]:
    alive = values[values != 0]
    return tuple(int(count) for count in torch.histc(alive, bins=BINS, min=-1, max=1))


def _sign_flips(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[int, int]:
    """How many weights survive, and how many of them have not the dense model's sign."""
    alive = flipped = 0
    for old, new in zip(before, after, strict=True):
        kept = new.detach().cpu()
        alive += int(kept.count_nonzero())
        flipped += int((torch.sign(kept) * torch.sign(old) < 0).sum())
    return alive, flipped

"""What a model is without its weights, or without some: each time all are put back afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hamcli.evaluation import Quality
from hamcli.sparsity.masks import apply_masks_, one_shot_masks
from hamcli.sparsity.rules import Rules
from hamcli.sparsity.targets import Targets


def one_shot_quality(
    targets: Targets, rules: Rules, measure: Callable[[], Quality | None]
) -> Quality | None:
    """Quality of the model once its targets are pruned in one shot.

    Args:
        targets: Of the model.
        rules: How many zeros, and where.
        measure: Measures the model as it is.
    """
    masks = one_shot_masks(targets, rules)
    with _weights_kept(targets):
        apply_masks_(targets, masks)
        return measure()


@torch.no_grad()
def empty_loss(targets: Targets, loss: Callable[[], Tensor]) -> float:
    """Loss of the model once every target weight is zero.

    Args:
        targets: Of the model.
        loss: Of the model as it is.
    """
    with _weights_kept(targets):
        for param in targets.params:
            param.zero_()
        return float(loss())


@contextmanager
def _weights_kept(targets: Targets) -> Iterator[None]:
    kept = [param.detach().clone() for param in targets.params]
    try:
        yield
    finally:
        with torch.no_grad():
            for param, values in zip(targets.params, kept, strict=True):
                param.copy_(values)

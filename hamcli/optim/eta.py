"""The eta and clamp of a pretrained model where nobody said: what its mirror step may do.

Two things that small image networks forgive break a language model within a few steps:

    outliers  a few weights have gradients thousands of times the mean, and a limit of 0.1 lets
              each of these move by a tenth a step. Hence clamp = 25 eta, 25 mean exponents
    size      where weights are large and the learning rate is small, eta alone would move them by
              many times what Adam does. Hence eta <= lr / (4 mean|w|): a quarter of the base step

Ours, not the paper's; `benchmarks/LOG.md` has what was measured.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hamcli.optim.exponents import CALIBRATED, CLAMPS, ETAS, choose_automatic_scaling

GREATEST_SHARE = 0.25  # of the base step; at 1.0 the best learning rate of SmolLM2 lost 15 %
CLAMP_OVER_ETA = 25.0  # what 0.1 is to the eta of 0.004 that was found with it


def choose_eta_and_clamp(
    weights: Iterable[Tensor],
    *,
    lr: float,
    base: str = "adamw",
    alpha: float | str = "auto",
    scaling: str = "auto",
    eta: float | None = None,
    clamp: float | None = None,
) -> tuple[float | None, float | None]:
    """Eta and clamp for a model: as given, else what its weights and learning rate stand.

    Args:
        weights: What is mirrored, before the first step.
        lr: Peak learning rate.
        base: The base optimizer. The step of sgd is not of size lr, and sets eta no limit.
        alpha: As for `HAM`.
        scaling: As for `HAM`.
        eta: As for `HAM`; None to choose.
        clamp: As for `HAM`; None to choose.

    Returns:
        Both unchanged where alpha is given, or not found as one number for all tensors.
    """
    if alpha != "auto" or scaling not in ("auto", *CALIBRATED):
        return eta, clamp
    if eta is None:
        eta = ETAS[choose_automatic_scaling()[0] if scaling == "auto" else scaling]
        size = mean_magnitude(weights)
        if base != "sgd" and size > 0:
            short = f"{GREATEST_SHARE * lr / size:.3g}"  # people read it in the recipe
            eta = min(eta, float(short))
    if clamp is None:
        clamp = min(CLAMPS["calibrated"], float(f"{CLAMP_OVER_ETA * eta:.3g}"))
    return eta, clamp


@torch.no_grad()
def mean_magnitude(weights: Iterable[Tensor]) -> float:
    """Mean |w| over all weights; 0 where there are none."""
    total = 0.0
    count = 0
    for weight in weights:
        total += float(torch.linalg.vector_norm(weight, 1, dtype=torch.float32))
        count += weight.numel()
    return total / max(count, 1)

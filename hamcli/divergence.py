"""When a run went astray: a loss that is no number or far too high, gradients that vanished."""

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hamcli.errors import Diverged
from hamcli.progress import StepRecord

FACTOR = 10.0
PATIENCE = 20
"""A loss of `FACTOR` times that of a model without weights, for so many steps, is astray."""

VANISHED = 0.03
"""Gradients below so much of those at the start, at a higher loss than at the start: collapsed."""
MEASURES = 5  # measured steps that count as the start, and as now

CURE = "a lower optimizer.lr, or optimizer.max_grad_norm above 0"


def refuse_high_loss(records: Sequence[StepRecord], empty_loss: float) -> None:
    """See that the last losses are not all far above that of a model which has learnt nothing.

    Such a loss is finite and may stay so to the end, but what would be written is worth nothing.
    A sound run passes far below: even a model whose targets are all zero has the bare loss.

    Args:
        records: Of all steps so far, those before a stop too, so that a resumed run decides alike.
        empty_loss: Loss of the model with all targets zero; without meaning where it is 0 or no
            number.

    Raises:
        Diverged: E703.
    """
    last = records[-PATIENCE:]
    if not 0 < empty_loss < math.inf or len(last) < PATIENCE:
        return
    least = min(last, key=lambda record: record.loss)
    if least.loss <= FACTOR * empty_loss:
        return
    raise Diverged(
        "E703",
        "training diverged",
        f"steps {last[0].step} to {last[-1].step}",
        f"loss {least.loss:.4g} and more; with every target weight zero it is {empty_loss:.4g}",
        CURE,
    )


def describe_collapse(records: Sequence[StepRecord]) -> str | None:
    """What to warn of once the network has ceased to answer to training; else None.

    A first few steps at the full learning rate can drive a network to where its output hardly
    depends on its input. Its loss is finite and even below that of one-shot pruning, and stays
    where it is: the gradients are gone. Gradients of a network that has learnt all there is vanish
    too, but its loss is below that of the start. Seen by the exponents of the mirror step.

    Args:
        records: Of all steps so far, those before a stop too.
    """
    # lr * alpha * mean |g| of the targets, over lr; the norm of all gradients would not tell, since
    # what is no target (embeddings, heads) goes on learning
    sizes = [
        (one.exponent_mean / one.lr, one.loss)
        for one in records
        if one.exponent_mean is not None and one.lr > 0
    ]
    if len(sizes) < 2 * MEASURES:
        return None
    parts = [sizes[end - MEASURES : end] for end in range(MEASURES, len(sizes) + 1)]
    medians = [[statistics.median(column) for column in zip(*part, strict=True)] for part in parts]
    size_before = medians[0][0]
    # a network may be driven astray within these few steps
    loss_before = min(loss for _, loss in parts[0])
    for size, loss in medians[MEASURES:]:
        if size < VANISHED * size_before and loss > loss_before:
            return (
                f"the targets' gradients have all but vanished at a loss of {loss:.4g}, "
                f"{loss_before:.4g} at the start: the network has collapsed, and more steps will "
                "hardly mend it (a lower optimizer.lr or optimizer.ham.eta, or a longer "
                "optimizer.warmup)"
            )
    return None


def refuse_non_finite(
    step: int, loss: float, norm: float, model: nn.Module, *, may_skip: bool = False
) -> None:
    """See that loss and gradient are numbers, before the step is taken.

    Raises:
        Diverged: E701.
    """
    # With a gradient scaler an overflow is expected: the scaler skips the step and scales down.
    if math.isfinite(loss) and (math.isfinite(norm) or may_skip):
        return
    bad = first_non_finite((name, param.grad) for name, param in model.named_parameters())
    raise Diverged(
        "E701",
        "training diverged",
        f"step {step}",
        f"loss {loss:.4g}, gradient norm {norm:.4g}"
        + (f", first non-finite gradient in {bad}" if bad else ""),
        CURE,
    )


def first_non_finite(
    named: Iterator[tuple[str, Tensor | None]] | Sequence[tuple[str, Tensor]],
) -> str | None:
    """Name of the first tensor that holds NaN or infinity."""
    for name, tensor in named:
        held = getattr(tensor, "to_local", lambda: tensor)()  # noqa: B023 - called at once
        if held is not None and not bool(torch.isfinite(held).all()):
            return name
    return None

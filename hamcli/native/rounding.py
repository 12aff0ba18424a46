"""Whether a form of the step rounds as torch's fused base steps do on this machine."""

import functools
from typing import Any

import torch
from torch import Tensor


def rounds_as_torch(form: Any) -> bool:
    """Whether a form's base steps agree with torch's fused ones on this machine, in every bit.

    Args:
        form: Has `adam_ham_` and `sgd_ham_`, as `hamcli.optim.cpu`.
    """
    return all(_one_adam_step(form, *case) for case in ((True, 0.1), (False, 0.1))) and all(
        _one_sgd_step(form, *case) for case in ((False, 0.0), (True, 0.1))
    )


@functools.cache
def _numbers() -> tuple[Tensor, Tensor]:
    """Weights and gradients with busy digits; no vector's length divides their number."""
    steps = torch.arange(1, 1_038, dtype=torch.float64, device="cpu")
    return torch.sin(steps).float() * 0.1, torch.cos(steps * steps).float() * 1e-3


def _one_adam_step(form: Any, decoupled: bool, weight_decay: float) -> bool:
    w, g = _numbers()
    ours, theirs = ([w.clone(), g * 0.5, g * g] for _ in range(2))
    step = torch.full((), 3.0, device="cpu")
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    fused(
        [theirs[0]],
        [g],
        [theirs[1]],
        [theirs[2]],
        [],
        [step],
        lr=1e-2,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=weight_decay,
        amsgrad=False,
        maximize=False,
    )
    form.adam_ham_(
        [ours[0]],
        [g],
        [ours[1]],
        [ours[2]],
        [step],
        masks=[None],
        rounded=[None],
        a=[0.0],
        b=0.0,
        clamp=1.0,
        lr=1e-2,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=weight_decay,
        decoupled=decoupled,
        sums=None,
    )
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _one_sgd_step(form: Any, nesterov: bool, weight_decay: float) -> bool:
    w, g = _numbers()
    ours, theirs = ([w.clone(), g * 0.5] for _ in range(2))
    torch._fused_sgd_(
        [theirs[0]],
        [g],
        [theirs[1]],
        lr=0.1,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=weight_decay,
        dampening=0.0,
        maximize=False,
        is_first_step=False,
    )
    form.sgd_ham_(
        [ours[0]],
        [g],
        [ours[1]],
        masks=[None],
        rounded=[None],
        a=[0.0],
        b=0.0,
        clamp=1.0,
        lr=0.1,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=weight_decay,
        is_first_step=False,
        sums=None,
    )
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))

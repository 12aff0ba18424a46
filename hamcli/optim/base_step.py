"""The base optimizer's step, done by torch's own functions: AdamW, Adam, SGD with momentum.

Fused kernels where torch has them (float weights in dense memory on a CPU or CUDA device), so that
without a mirror step the numbers are those of torch.optim with `fused=True`, bit for bit; torch's
default elsewhere. The state has torch's keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from hamcli.optim import rule
from hamcli.optim.cpu import is_dense

FUSED_DEVICES = ("cpu", "cuda")


def is_fused(w: Tensor) -> bool:
    """Whether torch's fused kernels take this weight."""
    return w.device.type in FUSED_DEVICES and is_dense(w)


def start(state: dict[str, Any], w: Tensor, base: str) -> None:
    """Make the state that `base` needs before its first step on `w`."""
    if base == "sgd" or "step" in state:
        return
    device = w.device if is_fused(w) else "cpu"
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    state["exp_avg"] = torch.zeros_like(w)
    state["exp_avg_sq"] = torch.zeros_like(w)


def first_moments(state: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The momentum of a weight, if it has any yet."""
    return tuple(state[key] for key in ("exp_avg", "momentum_buffer") if key in state)


def take(
    group: Mapping[str, Any],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
) -> None:
    """One base step on `weights`, in place; `states` are made ready by `start`."""
    kinds = [(is_fused(w), "momentum_buffer" in s) for w, s in zip(weights, states, strict=True)]
    # torch's fused SGD takes lists that are all at their first step, or none of them
    for kind in sorted(set(kinds)):
        at = [i for i, other in enumerate(kinds) if other == kind]
        of_kind = [weights[i] for i in at], [grads[i] for i in at], [states[i] for i in at]
        if group["base"] == "sgd":
            _sgd(group, *of_kind, fused=kind[0])
        else:
            _adam(group, *of_kind, fused=kind[0])


def _adam(
    group: Mapping[str, Any],
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    fused: bool,
) -> None:
    beta1, beta2 = group["betas"]
    adam(
        weights,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=None if fused else False,
        fused=fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        decoupled_weight_decay=group["base"] == "adamw",
    )


def _sgd(
    group: Mapping[str, Any],
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    fused: bool,
) -> None:
    has_momentum = group["momentum"] != 0
    buffers = [state.get("momentum_buffer") for state in states] if has_momentum else []
    sgd(
        weights,
        grads,
        buffers,
        foreach=None if fused else False,
        fused=fused,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=float(group["lr"]),
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
    )
    for state, buffer in zip(states, buffers, strict=False):
        state["momentum_buffer"] = buffer


def take_by_rule(group: Mapping[str, Any], w: Tensor, g: Tensor, state: dict[str, Any]) -> None:
    """The same step of one weight as `rule` writes it, in place."""
    if group["base"] == "sgd":
        new, buffer = rule.sgd_step(
            w,
            g,
            state.get("momentum_buffer"),
            lr=float(group["lr"]),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
        )
        w.copy_(new)
        if buffer is not None:
            state["momentum_buffer"] = buffer
        return
    state["step"] += 1
    beta1, beta2 = group["betas"]
    new, m, v = rule.adam_step(
        w,
        g,
        state["exp_avg"],
        state["exp_avg_sq"],
        step=int(state["step"]),
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group["base"] == "adamw",
    )
    w.copy_(new)
    state["exp_avg"].copy_(m)
    state["exp_avg_sq"].copy_(v)

"""The C++ extension: the fused step on a CPU, counts for exact selection, sparse products.

`operators` is the way in. It builds the extension on first use and gives None where that is not
possible, for whatever reason; the callers have slower forms of everything. `operators_if_built` is
for those to whom it is not worth a minute of building. `HAM_NATIVE=0` in the environment turns both
off. Imports nothing else of ours, and torch only when asked for them.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hamcli.native.building import CannotBuild, build, find_built

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Status:
    """Whether the extension is in use.

    Attributes:
        is_available: Whether `operators` gives them.
        reason: One line: what is in use, or why it is not.
    """

    is_available: bool
    reason: str


def operators() -> Any | None:
    """The extension's operators, `torch.ops.ham_native`; None where they cannot be had."""
    if not prepare().is_available:
        return None
    import torch

    return torch.ops.ham_native


def operators_if_built() -> Any | None:
    """The same, if this process or an earlier one has built them."""
    return operators() if _settled is not None or _is_built() else None


@functools.cache
def _is_built() -> bool:
    return os.environ.get("HAM_NATIVE", "1") != "0" and find_built() is not None


def status() -> Status:
    """Whether the extension is in use, and why not; builds it if nobody has asked yet."""
    return prepare()


_settled: Status | None = None


def prepare(note: Callable[[str], None] | None = None) -> Status:
    """Build and load the extension, if that has not been tried in this process.

    Args:
        note: Told in one line when a build begins: it takes about a minute.
    """
    global _settled
    if _settled is None:
        _settled = _settle(note)
    return _settled


def _settle(note: Callable[[str], None] | None) -> Status:
    if os.environ.get("HAM_NATIVE", "1") == "0":
        return Status(False, "native step off: HAM_NATIVE=0")
    import torch

    try:
        torch.ops.load_library(str(build(note)))  # type: ignore[no-untyped-call]  # torch's own
    except CannotBuild as error:
        return Status(False, f"native step off: {error}")
    except OSError as error:
        return Status(False, f"native step off: the library cannot be loaded: {error}")
    if not _rounds_as_torch():
        return Status(False, "native step off: its base steps are not torch's here, bit for bit")
    return Status(True, f"native step on: {torch.backends.cpu.get_cpu_capability()}")


def _rounds_as_torch() -> bool:
    """Whether the base steps agree with torch's fused ones on this machine, in every bit."""
    return all(_one_adam_step(*case) for case in ((True, 0.1), (False, 0.1))) and all(
        _one_sgd_step(*case) for case in ((False, 0.0), (True, 0.1))
    )


@functools.cache
def _numbers() -> "tuple[Tensor, Tensor]":
    """Weights and gradients with busy digits; no vector's length divides their number."""
    import torch

    steps = torch.arange(1, 1_038, dtype=torch.float64, device="cpu")
    return torch.sin(steps).float() * 0.1, torch.cos(steps * steps).float() * 1e-3


def _one_adam_step(decoupled: bool, weight_decay: float) -> bool:
    import torch

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
    torch.ops.ham_native.adam_ham_(
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


def _one_sgd_step(nesterov: bool, weight_decay: float) -> bool:
    import torch

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
    torch.ops.ham_native.sgd_ham_(
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

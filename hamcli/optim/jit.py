"""The step of `rule` over lists of tensors on a CPU in one pass, compiled by numba.

For machines without a C++ compiler; numba is an optional extra. The same functions as in `cpu`,
with the same arguments and, without a mirror step, the same bits. What the loop does not take
(fp64; gradients of another dtype than the weights) goes to `cpu`. `HAM_NUMBA=0` in the environment
turns it off.
"""

import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hamcli.native import Status
from hamcli.native.building import CannotBuild, cache_folder
from hamcli.native.rounding import rounds_as_torch
from hamcli.optim import cpu
from hamcli.optim.flat import Copies, lay_flat, pick, put_back, sort_out

GRAIN = 4  # blocks; below it a second thread does not pay

kept_norms = cpu.kept_norms

_settled: Status | None = None


def is_usable() -> bool:
    """Whether numba is there and its step is torch's; the first call in a process may compile."""
    return prepare().is_available


def status() -> Status:
    """Whether the numba step is in use, and why not."""
    return prepare()


def prepare(note: Callable[[str], None] | None = None) -> Status:
    """Import numba and try the step, if that has not been done in this process.

    Args:
        note: Told in one line before: compiling takes seconds.
    """
    global _settled
    if _settled is None:
        _settled = _settle(note)
    return _settled


def _settle(note: Callable[[str], None] | None) -> Status:
    if os.environ.get("HAM_NUMBA", "1") == "0":
        return Status(False, "numba step off: HAM_NUMBA=0")
    if importlib.util.find_spec("numba") is None:
        return Status(False, "numba step off: numba is not installed")
    if _lanes() == 0:
        return Status(False, "numba step off: the vector unit of this CPU is not known")
    if note is not None:
        note("compiling the numba step for this machine; some seconds")
    try:
        agrees = rounds_as_torch(sys.modules[__name__])
    except (CannotBuild, ImportError, OSError) as error:
        return Status(False, f"numba step off: {' '.join(str(error).split())[:200]}")
    if not agrees:
        return Status(False, "numba step off: its base steps are not torch's here, bit for bit")
    return Status(True, f"numba step on: numba {importlib.metadata.version('numba')}")


def _lanes() -> int:
    """Length of the vectors of torch's fused steps, fp32; 0 where that is not known."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() in ("arm64", "aarch64") and capability == "DEFAULT":
        return 4  # NEON
    # torch has its fused steps for AVX2 alone, also where the CPU has AVX-512
    return {"AVX2": 8, "AVX512": 8, "SVE256": 8}.get(capability, 0)


def adam_ham_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None],
    rounded: Sequence[Tensor | None],
    a: Sequence[float],
    b: float,
    clamp: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    sums: Tensor | None = None,
) -> None:
    """As `cpu.adam_ham_`."""
    from hamcli.optim import loop

    lerp = np.float32(1 - beta1)
    is_near = bool(abs(lerp) < 0.5)
    common = {
        loop.DECAY: 1 - lr * weight_decay if decoupled else weight_decay,
        loop.LERP: lerp if is_near else lerp - np.float32(1),
        loop.BETA2: beta2,
        loop.REST2: 1 - beta2,  # formed in double: in fp32 it is off by 1e-5 of itself
        loop.EPS: eps,
    }
    for at, is_taken in sort_out(params, grads, rounded):
        rows = [pick(row, at) for row in (params, grads, exp_avgs, exp_avg_sqs, masks, rounded)]
        counts, pulls = pick(steps, at), pick(a, at)
        if not is_taken:
            w, g, m, v, mask, low = rows
            cpu.adam_ham_(
                w, g, m, v, counts, masks=mask, rounded=low, a=pulls, b=b, clamp=clamp, lr=lr,
                beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=decoupled,
                sums=sums,
            )  # fmt: skip
            continue
        done = [float(count) for count in counts]
        own = {
            loop.STEP_SIZE: [lr / (1 - beta1**count) for count in done],
            loop.CORRECTION: [math.sqrt(1 - beta2**count) for count in done],
        }
        kind = {"base": loop.ADAMW if decoupled else loop.ADAM, "is_near": is_near}
        _step_(rows, (0, 2, 3, 5), {**common, **own}, (pulls, b, clamp), kind, sums)


def sgd_ham_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    masks: Sequence[Tensor | None],
    rounded: Sequence[Tensor | None],
    a: Sequence[float],
    b: float,
    clamp: float,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    is_first_step: bool,
    sums: Tensor | None = None,
) -> None:
    """As `cpu.sgd_ham_`."""
    from hamcli.optim import loop

    base = loop.SGD
    if momentum != 0:
        base = loop.NESTEROV if nesterov else loop.MOMENTUM_SGD
    kind = {"base": base, "is_first": is_first_step and momentum != 0}
    numbers = {loop.DECAY: weight_decay, loop.MOMENTUM: momentum, loop.LR: lr}
    for at, is_taken in sort_out(params, grads, rounded):
        rows = [pick(row, at) for row in (params, grads, momentum_buffers, masks, rounded)]
        pulls = pick(a, at)
        if not is_taken:
            w, g, m, mask, low = rows
            cpu.sgd_ham_(
                w, g, m, masks=mask, rounded=low, a=pulls, b=b, clamp=clamp, lr=lr,
                momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                is_first_step=is_first_step, sums=sums,
            )  # fmt: skip
            continue
        rows.insert(loop.V, [None] * len(at))
        _step_(rows, (0, 2, 5), numbers, (pulls, b, clamp), kind, sums)


def _step_(
    rows: list[list[Any]],
    written: Sequence[int],
    numbers: dict[int, Any],
    exponents: tuple[Sequence[float], float, float],
    kind: dict[str, Any],
    sums: Tensor | None,
) -> None:
    """Tensors of one dtype: `rows` are the columns of the loop's table, `numbers` those of its."""
    from hamcli.optim import loop

    copies: Copies = []
    columns = lay_flat(rows, written, copies)
    a, b, clamp = exponents
    clamp = min(clamp, loop.CLAMP_LIMIT)
    values = np.zeros((len(a), loop.NUM_NUMBERS), np.float32)
    for column, number in {**numbers, loop.A: a, loop.B: b, loop.CLAMP: clamp}.items():
        values[:, column] = number
    table = np.zeros((len(a), loop.NUM_COLUMNS), np.int64)
    for column, tensors in enumerate(columns):
        table[:, column] = [0 if one is None else one.data_ptr() for one in tensors]
    table[:, loop.NUMEL] = [param.numel() for param in columns[loop.W]]
    mirrors = (values[:, loop.A] != 0) | (values[:, loop.B] != 0)
    is_masked = table[:, loop.MASK] != 0
    lows = {torch.float32: loop.FP32, torch.bfloat16: loop.BF16, torch.float16: loop.FP16}
    fixed = {"low": lows[columns[loop.G][0].dtype], "is_near": False, "is_first": False, **kind}
    for with_mirror in (False, True):
        for with_mask in (False, True):
            chosen = (mirrors == with_mirror) & (is_masked == with_mask)
            if not chosen.any():
                continue
            one = loop.Kind(
                mirrors=with_mirror,
                is_masked=with_mask,
                is_small=with_mirror and clamp <= loop.SMALL,
                is_measured=with_mirror and sums is not None,
                lanes=_lanes(),
                **fixed,
            )
            _run(one, table[chosen], values[chosen], sums)
    put_back(copies)


def _run(kind: Any, rows: npt.NDArray[np.int64], numbers: npt.NDArray[np.float32],
         sums: Tensor | None) -> None:  # fmt: skip
    """All tensors as one row of blocks, cut among the threads; sums are added in their order."""
    from hamcli.optim import loop

    ends = np.cumsum(-(-rows[:, loop.NUMEL] // loop.BLOCK))
    rows[1:, loop.FIRST_BLOCK] = ends[:-1]
    blocks = int(ends[-1])
    of_blocks = np.zeros((blocks if kind.is_measured else 1, cpu.NUM_SUMS))
    step = loop.compiled(kind, _cache())
    threads = max(1, min(torch.get_num_threads(), blocks // GRAIN))
    cuts = [blocks * thread // threads for thread in range(threads + 1)]
    if threads == 1:
        step(rows, numbers, 0, blocks, of_blocks)
    else:
        # threads of this call alone: they cannot outlive a fork, nor the interpreter
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [
                pool.submit(step, rows, numbers, first, last, of_blocks)
                for first, last in itertools.pairwise(cuts[1:])
            ]
            step(rows, numbers, 0, cuts[1], of_blocks)
            for other in others:
                other.result()
    if kind.is_measured and sums is not None and blocks:
        sums[:-1] += torch.from_numpy(of_blocks[:, :-1].sum(axis=0))
        sums[-1] = torch.maximum(sums[-1], torch.from_numpy(of_blocks[:, -1]).max())


@functools.cache
def _cache() -> Path | None:
    """A private folder for what is compiled; None if there is none, and nothing is kept."""
    try:
        return cache_folder() / "numba"
    except CannotBuild:
        return None

"""The step of `rule` over lists of tensors on a GPU: one Triton launch for all of the same dtypes.

Every weight is read and written once: base step, mirror step and mask meet it in registers, as
fp32. The kernel finds its tensors through a table of addresses. It reads learning rate, exponents
and step counts on the device, so that nothing waits for it and a captured CUDA graph follows their
changes. There is no autotuning: a tuner runs a kernel many times, and this one changes its inputs.

Legend: w weights, g gradients, m and v first and second moments, a = lr * alpha, b = lr * beta, e
exponents. All lists have one entry per tensor.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hamcli.optim.cpu import NUM_SUMS
from hamcli.optim.kernel import compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of gradients and of rounded weights
CLAMP_LIMIT = 87.0  # exp of it, and of minus it, is a normal fp32 number
VECTOR_BYTES = 16  # the widest load of one thread
INTERPRETED_BLOCK = 1 << 16  # the interpreter takes milliseconds a program, however small
NUM_HELD = 512  # a few for each group, and the places where gradients come to lie in turn

Numbers = float | Sequence[float] | Tensor
Integers = np.ndarray[Any, np.dtype[np.int64]]
# w, m, v, mask, rounded weight, step count: an entry for each weight, None where there is none.
Columns = tuple[Sequence[Any], ...]

# --- the step


def is_usable(weight: Tensor) -> bool:
    """Whether this backend steps `weight` (or the master of a low-precision one)."""
    is_here = weight.device.type == "cuda" or (weight.device.type == "cpu" and _is_interpreted())
    is_taken = weight.dtype in DTYPES and _is_dense(weight)
    return is_here and is_taken and importlib.util.find_spec("triton") is not None


def adam_ham_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None],
    rounded: Sequence[Tensor | None],
    a: Numbers,
    b: Numbers,
    clamp: float,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    sums: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """One step of AdamW (`decoupled`) or Adam, then the mirror step, then the mask, in place.

    As `cpu.adam_ham_`, with what belongs to a GPU. Nothing waits for the device, unless `sums` is
    elsewhere. A captured CUDA graph reads tensors anew at every replay and keeps numbers as they
    were at the capture; one step must have run before a capture, to compile.

    Args:
        params: Weights, or the masters of low-precision ones: fp32; or bf16 and fp16 weights
            without a master. Dense, in any memory order; what is written has the same. Written.
        grads: Of the same shapes, fp32, bf16 or fp16. Read.
        exp_avgs: First moments, fp32. Written.
        exp_avg_sqs: Second moments, fp32. Written.
        steps: Number of this step, from 1, as 0-d fp32 tensors, on the device or a CPU. Read.
        masks: bool, True where kept; None for no mask.
        rounded: Low-precision weights that receive the rounded `params`; None where `params` are
            the weights themselves. Written.
        a: lr * alpha: of all tensors, or of each; numbers, or a tensor on the device.
        b: lr * beta: likewise. Where `a` and `b` are zero there is no mirror step.
        clamp: Greatest |exponent|; more than 87 is 87.
        lr: Learning rate; a number, or a 0-d tensor on the device.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled or added to the gradient.
        decoupled: Which of the two.
        sums: `cpu.NUM_SUMS` in float64, added to if given.
        seed: Rounds bf16 `params` stochastically, alike for the same seed, step and place; None
            rounds to nearest-even.
    """
    columns = (params, exp_avgs, exp_avg_sqs, masks, rounded, steps)
    base = _Base("adamw" if decoupled else "adam", beta1, beta2, eps, weight_decay)
    _step_(columns, grads, base, (lr, a, b), clamp, sums, seed)


def sgd_ham_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    masks: Sequence[Tensor | None],
    rounded: Sequence[Tensor | None],
    a: Numbers,
    b: Numbers,
    clamp: float,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    is_first_step: bool,
    sums: Tensor | None = None,
    seed: int | None = None,
    steps: Sequence[Tensor] | None = None,
) -> None:
    """One step of SGD, then the mirror step, then the mask, in place.

    Args:
        params: As in `adam_ham_`.
        grads: As in `adam_ham_`.
        momentum_buffers: fp32, written; None if and only if `momentum` is 0.
        masks: As in `adam_ham_`.
        rounded: As in `adam_ham_`.
        a: As in `adam_ham_`.
        b: As in `adam_ham_`.
        clamp: As in `adam_ham_`.
        lr: Learning rate; a number, or a 0-d tensor on the device.
        momentum: 0 for none.
        nesterov: Whether the step looks ahead along the momentum.
        weight_decay: Added to the gradient.
        is_first_step: The buffers are filled, their contents are not read.
        sums: As in `adam_ham_`.
        seed: As in `adam_ham_`.
        steps: As in `adam_ham_`; needed with `seed` only.
    """
    absent: list[None] = [None] * len(params)
    counts: Sequence[Tensor | None] = absent if steps is None else steps
    assert seed is None or steps is not None, "each step must draw other random numbers"
    columns = (params, momentum_buffers, absent, masks, rounded, counts)
    base = _Base(
        "sgd",
        weight_decay=weight_decay,
        momentum=momentum,
        is_nesterov=nesterov,
        is_first_step=is_first_step,
    )
    _step_(columns, grads, base, (lr, a, b), clamp, sums, seed)


# --- from lists to launches


@dataclass(frozen=True, slots=True)
class _Base:
    """The base optimizer and its constants."""

    kind: str
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    is_nesterov: bool = False
    is_first_step: bool = False


@dataclass(frozen=True, slots=True)
class _Launch:
    """The weights of one launch: what they have in common, and where they are."""

    device: torch.device
    w_dtype: torch.dtype
    g_dtype: torch.dtype
    r_dtype: torch.dtype | None
    at: list[int]  # index of each tensor in the caller's lists
    rows: Tensor  # [tensors, 8] int64: the addresses of Columns, size, index
    places: Tensor  # [blocks, 2] int32: tensor, block within it
    block: int
    is_aligned: bool
    has_mask: bool
    has_step: bool


class _Held:
    """What is on the device already and need not be sent again; none of it is ever overwritten.

    While a CUDA graph is captured, what is sent reaches the device at each replay, not now: it is
    of no use outside of the graph, and is held for as long as the graph may live, the process.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[Any, Any] = OrderedDict()
        self._captured: list[Any] = []

    def _get(self, key: tuple[Any, ...], device: torch.device, make: Callable[[], Any]) -> Any:
        """What is held for `key`, or else what `make` gives."""
        is_capturing = _is_capturing(device)
        found = self._held.get(key)
        if found is None:
            found = make()
            if not is_capturing:
                self._held[key] = found
        else:
            self._held.move_to_end(key)
        if is_capturing:
            self._captured.append(found)
        elif len(self._held) > NUM_HELD:
            self._held.popitem(last=False)
        return found

    def launches(self, columns: Columns, grads: Sequence[Tensor]) -> list[_Launch]:
        """The launches that step the tensors of `columns`."""
        weights = columns[0]
        tensors = [x for column in columns for x in column]
        key = (
            tuple([0 if x is None else x.data_ptr() for x in tensors]),
            tuple([None if x is None else x.dtype for x in tensors]),
            tuple([(w.numel(), g.dtype) for w, g in zip(weights, grads, strict=True)]),
        )
        found: list[_Launch] = self._get(
            key, weights[0].device, lambda: self._make_launches(columns, grads)
        )
        return found

    def _make_launches(self, columns: Columns, grads: Sequence[Tensor]) -> list[_Launch]:
        by_kind: dict[tuple[Any, ...], list[list[int]]] = {}
        for index, (g, *tensors) in enumerate(zip(grads, *columns, strict=True)):
            _check(tensors)
            w, _, _, _, rounded, _ = tensors
            kind = (w.device, w.dtype, g.dtype, None if rounded is None else rounded.dtype)
            row = [0 if x is None else x.data_ptr() for x in tensors]
            if w.numel() > 0:
                by_kind.setdefault(kind, []).append([*row, w.numel(), index])
        return [self._make_launch(kind, np.array(rows)) for kind, rows in by_kind.items()]

    def _make_launch(self, kind: tuple[Any, ...], rows: Integers) -> _Launch:
        device, w_dtype, g_dtype, r_dtype = kind
        sizes = rows[:, 6]
        block = _block_size(int(sizes.sum()))
        return _Launch(
            device=device,
            w_dtype=w_dtype,
            g_dtype=g_dtype,
            r_dtype=r_dtype,
            at=rows[:, 7].tolist(),
            rows=self._send(rows, device),
            places=self._send(_places(sizes, block), device),
            block=block,
            is_aligned=_are_aligned(rows[:, :5]),
            has_mask=bool(rows[:, 3].any()),
            has_step=bool(rows[:, 5].all()),
        )

    def addresses(self, grads: Sequence[Tensor], device: torch.device) -> tuple[Tensor, bool]:
        """Where the gradients of a launch are, which may change, and whether they are aligned."""
        addresses = tuple([g.data_ptr() for g in grads])

        def make() -> tuple[Tensor, bool]:
            assert all(g.device == device for g in grads)
            array = np.array(addresses, dtype=np.int64)
            return self._send(array, device), _are_aligned(array)

        found: tuple[Tensor, bool] = self._get((device, addresses), device, make)
        return found

    def numbers(self, x: Numbers, device: torch.device) -> Tensor:
        """`x` on the device: 0-d, or 1-d with one number a tensor of the caller's lists."""
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=True).contiguous()
        if not isinstance(x, (int, float)):
            x = x[0] if len(set(x)) == 1 else tuple(x)

        def make() -> Tensor:
            if isinstance(x, tuple):
                return self._send(np.array(x, dtype=np.float32), device)
            return torch.full((), x, dtype=torch.float32, device=device)

        found: Tensor = self._get((device, "number", x), device, make)
        return found

    def _send(self, array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
        host = torch.from_numpy(array)
        if device.type == "cpu":
            return host
        host = host.pin_memory()  # from memory that is not pinned the copy would wait
        if _is_capturing(device):
            self._captured.append(host)
        return host.to(device, non_blocking=True)


_held = _Held()


def _check(tensors: Sequence[Tensor | None]) -> None:
    """The kernel believes addresses: another dtype or layout would garble, or crash."""
    w, m, v, mask, rounded, step = tensors
    assert w is not None
    assert w.dtype in DTYPES
    assert rounded is None or (w.dtype == torch.float32 and rounded.dtype in DTYPES)
    assert _is_dense(w)
    assert step is None or (step.dtype, step.device) == (torch.float32, w.device)
    dtypes = (torch.float32, torch.float32, torch.bool, None)
    for tensor, dtype in zip((m, v, mask, rounded), dtypes, strict=True):
        if tensor is not None:
            assert dtype in (None, tensor.dtype), f"{tensor.dtype}, not {dtype}"
            assert tensor.device == w.device
            assert _has_order(tensor, w)


@torch.no_grad()
def _step_(
    columns: Columns,
    grads: Sequence[Tensor],
    base: _Base,
    numbers: tuple[Numbers, Numbers, Numbers],
    clamp: float,
    sums: Tensor | None,
    seed: int | None,
) -> None:
    """One launch for every combination of dtypes among the weights."""
    weights, m, v, masks, rounded, steps = columns
    if not weights:
        return
    counts = None
    if steps[0] is not None and steps[0].device != weights[0].device:
        counts = [float(step) for step in steps]
        steps = [None] * len(steps)
    grads = [_in_order(g, w) for g, w in zip(grads, weights, strict=True)]
    masks = [None if k is None else _in_order(k, w) for k, w in zip(masks, weights, strict=True)]
    for launch in _held.launches((weights, m, v, masks, rounded, steps), grads):
        device = launch.device
        part = None
        if sums is not None:
            part = torch.zeros((len(launch.places), NUM_SUMS), device=device)
        where = _held.addresses([grads[i] for i in launch.at], device)
        lr, a, b = (_held.numbers(x, device) for x in numbers)
        step = None if counts is None else _held.numbers(counts, device)
        _run(launch, where, base, (lr, a, b, step), clamp, part, seed)
        if part is not None and sums is not None:
            _add_up_(sums, part)


def _add_up_(sums: Tensor, part: Tensor) -> None:
    """Add what the blocks of a launch found to `sums`; the last of the numbers is a maximum."""
    total = part.sum(dim=0, dtype=torch.float64)
    total[-1] = part[:, -1].max()
    total = total.to(sums.device)
    sums[:-1] += total[:-1]
    sums[-1] = torch.maximum(sums[-1], total[-1])


def _run(
    launch: _Launch,
    where: tuple[Tensor, bool],
    base: _Base,
    numbers: tuple[Tensor, Tensor, Tensor, Tensor | None],
    clamp: float,
    part: Tensor | None,
    seed: int | None,
) -> None:
    """Start the kernel; `numbers` are lr, a, b and step counts, `part` the sums of each block."""
    kernel, kernel_dtypes = compiled()
    grads, are_aligned = where
    lr, a, b, step = numbers
    device, w_dtype, r_dtype = launch.device, launch.w_dtype, launch.r_dtype
    # Triton launches on the current device, and takes pointers of another one for a CPU's
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(len(launch.places),)](
            launch.rows,
            grads,
            launch.places,
            launch.rows if part is None else part,
            lr,
            a,
            b,
            lr if step is None else step,
            1 - base.beta1,
            1 - base.beta2,
            math.log(base.beta1) if base.beta1 > 0 else -math.inf,
            math.log(base.beta2) if base.beta2 > 0 else -math.inf,
            base.eps,
            base.weight_decay,
            base.momentum,
            min(clamp, CLAMP_LIMIT),
            0 if seed is None else seed,
            A_STRIDE=a.ndim,
            B_STRIDE=b.ndim,
            STEP_STRIDE=step.ndim if step is not None else -1 if launch.has_step else 0,
            KIND=base.kind,
            NESTEROV=base.is_nesterov,
            FIRST_STEP=base.is_first_step,
            HAS_DECAY=base.weight_decay != 0,
            HAS_MOMENTUM=base.kind != "sgd" or base.momentum != 0,
            HAS_MASK=launch.has_mask,
            HAS_ROUNDED=r_dtype is not None,
            HAS_SUMS=part is not None,
            BY_CHANCE=seed is not None and w_dtype == torch.bfloat16,
            W_DTYPE=kernel_dtypes[w_dtype],
            G_DTYPE=kernel_dtypes[launch.g_dtype],
            R_DTYPE=kernel_dtypes[w_dtype if r_dtype is None else r_dtype],
            ALIGNED=launch.is_aligned and are_aligned,
            BLOCK=launch.block,
        )


def _places(sizes: Integers, block: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """[blocks, 2]: which block of which tensor each program does."""
    counts = (sizes + block - 1) // block
    tensors = np.repeat(np.arange(len(sizes)), counts)
    begins = np.cumsum(counts) - counts
    blocks = np.arange(len(tensors)) - begins[tensors]
    return np.stack([tensors, blocks], axis=1).astype(np.int32)


def _are_aligned(addresses: Integers) -> bool:
    return not (addresses % VECTOR_BYTES).any()


def _block_size(num_elements: int) -> int:
    """Elements a program: fewer where there is little to share out among the processors."""
    if _is_interpreted():
        return INTERPRETED_BLOCK
    return 256 if num_elements < 1 << 20 else 512


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    return tensor.permute(order).is_contiguous()


def _has_order(tensor: Tensor, like: Tensor) -> bool:
    """Whether elements at the same place in memory are the same elements; `like` is dense."""
    assert tensor.numel() == like.numel()
    if tensor.is_contiguous() and like.is_contiguous():
        return True
    # the stride of a dimension of one element is never used
    strides = zip(tensor.stride(), like.stride(), like.shape, strict=True)
    return all(one == other or size == 1 for one, other, size in strides)


def _in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, or its copy in the memory order of `like`."""
    if _has_order(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

"""The mirror step and the mask over lists of tensors, in blocks that stay in cache. Any device.

    w, g   weight, gradient          a, b   lr * alpha and the decay of this step
    m      first moment              e      exponent of the mirror step

Plain torch with `out=`: no temporary is larger than a block. `rule` says what is computed; groups,
state and the choice of a and b are for `ham`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_BLOCK = 1 << 15  # elements; weight, gradient, mask and exponent of a block fit the L2 cache
DEVICE_BLOCK = 1 << 24  # elsewhere launches cost more than memory


@dataclass(slots=True)
class Tally:
    """Sums over the exponents of one step; weights that are zero or masked do not count."""

    count: int = 0
    total: float = 0.0
    greatest: float = 0.0
    moved: int = 0
    clamped: int = 0


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """`tensor` in the memory order and on the device of `pattern`; itself when it is so already."""
    if tensor.stride() == pattern.stride() and tensor.device == pattern.device:
        return tensor
    return torch.empty_like(pattern, dtype=tensor.dtype).copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """One-dimensional view of a dense tensor in memory order."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))


def blocks(tensor: Tensor) -> Iterator[slice]:
    """Slices that cut the flat view of `tensor` into blocks."""
    size = CPU_BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK
    for begin in range(0, tensor.numel(), size):
        yield slice(begin, min(begin + size, tensor.numel()))


class Scratch:
    """Block-sized tensors by dtype, made once for a call and used again for every block."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[torch.device, torch.dtype, str], Tensor] = {}

    def get(self, like_block: Tensor, dtype: torch.dtype, use: str) -> Tensor:
        """A tensor of the block's length; one and the same memory for each `use`."""
        key = (like_block.device, dtype, use)
        held = self._tensors.get(key)
        if held is None or held.numel() < like_block.numel():
            held = torch.empty(like_block.numel(), dtype=dtype, device=like_block.device)
            self._tensors[key] = held
        return held[: like_block.numel()]

    def zero(self, like_block: Tensor) -> Tensor:
        """A zero of the block's dtype."""
        key = (like_block.device, like_block.dtype, "zero")
        if key not in self._tensors:
            self._tensors[key] = like_block.new_zeros(())
        return self._tensors[key]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on `dtype` is done in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def mask_(tensors: Sequence[Tensor], mask: Tensor, scratch: Scratch) -> None:
    """Zero, in place, what `mask` (True where kept) drops. All of one shape and memory order."""
    keep = flat(mask)
    for view in map(flat, tensors):
        for block in blocks(view):
            part = view[block]
            # where, not a product: 0 * nan is nan, and -w * 0 is -0.0
            torch.where(keep[block], part, scratch.zero(part), out=part)


def mirror_(
    w: Tensor,
    g: Tensor | None,
    *,
    a: float,
    b: float,
    clamp: float,
    mask: Tensor | None,
    moments: Sequence[Tensor],
    scratch: Scratch,
    tally: Tally | None = None,
) -> None:
    """Mirror step and mask of one dense tensor, in place; `moments` are masked with it.

    All tensors have one shape and memory order. With a = b = 0 only the mask acts. `g` may be
    missing when a = 0.
    """
    if a == 0 and b == 0 and tally is None:
        if mask is not None:
            mask_([w, *moments], mask, scratch)
        return
    ws = flat(w)
    gs = None if g is None else flat(g)
    keep = None if mask is None else flat(mask)
    held = [flat(moment) for moment in moments]
    for block in blocks(ws):
        part = ws[block]
        kept = None if keep is None else keep[block]
        e = _exponent(part, None if gs is None else gs[block], a, b, clamp, scratch)
        before = None if tally is None else part.clone()
        if tally is not None and before is not None:
            count_exponents(tally, before, e, clamp, kept)
        e.expm1_()
        part.addcmul_(part, e)
        if kept is not None:
            for tensor in (part, *(moment[block] for moment in held)):
                torch.where(kept, tensor, scratch.zero(tensor), out=tensor)
        if tally is not None and before is not None:
            changed = part != before
            tally.moved += int((changed if kept is None else changed & kept).sum())


def _exponent(
    w: Tensor, g: Tensor | None, a: float, b: float, clamp: float, scratch: Scratch
) -> Tensor:
    """The clamped exponent of a block, in scratch memory."""
    e = scratch.get(w, wide(w.dtype), "exponent")
    if g is None or a == 0:
        return e.fill_(max(-b, -clamp))
    torch.sign(w, out=e)
    e.mul_(g).mul_(-a)
    if b != 0:
        e.sub_(b)
    return e.clamp_(-clamp, clamp)


def count_exponents(tally: Tally, w: Tensor, e: Tensor, clamp: float, kept: Tensor | None) -> None:
    """Add the exponents `e` of the weights `w`, as they were before the mirror step, to `tally`."""
    counted = w != 0 if kept is None else (w != 0) & kept
    sizes = e.abs()[counted]
    if sizes.numel() == 0:
        return
    tally.count += sizes.numel()
    tally.total += float(sizes.sum())
    greatest = float(sizes.max())
    tally.greatest = greatest if greatest != greatest else max(tally.greatest, greatest)
    tally.clamped += int((sizes >= clamp).sum())


def grad_sums(g: Tensor, mask: Tensor | None, scratch: Scratch) -> Tensor:
    """Sum of |g| and sum of g squared over what `mask` keeps: two numbers, on g's device."""
    gs = flat(g)
    keep = None if mask is None else flat(mask)
    dtype = wide(g.dtype)
    total = torch.zeros(2, dtype=dtype, device=g.device)
    for block in blocks(gs):
        part = gs[block]
        if keep is not None:
            shown = scratch.get(part, part.dtype, "gradient")
            part = torch.where(keep[block], part, scratch.zero(part), out=shown)
        total[0] += torch.linalg.vector_norm(part, 1, dtype=dtype)
        total[1] += torch.linalg.vector_norm(part, 2, dtype=dtype).square()
    return total


@torch.no_grad()
def ham_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    lr: float,
    alpha: float,
    beta: float,
    clamp: float = 5.0,
    masks: Sequence[Tensor | None] | None = None,
) -> None:
    """The mirror step of HAM on lists of tensors, in place, for any optimizer's post-step hook.

    param <- param * exp(clamp(-lr * (alpha * sign(param) * grad + beta))), then the mask (HAM, arXiv
    2506.02630). The product is formed as param + param * expm1(.) in at least float32 and rounded
    once, to the parameter's dtype: in bfloat16 and float16 exponents below about 2e-3 are lost, and
    in float32 those below 3e-8, `lr * beta` of a fine-tune among them. `HAM` keeps them.

    Args:
        params: Weights after the base optimizer's step.
        grads: The gradients that step used; None leaves the weight as it is, its mask aside.
        lr: Learning rate of this step.
        alpha: Strength of the gradient's part; 200 in the paper.
        beta: Strength of the decay; 1e-3 in the paper.
        clamp: Bound of |exponent|.
        masks: One bool mask a parameter, True where kept, or None for all kept.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> def mirror(optimizer, args, kwargs):
        ...     for group in optimizer.param_groups:
        ...         weights = [p for p in group["params"] if p.ndim >= 2]
        ...         ham_step_(weights, [p.grad for p in weights], lr=group["lr"], alpha=200, beta=1e-3)
        >>> handle = optimizer.register_step_post_hook(mirror)
    """
    scratch = Scratch()
    for param, grad, mask in zip(params, grads, masks or [None] * len(params), strict=True):
        w = param if is_dense(param) else param.contiguous()
        mirror_(
            w,
            None if grad is None else like(grad, w),
            a=lr * alpha if grad is not None else 0.0,
            b=lr * beta if grad is not None else 0.0,
            clamp=clamp,
            mask=None if mask is None else like(mask, w),
            moments=(),
            scratch=scratch,
        )
        if w is not param:
            param.copy_(w)

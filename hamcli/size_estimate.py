"""What the weight files will shrink to, before a run: packed, and in gzip.

The masks of pruning once stand for those of the run. The packed size is the entropy of each
tensor's mask, and of the signs and exponents of the weights that stay; their mantissas do not
shrink. That of gzip is what gzip makes of a sample of each tensor.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hamcli.errors import RecipeError
from hamcli.sizes import GZIP_LEVEL
from hamcli.sparsity.globs import literal
from hamcli.sparsity.masks import prune_masks
from hamcli.sparsity.targets import Targets, select_targets

CHUNK = 1 << 16  # bytes of a tensor that gzip sees at once: twice its window
CHUNKS = 16

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MANTISSA_BITS = {
    torch.float16: 10,
    torch.bfloat16: 7,
    torch.float32: 23,
    torch.float64: 52,
}


@dataclass(frozen=True, slots=True)
class SizeEstimate:
    """The weight files of a result.

    Attributes:
        targets: What may become zero, in words.
        setting: The line that asks for it; empty for the recipe as it is.
        zeros: Of all parameters, in the end.
        dense_bytes: Dense.
        packed_bytes: Packed, estimated.
        gzip_bytes: The dense files in gzip, estimated.
    """

    targets: str
    setting: str
    zeros: int
    dense_bytes: int
    packed_bytes: int
    gzip_bytes: int


@dataclass(frozen=True, slots=True)
class Pruning:
    """How pruning once goes: as `sparsity.masks.prune_masks` takes it."""

    target: float
    allocation: str
    pattern: str
    min_sparsity: float
    max_sparsity: float


def estimate_sizes(
    model: Any,
    targets: Targets,
    include: Sequence[str],
    exclude: Sequence[str] | None,
    pruning: Pruning,
    dtype: torch.dtype,
) -> tuple[SizeEstimate, ...]:
    """For the targets as they are, and with the tokens' embedding among them.

    Args:
        model: The dense one, of transformers, on the CPU.
        targets: As the recipe chooses them.
        include: Globs that chose them.
        exclude: Globs that left others out; None for those found in the model.
        pruning: How many become zero.
        dtype: Of the written weights.
    """
    found = [_estimate(model, targets, pruning, dtype, "as asked", "")]
    name = _token_embedding(model, targets)
    if not name:
        return tuple(found)
    globs = [*include, literal(name)]
    try:
        wider = select_targets(model, globs, exclude)
        setting = f"targets.include=[{', '.join(map(_quoted, globs))}]"
        found.append(_estimate(model, wider, pruning, dtype, "with the embedding", setting))
    except RecipeError:  # the pattern does not fit them
        pass
    return tuple(found)


def _quoted(glob: str) -> str:
    return f'"{glob}"'


def _token_embedding(model: Any, targets: Targets) -> str:
    """Name of the module of the tokens' embedding, if there is one and it is no target."""
    taken = {id(target.param) for target in targets}
    if getattr(model, "main_input_name", "") != "input_ids":
        return ""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or id(table.weight) in taken:
        return ""
    return next((name for name, module in model.named_modules() if module is table), "")


def _estimate(
    model: nn.Module,
    targets: Targets,
    pruning: Pruning,
    dtype: torch.dtype,
    words: str,
    setting: str,
) -> SizeEstimate:
    masks = prune_masks(
        targets,
        pruning.target,
        # the shares of outliers that owl goes by are not known before the run
        allocation="global" if pruning.allocation == "owl" else pruning.allocation,
        pattern=pruning.pattern,
        min_sparsity=pruning.min_sparsity,
        max_sparsity=pruning.max_sparsity,
    )
    by_param = {id(target.param): mask for target, mask in zip(targets, masks, strict=True)}
    dense = zeros = 0
    packed = gzipped = 0.0
    for tensor in _written(model, by_param, dtype):
        size = tensor.numel() * tensor.element_size()
        dense += size
        zeros += tensor.numel() - int(tensor.count_nonzero())
        packed += min(float(size), entropy_bytes(tensor))
        gzipped += min(float(size), _gzip_bytes(tensor))
    return SizeEstimate(words, setting, zeros, dense, round(packed), round(gzipped))


def _written(model: nn.Module, masks: Mapping[int, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Each tensor of the files, flat, tied ones once, as it will be after pruning."""
    seen = set()
    for tensor in model.state_dict(keep_vars=True).values():
        if id(tensor) in seen or tensor.numel() == 0:
            continue
        seen.add(id(tensor))
        values = tensor.detach()
        if (mask := masks.get(id(tensor))) is not None:
            values = torch.where(mask, values, 0.0)
        yield (values.to(dtype) if values.is_floating_point() else values).flatten()


def entropy_bytes(values: Tensor) -> float:
    """Bytes of an ideal code of the mask and of what is not zero: its top bits, and lower bytes.

    The top bits are sign and exponent, with those of the mantissa up to a whole byte counted whole;
    a lower byte shrinks where the weights were once of a narrower dtype.

    Args:
        values: Flat; others than floating-point ones count whole.
    """
    if values.dtype not in _MANTISSA_BITS:
        return float(values.numel() * values.element_size())
    kept = values[values != 0]
    mask = _entropy(torch.tensor([kept.numel(), values.numel() - kept.numel()]))
    if kept.numel() == 0:
        return mask / 8
    width, mantissa = values.element_size(), _MANTISSA_BITS[values.dtype]
    tops = kept.view(_INTEGERS[width]) >> mantissa
    bits = mask + _entropy(torch.bincount(tops - tops.min())) + kept.numel() * (mantissa % 8)
    planes = kept.view(torch.uint8).view(-1, width)
    for low in range(mantissa // 8):
        bits += _entropy(torch.bincount(planes[:, low]))
    return bits / 8


def _entropy(counts: Tensor) -> float:
    """Bits of an ideal code of symbols that occur so often."""
    counts = counts[counts > 0].double()
    return float((counts * (counts.sum() / counts).log2()).sum()) if counts.numel() else 0.0


def _gzip_bytes(values: Tensor) -> float:
    """What gzip makes of the tensor, by some pieces of it."""
    raw = values.view(torch.uint8)
    pieces = max(1, min(CHUNKS, math.ceil(raw.numel() / CHUNK)))
    stride = raw.numel() / pieces
    length = min(CHUNK, raw.numel() // pieces)
    sample = b"".join(
        raw[int(index * stride) : int(index * stride) + length].numpy().tobytes()
        for index in range(pieces)
    )
    packer = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 31)
    made = len(packer.compress(sample)) + len(packer.flush())
    return made * raw.numel() / max(1, len(sample))

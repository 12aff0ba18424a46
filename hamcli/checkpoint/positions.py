"""How many tokens a model has positions for, where it has learned them one by one."""

import re

from torch import nn

_LEARNED = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")


def learned_positions(model: nn.Module) -> int | None:
    """Tokens that the model has a learned position for; None where positions are computed.

    A longer text ends in an index error. What rotary models say of their longest text is advice.
    """
    found = [
        _usable_rows(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _LEARNED.search(name)
    ]
    return min(found, default=None)


def _usable_rows(positions: nn.Embedding) -> int:
    """Without those that are never a token's: up to that of padding, or below an offset."""
    spare = 0 if positions.padding_idx is None else positions.padding_idx + 1
    return positions.num_embeddings - max(spare, getattr(positions, "offset", 0))

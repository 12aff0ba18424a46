"""Random inputs of a model: tokens or pixels, of any number and length."""

import inspect
from typing import Any

import torch
from torch import Tensor

from hamcli.checkpoint.pixels import EDGE, image_size, num_channels
from hamcli.checkpoint.positions import learned_positions
from hamcli.errors import InputRefused

_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


def takes_images(model: Any) -> bool:
    """Whether a model looks at pixels."""
    return getattr(model, "main_input_name", "") == "pixel_values"


def input_names(model: Any, tokenizer: Any | None = None) -> tuple[str, ...]:
    """What a model is given for inference, in the order of its own arguments.

    Args:
        model: Of transformers.
        tokenizer: Its own, which says whether the model wants types of tokens; None for the least.

    Raises:
        InputRefused: E474, it takes neither tokens nor pixels alone.
    """
    if takes_images(model):
        return ("pixel_values",)
    takes_tokens = getattr(model, "main_input_name", "") == "input_ids"
    if not takes_tokens or getattr(model.config, "is_encoder_decoder", False):
        raise InputRefused(
            "E474",
            "cannot make inputs for the model",
            type(model).__name__,
            "it takes neither tokens nor pixels alone",
            "an encoder, a decoder or an image classifier",
        )
    wanted = getattr(tokenizer, "model_input_names", None) or _TOKENS[:2]
    known = inspect.signature(model.forward).parameters
    return tuple(name for name in _TOKENS if name in wanted and name in known)


def random_inputs(
    model: Any,
    batch: int,
    length: int,
    *,
    names: tuple[str, ...] | None = None,
    processor: Any | None = None,
    padded: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of a model on the CPU, the same ones for the same numbers.

    Args:
        model: Of transformers.
        batch: Rows.
        length: Tokens of each row; images have their own size.
        names: From `input_names`.
        processor: Image processor, which may know the size.
        padded: Whether all rows but the first end in padding that the mask hides.
        seed: Of the values.

    Raises:
        InputRefused: As `input_names`.
    """
    names = names or input_names(model)
    generator = torch.Generator().manual_seed(seed)
    if names == ("pixel_values",):
        size = image_size(model.config, processor) or (EDGE, EDGE)
        shape = (batch, num_channels(model.config), *size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padded:
        for row in range(1, batch):
            mask[row, max(1, length - 3 * row) :] = 0
    made = {
        "input_ids": torch.randint(vocabulary, (batch, length), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.zeros(batch, length, dtype=torch.int64),
    }
    return {name: made[name] for name in names}


def longest(model: Any, length: int) -> int:
    """`length`, or what the model can take where that is less."""
    said = getattr(model.config, "max_position_embeddings", None)
    known = (learned_positions(model), said if isinstance(said, int) and said > 0 else None)
    return min([length, *(one for one in known if one is not None)])

"""What each of several processes takes of a batch, and how they see that they agree."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hamcli.errors import RecipeError

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuse_uneven_batch(batch_size: int, num_processes: int) -> None:
    """Raise RecipeError E244 unless each process gets as many examples of a batch."""
    if batch_size % num_processes:
        raise RecipeError(
            "E244",
            "the batch cannot be shared out evenly",
            "training.batch_size",
            f"{batch_size} examples to {num_processes} processes",
            f"a multiple of {num_processes}, as {-(-batch_size // num_processes) * num_processes}",
        )


def part_of(whole: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """The rows of a batch that one of several processes computes."""
    rows = len(next(iter(whole.values()))) // size
    return {name: tensor[rank * rows : (rank + 1) * rows] for name, tensor in whole.items()}


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer's output depends on the other examples of the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor]) -> int:
    """Sum of the bits of all tensors, as integers that wrap around."""
    total = 0
    for place, tensor in enumerate(tensors):
        bits = tensor.detach().contiguous().view(_WORDS[tensor.element_size()])
        total += (place + 1) * int(bits.sum(dtype=torch.int64))
    return total % 2**62

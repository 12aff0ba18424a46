"""What the layers see: second moments of their inputs over a few examples, dense and once.

Wanda, SparseGPT and OWL are made of these. Places of padding are left out. Only linear layers
(transformers' Conv1D too) and ordinary convolutions are known; any other target is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamcli.data import batch
from hamcli.errors import RecipeError
from hamcli.objective import without_labels
from hamcli.opening import Opened
from hamcli.sparsity.choice import module_of
from hamcli.sparsity.score import Score, make_activation
from hamcli.sparsity.targets import Target, Targets

OUTLIER_FACTOR = 5.0  # times the mean of a layer; arXiv 2310.05175
_CONVS = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one target's layer saw.

    Attributes:
        rows: Number of input vectors.
        moments: Sum of x x^T, [groups, inputs, inputs], or of x^2 alone, [groups, inputs]; fp32,
            inputs in the order of the weight's own axes behind the outputs.
    """

    rows: int
    moments: Tensor

    @property
    def squares(self) -> Tensor:
        """Sum of x^2, [groups, inputs]."""
        if self.moments.dim() == 3:
            return self.moments.diagonal(dim1=1, dim2=2)
        return self.moments


def calibrate(opened: Opened, device: torch.device, *, full: bool) -> list[Inputs]:
    """What each target of an opened model sees of `sparsity.calibration` training examples."""
    recipe, data = opened.recipe, opened.data
    size = recipe.evaluation.batch_size
    number = max(1, -(-min(recipe.sparsity.calibration, len(data.train)) // size))
    seed = recipe.training.seed
    batches = (batch(data, index, batch_size=size, seed=seed) for index in range(number))
    return watch(opened.loaded.model, opened.targets, batches, device, full=full)


@torch.no_grad()
def watch(
    model: nn.Module,
    targets: Targets,
    batches: Iterator[dict[str, Tensor]],
    device: torch.device,
    *,
    full: bool,
) -> list[Inputs]:
    """Run the batches through the model in inference mode; one record a target.

    Args:
        model: Left as it is.
        targets: Its targets.
        batches: As the model's forward takes them.
        device: Of the model.
        full: Whether whole matrices of second moments are wanted, which SparseGPT needs: inputs
            squared, 4 bytes each, for all layers at once.

    Raises:
        RecipeError: E227, a target is no linear layer or convolution, or saw nothing.
    """
    modules = dict(model.named_modules())
    recorder = _Recorder(full)
    handles = [
        _known(modules[module_of(target.name)], target).register_forward_pre_hook(
            recorder.hook(index)
        )
        for index, target in enumerate(targets)
    ]
    was_training = model.training
    model.eval()
    try:
        for values in batches:
            placed = {key: one.to(device) for key, one in without_labels(values).items()}
            recorder.mask = placed.get("attention_mask")
            model(**placed)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for index, target in enumerate(targets):
        if index not in recorder.seen:
            raise _refused(target, "no example reaches it")
    return [recorder.seen[index] for index in range(len(targets))]


def _known(module: nn.Module, target: Target) -> nn.Module:
    is_known = isinstance(module, (nn.Linear, *_CONVS)) or _is_transposed(module)
    if not is_known or getattr(module, "weight", None) is not target.param:
        raise _refused(target, f"it belongs to a {type(module).__name__}")
    if isinstance(module, _CONVS) and (module.padding_mode != "zeros" or module.padding == "same"):
        raise _refused(target, "its padding is not of zeros")
    return module


def _refused(target: Target, why: str) -> RecipeError:
    return RecipeError(
        "E227",
        "cannot see the inputs of a target",
        target.name,
        why,
        "exclude it, or a score and allocation that need no activations",
    )


def _is_transposed(module: nn.Module) -> bool:
    """Transformers' Conv1D, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


class _Recorder:
    """Adds up what the layers see.

    Attributes:
        seen: Index of a target to what its layer saw so far.
        mask: The batch's attention mask, [batch, length]; None where it has none.
    """

    def __init__(self, full: bool) -> None:
        self._full = full
        self.seen: dict[int, Inputs] = {}
        self.mask: Tensor | None = None

    def hook(self, index: int) -> Callable[[nn.Module, Any], None]:
        """What a target's layer calls with its inputs."""

        def record(module: nn.Module, arguments: Any) -> None:
            x = _rows(module, self._without_padding(module, arguments[0].detach().float()))
            rows = x.shape[1]
            moments = x.transpose(1, 2) @ x if self._full else x.square().sum(dim=1)
            if (before := self.seen.get(index)) is not None:
                rows, moments = before.rows + rows, before.moments + moments
            self.seen[index] = Inputs(rows, moments)

        return record

    def _without_padding(self, module: nn.Module, x: Tensor) -> Tensor:
        """The inputs of tokens, [batch, length, ...] or [batch * length, ...], that count."""
        if self.mask is None or isinstance(module, _CONVS):
            return x
        mask = self.mask.bool()
        if x.dim() > 2 and x.shape[:2] == mask.shape:
            return x[mask]
        return x[mask.flatten()] if x.dim() == 2 and len(x) == mask.numel() else x


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """Input vectors [groups, rows, inputs] that the rows of the weight are multiplied with."""
    if not isinstance(module, _CONVS):
        return x.reshape(1, -1, x.shape[-1])
    # as a word it is "valid", which means none: "same" is refused
    given = (0,) * len(module.kernel_size) if isinstance(module.padding, str) else module.padding
    sizes: list[tuple[int, ...]] = [
        tuple(one) for one in (module.kernel_size, module.stride, given, module.dilation)
    ]
    kernel, stride, padding, dilation = sizes
    if isinstance(module, nn.Conv1d):
        x = x.unsqueeze(2)
        kernel, stride, padding, dilation = (
            (first, *rest)
            for first, rest in zip((1, 1, 0, 1), (kernel, stride, padding, dilation), strict=True)
        )
    columns = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    examples, _, places = columns.shape
    grouped = columns.view(examples, int(module.groups), -1, places)
    return grouped.permute(1, 0, 3, 2).reshape(int(module.groups), examples * places, -1)


def norms(targets: Targets, inputs: Sequence[Inputs]) -> list[Tensor]:
    """L2 norm of the input that each weight meets, broadcastable to the weights."""
    made = []
    for target, one in zip(targets, inputs, strict=True):
        norm = one.squares.sqrt()
        if target.input_dim == 0:  # [in, out]
            made.append(norm[0].unsqueeze(1))
            continue
        rows = target.param.shape[0] // len(norm)
        made.append(norm.repeat_interleave(rows, dim=0).view(target.param.shape))
    return made


def activation_score(targets: Targets, inputs: Sequence[Inputs]) -> Score:
    """The score `wanda`, |w| * ||x|| (arXiv 2306.11695)."""
    return make_activation(targets.params, norms(targets, inputs))


@torch.no_grad()
def outliers(targets: Targets, inputs: Sequence[Inputs]) -> list[float]:
    """Share of |w| * ||x|| above five times the layer's mean: OWL (arXiv 2310.05175).

    A layer is what shares a name up to its first number: the targets of one transformer block have
    one share.
    """
    score = activation_score(targets, inputs)
    above: dict[str, float] = {}
    count: dict[str, int] = {}
    layers = [_layer(target.name) for target in targets]
    found = [score(target.param) for target in targets]
    sums: dict[str, float] = {}
    for layer, one in zip(layers, found, strict=True):
        sums[layer] = sums.get(layer, 0.0) + float(one.sum(dtype=torch.float64))
        count[layer] = count.get(layer, 0) + one.numel()
    for layer, one in zip(layers, found, strict=True):
        limit = OUTLIER_FACTOR * sums[layer] / count[layer]
        above[layer] = above.get(layer, 0.0) + int((one > limit).sum())
    return [above[layer] / count[layer] for layer in layers]


def _layer(name: str) -> str:
    words = name.split(".")
    number = next((place for place, word in enumerate(words) if word.isdecimal()), None)
    return name if number is None else ".".join(words[: number + 1])

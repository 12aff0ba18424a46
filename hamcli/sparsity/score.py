"""How important: weights → scores, the larger is kept. Which of them go is for `select`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from hamcli.sparsity.across import Across

if TYPE_CHECKING:
    from hamcli.sparsity.targets import Target

Score = Callable[[Tensor], Tensor]

# Below every score there is: magnitudes are not negative.
BELOW_ALL = -1.0


@torch.no_grad()
def magnitude(param: Tensor) -> Tensor:
    """|w|, in the dtype of the weights, or fp32 for 8-bit floats, which torch cannot compare."""
    if param.dtype.itemsize == 1:
        param = param.float()
    return param.detach().abs()


@torch.no_grad()
def first_order(param: Tensor) -> Tensor:
    """|w * g|, the first-order change of the loss when w goes (Molchanov et al., arXiv 1611.06440).

    The gradient is the one that `param.grad` holds: of the step just done.
    """
    assert param.grad is not None, "a first-order score needs a gradient"
    return (param.detach() * param.grad).abs().nan_to_num()


def make_fisher(second_moment: Callable[[Tensor], Tensor | None]) -> Score:
    """|w| sqrt(E[g^2]): how much the loss gains when w goes, by the diagonal of the Fisher matrix.

    Optimal Brain Damage (LeCun et al. 1989) with the empirical Fisher matrix in place of the
    Hessian (Theis et al., arXiv 1801.05787); the square root orders as the gain does. Unlike
    |w| it compares layers whose weights or inputs are of other sizes.

    Args:
        second_moment: A weight to the running mean of its squared gradients, of its shape, which
            Adam keeps anyway; None before the first step, when |w| is the score.
    """

    @torch.no_grad()
    def fisher(param: Tensor) -> Tensor:
        moment = second_moment(param)
        if moment is None:
            return magnitude(param)
        return moment.sqrt().mul_(param.detach()).abs_().nan_to_num_()

    return fisher


def make_random(targets: "Sequence[Target]", seed: int) -> Score:
    """Uniform in [0, 1), fp32: the same for a tensor at each asking, made of seed and place."""
    places = {id(target.param): place for place, target in enumerate(targets)}

    def random(param: Tensor) -> Tensor:
        target = targets[places[id(param)]]
        generator = torch.Generator().manual_seed((seed << 20) + places[id(param)])
        made = torch.rand(target.shape, generator=generator)
        begin = 0 if target.part is None else target.part.begin
        return made[begin : begin + len(param)].to(param.device)

    return random


def make_activation(params: Sequence[Tensor], norms: Sequence[Tensor]) -> Score:
    """|w| * ||x||: Wanda (arXiv 2306.11695).

    Args:
        params: The weights.
        norms: L2 norm of the input that each weight meets; one tensor for each of `params`, that
            broadcasts to its shape.
    """
    of = {id(param): norm for param, norm in zip(params, norms, strict=True)}

    @torch.no_grad()
    def activation(param: Tensor) -> Tensor:
        return param.detach().float().abs() * of[id(param)].to(param.device, torch.float32)

    return activation


@torch.no_grad()
def layer_adaptive(score: Tensor) -> Tensor:
    """LAMP: s^2 over the sum of the s^2 that are not smaller (arXiv 2010.07611), fp32.

    The order within a tensor stays; across tensors the scores compare, and the greatest of each is
    1, so that a common threshold empties no tensor before all others. Negative scores, which mark
    what is dropped already, stay below all.
    """
    flat = score.detach().reshape(-1)
    order = flat.argsort(stable=True)
    squares = flat[order].clamp(min=0).double().square()
    # the sum from the greatest down; what is equal counts by position
    left = squares.flip(0).cumsum(0).flip(0)
    made = torch.where(left > 0, squares / left, 0.0).float()
    made[flat[order] < 0] = BELOW_ALL
    return torch.empty_like(made).scatter_(0, order, made).view(score.shape)


@dataclass(frozen=True, slots=True)
class Scores(Sequence[Tensor]):
    """Scores made when asked for, one tensor at a time, so that they never stand in memory at once.

    Attributes:
        params: The weights.
        score: Weights → finite scores of 0 or more.
        masks: Weights these drop score below all others, so that what is zero stays so.
        candidates: Weights these keep score above all others: they are not to be dropped yet.
        across: The processes that hold the other rows; None where the weights are whole.
    """

    params: Sequence[Tensor]
    score: Score = magnitude
    masks: Sequence[Tensor] | None = None
    candidates: Sequence[Tensor] | None = None
    across: Across | None = None

    def __len__(self) -> int:
        return len(self.params)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self._at(place) for place in range(len(self))[index]]
        return self._at(index)

    @torch.no_grad()
    def _at(self, index: int) -> Tensor:
        score = self.score(self.params[index])
        limits = (self.candidates, self.masks)
        spared, kept = (None if each is None else each[index] for each in limits)
        return _limited(score, spared, kept)

    @torch.no_grad()
    def chunks(self, index: int, size: int) -> Iterator[Tensor]:
        """One tensor's scores as flat parts of `size`, row-major.

        Of magnitudes there is never more than a part in memory; another score may depend on the
        whole tensor, and is made of it.
        """
        is_magnitude = self.score is magnitude
        param = self.params[index]
        whole = _flat(param if is_magnitude else self.score(param))
        limits = [
            None if each is None else _flat(each[index]) for each in (self.candidates, self.masks)
        ]
        for start in range(0, whole.numel(), size):
            part = slice(start, start + size)
            spared, kept = (None if each is None else each[part] for each in limits)
            yield _limited(magnitude(whole[part]) if is_magnitude else whole[part], spared, kept)

    def only(self, indices: Sequence[int]) -> "Scores":
        """The scores of some of the tensors."""
        return Scores(
            [self.params[index] for index in indices],
            self.score,
            None if self.masks is None else [self.masks[index] for index in indices],
            None if self.candidates is None else [self.candidates[index] for index in indices],
            self.across,
        )


def as_they_are(scores: Tensor) -> Tensor:
    """The score of what is a score already."""
    return scores


@torch.no_grad()
def all_layer_adaptive(scores: Sequence[Tensor]) -> Sequence[Tensor]:
    """`layer_adaptive` of each; where rows lie in several processes, of one whole at a time."""
    across = scores.across if isinstance(scores, Scores) else None
    if across is None:
        return [layer_adaptive(one) for one in scores]
    made = []
    for one in scores:
        begin = int(across.gather([len(one)])[: across.rank].sum())
        made.append(layer_adaptive(across.whole(one))[begin : begin + len(one)].clone())
    return Scores(made, as_they_are, across=across)


def _limited(score: Tensor, spared: Tensor | None, kept: Tensor | None) -> Tensor:
    """The scores, above all where `spared`, below all where not `kept`."""
    greatest = torch.finfo(score.dtype).max
    # limits made by arithmetic, since torch.where costs four times as much
    if spared is not None:
        floor = spared.to(score.dtype).mul_(greatest)
        score = torch.maximum(score, floor, out=floor)
    if kept is not None:
        ceiling = kept.to(score.dtype).mul_(greatest).add_(BELOW_ALL)
        score = torch.minimum(score, ceiling, out=ceiling)
    return score


def _flat(tensor: Tensor) -> Tensor:
    """The elements as one dimension, row-major; copied only if they do not lie so."""
    return tensor.detach().reshape(-1)

"""Which weights may become zero: decided once, used by optimizer, pruner and report.

A weight is prunable when a glob names its module (or the parameter itself, which tells the fused
experts of one module apart) and it has two or more dimensions. A tied tensor is one target, under
its first name; so are layers that a model runs through several times.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor, nn

from hamcli.sparsity.across import Across
from hamcli.sparsity.choice import ROUTERS, choose, module_of

_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED_CONVS)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What tells the rows that one of several processes holds from the whole tensor.

    Attributes:
        shape: Of the whole tensor.
        begin: The first row that lies here; rows lie in the order of the processes.
        source: The parameter that these rows are of, as an optimizer holds it.
    """

    shape: tuple[int, ...]
    begin: int
    source: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One tensor that may become sparse.

    Attributes:
        name: Its first parameter name in the model, as in `named_parameters()`.
        param: The weights.
        input_dim: Axis that the layer sums over, along which N:M groups lie: 1 for Linear
            [out, in] and convolutions [out, in / groups, ...], 0 for transformers' Conv1D and for
            transposed convolutions [in, out, ...], 1 or 2 for fused experts.
        is_stacked: Whether axis 0 counts matrices (fused experts) and is no part of one.
        part: Where `param` is some rows of a tensor that is cut over processes; None where whole.
    """

    name: str
    param: Tensor
    input_dim: int
    is_stacked: bool = False
    part: Part | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.param.shape) if self.part is None else self.part.shape

    @property
    def size(self) -> int:
        """Number of weights of the whole tensor."""
        return math.prod(self.shape)

    def own(self, whole: Tensor) -> Tensor:
        """What of a tensor of the target's shape belongs to `param`: its rows."""
        if self.part is None:
            return whole
        return whole[self.part.begin : self.part.begin + len(self.param)].clone()


@dataclass(frozen=True, slots=True, eq=False)
class Targets(Sequence[Target]):
    """The tensors that may become sparse, in the model's order, tied ones once.

    Attributes:
        items: The targets.
        exclude: Globs that leave the same targets when given back: `auto` resolved to names.
        across: The processes that hold the other rows; None where the tensors are whole.
    """

    items: tuple[Target, ...]
    exclude: tuple[str, ...] = ()
    across: Across | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Target]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Target: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Target, ...]: ...
    def __getitem__(self, index: int | slice) -> Target | tuple[Target, ...]:
        return self.items[index]

    @property
    def names(self) -> list[str]:
        """First name of each."""
        return [target.name for target in self.items]

    @property
    def params(self) -> list[Tensor]:
        """The weights of each."""
        return [target.param for target in self.items]

    @property
    def total(self) -> int:
        """Number of prunable weights: the denominator of every sparsity."""
        return sum(target.size for target in self.items)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters as an optimizer holds them."""
        return [one.param if one.part is None else one.part.source for one in self.items]


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A tensor of two or more dimensions, with all the names it goes by."""

    param: Tensor
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]


def select_targets(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str] | None
) -> Targets:
    """The targets of a model.

    With `exclude` None what is known to suffer or to gain nothing stays dense, found in the
    structure and not by the model's name: embeddings (with patch embeddings), output heads,
    everything outside the base model, poolers, routers of experts, and free tensors that are no
    weight of a layer (class tokens, position tables). A literal name in `include` overrides that.

    Args:
        model: Any module.
        include: Globs over module names, or parameter names.
        exclude: Globs too; "auto" among them stands for what None would exclude.

    Raises:
        RecipeError: E214, E215, a glob matches nothing. E216, nothing is left. E217, a tied tensor
            is reached by some of its names only.
    """
    candidates = _candidates(model)
    every_name = [name for name, _ in model.named_modules(remove_duplicate=False)]
    every_name += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = _dense_by_structure(model, candidates)
    return _targets(*choose(candidates, every_name, found, include, exclude))


def _is_prunable(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel() > 0


def _candidates(model: nn.Module) -> list[_Candidate]:
    modules = dict(model.named_modules(remove_duplicate=False))
    params: dict[int, nn.Parameter] = {}
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if _is_prunable(param):
            params[id(param)] = param
            names.setdefault(id(param), []).append(name)
    return [
        _Candidate(param, tuple(names[key]), tuple(modules[module_of(name)] for name in names[key]))
        for key, param in params.items()
    ]


# What stays dense


def _dense_by_structure(model: nn.Module, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    outside = _outside_base(model)
    head = _output_head(model)
    return [
        candidate
        for candidate in candidates
        if id(candidate.param) in outside
        or any(owner is head for owner in candidate.owners if head is not None)
        or any(map(_is_dense_layer, candidate.names, candidate.owners))
    ]


def _outside_base(model: nn.Module) -> set[int]:
    """Ids of the parameters of a model's head: all but those of its base model."""
    base = getattr(model, "base_model", model)
    if base is model or not isinstance(base, nn.Module):
        return set()
    inside = {id(param) for param in base.parameters()}
    return {id(param) for param in model.parameters() if id(param) not in inside}


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


def _is_dense_layer(name: str, owner: nn.Module) -> bool:
    words = name.split(".")
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or _is_patch_embedding(name, owner):
        return True
    if "pooler" in words or any(word in ROUTERS for word in words):
        return True
    return not (_is_layer(owner) or _reads_as_weight(name))


def _is_patch_embedding(name: str, owner: nn.Module) -> bool:
    """Convolutions that cut an image into patches; a stem, which overlaps, is an ordinary layer."""
    if not isinstance(owner, _CONVS) or "embed" not in name:
        return False
    return tuple(owner.stride) == tuple(owner.kernel_size) and max(owner.kernel_size) > 1


def _is_layer(owner: nn.Module) -> bool:
    return isinstance(owner, (nn.Linear, nn.Bilinear, *_CONVS)) or _is_transposed_linear(owner)


def _reads_as_weight(name: str) -> bool:
    """Whether a free tensor is a layer's weight, going by its name: weight_ih_l0, experts.w1."""
    leaf = name.rpartition(".")[2]
    if "bias" in leaf:
        return False
    return "weight" in leaf or leaf.endswith("proj") or "expert" in name


# What is known of a target


def _targets(chosen: Sequence[_Candidate], globs: tuple[str, ...]) -> Targets:
    return Targets(tuple(_target(candidate) for candidate in chosen), globs)


def _target(candidate: _Candidate) -> Target:
    owner, param = candidate.owners[0], candidate.param
    is_stacked = param.dim() == 3 and not _is_layer(owner)
    return Target(candidate.names[0], param, _input_dim(owner, is_stacked), is_stacked)


def _input_dim(owner: nn.Module, is_stacked: bool) -> int:
    if _is_transposed_linear(owner) or isinstance(owner, _TRANSPOSED_CONVS):
        return 0
    if isinstance(owner, nn.Bilinear):
        return 2
    if is_stacked:
        return 1 if _has_transposed_experts(owner) else 2
    return 1


def _is_transposed_linear(owner: nn.Module) -> bool:
    """Transformers' Conv1D, [in, out], as in GPT-2; known by name so as not to import it."""
    return type(owner).__name__ == "Conv1D" and hasattr(owner, "nf")


def _has_transposed_experts(owner: nn.Module) -> bool:
    """Whether fused experts lie as [experts, in, out] and not as [experts, out, in].

    transformers marks most of these modules with `is_transposed`. The others tell it by shapes:
    the two projections of an expert meet in the hidden size, which is the second axis of the first
    and the last of the second when they are [in, out].
    """
    declared = getattr(owner, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    first, second = getattr(owner, "gate_up_proj", None), getattr(owner, "down_proj", None)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.shape[1] == second.shape[-1] and first.shape[-1] != second.shape[1]

"""A model cut over the processes by FSDP2, and what each of them sees of a tensor.

`fully_shard` is applied here and not by accelerate, whose FSDP road ignores a CPU (and so every
test of it without a GPU) and swaps the parameters that targets and optimizer stand on. Each
parameter becomes a DTensor of which a process holds some whole rows: those of process 0 come first.
The methods, which work element by element, see these rows as plain tensors in the same memory; only
counts and norms are exchanged.
"""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hamcli.optim import sharded
from hamcli.parallel.world import World
from hamcli.sparsity.targets import Part, Target, Targets

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def shard_(model: nn.Module, world: World, device: torch.device) -> None:
    """Cut a model over all processes: its blocks one by one, then what is left.

    Args:
        model: On a CPU, the same in every process. Afterwards its parameters are DTensors on
            `device`.
        world: The processes.
        device: Where its parts lie.
    """
    # a second of imports that runs in one process do without
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    # by default the outermost part stays gathered after a forward pass, until a backward pass: one
    # that only measures would leave old weights there
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers that are gathered and let go one after the other.

    Those of the classes that transformers never splits, or else the items of module lists. None of
    them lies in another, and none is run several times: its parts would be let go between.
    """
    config = getattr(model, "config", None)
    groups = getattr(config, "num_hidden_groups", None)
    if groups is not None and groups < getattr(config, "num_hidden_layers", 0):
        return []  # ALBERT: a layer runs many times
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [one for one in model.modules() if type(one).__name__ in names]
    if not found:
        lists = [one for one in model.modules() if isinstance(one, nn.ModuleList)]
        found = [item for one in lists for item in one]
    inner = {id(sub) for one in found for sub in one.modules() if sub is not one}
    return [one for one in found if id(one) not in inner and any(True for _ in one.parameters())]


def shard_teacher(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """A frozen copy of a whole model, cut like it; never whole in memory itself.

    Its parameters have no memory until they are cut, and are filled by `fill_`.
    """
    hollow: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
        for param in model.parameters()
    }
    teacher = copy.deepcopy(model, hollow).eval()
    buffers = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    shard_(teacher, world, device)
    teacher.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in teacher.named_buffers():
            buffer.copy_(buffers[name])
    return teacher


@torch.no_grad()
def fill_(teacher: nn.Module, model: nn.Module) -> None:
    """Give a cut copy the weights of the cut model."""
    for ours, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
        local(ours).copy_(local(theirs))


def local(tensor: Tensor) -> Tensor:
    """The rows that lie here, in the same memory, outside of autograd; a plain tensor itself."""
    return sharded.local(tensor.detach())


def _is_cut(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


class Shards:
    """Where the rows of each parameter lie; of a model that `shard_` has cut.

    Args:
        model: The model.
        world: The processes.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        from torch.distributed.tensor import DTensor, Shard

        self._params = [one for one in model.parameters() if isinstance(one, DTensor)]
        rows = world.gather([len(local(one)) for one in self._params])
        begins = rows[: world.rank].sum(axis=0).tolist()
        self._begins = {id(one): begin for one, begin in zip(self._params, begins, strict=True)}
        for one in self._params:
            assert list(one.placements) == [Shard(0)], one.placements

    @property
    def mesh(self) -> "DeviceMesh":
        """Of the processes."""
        return self._params[0].device_mesh

    def targets(self, whole: Targets) -> Targets:
        """The same targets, each as the rows that lie here."""
        items = tuple(self._part(target) for target in whole)
        return Targets(items, whole.exclude, self._world)

    def _part(self, target: Target) -> Target:
        source = target.param
        assert _is_cut(source), target.name
        part = Part(tuple(source.shape), self._begins[id(source)], source)
        return replace(target, param=local(source), part=part)

    def show_gradients(self, targets: Targets) -> None:
        """Let the rows of the targets hold the gradients of this step."""
        for target in targets:
            grad = None if target.part is None else target.part.source.grad
            target.param.grad = None if grad is None else local(grad)

    def hide_gradients(self, targets: Targets) -> None:
        """Let go of them."""
        for target in targets:
            target.param.grad = None

    def cut(self, whole: Tensor, like: Tensor) -> Tensor:
        """The rows of a whole tensor that lie here, as a DTensor cut like a parameter.

        Args:
            whole: Of the shape of `like`.
            like: A parameter of the model.
        """
        begin = self._begins[id(like)]
        rows = whole[begin : begin + len(local(like))]
        return self.joined(rows.to(like.device, copy=True), like)

    def joined(self, rows: Tensor, like: Tensor) -> "DTensor":
        """Rows that lie here as a DTensor of the shape of a parameter."""
        from torch.distributed.tensor import DTensor

        assert isinstance(like, DTensor)
        stride = torch.empty(like.shape, device="meta").stride()
        return DTensor.from_local(
            rows, self.mesh, like.placements, run_check=False, shape=like.shape, stride=stride
        )


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows; every process must ask, in the same order."""
    held = tensor.detach()
    return held.full_tensor() if _is_cut(held) else held  # type: ignore[attr-defined]  # a DTensor

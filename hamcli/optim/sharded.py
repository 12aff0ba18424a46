"""Parameters that are cut over processes (DTensors): the part here, and sums over all parts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that lies here; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def of_all_shards(sums: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """What was measured here and in the processes that hold the other shards; all act alike."""
    sharded = next((param for param in params if hasattr(param, "to_local")), None)
    if sharded is None:
        return list(sums)
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    assert isinstance(sharded, DTensor)
    mesh = sharded.device_mesh
    added = torch.stack(list(sums)).to(local(sharded).device)
    greatest = added[:, -1].clone()
    for axis, place in enumerate(sharded.placements):
        if place.is_shard():
            dist.all_reduce(added, group=mesh.get_group(axis))
            dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=mesh.get_group(axis))
    added[:, -1] = greatest
    return list(added)


def over_shards(
    norms: Sequence[tuple[float, float, int]], params: Sequence[Tensor]
) -> list[tuple[float, float, int]]:
    """Sums over all shards of each distributed parameter; of any other, as they are.

    Parameters that are cut alike are added up in one exchange.
    """
    found = list(norms)
    if not any(hasattr(param, "to_local") for param in params):
        return found
    from torch.distributed.tensor import DTensor, Partial, Replicate

    alike: dict[Any, list[int]] = {}
    for index, param in enumerate(params):
        if isinstance(param, DTensor):
            alike.setdefault((param.device_mesh, param.placements), []).append(index)
    for (mesh, places), at in alike.items():
        placements = [Partial() if place.is_shard() else Replicate() for place in places]
        device = local(params[at[0]]).device
        here = torch.tensor([norms[i] for i in at], dtype=torch.float64, device=device)
        total = DTensor.from_local(here, mesh, placements).full_tensor().tolist()
        for index, (magnitudes, squares, count) in zip(at, total, strict=True):
            found[index] = magnitudes, squares, int(count)
    return found

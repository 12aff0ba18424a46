"""Parameters that are cut over processes (DTensors): the part here, and sums over all parts."""

from collections.abc import Sequence

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


def over_shards(norms: tuple[float, float, int], param: Tensor) -> tuple[float, float, int]:
    """Sums over all shards of a distributed parameter; of any other, as they are."""
    if not hasattr(param, "to_local"):
        return norms
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(param, DTensor)
    placements = [Partial() if place.is_shard() else Replicate() for place in param.placements]
    here = torch.tensor(norms, dtype=torch.float64, device=local(param).device)
    total = DTensor.from_local(here, param.device_mesh, placements).full_tensor().tolist()
    return total[0], total[1], int(total[2])

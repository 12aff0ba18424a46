"""The processes that train one model together: who there is, and what they tell each other.

torch.distributed carries the numbers. Objects go as JSON, never pickled. In a world of one, every
exchange is what this process says to itself.
"""

import datetime
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hamcli.errors import HamError, RecipeError, ResourceError
from hamcli.parallel.launch import Launch, launched, settled_parallel
from hamcli.parallel.mates import Mates

Counts = npt.NDArray[np.int64]

JOIN_SECONDS = 300.0
PATIENCE = datetime.timedelta(days=1)  # one may write for long; the dead are noticed by `mates`


class World:
    """The processes of a run; without arguments, this one alone.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        kind: none, ddp or fsdp.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, kind: str = "none", local_rank: int = 0
    ) -> None:
        self.rank, self.size, self.kind = rank, size, kind
        self._local_rank = local_rank

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self.kind == "fsdp"

    # ---- what they tell each other; every process must call, in the same order ----

    def barrier(self) -> None:
        """Wait for all."""
        self.add([0])

    @contextmanager
    def turns(self) -> Iterator[None]:
        """Inside, of all processes on a machine that hold parts, one at a time; no exchanges there.

        So a machine has one whole model in its memory while they open it, not one for each process.
        """
        last = int(self.greatest(self._local_rank)) if self.is_sharded else 0
        for _ in range(self._local_rank if last else 0):
            self.barrier()
        yield
        for _ in range(last - self._local_rank if last else 0):
            self.barrier()

    def add(self, counts: Sequence[int] | Counts) -> Counts:
        """Sums of integers over the processes."""
        here = torch.as_tensor(np.array(counts, dtype=np.int64))
        if self.size > 1:
            torch.distributed.all_reduce(here)
        return here.numpy()

    def gather(self, counts: Sequence[int] | Counts) -> Counts:
        """The integers of all processes, [processes, ...]."""
        here = torch.as_tensor(np.array(counts, dtype=np.int64))
        if self.size == 1:
            return here.unsqueeze(0).numpy()
        found = [torch.empty_like(here) for _ in range(self.size)]
        torch.distributed.all_gather(found, here)
        return torch.stack(found).numpy()

    def whole(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one after the other, on the same device in each.

        Args:
            rows: As many as there are here, or none; each of the others' shape and dtype.
        """
        if self.size == 1:
            return rows
        counts = self.gather([len(rows)]).flatten()
        longest = int(counts.max())
        sent = rows.contiguous()
        if len(rows) < longest:
            sent = rows.new_zeros((longest, *rows.shape[1:]))
            sent[: len(rows)] = rows
        found = rows.new_empty((self.size * longest, *rows.shape[1:]))
        if found.numel():
            parts = list(_bytes(found).chunk(self.size))
            torch.distributed.all_gather(parts, _bytes(sent))
        begins = np.cumsum(counts) - counts
        if (begins == longest * np.arange(self.size))[counts > 0].all():
            return found[: int(counts.sum())]  # as FSDP2 cuts: all are full but the last ones
        return torch.cat([found[longest * rank :][: int(n)] for rank, n in enumerate(counts)])

    def mean(self, number: float) -> float:
        """Mean of a number over the processes."""
        if self.size == 1:
            return number
        here = torch.tensor([number], dtype=torch.float64)
        torch.distributed.all_reduce(here)
        return float(here) / self.size

    def total(self, number: float) -> float:
        """Sum of a number over the processes."""
        return float(self.sum_(torch.tensor([number], dtype=torch.float64)))

    def greatest(self, number: float) -> float:
        """Greatest of a number over the processes."""
        if self.size == 1:
            return number
        here = torch.tensor([number], dtype=torch.float64)
        torch.distributed.all_reduce(here, op=torch.distributed.ReduceOp.MAX)
        return float(here)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def tell(self, value: Any) -> Any:
        """What process 0 says, to all: data that JSON holds; the others' `value` is not read."""
        if self.size == 1:
            return value
        raw = json.dumps(value).encode() if self.is_main else b""
        length = int(self.add([len(raw)])[0])
        here = torch.zeros(length, dtype=torch.uint8)
        if self.is_main:
            here = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        torch.distributed.broadcast(here, 0)
        return json.loads(here.numpy().tobytes())

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Process 0's tensor in place of the others', which have its shape and dtype."""
        if self.size > 1:
            torch.distributed.broadcast(tensor, 0)
        return tensor

    def share(
        self,
        tensors: Mapping[str, Tensor] | None,
        keep: Callable[[str, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Process 0's tensors, on a CPU, to all; one after the other.

        Args:
            tensors: In process 0; None in the others.
            keep: Name and tensor to what is kept of it.
        """
        if self.size == 1:
            assert tensors is not None, "process 0 has them"
            return dict(tensors)
        names = None
        if tensors is not None:
            names = [
                (name, list(one.shape), str(one.dtype).removeprefix("torch."))
                for name, one in tensors.items()
            ]
        made = {}
        for name, shape, dtype in self.tell(names):
            here = torch.empty(shape, dtype=getattr(torch, dtype))
            if tensors is not None:
                here.copy_(tensors[name])
            if here.numel():
                self.broadcast(_bytes(here))
            made[name] = here if keep is None else keep(name, here)
        return made


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor as bytes, since gloo knows few dtypes."""
    return tensor.view(-1).view(torch.uint8)


@contextmanager
def joined(word: str, device: str) -> Iterator[World]:
    """The world of this run while the block runs; a failure in one process ends all.

    Args:
        word: `training.parallel`.
        device: `training.device`.

    Raises:
        RecipeError: E241 to E243, E248: the launcher and the recipe say different things.
        ResourceError: E545, another process died; E546, the processes that met are not those that
            the launcher counts; E547, they do not meet.
        HamError: What another process failed with.
    """
    kind = settled_parallel(word)
    if kind == "none":
        yield World()
        return
    launch = launched()
    _choose_device(device, launch)
    _init(device, launch)
    world = World(launch.rank, launch.size, kind, launch.local_rank)
    mates = Mates(launch.rank, launch.size)
    try:
        _meet(world, mates)
        yield world
        world.barrier()
    except BaseException as error:
        other = mates.end_together(error)
        if other is not None:
            raise other from error
        raise
    mates.leave()
    torch.distributed.destroy_process_group()


def _choose_device(device: str, launch: Launch) -> None:
    if device == "mps" or device.startswith("cuda:"):
        raise RecipeError(
            "E243",
            "several processes on one device",
            "training.device",
            f"{device}, and {launch.size} processes",
            "auto, cuda or cpu",
        )
    if _is_on_cuda(device):
        count = torch.cuda.device_count()
        if launch.local_size > count:
            raise RecipeError(
                "E243",
                "more processes than GPUs",
                "training.device",
                f"{launch.local_size} processes on a machine with {count}",
                f"--nproc-per-node {count}, or training.device cpu",
            )
        torch.cuda.set_device(launch.local_rank)


def _is_on_cuda(device: str) -> bool:
    return device != "cpu" and torch.cuda.is_available()


def _init(device: str, launch: Launch) -> None:
    """Join the process group; counts always go by the CPU."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if _is_on_cuda(device) else "gloo"
    try:
        if not dist.is_initialized():
            limit = datetime.timedelta(seconds=JOIN_SECONDS)
            store, rank, size = next(rendezvous("env://", timeout=limit))
            # the store may be the launcher's: one that fails before it comes here must not be
            # waited for as long as one that writes
            store.set(f"here/{rank}", "")
            store.wait([f"here/{other}" for other in range(size)], limit)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise _cannot_meet(str(error)) from error
    if (dist.get_rank(), dist.get_world_size()) != (launch.rank, launch.size):
        raise ResourceError(
            "E546",
            "the processes are not those of the launcher",
            "",
            f"process {dist.get_rank()} of {dist.get_world_size()} met, the launcher says "
            f"{launch.rank} of {launch.size}",
        )


def _cannot_meet(why: str) -> HamError:
    return ResourceError(
        "E547",
        "the processes cannot meet",
        f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}",
        " ".join(why.split())[:120],
        "a launcher such as torchrun, and a network between the machines",
    )


def _meet(world: World, mates: Mates) -> None:
    try:
        _shake_hands(world, mates)
    except (OSError, RuntimeError) as error:
        raise _cannot_meet(str(error)) from error


def _shake_hands(world: World, mates: Mates) -> None:
    token = secrets.token_hex(16)
    port = mates.listen(token) if world.is_main else 0
    found = world.tell({"port": port, "token": token})
    if world.is_main:
        mates.accept(JOIN_SECONDS)
    else:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        mates.connect(host, found["port"], found["token"], JOIN_SECONDS)
    world.barrier()

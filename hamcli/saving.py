"""What a training run needs to go on, to a run checkpoint and back, in each of its processes."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hamcli.errors import ResourceError
from hamcli.optim import HAM
from hamcli.parallel.parts import fingerprint
from hamcli.parallel.shards import Shards, local, whole
from hamcli.parallel.world import World
from hamcli.progress import StepRecord
from hamcli.runstate import Checkpoint, RunState
from hamcli.runstate.tensors import writing_order
from hamcli.sparsity.courses import Course
from hamcli.sparsity.targets import Targets

PARTS = (
    "model",
    "optimizer",
    "sparsifier",
    "values.exponents",
    "values.groups",
    "values.records",
    "values.scaler",
    "values.seconds",
    "values.tensors",
)
"""What a run checkpoint must hold."""


@dataclass(slots=True)
class History:
    """What a run has done so far.

    Attributes:
        records: One of each step.
        seconds_before: Of training, before this session.
        exponents_before: Of the last mirror step measured before this session.
        saved: Steps that are saved, or will be before anybody hears of a stop.
    """

    records: list[StepRecord] = field(default_factory=list)
    seconds_before: float = 0.0
    exponents_before: dict[str, Any] | None = None
    saved: int = 0

    def exponents(self, optimizer: HAM) -> dict[str, Any] | None:
        """What the report tells of the last measured mirror step, here or before a stop."""
        last = optimizer.exponent_statistics()
        if last is None:
            return self.exponents_before
        return {
            "alpha": last.alpha,
            "clamped_fraction": last.clamped_fraction,
            "guard_events": last.guard_events,
        }


@dataclass(frozen=True, slots=True)
class State:
    """Everything that a step changes.

    Attributes:
        model: Whole, or cut over the processes.
        optimizer: Of its parameters.
        course: With its masks.
        targets: The prunable weights, or this process's rows of them.
        world: The processes of the run.
        shards: How the weights are cut; None where they are whole.
        scaler: Of the gradients, in fp16; None in other precisions.
    """

    model: nn.Module
    optimizer: HAM
    course: Course
    targets: Targets
    world: World
    shards: Shards | None
    scaler: torch.amp.GradScaler | None = None


def save(run: RunState | None, state: State, history: History, step: int, seconds: float) -> None:
    """Save the run, in process 0; the others wait, so that none runs ahead of it.

    Args:
        run: Of process 0; None in the others.
        state: After the step.
        history: Learns that the step is saved.
        step: The last one.
        seconds: Of training, in all sessions.

    Raises:
        ResourceError: E546, the processes hold different weights; or the disk.
    """
    _refuse_drift(state, step)
    tensors = _tensors_of(state)
    if run is not None:
        values = {
            "exponents": history.exponents(state.optimizer),
            "groups": state.optimizer.state_dict()["param_groups"],
            "records": [_plain(record) for record in history.records],
            "scaler": None if state.scaler is None else state.scaler.state_dict(),
            "seconds": seconds,
            # a moment that is missing would not be missed: the optimizer would begin it anew
            "tensors": {stem: sorted(named) for stem, named in tensors.items()},
        }
        run.save(step, tensors, values)
    elif state.shards is not None:  # process 0 asks for whole tensors, one after the other
        for stem in sorted(tensors):
            for name in writing_order(tensors[stem]):
                whole(tensors[stem][name])
    state.world.barrier()
    history.saved = step


def _refuse_drift(state: State, step: int) -> None:
    """See that the processes hold the same weights, to the bit."""
    if state.world.kind != "ddp":
        return
    sums = state.world.gather([fingerprint(state.targets.params)])
    if len(np.unique(sums)) > 1:
        raise ResourceError(
            "E546",
            "the processes hold different weights",
            f"step {step}",
            f"the sums of their bits are {sums.flatten().tolist()[:4]}",
            "the same hardware and software in every process",
        )


def _tensors_of(state: State) -> dict[str, dict[str, Tensor]]:
    """All tensors of the run by file and name; those that are cut, as DTensors."""
    moments = {
        f"{index}.{key}": value
        for index, entries in state.optimizer.state_dict()["state"].items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }
    kept = state.course.state()
    if state.shards is not None:
        for target in state.targets:
            if (key := f"mask.{target.name}") in kept and target.part is not None:
                kept[key] = state.shards.joined(kept[key], target.part.source)
    return {"model": own_tensors(state.model), "optimizer": moments, "sparsifier": kept}


def restore(found: Checkpoint | None, state: State, history: History) -> None:
    """Go on from a checkpoint, which process 0 reads for all.

    Args:
        found: Of process 0; None in the others.
        state: Gets what was saved.
        history: The same.
    """
    world = state.world

    def shared(
        stem: str, names: Collection[str], like: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        here = None if found is None else found.tensors(stem, names)
        return world.share(here, _cutting(state.shards, like))

    values = world.tell(None if found is None else found.values)
    own, names = own_tensors(state.model), values["tensors"]
    saved = shared("model", set(own), own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    params = [one for group in state.optimizer.param_groups for one in group["params"]]
    numbered = {str(index): param for index, param in enumerate(params)}
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in shared("optimizer", names["optimizer"], numbered).items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = tensor
    state.optimizer.load_state_dict({"state": entries, "param_groups": values["groups"]})
    masks = {f"mask.{one.name}": one.part.source for one in state.targets if one.part}
    kept = shared("sparsifier", names["sparsifier"], masks)
    state.course.load_state({key: local(one) if key in masks else one for key, one in kept.items()})
    history.records[:] = [_record(record) for record in values["records"]]
    if state.scaler is not None:
        state.scaler.load_state_dict(values["scaler"])
    history.seconds_before = float(values["seconds"])
    history.exponents_before = values["exponents"]


def _cutting(
    shards: Shards | None, like: Mapping[str, Tensor]
) -> Callable[[str, Tensor], Tensor] | None:
    """What of each whole tensor stays here, given the parameter that it belongs to.

    `optimizer` files name a parameter by its number before the first dot.
    """
    if shards is None:
        return None

    def cut(name: str, tensor: Tensor) -> Tensor:
        param = like.get(name, like.get(name.partition(".")[0]))
        if param is None or not hasattr(param, "to_local") or tensor.shape != param.shape:
            return tensor
        return shards.cut(tensor, param)

    return cut


def _plain(record: StepRecord) -> dict[str, Any]:
    """A record as JSON may hold it: the gradient of a step that fp16 skipped has no norm."""
    norm = record.grad_norm
    return {**asdict(record), "grad_norm": norm if math.isfinite(norm) else None}


def _record(saved: Mapping[str, Any]) -> StepRecord:
    norm = saved["grad_norm"]
    return StepRecord(**{**saved, "grad_norm": math.inf if norm is None else norm})


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their first name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}

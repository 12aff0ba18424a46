"""The training loop: batches, loss, clipping, steps; any optimizer, any method.

Everything that varies with time is a pure function of the step (batch, learning rate, random
seed), so a run that is stopped after any step and goes on from its weights and states is the same
run bit for bit. accelerate brings precision, devices and processes.
"""

import itertools
import math
import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hamcli.divergence import refuse_non_finite
from hamcli.errors import RecipeError, ResourceError
from hamcli.progress import StepRecord
from hamcli.sharpness import uphill

Batch = dict[str, Tensor]
RANK_STRIDE = 0x9E3779B97F4A7C15  # odd, and near 2^64 over the golden ratio: seeds far apart


class Exponents(Protocol):
    """What the optimizer measured of one mirror step."""

    @property
    def mean(self) -> float:
        """Mean of |exponent|."""

    @property
    def max(self) -> float:
        """Greatest |exponent|."""

    @property
    def moved_fraction(self) -> float:
        """Share of the mirrored weights that the mirror step changed."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop asks others for at each step.

    Attributes:
        batch_at: Micro-step (from 0) to a batch on the CPU.
        loss_of: Model, this process's part of a batch, and the whole batch to a scalar loss whose
            mean over the processes is the loss of the whole.
        lr_at: Optimizer step (from 1) to the learning rate of that step.
        measures: Whether the optimizer measures its mirror step on this step.
        exponents: The last measurement.
        after_step: Called when the optimizer's step is done and its gradients are still there;
            returns the sparsity that now holds.
        before_step: Called before the forward pass of a step.
        after_backward: Called after the last backward pass of a step, before clipping.
        sharpness: Radius rho of the ascent of sharpness-aware minimisation; 0 for none.
        zeros: Weights that the ascent leaves at zero where they are zero.
        part_of: A batch to this process's part of it.
        mean: A number to its mean over the processes.
        total: What is a sum over the parts that lie here to that over the parts of all.
        rank: Of this process; each has random numbers of its own.
    """

    batch_at: Callable[[int], Batch]
    loss_of: Callable[[nn.Module, Batch, Batch], Tensor]
    lr_at: Callable[[int], float]
    measures: Callable[[int], bool]
    exponents: Callable[[], Exponents | None]
    after_step: Callable[[int], float]
    before_step: Callable[[int], None] = lambda step: None
    after_backward: Callable[[int], None] = lambda step: None
    sharpness: float = 0.0
    zeros: Sequence[Tensor] = ()
    part_of: Callable[[Batch], Batch] = lambda batch: batch
    mean: Callable[[float], float] = lambda number: number
    total: Callable[[float], float] = lambda number: number
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Engine:
    """Model and optimizer as accelerate runs them; made by `make_engine`.

    Attributes:
        accelerator: Precision, device, processes.
        model: The module itself.
        wrapped: What is called: the module, or DDP around it.
        optimizer: The optimizer itself.
        stepper: What steps: with fp16 it may skip.
        is_sharded: Whether each process holds a part of every tensor.
        has_dropout: Whether the model's own dropout acts.
    """

    accelerator: Any
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    stepper: Any
    is_sharded: bool = False
    has_dropout: bool = True

    def enter_training_mode(self) -> None:
        """Put the modules into training mode; without dropout, those that learn statistics only.

        Functions such as attention ask their module's mode before they drop anything, so that
        setting the probability of `nn.Dropout` modules to 0 would not reach them.
        """
        self.wrapped.train(self.has_dropout)
        for module in self.model.modules():
            if isinstance(module, _NormBase):  # batch and instance norm
                module.train()

    @contextmanager
    def synchronised(self, is_last: bool) -> Iterator[None]:
        """Inside, a backward pass exchanges gradients only where it is the step's last one."""
        if self.is_sharded:
            self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]  # of FSDPModule
        with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
            yield

    def clip(self, params: Sequence[Tensor], limit: float) -> float:
        """Clip the gradients to a global norm; returns the norm before, over all processes."""
        norm = self.accelerator.clip_grad_norm_(params, limit)
        return float(norm.full_tensor() if self.is_sharded else norm)


def make_engine(
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    is_sharded: bool = False,
    has_idle: bool = False,
    has_dropout: bool = True,
) -> Engine:
    """Prepare model and optimizer, once a run.

    Args:
        accelerator: From `make_accelerator`.
        model: On its device.
        optimizer: Holds the parameters of `model`, or what they are made of.
        is_sharded: Whether the model is sharded already, and needs no wrapper.
        has_idle: Whether some parameters get no gradient: DDP must look for them.
        has_dropout: Whether the model's own dropout acts in training.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=has_idle)
    if is_sharded:
        stepper = accelerator.prepare(optimizer)
        return Engine(accelerator, model, model, optimizer, stepper, True, has_dropout)
    wrapped, stepper = accelerator.prepare(model, optimizer)
    # of 1x1 convolutions, whose gradient lies in memory as well one way as the other
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return Engine(accelerator, model, wrapped, optimizer, stepper, has_dropout=has_dropout)


def refuse_missing_device(device: str, where: str = "training.device") -> None:
    """See that torch has a device that is asked for by name: accelerate would take another.

    Args:
        device: auto, cpu, mps, cuda or cuda:N.
        where: Where it was said.

    Raises:
        RecipeError: E246, it has not.
    """
    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "mps" and not torch.backends.mps.is_available():
        why = "torch finds no MPS here"
    elif kind == "cuda" and int(number or 0) >= count:
        why = f"torch finds {count} CUDA devices here"
    else:
        return
    raise RecipeError("E246", "no such device", where, f"{device}, and {why}", "auto or cpu")


def refuse_missing_scaler(precision: str, device: str, where: str = "training.precision") -> None:
    """See that fp16 runs where its gradients are scaled: accelerate does that on a GPU only.

    Args:
        precision: auto, fp32, bf16 or fp16.
        device: auto, cpu, mps, cuda or cuda:N; there is such a one.
        where: Where the precision was said.

    Raises:
        RecipeError: E251, without the scale small gradients are lost.
    """
    if precision == "fp16" and (device in ("cpu", "mps") or not torch.cuda.is_available()):
        why = "its gradients are scaled on a CUDA device only"
        raise RecipeError("E251", "fp16 without a GPU", where, why, "bf16 or fp32")


def make_accelerator(device: str, precision: str, num_processes: int = 1) -> Any:
    """An `accelerate.Accelerator` for one device name and one precision.

    Args:
        device: auto, cpu, mps, cuda or cuda:N.
        precision: auto, fp32, bf16 or fp16; auto is bf16 on a GPU that has it, else fp32.
        num_processes: That have met; the process group stands.

    Raises:
        ResourceError: E546, accelerate counts other processes.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    on_cuda = device != "cpu" and device != "mps" and torch.cuda.is_available()
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if precision == "auto":
        precision = "bf16" if on_cuda and torch.cuda.is_bf16_supported() else "fp32"
    # One process may run several jobs; accelerate keeps the first one's settings otherwise.
    AcceleratorState._reset_state(reset_partial_state=True)
    # a config of `accelerate launch` may ask for FSDP, which is applied elsewhere: accelerate's own
    # ignores a CPU, and swaps the parameters that targets and optimizer stand on
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    made = Accelerator(
        cpu=device == "cpu" or (num_processes > 1 and not on_cuda),
        mixed_precision="no" if precision == "fp32" else precision,
    )
    if made.num_processes != num_processes:
        raise ResourceError(
            "E546",
            "the processes are not those of the launcher",
            "",
            f"accelerate counts {made.num_processes}, {num_processes} have met",
        )
    return made


def warm_up_and_decay(
    schedule: str, *, peak: float, steps: int, warmup: float
) -> Callable[[int], float]:
    """Learning rate of each optimizer step, counted from 1.

    Linear from near zero over the first `warmup` of the run, then `cosine` or `linear` towards
    zero, which is reached one step after the last, or `constant`.

    Args:
        schedule: cosine, linear or constant.
        peak: Highest learning rate.
        steps: Length of the run.
        warmup: Fraction of the run, 0 to 1.
    """
    rising = round(warmup * steps)

    def lr_at(step: int) -> float:
        if step <= rising:
            return peak * step / (rising + 1)
        if schedule == "constant":
            return peak
        done = (step - rising - 1) / (steps - rising)
        return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)

    return lr_at


def in_cycles(
    make: Callable[[int], Callable[[int], float]], steps: int, starts: Sequence[int]
) -> Callable[[int], float]:
    """Learning rate of each optimizer step, counted from 1, with a schedule that begins anew.

    Args:
        make: Length of a cycle to its learning rates.
        steps: Length of the run.
        starts: Steps after which a new cycle begins, increasing, between 0 and `steps`.
    """
    bounds = [0, *starts, steps]
    rates = [make(end - start) for start, end in itertools.pairwise(bounds)]

    def lr_at(step: int) -> float:
        index = bisect_left(bounds, step) - 1
        return rates[index](step - bounds[index])

    return lr_at


def train(
    engine: Engine,
    hooks: Hooks,
    *,
    first_step: int,
    last_step: int,
    accumulation: int,
    max_grad_norm: float,
    seed: int,
) -> Iterator[StepRecord]:
    """Train from `first_step` to `last_step`, counted from 1, and yield a record after each.

    Order in a step: `before_step`, forward and backward of each micro-step (twice with sharpness),
    `after_backward`, clip, check that the norm is finite, optimizer step (base, mirror, mask),
    `after_step`, gradients cleared. What the caller does between two records
    happens between two whole steps.

    Raises:
        Diverged: The loss or the gradient became non-finite; the weights are those of the step
            before.
    """
    optimizer = engine.optimizer
    params = [param for group in optimizer.param_groups for param in group["params"]]
    engine.enter_training_mode()
    for step in range(first_step, last_step + 1):
        lr = hooks.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        hooks.before_step(step)
        loss = _accumulate(engine, hooks, step, accumulation, seed)
        if hooks.sharpness > 0:
            with uphill(engine.model, hooks.sharpness, hooks.zeros, hooks.total):
                _accumulate(engine, hooks, step, accumulation, seed)
        hooks.after_backward(step)
        norm = engine.clip(params, max_grad_norm if max_grad_norm > 0 else math.inf)
        may_skip = getattr(engine.accelerator, "scaler", None) is not None
        refuse_non_finite(step, loss, norm, engine.model, may_skip=may_skip)
        engine.stepper.step()
        measured = hooks.exponents() if hooks.measures(step) else None
        sparsity = hooks.after_step(step)
        engine.stepper.zero_grad()
        yield StepRecord(
            step=step,
            loss=loss,
            sparsity=sparsity,
            lr=lr,
            grad_norm=norm,
            exponent_mean=measured.mean if measured else None,
            exponent_max=measured.max if measured else None,
            moved_fraction=measured.moved_fraction if measured else None,
        )


def find_gradients(engine: Engine, hooks: Hooks, *, accumulation: int, seed: int) -> None:
    """Gradients of the first step's batches, for masks that are chosen before the first step."""
    engine.enter_training_mode()
    hooks.before_step(1)
    _accumulate(engine, hooks, 1, accumulation, seed)
    hooks.after_backward(1)


def has_idle_parameters(model: nn.Module, hooks: Hooks) -> bool:
    """Whether the loss leaves a trained parameter of the unwrapped model without a gradient.

    In any process: one that tells DDP to look for them sends what the others must await. Looked at
    in eval mode, which changes no statistics and draws no random numbers.
    """
    model.eval()
    whole = hooks.batch_at(0)
    device = next(model.parameters()).device
    hooks.loss_of(model, to_device(hooks.part_of(whole), device), whole).backward()  # type: ignore[no-untyped-call]  # torch's
    idle = any(param.requires_grad and param.grad is None for param in model.parameters())
    for param in model.parameters():
        param.grad = None
    return hooks.mean(float(idle)) > 0


def _accumulate(engine: Engine, hooks: Hooks, step: int, accumulation: int, seed: int) -> float:
    """Gradients of one optimizer step: the mean over its micro-steps. Returns the mean loss."""
    total = 0.0
    accelerator = engine.accelerator
    for part in range(accumulation):
        micro_step = (step - 1) * accumulation + part
        whole = hooks.batch_at(micro_step)
        batch = to_device(hooks.part_of(whole), accelerator.device)
        # Dropout of a step must not depend on what ran before it, or a resumed run would differ.
        torch.manual_seed(step_seed(seed, micro_step, hooks.rank))
        with engine.synchronised(part == accumulation - 1):
            with accelerator.autocast():
                loss = hooks.loss_of(engine.wrapped, batch, whole)
            accelerator.backward(loss / accumulation)
        total += float(loss.detach())
    return hooks.mean(total / accumulation)


def step_seed(seed: int, micro_step: int, rank: int = 0) -> int:
    """A seed of its own for each of the first 2^31 micro-steps of each process."""
    return ((seed << 31) + micro_step + rank * RANK_STRIDE) % 2**64


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    return {name: tensor.to(device) for name, tensor in batch.items()}

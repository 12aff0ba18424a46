"""Bytes that one process of a run holds, by what they are for; plain arithmetic, no tensors."""

from dataclasses import asdict, dataclass

WORD = 4  # bytes of a weight in training: fp32
MASKS = 2  # bytes a prunable weight: the method's mask and the optimizer's
GATHERED = 6  # a layer's weights and the next one's, each as sent and as used, and its gradients so
SORTED = 48  # bytes a weight of a tensor whose scores are gathered and sorted, for LAMP


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in each process at its peak.

    Attributes:
        weights: Of the model.
        gradients: Of all weights.
        moments: What the optimizer keeps.
        masks: One byte a prunable weight, twice.
        dense: The targets' weights as they were, on the CPU, for the report.
        teacher: The dense model.
        exchange: What is gathered for a moment, or DDP's buckets.
        extra: Copies that a method or SAM keeps.
        activations: Of one micro-step, as measured here; 0 where it was not.
    """

    weights: int
    gradients: int
    moments: int
    masks: int
    dense: int
    teacher: int
    exchange: int
    extra: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All but the activations."""
        counts: list[int] = list(asdict(self).values())
        return sum(counts) - self.activations


def memory_of(
    *,
    parameters: int,
    prunable: int,
    largest: int,
    sorted_weights: int = 0,
    moments: int = 2,
    has_teacher: bool = True,
    extra: int = 0,
    activations: int = 0,
    parallel: str = "none",
    world: int = 1,
) -> Memory:
    """What each of `world` processes holds.

    Args:
        parameters: Of the model.
        prunable: Weights of the targets.
        largest: Parameters of the largest part that FSDP gathers at once.
        sorted_weights: Of the largest tensor whose scores are sorted as a whole; 0 where none are.
        moments: fp32 numbers that the optimizer keeps of each weight.
        has_teacher: Whether the dense model teaches.
        extra: Bytes beside these, in one process; cut like the weights.
        activations: Bytes of a micro-step in one process.
        parallel: none, ddp or fsdp.
        world: Number of processes.
    """
    share = world if parallel == "fsdp" else 1

    def cut(size: int) -> int:
        return -(-size // share)

    at_once = max(GATHERED * WORD * largest, SORTED * sorted_weights)  # in a step, between two
    exchange = {"none": 0, "ddp": WORD * parameters, "fsdp": at_once}[parallel]
    return Memory(
        weights=cut(WORD * parameters),
        gradients=cut(WORD * parameters),
        moments=cut(moments * WORD * parameters),
        masks=cut(MASKS * prunable),
        dense=cut(WORD * prunable),
        teacher=cut(WORD * parameters) if has_teacher else 0,
        exchange=exchange,
        extra=cut(extra),
        activations=-(-activations // world),
    )

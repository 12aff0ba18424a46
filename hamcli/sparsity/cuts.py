"""Groups of weights that lie in several processes, of which each holds whole rows of a tensor.

What such a group decides is decided by the tensor as a whole, in every process alike, and each
keeps its own rows: one tensor at a time, so that no more than one is whole.
"""

from collections.abc import Sequence

from hamcli.sparsity.across import Across, totals
from hamcli.sparsity.targets import Target, Targets


def across_groups(targets: Targets, rows: Sequence[int | None]) -> list[Across | None]:
    """For each target, the processes in which its groups lie; None where none of them is cut.

    The answer is the same in all processes, of which each must ask.

    Args:
        targets: What may become zero.
        rows: How many rows a group has; None where only all rows together are of any use.
    """
    here = [int(_is_cut(one, count)) for one, count in zip(targets, rows, strict=True)]
    return [targets.across if count else None for count in totals(here, targets.across)]


def _is_cut(target: Target, rows: int | None) -> bool:
    if target.part is None:
        return False
    if rows is None:
        return 0 < len(target.param) < target.shape[0]
    return target.part.begin % rows != 0 or len(target.param) % rows != 0

"""Which learning rates are tried, and which one wins: the same number for every arm."""

import math
from collections.abc import Sequence

from hamcli.comparison.records import Row

SPACING = math.sqrt(10)


def learning_rates(lr: float, trials: int) -> list[float]:
    """`trials` learning rates around `lr`, half a decade apart, ascending; `lr` is one of them.

    An even number has one more below than above.

    Args:
        lr: The recipe's, above 0.
        trials: At least 1.
    """
    offsets = [index - trials // 2 for index in range(trials)]
    return [float(f"{lr * SPACING**offset:.2g}") if offset else lr for offset in offsets]


def choose(trials: Sequence[Row]) -> tuple[float, bool]:
    """The learning rate of the best trial, and whether it lies at an edge of those tried.

    The quality decides, then the lower loss, then the lower learning rate. Where no trial ended
    well the lowest learning rate is taken.
    """
    rates = [one.cell.lr for one in trials]
    ended = [one for one in trials if one.outcome.value is not None]
    lr = min(ended, key=_rank).cell.lr if ended else min(rates)
    return lr, len(rates) > 1 and lr in (min(rates), max(rates))


def _rank(row: Row) -> tuple[float, float, float]:
    outcome = row.outcome
    assert outcome.value is not None
    loss = math.inf if outcome.loss is None else outcome.loss
    return (-outcome.value if outcome.higher_is_better else outcome.value, loss, row.cell.lr)

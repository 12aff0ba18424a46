"""From runs to means, standard errors and paired differences."""

import math
import statistics
from collections.abc import Mapping, Sequence

from hamcli.comparison.grid import Arm, Grid
from hamcli.comparison.records import Mean, Outcome, Pair, Row, Spread

Runs = Mapping[tuple[Arm, float, int], Outcome]


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard error s / sqrt(n), with s the sample's standard deviation (n - 1)."""
    if not values:
        return Spread(None, None, 0)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(mean, None, 1)
    return Spread(mean, statistics.stdev(values, mean) / math.sqrt(len(values)), len(values))


def means(grid: Grid, rows: Sequence[Row]) -> tuple[Mean, ...]:
    """Over the seeds, for each arm and sparsity."""
    runs = _by_place(rows)
    return tuple(
        _mean(runs, arm, target, grid.seeds) for arm in grid.arms for target in grid.targets_of(arm)
    )


def pairs(grid: Grid, rows: Sequence[Row]) -> tuple[Pair, ...]:
    """HAM on minus off, seed by seed, for each method that ran both ways and each sparsity."""
    runs = _by_place(rows)
    both = [one.method for one in grid.arms if one.ham and Arm(one.method, False) in grid.arms]
    return tuple(
        _pair(runs, method, target, grid.seeds) for method in both for target in grid.targets
    )


def _by_place(rows: Sequence[Row]) -> Runs:
    return {(row.cell.arm, row.cell.target, row.cell.seed): row.outcome for row in rows}


def _mean(runs: Runs, arm: Arm, target: float, seeds: Sequence[int]) -> Mean:
    found = [runs[arm, target, seed] for seed in seeds]
    values = [one.value for one in found if one.value is not None]
    losses = [one.loss for one in found if one.loss is not None]
    return Mean(arm, target, spread(values), spread(losses), len(seeds) - len(values))


def _pair(runs: Runs, method: str, target: float, seeds: Sequence[int]) -> Pair:
    values, losses, higher = [], [], True
    for seed in seeds:
        on, off = runs[Arm(method, True), target, seed], runs[Arm(method, False), target, seed]
        if on.value is not None and off.value is not None:
            values.append(on.value - off.value)
            higher = bool(on.higher_is_better)
        if on.loss is not None and off.loss is not None:
            losses.append(on.loss - off.loss)
    value = spread(values)
    gain = value.mean if value.mean is None or higher else -value.mean
    return Pair(method, target, value, spread(losses), gain, len(seeds) - len(values))

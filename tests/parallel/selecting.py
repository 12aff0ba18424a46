"""One of several processes that select over tensors which are cut into rows: FOLDER to write to."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from hamcli.parallel.world import joined
from hamcli.sparsity.exchange import exchanged
from hamcli.sparsity.masks import apply_masks_, nonzero_masks, num_dropped, prune_masks
from hamcli.sparsity.methods import make_sparsifier
from hamcli.sparsity.score import make_random
from hamcli.sparsity.targets import Part, Target, Targets

SHAPES = [(7, 12), (16, 8), (3, 4), (1, 8), (12, 4, 2, 2)]
CASES = {
    "global": {},
    "bounds": {"min_sparsity": 0.3, "max_sparsity": 0.8},
    "uniform": {"allocation": "uniform"},
    "erk": {"allocation": "erk"},
    "lamp": {"allocation": "lamp"},
    "lamp bounds": {"allocation": "lamp", "min_sparsity": 0.3, "max_sparsity": 0.8},
    "mixed": {},
    "2:4": {"pattern": "2:4"},
}

# Shape, input axis, whether axis 0 counts matrices. Groups of four rows and blocks of three, over
# parts of 10, 7 and 5 rows, of one row, and of none.
GROUPED = [
    ((20, 6), 0, False),
    ((4, 8), 0, False),
    ((7, 12), 1, False),
    ((12, 3, 2, 2), 0, False),
    ((5, 4, 2, 2), 1, False),
    ((3, 5, 8), 2, True),
    ((5, 8, 3), 1, True),
]
IN_BLOCKS = [
    ((15, 4), 1, False),
    ((4, 9), 0, False),
    ((6, 4, 2, 3), 1, False),
    ((3, 8), 1, False),
    ((4, 6, 2, 2), 0, False),
    ((3, 6, 4), 2, True),
    ((5, 2, 9), 1, True),
]
PATTERNS = {"2:4": GROUPED, "block:3x2": IN_BLOCKS}
CUT_CASES = {
    "cut 2:4": {"pattern": "2:4", "target": 0.5},
    "cut 2:4 floats": {"pattern": "2:4", "target": 0.5},
    "cut blocks": {"pattern": "block:3x2", "target": 0.55},
    "cut blocks floats": {"pattern": "block:3x2", "target": 0.55},
    "cut blocks dense": {"pattern": "block:3x2", "target": 0.01},
    "cut blocks empty": {"pattern": "block:3x2", "target": 1.0},
    "cut blocks bounds": {
        "pattern": "block:3x2", "target": 0.61, "min_sparsity": 0.4, "max_sparsity": 0.75,
    },
    "cut blocks uniform": {"pattern": "block:3x2", "target": 0.61, "allocation": "uniform"},
    "cut blocks lamp": {"pattern": "block:3x2", "target": 0.61, "allocation": "lamp"},
    "cut blocks erk": {"pattern": "block:3x2", "target": 0.61, "allocation": "erk"},
}  # fmt: skip
CUT_METHODS = [
    ("gradual", "2:4", 0.5),
    ("ac-dc", "2:4", 0.5),
    ("gradual", "block:3x2", 0.7),
    ("rigl", "block:3x2", 0.7),
    ("random", "block:3x2", 0.7),
]


def whole_tensors(case: str) -> list[Tensor]:
    """Weights of few different values: ties lie within and across the rows of processes."""
    torch.manual_seed(3)
    made = [torch.randint(-3, 4, shape).float() / 4 for shape in SHAPES]
    if case == "mixed":
        made = [one if place % 2 else one.bfloat16() for place, one in enumerate(made)]
    return made


def targets_of(tensors: list[Tensor], world=None, kinds=None) -> Targets:
    """The targets, whole or as the rows of one process, which may have none.

    `kinds` says the input axis of each, and whether it is a stack; else all are matrices.
    """
    items = []
    for place, one in enumerate(tensors):
        kind = (1, False) if kinds is None else kinds[place][1:]
        if world is None:
            items.append(Target(str(place), one, *kind))
            continue
        each = -(-len(one) // world.size)
        begin = min(world.rank * each, len(one))
        rows = one[begin : begin + each].clone()
        items.append(Target(str(place), rows, *kind, part=Part(tuple(one.shape), begin, rows)))
    return Targets(tuple(items), (), world)


def cut_targets(pattern: str, world=None, *, floats: bool = False) -> Targets:
    """Targets with groups or blocks that lie in several processes, of tied weights or others."""
    torch.manual_seed(4)
    kinds = PATTERNS[pattern]
    made = [torch.randint(-1, 2, shape).float() / 4 for shape, *_ in kinds]
    if floats:
        made = [torch.randn(shape) for shape, *_ in kinds]
        made[1] = made[1].bfloat16()
    made[0][9:12] = 0.0  # what is zero already lies on both sides of a cut
    return targets_of(made, world, kinds)


def choose_cut(case: str, world=None) -> list[Tensor]:
    words = dict(CUT_CASES[case])
    return prune_masks(cut_targets(words["pattern"], world, floats="floats" in case), **words)


def choose(case: str, targets: Targets) -> list[Tensor]:
    words = dict(CASES[case])
    target = 0.5 if case == "2:4" else 0.61
    return prune_masks(targets, target, **words)


def steps(
    targets: Targets, method: str, target: float = 0.7, pattern: str = "unstructured"
) -> list[list[Tensor]]:
    """Masks of a run in which the weights shake, and its counts."""
    made = []
    sparsifier = make_sparsifier(
        method, targets, target=target, steps=10, update_every=0.1, pattern=pattern,
        score=make_random(targets, 1) if method == "random" else lambda one: one.abs(),
    )  # fmt: skip
    for step in range(8):
        for place, one in enumerate(targets):
            generator = torch.Generator().manual_seed(100 * step + place)
            shake = one.own(torch.randint(-2, 3, one.shape, generator=generator).float() / 8)
            one.param.add_(shake)
            one.param.grad = shake.roll(1, -1)
        if (masks := sparsifier.masks_due(step)) is not None:
            apply_masks_(targets, masks)
        counts = [sparsifier.num_masked, sparsifier.natural_zeros, sparsifier.num_zeros]
        held = [mask.clone() for mask in masks or nonzero_masks(targets)]
        made.append([*held, torch.tensor(counts)])
    return made


def main() -> None:
    with joined("fsdp", "cpu") as world:
        found: dict[str, list] = {}
        for case in CASES:
            targets = targets_of(whole_tensors(case), world)
            masks = choose(case, targets)
            found[case] = [mask.tolist() for mask in masks]
            found[f"{case} count"] = [num_dropped(masks, world)]
        for method in ("gradual", "one-shot", "random", "ac-dc", "rigl", "cyclic"):
            targets = targets_of(whole_tensors("global"), world)
            found[method] = [[one.tolist() for one in step] for step in steps(targets, method)]
        for case in CUT_CASES:
            found[case] = [mask.tolist() for mask in choose_cut(case, world)]
        for method, pattern, target in CUT_METHODS:
            made = steps(cut_targets(pattern, world), method, target, pattern)
            found[f"{method} {pattern}"] = [[one.tolist() for one in step] for step in made]
        targets = targets_of(whole_tensors("global"), world)
        one = targets[1].param
        mask = exchanged(one > 0, one.abs(), one.roll(1, -1), 0.3, world)
        found["exchange"] = [mask.tolist()]
        rows = torch.full((world.rank, 2), world.rank, dtype=torch.bfloat16)
        found["uneven"] = [world.whole(rows).tolist(), world.whole(rows[:0]).tolist()]
        Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

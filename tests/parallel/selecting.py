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
    "mixed": {},
    "2:4": {"pattern": "2:4"},
}


def whole_tensors(case: str) -> list[Tensor]:
    """Weights of few different values: ties lie within and across the rows of processes."""
    torch.manual_seed(3)
    made = [torch.randint(-3, 4, shape).float() / 4 for shape in SHAPES]
    if case == "mixed":
        made = [one if place % 2 else one.bfloat16() for place, one in enumerate(made)]
    return made


def targets_of(tensors: list[Tensor], world=None) -> Targets:
    """The targets, whole or as the rows of one process, which may have none."""
    items = []
    for place, one in enumerate(tensors):
        if world is None:
            items.append(Target(str(place), one, 1))
            continue
        each = -(-len(one) // world.size)
        begin = min(world.rank * each, len(one))
        rows = one[begin : begin + each].clone()
        items.append(Target(str(place), rows, 1, part=Part(tuple(one.shape), begin, rows)))
    return Targets(tuple(items), (), world)


def choose(case: str, targets: Targets) -> list[Tensor]:
    words = dict(CASES[case])
    target = 0.5 if case == "2:4" else 0.61
    return prune_masks(targets, target, **words)


def steps(targets: Targets, method: str) -> list[list[Tensor]]:
    """Masks of a run in which the weights shake, and its counts."""
    made = []
    sparsifier = make_sparsifier(
        method, targets, target=0.7, steps=10, update_every=0.1,
        score=make_random(targets, 1) if method == "random" else lambda one: one.abs(),
    )  # fmt: skip
    for step in range(8):
        for place, target in enumerate(targets):
            generator = torch.Generator().manual_seed(100 * step + place)
            shake = torch.randint(-2, 3, target.shape, generator=generator).float() / 8
            begin = 0 if target.part is None else target.part.begin
            shake = shake[begin : begin + len(target.param)]
            target.param.add_(shake)
            target.param.grad = shake.roll(1, -1)
        if (masks := sparsifier.masks_due(step)) is not None:
            apply_masks_(targets, masks)
        counts = torch.tensor([sparsifier.num_masked, sparsifier.natural_zeros])
        made.append([*(mask.clone() for mask in masks or nonzero_masks(targets)), counts])
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
        targets = targets_of(whole_tensors("global"), world)
        one = targets[1].param
        mask = exchanged(one > 0, one.abs(), one.roll(1, -1), 0.3, world)
        found["exchange"] = [mask.tolist()]
        Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

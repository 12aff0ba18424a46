"""Selection over rows in several processes gives the integers of one, ties and all."""

import json
import subprocess

import pytest

from hamcli.sparsity.blocks import block_any, block_sums
from hamcli.sparsity.exchange import exchanged
from hamcli.sparsity.masks import num_dropped
from tests.parallel.pico import environment, torchrun
from tests.parallel.selecting import (
    CASES,
    CUT_CASES,
    CUT_METHODS,
    PATTERNS,
    choose,
    choose_cut,
    cut_targets,
    steps,
    targets_of,
    whole_tensors,
)

pytestmark = pytest.mark.slow
METHODS = ("gradual", "one-shot", "random", "ac-dc", "rigl", "cyclic")


@pytest.fixture(scope="module", params=[2, 3, 4])
def processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    launch = torchrun(request.param, "-m", "tests.parallel.selecting", folder)
    done = subprocess.run(
        launch, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def together(processes, case, index):
    """Rows of all processes, one after the other."""
    return [row for found in processes for row in found[case][index]]


@pytest.mark.parametrize("case", CASES)
def test_masks_over_rows_are_those_of_the_whole(processes, case):
    targets = targets_of(whole_tensors(case))
    masks = choose(case, targets)
    for index, mask in enumerate(masks):
        assert together(processes, case, index) == mask.tolist()
    assert all(found[f"{case} count"] == [num_dropped(masks)] for found in processes)


def test_the_planted_ties_lie_in_several_processes(processes):
    weights = whole_tensors("global")
    dropped = [~mask for mask in choose("global", targets_of(weights))]
    largest = max(float(w.abs()[d].max()) for w, d in zip(weights, dropped, strict=True))
    tied = [(w.abs() == largest) for w in weights]
    # some of the ties go and some stay, in tensors that have rows everywhere
    assert any(bool((t & d).any()) for t, d in zip(tied, dropped, strict=True))
    assert any(bool((t & ~d).any()) for t, d in zip(tied, dropped, strict=True))
    assert bool(tied[1][:4].any())
    assert bool(tied[1][12:].any())


@pytest.mark.parametrize("case", CUT_CASES)
def test_groups_that_several_processes_hold_are_those_of_the_whole(processes, case):
    for index, mask in enumerate(choose_cut(case)):
        assert together(processes, case, index) == mask.tolist(), index


@pytest.mark.parametrize(("method", "pattern", "target"), CUT_METHODS)
def test_a_method_over_cut_groups_is_that_over_the_whole(processes, method, pattern, target):
    case = f"{method} {pattern}"
    for step, expected in enumerate(steps(cut_targets(pattern), method, target, pattern)):
        for index, mask in enumerate(expected[:-1]):
            rows = [row for found in processes for row in found[case][step][index]]
            assert rows == mask.tolist(), (step, index)
        assert all(found[case][step][-1] == expected[-1].tolist() for found in processes)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_groups_of_the_first_tensor_lie_in_several_processes(pattern):
    rows = {"2:4": 4, "block:3x2": 3}[pattern]
    length = len(cut_targets(pattern)[0].param)
    assert all(-(-length // size) % rows for size in (2, 3, 4))


def test_of_equal_weights_in_a_cut_group_some_stay_and_some_go():
    weights, mask = cut_targets("2:4")[0].param.abs(), choose_cut("cut 2:4")[0]
    grouped, kept = weights.view(-1, 4, 6), mask.view(-1, 4, 6)
    least = grouped.masked_fill(~kept, 9.0).amin(1, keepdim=True)
    assert bool(((grouped == least) & ~kept).any())


def test_of_equal_blocks_of_a_cut_tensor_some_stay_and_some_go():
    targets, masks = cut_targets("block:3x2"), choose_cut("cut blocks")
    found = []
    for one, mask in zip(targets, masks, strict=True):
        sums = block_sums(one.param.abs(), one, (3, 2)).flatten()
        found.append((sums, block_any(mask, one, (3, 2)).flatten()))
    largest = max(float(sums[~kept].max()) for sums, kept in found)
    tied = [kept[sums == largest] for sums, kept in found]
    # the blocks of this kernel lie in another order than its rows, which are cut
    assert 0 < int(tied[2].sum()) < len(tied[2])


def test_parts_of_any_length_make_a_whole(processes):
    every = [[float(rank)] * 2 for rank in range(len(processes)) for _ in range(rank)]
    assert all(found["uneven"] == [every, []] for found in processes)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_over_rows_is_that_over_the_whole(processes, method):
    for step, expected in enumerate(steps(targets_of(whole_tensors("global")), method)):
        for index, mask in enumerate(expected[:-1]):
            rows = [row for found in processes for row in found[method][step][index]]
            assert rows == mask.tolist(), (step, index)
        assert all(found[method][step][-1] == expected[-1].tolist() for found in processes)


def test_an_exchange_over_rows_is_that_over_the_whole(processes):
    one = targets_of(whole_tensors("global"))[1].param
    mask = exchanged(one > 0, one.abs(), one.roll(1, -1), 0.3)
    assert together(processes, "exchange", 0) == mask.tolist()

"""Selection over rows in several processes gives the integers of one, ties and all."""

import json
import subprocess

import pytest

from hamcli.sparsity.exchange import exchanged
from hamcli.sparsity.masks import num_dropped
from tests.parallel.pico import environment, torchrun
from tests.parallel.selecting import CASES, choose, steps, targets_of, whole_tensors

pytestmark = pytest.mark.slow
METHODS = ("gradual", "one-shot", "random", "ac-dc", "rigl", "cyclic")


@pytest.fixture(scope="module", params=[2, 4])
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

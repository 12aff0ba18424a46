"""What a run did to the weights, by hand."""

import pytest
import torch

from hamcli import changes
from hamcli.changes import BINS, change_of, greatest_dropped, histogram_of
from hamcli.parallel.world import World
from hamcli.sparsity.targets import Part, Target, Targets


def targets_of(*tensors):
    return Targets(tuple(Target(str(place), one, 1) for place, one in enumerate(tensors)))


BEFORE = [torch.tensor([[1.0, -1.0, 1.0, 0.0]]), torch.tensor([[-1.0], [1.0], [-1.0]])]
AFTER = [torch.tensor([[2.0, -1.0, -0.0, 0.0]]), torch.tensor([[-0.5], [-0.5], [0.0]])]


def test_a_sign_flips_where_a_survivor_has_not_the_dense_sign():
    found = change_of(BEFORE, targets_of(*AFTER), World())
    assert found.sign_flips == 1 / 4
    assert change_of(BEFORE, targets_of(*map(torch.zeros_like, AFTER)), World()).sign_flips == 0.0


def test_the_histogram_leaves_zeros_out_and_is_in_dense_root_mean_squares():
    found = histogram_of(BEFORE, targets_of(*AFTER))
    assert found == change_of(BEFORE, targets_of(*AFTER), World()).histogram
    assert (found.total, found.before_zeros, found.after_zeros) == (7, 1, 3)
    scale = (6 / 7) ** 0.5
    assert len(found.before) == len(found.after) == len(found.edges) - 1 == BINS
    assert sum(found.before) == 0  # a magnitude of 1 is beyond one root mean square
    half = int((0.5 / scale + 1) / 2 * BINS)
    assert {place: count for place, count in enumerate(found.after) if count} == {
        BINS - 1 - half: 2
    }
    assert "every" not in found.unit


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_sample_of_parts_is_that_of_the_whole(monkeypatch, rows):
    monkeypatch.setattr(changes, "HISTOGRAM_LIMIT", 3)
    whole = torch.arange(28.0).reshape(4, 7)
    stride = 28 // 3
    assert "every 9th weight" in histogram_of([whole], targets_of(whole)).unit
    (sampled,) = changes._sampled([whole], stride, targets_of(whole))
    assert sampled.tolist() == [0.0, 9.0, 18.0, 27.0]
    found = []
    for begin in range(0, 4, rows):
        held = whole[begin : begin + rows]
        part = Target("w", held, 1, part=Part((4, 7), begin, held))
        found += changes._sampled([held], stride, Targets((part,)))
    assert torch.cat(found).tolist() == sampled.tolist()


def test_the_greatest_dropped_magnitude_is_of_the_dense_weights():
    masks = [torch.tensor([[True, False, True, False]]), torch.ones(3, 1, dtype=torch.bool)]
    before = [torch.tensor([[9.0, -3.0, 9.0, 2.0]]), BEFORE[1]]
    assert greatest_dropped(before, masks) == 3.0
    masks[1] = torch.tensor([[True], [False], [True]])
    assert greatest_dropped(before, masks) == 3.0
    assert greatest_dropped(before[1:], masks[1:]) == 1.0
    masks[1][:] = True
    assert greatest_dropped(before[1:], masks[1:]) is None

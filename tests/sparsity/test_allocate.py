import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hamcli.errors import RecipeError
from hamcli.sparsity.allocate import allocate, share_out
from hamcli.sparsity.score import Scores
from tests.oracles import selection

ALLOCATIONS = ["global", "uniform", "erk"]
shapes_strategy = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=5)


def scores_of(shapes: list[tuple[int, int]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # few distinct values, so that ties decide often
    return [torch.randint(0, 4, shape, generator=generator).float() for shape in shapes]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_budget_is_exact_and_within_the_bounds(allocation: str, data: st.DataObject) -> None:
    shapes = data.draw(shapes_strategy)
    sizes = [math.prod(shape) for shape in shapes]
    least = data.draw(st.integers(0, 10)) / 10
    most = data.draw(st.integers(round(least * 10), 10)) / 10
    low, high = math.ceil(least * sum(sizes)), math.floor(most * sum(sizes))
    assume(low <= high)
    zeros = data.draw(st.integers(low, high))
    counts = allocate(
        shapes,
        zeros,
        allocation,
        scores=scores_of(shapes, data.draw(st.integers(0, 9))),
        min_sparsity=least,
        max_sparsity=most,
    )
    assert sum(counts) == zeros
    for count, size in zip(counts, sizes, strict=True):
        assert Fraction(str(least)) * size - 1 < count < Fraction(str(most)) * size + 1
        assert 0 <= count <= size


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_global_under_bounds_is_one_threshold_clamped(data: st.DataObject) -> None:
    shapes = data.draw(shapes_strategy)
    sizes = [math.prod(shape) for shape in shapes]
    scores = scores_of(shapes, data.draw(st.integers(0, 99)))
    least, most = sorted(data.draw(st.tuples(st.integers(0, 10), st.integers(0, 10))))
    lower = [math.ceil(Fraction(least, 10) * size) for size in sizes]
    upper = [math.floor(Fraction(most, 10) * size) for size in sizes]
    assume(all(low <= high for low, high in zip(lower, upper, strict=True)))
    zeros = data.draw(st.integers(sum(lower), sum(upper)))
    counts = allocate(
        shapes, zeros, "global", scores=scores, min_sparsity=least / 10, max_sparsity=most / 10
    )
    assert counts == selection.bounded_counts(scores, zeros, lower, upper)


def test_lazy_scores_may_be_bounded_too() -> None:
    params = [torch.full((2, 5), 0.1), torch.full((2, 5), 0.2), torch.full((2, 5), 0.3)]
    counts = allocate([(2, 5)] * 3, 15, "global", scores=Scores(params), max_sparsity=0.8)
    assert counts == [8, 7, 0]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_zeros_that_are_there_are_never_undone(allocation: str, data: st.DataObject) -> None:
    shapes = data.draw(shapes_strategy)
    sizes = [math.prod(shape) for shape in shapes]
    already = [data.draw(st.integers(0, size)) for size in sizes]
    zeros = data.draw(st.integers(sum(already), sum(sizes)))
    scores = scores_of(shapes, 0)
    counts = allocate(shapes, zeros, allocation, scores=scores, already=already)
    assert sum(counts) == zeros
    assert all(count >= before for count, before in zip(counts, already, strict=True))


def test_uniform_gives_each_the_same_share() -> None:
    assert allocate([(10, 10), (5, 4), (1, 10)], 117, "uniform") == [90, 18, 9]


def test_uniform_gives_what_is_left_to_the_largest_remainders() -> None:
    # shares 2.25, 3.75, 4.0: floors leave one
    assert allocate([(1, 9), (1, 15), (1, 16)], 10, "uniform") == [2, 4, 4]


def test_erk_density_goes_by_sum_over_product_of_the_shape() -> None:
    # kept in proportion to 10 + 10 and 20 + 60: 70 of 100 + 1200 are kept
    assert allocate([(10, 10), (20, 60)], 1230, "erk") == [100 - 14, 1200 - 56]


def test_erk_counts_the_kernel_of_a_convolution() -> None:
    # sums 4 + 4 + 3 + 3 = 14 and 4 + 24 = 28: kept 20 and 40
    assert allocate([(4, 4, 3, 3), (4, 24)], 240 - 60, "erk") == [144 - 20, 96 - 40]


def test_erk_caps_a_small_tensor_at_dense_and_keeps_the_budget() -> None:
    counts = allocate([(2, 2), (100, 100)], 5000, "erk")
    assert counts == [0, 5000]


def test_erk_takes_stacked_experts_as_separate_matrices() -> None:
    stacked = allocate([(3, 4, 8), (4, 8)], 64, "erk", stacked=[True, False])
    assert stacked == [48, 16]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_bound_keeps_every_tensor_alive(allocation: str) -> None:
    params = [torch.full((4, 5), 0.01), torch.full((40, 50), 1.0)]
    counts = allocate([(4, 5), (40, 50)], 1800, allocation, scores=params, max_sparsity=0.95)
    assert counts[0] <= 19
    assert sum(counts) == 1800


def test_bounds_equal_to_the_target_are_met_up_to_rounding() -> None:
    counts = allocate(
        [(1, 5), (1, 5)],
        9,
        "global",
        scores=[torch.arange(5.0), torch.arange(5.0)],
        min_sparsity=0.9,
        max_sparsity=0.9,
    )
    assert sorted(counts) == [4, 5]


@pytest.mark.parametrize(
    ("bounds", "key"),
    [({"max_sparsity": 0.5}, "max_sparsity"), ({"min_sparsity": 0.95}, "min_sparsity")],
)
def test_bounds_without_room_are_refused(bounds: dict[str, float], key: str) -> None:
    with pytest.raises(RecipeError, match=f"E221.*sparsity.{key}"):
        allocate([(10, 10), (10, 10)], 180, "uniform", **bounds)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("zeros", [0, 21])
def test_nothing_and_everything(allocation: str, zeros: int) -> None:
    shapes = [(1, 1), (4, 5)]
    counts = allocate(shapes, zeros, allocation, scores=[torch.ones(1, 1), torch.ones(4, 5)])
    assert counts == ([0, 0] if zeros == 0 else [1, 20])


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_shares_differ_from_proportion_by_less_than_one(data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    total = data.draw(st.integers(0, sum(weights)))
    shares = share_out(total, weights, [0] * len(weights), weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - Fraction(total * weight, sum(weights))) < 1

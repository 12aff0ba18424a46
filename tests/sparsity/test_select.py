import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hamcli import native
from hamcli.native import selection as streams
from hamcli.sparsity import select
from hamcli.sparsity.counting import exact, num_zeros
from hamcli.sparsity.score import Scores
from hamcli.sparsity.select import (
    exact_mask,
    exact_masks,
    global_counts,
    global_masks,
    n_m_mask,
)
from tests.oracles import selection

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

few_values = st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0**-140, 65504.0, math.inf, 1e-300])
signed_values = st.floats(width=32, allow_nan=False)
bits = st.floats(width=16, allow_nan=False, allow_infinity=True)


@st.composite
def score_lists(draw: st.DrawFn, values: st.SearchStrategy[float]) -> list[Tensor]:
    """Up to four tensors of up to a dozen values, empty ones among them, dtypes mixed at times."""
    common = draw(st.sampled_from([*FLOATS, None]))
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = common or draw(st.sampled_from(FLOATS))
        flat = torch.tensor(draw(st.lists(values, max_size=12)), dtype=torch.float64).to(dtype)
        tensors.append(flat.view(2, -1) if len(flat) % 2 == 0 and len(flat) else flat)
    return tensors


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk borders inside every test tensor."""
    monkeypatch.setattr(select, "CHUNK", 5)


def assert_same_masks(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert [mask.tolist() for mask in ours] == [mask.tolist() for mask in theirs]


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_global_masks_are_those_of_a_stable_sort(data: st.DataObject) -> None:
    values = data.draw(st.sampled_from([few_values, signed_values, bits]))
    scores = data.draw(score_lists(values))
    zeros = data.draw(st.integers(0, sum(score.numel() for score in scores)))
    expected = selection.global_masks(scores, zeros)
    chunk, select.CHUNK = select.CHUNK, data.draw(st.sampled_from([1, 3, 5, 1 << 18]))
    try:
        assert_same_masks(global_masks(scores, zeros), expected)
        assert global_counts(scores, zeros) == selection.zeros_of(expected)
    finally:
        select.CHUNK = chunk


@pytest.fixture(params=["native", "numpy", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the three ways to count and to cut, the last that of a device or of fp64."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "_settled", native.Status(False, "off for a test"))
    elif request.param == "torch":
        monkeypatch.setattr(streams, "takes", lambda *_: False)
    elif not native.status().is_available:
        pytest.skip(native.status().reason)
    return str(request.param)


@st.composite
def weight_lists(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    """Up to three tensors of one dtype and their masks; few values, so that many are tied."""
    dtype = draw(st.sampled_from(FLOATS))
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0**-14, -60000.0])
    finite = st.floats(-60000.0, 60000.0, width=16)
    weights, masks = [], []
    for _ in range(draw(st.integers(1, 3))):
        flat = draw(st.lists(draw(st.sampled_from([values, finite])), max_size=12))
        weight = torch.tensor(flat, dtype=torch.float64).to(dtype)
        mask = torch.tensor([draw(st.booleans()) for _ in flat], dtype=torch.bool)
        shape = (2, -1) if len(flat) % 2 == 0 and flat else (-1,)
        weights.append(weight.view(shape))
        masks.append(mask.view(shape))
    return weights, masks


@pytest.mark.parametrize("chunk", [1, 5, 1 << 18])
def test_weights_are_cut_as_by_a_stable_sort_whatever_is_masked(form: str, chunk: int) -> None:
    @given(weight_lists(), st.booleans(), st.data())
    @settings(max_examples=150, deadline=None, derandomize=True)
    def check(drawn: tuple[list[Tensor], list[Tensor]], is_masked: bool, data: st.DataObject):
        weights, masks = drawn
        scores = [weight.abs().double() for weight in weights]
        if is_masked:
            scores = [torch.where(m, s, -1.0) for s, m in zip(scores, masks, strict=True)]
        zeros = data.draw(st.integers(0, sum(weight.numel() for weight in weights)))
        expected = selection.global_masks(scores, zeros)
        subject = Scores(weights, masks=masks if is_masked else None)
        assert_same_masks(global_masks(subject, zeros), expected)
        assert global_counts(subject, zeros) == selection.zeros_of(expected)
        counts = [data.draw(st.integers(0, weight.numel())) for weight in weights]
        alone = [selection.global_masks([s], n)[0] for s, n in zip(scores, counts, strict=True)]
        assert_same_masks(exact_masks(subject, counts), alone)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "CHUNK", chunk)
        patch.setattr(streams, "CHUNK", chunk)
        check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_long_tensors_are_cut_as_by_a_stable_sort(
    form: str, dtype: torch.dtype, is_masked: bool, threads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).to(dtype) for size in (700_001, 3, 524_288)]
    for weight in weights[::2]:
        weight[::3] = 0.25  # ties on both sides of every border between parts
    masks = [torch.rand(w.shape, generator=generator) > 0.2 for w in weights] if is_masked else None
    scores = torch.cat(weights).abs().double()
    if masks is not None:
        scores = torch.where(torch.cat(masks), scores, -1.0)
    order = scores.argsort(stable=True)
    below, tied = int((scores < 0.25).sum()), int((scores == 0.25).sum())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for zeros in (1, below, below + 1, below + tied // 2, below + tied, len(scores) - 1):
            expected = torch.ones(len(scores), dtype=torch.bool)
            expected[order[:zeros]] = False
            assert torch.equal(
                torch.cat(global_masks(Scores(weights, masks=masks), zeros)), expected
            )
    finally:
        torch.set_num_threads(before)


def test_a_score_that_needs_its_whole_tensor_gets_it() -> None:
    def rank(weight: Tensor) -> Tensor:
        return weight.argsort().argsort().float()

    weights = [torch.tensor([5.0, -1.0, 3.0, 2.0]), torch.tensor([9.0, 8.0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "CHUNK", 2)
        masks = global_masks(Scores(weights, rank), 3)
    assert [mask.tolist() for mask in masks] == [[True, False, True, False], [True, False]]


@pytest.mark.parametrize("zeros", [0, 1, 7, 8])
def test_equal_scores_are_dropped_from_the_front(zeros: int) -> None:
    mask = exact_mask(torch.ones(2, 4), zeros)
    assert mask.flatten().tolist() == [False] * zeros + [True] * (8 - zeros)


def test_ties_go_to_earlier_tensors_first() -> None:
    masks = global_masks([torch.ones(3), torch.zeros(1), torch.ones(3)], 5)
    assert [mask.tolist() for mask in masks] == [[False] * 3, [False], [False, True, True]]


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("dtype", FLOATS)
def test_bf16_and_kin_have_the_exact_count_in_spite_of_ties(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(40, 25, generator=generator).abs().to(dtype)
    for zeros in (1, 499, 900, 999):
        mask = exact_mask(score, zeros)
        assert int((~mask).sum()) == zeros
        assert score[~mask].max() <= score[mask].min()


def test_negative_zero_ties_with_zero() -> None:
    assert exact_mask(torch.tensor([0.0, -0.0, 1.0]), 1).tolist() == [False, True, True]


def test_negative_scores_are_below_positive_ones() -> None:
    score = torch.tensor([0.5, -2.0, 0.0, -0.5, -math.inf])
    assert exact_mask(score, 3).tolist() == [True, False, True, False, False]


def test_nan_is_kept_before_infinity() -> None:
    assert exact_mask(torch.tensor([math.nan, math.inf, 1.0]), 2).tolist() == [True, False, False]


def test_denormals_are_told_apart() -> None:
    smallest = torch.tensor([2.0**-148, 2.0**-149, 0.0])
    assert exact_mask(smallest, 2).tolist() == [True, False, False]


def test_position_is_the_logical_one_of_a_strided_tensor() -> None:
    score = torch.zeros(4, 6).t()[::2]
    assert not score.is_contiguous()
    mask = exact_mask(score, 5)
    assert mask.flatten().tolist() == [False] * 5 + [True] * 7


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty_tensors_have_empty_masks(shape: tuple[int, ...]) -> None:
    masks = global_masks([torch.zeros(shape), torch.tensor([[2.0]])], 1)
    assert masks[0].shape == shape
    assert masks[1].tolist() == [[False]]


def test_no_tensors_need_no_masks() -> None:
    assert global_masks([], 0) == []


def test_zero_dimensional_score() -> None:
    assert exact_mask(torch.tensor(3.0), 1).item() is False


def test_more_than_2_to_the_24_elements_are_counted_exactly() -> None:
    # float32 counters stop at 2**24; torch.quantile refuses
    total = 2**24 + 5
    score = torch.ones(total, dtype=torch.bfloat16)
    score[-1] = 0.5
    mask = exact_mask(score, 2**24 + 2)
    assert int((~mask).sum()) == 2**24 + 2
    assert mask[2**24 + 1 :].tolist() == [True, True, True, False]


def test_each_tensor_has_its_own_count() -> None:
    masks = exact_masks([torch.arange(4.0), torch.arange(4.0)], [1, 3])
    assert [mask.tolist() for mask in masks] == [[False, True, True, True], [False] * 3 + [True]]


def test_a_param_that_needs_gradients_is_scored_without_them() -> None:
    param = torch.nn.Parameter(torch.arange(4.0))
    assert exact_mask(param, 2).tolist() == [False, False, True, True]
    assert n_m_mask(param, 2, 4, 0).tolist() == [False, False, True, True]


def test_8_bit_floats_are_ordered_by_value() -> None:
    param = torch.tensor([[-2.0, 0.25, 1.0, 0.0]]).to(torch.float8_e4m3fn)
    assert global_masks(Scores([param]), 2)[0].tolist() == [[True, False, True, False]]


# num_zeros


@pytest.mark.parametrize(
    ("target", "total", "zeros"),
    [
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.9, 0, 0),
        (0.9, 1, 1),
        (0.5, 1, 0),
        (0.5, 3, 2),
        (0.9, 5, 4),  # 4.5, half to even
        (0.9, 15, 14),  # 13.5
        (0.575, 100, 58),  # 57.5, which floats make 57.49999999999999
        (1 / 3, 3, 1),
        (0.9, 10**18 + 5, 900000000000000004),  # beyond the integers of a double
    ],
)
def test_num_zeros_rounds_the_decimal_that_was_written(
    target: float, total: int, zeros: int
) -> None:
    assert num_zeros(target, total) == zeros


@given(st.floats(0, 1), st.integers(0, 10**12))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_num_zeros_is_never_more_than_half_a_weight_away(target: float, total: int) -> None:
    zeros = num_zeros(target, total)
    assert 0 <= zeros <= total
    assert abs(zeros - exact(target) * total) * 2 <= 1


# Groups of neighbours


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_n_m_mask_is_that_of_a_sort_of_each_group(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 5))
    n = data.draw(st.integers(1, m - 1))
    shape = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    input_dim = data.draw(st.integers(0, len(shape) - 1))
    shape[input_dim] *= m
    size = math.prod(shape)
    values = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    dtype = data.draw(st.sampled_from(FLOATS))
    score = torch.tensor(values, dtype=dtype).view(shape)
    chunk, select.CHUNK = select.CHUNK, 7
    try:
        mask = n_m_mask(score, n, m, input_dim)
    finally:
        select.CHUNK = chunk
    assert mask.is_contiguous()
    assert torch.equal(mask, selection.n_m_mask(score, n, m, input_dim))


def test_n_m_ties_are_dropped_from_the_front() -> None:
    assert n_m_mask(torch.ones(1, 8), 2, 4, 1).tolist() == [[False, False, True, True] * 2]

"""Counting of bits, native and in numpy, against sorting."""

import numpy as np
import pytest
import torch

from hamcli import native
from hamcli.native import selection
from tests.optim.numbers import normal
from tests.oracles import selection as oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "numpy"])
def form(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(native, "_settled", native.Status(False, "off for a test"))
    elif not native.status().is_available:
        pytest.skip(native.status().reason)
    return request.param


def tensors(dtype):
    """Normal weights with zeros of both signs, ties, infinities, in odd sizes and layouts."""
    made = [normal(301, 7, seed=0), normal(5, seed=1), normal(0, seed=2), normal(64, 33, seed=3).T]
    made[0][:20] = 0.0
    made[0][20:30] = -0.0
    made[1][0], made[1][1] = torch.inf, -torch.inf
    made[3][:10] = 0.5
    return [one.to(dtype) for one in made]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kth_magnitude_is_that_of_the_sort(form, dtype):
    weights = tensors(dtype)
    sizes = torch.cat([w.abs().flatten() for w in weights]).float().sort().values
    for k in (1, 100, 210, 211, 1500, len(sizes) - 1, len(sizes)):
        cut = selection.kth_magnitude(weights, k)
        bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
        value = torch.tensor([cut.key], dtype=bits).view(dtype).float()
        assert value == sizes[k - 1]
        assert cut.below == (sizes < value).sum()
        assert cut.below + cut.ties == k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [False, True])
def test_counts_of_the_first_digit_follow_the_order_of_the_scores(form, dtype, magnitude):
    (scores, *_) = tensors(dtype)
    shift = torch.finfo(dtype).bits - 16
    counts = selection.count_digits([scores], shift, magnitude=magnitude)
    assert counts.dtype == np.int64
    assert counts.sum() == scores.numel()
    values = scores.abs() if magnitude else scores
    assert counts[:32768].sum() == (values < 0).sum()
    if dtype != torch.float32:
        assert counts[32768] == (values == 0).sum()


def limits_of(kind, numel):
    """Masks of each kind; of the scores that are dropped, kept or spared some are whole groups."""
    mask, spared = normal(numel, seed=6) > 0, normal(numel, seed=7) > 0.5
    mask[:4096], mask[4096:8192], spared[:2048] = False, True, True
    return {"none": None, "masks": [mask], "places": [selection.limits(mask, spared)]}[kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("kind", ["none", "masks", "places"])
def test_native_counts_are_those_of_numpy(dtype, magnitude, kind, monkeypatch):
    if not native.status().is_available:
        pytest.skip(native.status().reason)
    scores = normal(100_003, seed=5).to(dtype)
    bits = torch.finfo(dtype).bits
    options = {"magnitude": magnitude, "masks": limits_of(kind, scores.numel())}

    def everything():
        found = [selection.count_digits([scores], bits - 16, **options)]
        if bits == 32:
            # of numbers, of what is dropped, of what is spared
            dropped = selection._dropped_key(dtype) >> 16
            values = np.argsort(found[0])[-3:] - 32768
            for begins in (0, dropped, 32767, *map(int, values)):
                found.append(selection.count_digits([scores], 0, begins, **options))
        found.append(np.array(selection.count_scores([scores], 1 << 12, **options)))
        return found

    natively = everything()
    monkeypatch.setattr(native, "_settled", native.Status(False, "off for a test"))
    for one, other in zip(natively, everything(), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_against_a_key(form, dtype):
    (scores, *_) = tensors(dtype)
    zero = 0
    ((below, at),) = selection.count_scores([scores], zero)
    assert (below, at) == ((scores < 0).sum(), (scores == 0).sum())
    ((below, at),) = selection.count_scores([scores], zero, magnitude=True)
    assert (below, at) == (0, (scores == 0).sum())
    assert selection.count_scores([scores, scores[:7], scores[:0]], zero)[1:] == [(0, 49), (0, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_mask", [False, True])
def test_what_is_spared_is_above_all_and_what_is_dropped_below(form, dtype, has_mask):
    weights = tensors(dtype)
    spared = [normal(*w.shape, seed=10 + i) > 0 for i, w in enumerate(weights)]
    masks = [
        normal(*w.shape, seed=20 + i) > -1 if has_mask else None for i, w in enumerate(weights)
    ]
    places = [selection.limits(*pair) for pair in zip(masks, spared, strict=True)]
    scores = [
        w.abs().float().where(~s, torch.inf).where(torch.tensor(True) if m is None else m, -1.0)
        for w, s, m in zip(weights, spared, masks, strict=True)
    ]
    # the infinity among the weights counts as a number here: with the spared ones it would tie
    weights[1][:2] = scores[1][:2] = 3.0
    scores[1][:2] = scores[1][:2].where(~spared[1][:2], torch.inf)
    if has_mask:
        scores[1][:2] = scores[1][:2].where(masks[1][:2], -1.0)
    order = torch.cat([one.flatten() for one in scores]).sort(stable=True).values
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    key = int(torch.tensor([0.5], dtype=dtype).view(bits))
    flat = [one.contiguous() for one in weights]
    found = selection.count_scores(flat, key, magnitude=True, masks=places)
    assert [list(one) for one in found] == [
        [int((one < 0.5).sum()), int((one == 0.5).sum())] for one in scores
    ]
    made, left = selection.keep_masks(flat, key, 3, magnitude=True, masks=places)
    assert left == 0
    assert sum(int((~mask).sum()) for mask in made) == int((order < 0.5).sum()) + 3
    for mask, one in zip(made, scores, strict=True):
        assert not mask[one < 0.5].any()
        assert mask[one > 0.5].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 8), (2, 3), (5, 12)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_groups_of_neighbours_keep_the_greatest_along_any_axis(dtype, n, m, axis):
    if not native.status().is_available:
        pytest.skip(native.status().reason)
    shape = [6, 10, 14]
    shape[axis] = 3 * m
    # few values, and so ties; zeros of both signs; signs, since scores need not be magnitudes
    score = (normal(*shape, seed=1) * 2).round().to(dtype)
    assert (score == 0).any()
    assert torch.equal(
        selection.keep_n_of_m(score, n, m, axis), oracle.n_m_mask(score.float(), n, m, axis)
    )

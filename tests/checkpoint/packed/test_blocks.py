import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hamcli.checkpoint.packed import native
from hamcli.checkpoint.packed.blocks import (
    HEAD,
    PLANE,
    decode_block,
    encode_block,
    merge_in_numpy,
    split_in_numpy,
)
from hamcli.checkpoint.packed.planes import (
    MASK_BITS,
    MASK_EMPTY,
    MASK_FULL,
    MASK_GAPS,
    TOP_BYTES,
    TOP_QUADS,
    UNSIGNED,
    DamagedPlanes,
)
from tests.checkpoint.packed.blocks_by_hand import read_block

WIDTHS = sorted(UNSIGNED)


def ways():
    """The numpy coder, and the native one where it can be had."""
    found = [("numpy", split_in_numpy, merge_in_numpy)]
    if native.prepare():
        found.append(("native", native.split_natively, native.merge_natively))
    return found


WAYS = ways()


def random_bits(width, size, share, seed=0):
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2 ** (8 * width), size, UNSIGNED[width], endpoint=False)
    bits[generator.random(size) >= share] = 0
    return bits


def weights(size, sparsity, dtype, seed=0):
    """Bits of normal weights of which the smallest are zero."""
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 0.05
    values[np.abs(values) < np.quantile(np.abs(values), sparsity)] = 0
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.view(np.uint32)


@st.composite
def blocks(draw):
    width = draw(st.sampled_from(WIDTHS))
    top = 2 ** (8 * width) - 1
    near = draw(st.integers(0, top))
    value = st.one_of(
        st.just(0),
        st.integers(0, top),
        st.integers(near, min(top, near + 40)),
        st.just(top // 2 + 1),
    )
    runs = draw(st.lists(st.tuples(value, st.integers(1, 700)), min_size=1, max_size=12))
    singles = draw(st.lists(value, max_size=200))
    elements = [one for one, count in runs for _ in range(count)] + singles
    return np.array(elements, UNSIGNED[width]), draw(st.booleans())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(blocks())
def test_any_block_comes_back_and_both_ways_give_the_same_bytes(block):
    bits, rotated = block
    made = {name: encode_block(bits, rotated, split) for name, split, _ in WAYS}
    assert len(set(made.values())) == 1
    for name, _, merge in WAYS:
        out = np.full_like(bits, 7)
        decode_block(memoryview(made[name]), out, rotated, merge)
        assert np.array_equal(out, bits), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(blocks())
def test_a_reader_written_from_the_specification_agrees(block):
    bits, rotated = block
    width = bits.dtype.itemsize
    made = encode_block(bits, rotated)
    assert read_block(made, len(bits), width, rotated) == bits.tolist()


@pytest.mark.parametrize(
    ("share", "coding"), [(0.0, MASK_EMPTY), (0.1, MASK_GAPS), (0.5, MASK_BITS), (1.0, MASK_FULL)]
)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_mask_is_coded_as_its_density_asks(width, share, coding):
    bits = random_bits(width, 5000, share) | UNSIGNED[width].type(share == 1.0)
    assert split_in_numpy(bits, False).mask_coding == coding


def test_tops_of_pruned_weights_are_quads_and_those_of_dense_ones_bytes():
    assert split_in_numpy(weights(20_000, 0.9, "BF16"), True).top_coding == TOP_QUADS
    assert split_in_numpy(weights(20_000, 0.0, "BF16"), True).top_coding == TOP_BYTES


def test_escapes_are_kept():
    bits = weights(20_000, 0.9, "F32").copy()
    bits[5:8] = [0x7F800000, 0xFF800001, 0x7FC12345]  # inf, two NaNs
    for _, split, merge in WAYS:
        planes = split(bits, True)
        assert planes.top_coding == TOP_QUADS
        assert len(planes.escapes) > 0
        out = np.empty_like(bits)
        merge(planes, out, True)
        assert np.array_equal(out, bits)


@pytest.mark.parametrize(("dtype", "goal"), [("BF16", 1.05), ("F32", 1.03)])
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_a_block_of_weights_is_near_the_entropy_of_its_mask_and_values(sparsity, dtype, goal):
    bits = weights(1 << 20, sparsity, dtype)
    high = (bits if dtype == "BF16" else bits >> 16).astype(np.uint16)
    counts = np.bincount(high[bits != 0], minlength=65536)
    limit = entropy(counts) + entropy(np.array([np.count_nonzero(bits == 0), counts.sum()]))
    limit += int(counts.sum()) * (bits.itemsize - 2)
    assert len(encode_block(bits, True)) <= goal * limit


def entropy(counts):
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def test_every_damaged_byte_is_refused_or_decodes_within_the_block():
    bits = weights(3000, 0.9, "BF16")
    sound = encode_block(bits, True)
    generator = np.random.default_rng(0)
    refused = 0
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(generator.integers(8))
        refused += is_refused(bytes(damaged), len(bits), 2)
    assert refused > 16
    assert all(is_refused(sound[:length], len(bits), 2) for length in range(len(sound)))


def is_refused(data, size, width):
    """Whether both ways refuse `data`; guards around the block catch a write beyond it."""
    answers = []
    for _, _, merge in WAYS:
        guarded = np.full(size + 64, 99, UNSIGNED[width])
        try:
            decode_block(memoryview(data), guarded[32 : size + 32], True, merge)
            answers.append(False)
        except DamagedPlanes:
            answers.append(True)
        assert (guarded[:32] == 99).all()
        assert (guarded[-32:] == 99).all()
    assert len(set(answers)) == 1
    return answers[0]


def test_lengths_that_lie_are_refused_before_anything_is_made():
    sound = encode_block(weights(3000, 0.9, "BF16"), True)
    for index in range(4):
        for field in (4, 8):
            damaged = bytearray(sound)
            place = HEAD.size + PLANE.size * index + field
            damaged[place : place + 4] = b"\xff\xff\xff\xff"
            assert is_refused(bytes(damaged), 3000, 2)
    damaged = bytearray(sound)
    damaged[4:8] = b"\xff\xff\xff\xff"
    assert is_refused(bytes(damaged), 3000, 2)


def test_gaps_that_lead_beyond_the_block_are_refused():
    made = encode_block(weights(3000, 0.9, "BF16"), True)
    assert is_refused(made, 2000, 2)

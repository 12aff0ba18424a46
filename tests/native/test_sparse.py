"""The product with a sparse matrix in the extension, against float64."""

import pytest
import torch

from hamcli import native
from tests.optim.numbers import normal


@pytest.fixture
def operators():
    found = native.operators()
    if found is None:
        pytest.skip(native.status().reason)
    return found


def pruned(rows, columns, sparsity, seed=0):
    weights = normal(rows, columns, seed=seed).float()
    drop = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < sparsity
    return weights.masked_fill_(drop, 0.0)


def assert_is_product(y, x, weights, bias):
    expected = x.double() @ weights.double().T
    scale = x.double().abs() @ weights.double().abs().T
    if bias is not None:
        expected, scale = expected + bias.double(), scale + bias.double().abs()
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 70), (96, 384), (130, 257)])
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 32, 33, 100, 1024])
def test_product_is_the_dense_one(operators, shape, batch):
    weights = pruned(*shape, 0.8)
    x, bias = normal(batch, shape[1], seed=5).float(), normal(shape[0], seed=6).float()
    packed = operators.csr_pack(weights)
    for start in (None, bias):
        for vectors in (1, 2, 3, 4, 5, 6, 7, 8):
            y = operators.csr_linear(x, *packed, start, vectors)
            assert_is_product(y, x, weights, start)


def test_two_threads_give_the_bits_of_one(operators):
    weights, x = pruned(300, 200, 0.5), normal(257, 200, seed=3).float()
    packed = operators.csr_pack(weights)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(operators.csr_linear(x, *packed, None, 4))
            found.append(operators.csr_linear(x[:1], *packed, None, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[4])
    assert torch.equal(found[1], found[3])
    assert_is_product(found[0], x, weights, None)


def test_rows_of_zeros_and_empty_tensors(operators):
    weights = pruned(40, 24, 0.5)
    weights[3:20] = 0
    x = normal(9, 24, seed=1).float()
    y = operators.csr_linear(x, *operators.csr_pack(weights), None, 4)
    assert (y[:, 3:20] == 0).all()
    assert_is_product(y, x, weights, None)
    nothing = operators.csr_pack(torch.zeros(40, 24))
    assert nothing[2].numel() == 0
    assert (operators.csr_linear(x, *nothing, torch.ones(40), 4) == 1).all()
    assert operators.csr_linear(x[:0], *nothing, None, 4).shape == (0, 40)
    no_rows = operators.csr_pack(torch.zeros(0, 24))
    assert operators.csr_linear(x, *no_rows, None, 4).shape == (9, 0)
    no_columns = operators.csr_pack(torch.zeros(5, 0))
    assert (operators.csr_linear(torch.zeros(3, 0), *no_columns, None, 4) == 0).all()


def test_the_last_column_that_16_bits_can_name(operators):
    weights = torch.zeros(2, 65_536)
    weights[0, 65_535], weights[1, 32_768] = 2.0, 3.0
    x = torch.ones(2, 65_536)
    y = operators.csr_linear(x, *operators.csr_pack(weights), None, 4)
    assert y.tolist() == [[2.0, 3.0]] * 2
    with pytest.raises(RuntimeError, match="16 bits"):
        operators.csr_pack(torch.zeros(1, 65_537))


def test_minus_zero_is_kept_and_wrong_calls_are_refused(operators):
    packed = operators.csr_pack(torch.tensor([[0.0, -0.0, 1.0]]))
    assert packed[1].tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="bias"):
        operators.csr_linear(torch.ones(2, 3), *packed, torch.ones(2), 4)
    with pytest.raises(RuntimeError, match="csr_pack"):
        operators.csr_linear(torch.ones(2, 3), packed[0], packed[1], packed[2][:1], None, 4)
    with pytest.raises(RuntimeError, match="fp32"):
        operators.csr_linear(torch.ones(2, 3).double(), *packed, None, 4)

"""Blocks, LAMP, OWL and 2:4 against slow or foreign twins."""

import pytest
import torch

from hamcli.errors import RecipeError
from hamcli.sparsity import blocks
from hamcli.sparsity.allocate import allocate
from hamcli.sparsity.counting import num_zeros
from hamcli.sparsity.masks import num_dropped, prune_masks
from hamcli.sparsity.rules import make_rules
from hamcli.sparsity.score import first_order, layer_adaptive, make_fisher, make_random
from hamcli.sparsity.targets import Target, Targets


def targets_of(*shapes, seed=0, **words):
    generator = torch.Generator().manual_seed(seed)
    return Targets(
        tuple(
            Target(
                f"layer.{index}", torch.randn(shape, generator=generator) * (index + 1), 1, **words
            )
            for index, shape in enumerate(shapes)
        )
    )


def test_blocks_by_hand():
    target = Target(
        "w", torch.tensor([[1.0, 1, 9, 0], [1, 1, 0, 0], [2, 2, 0, 3], [2, 2, 0, 0]]), 1
    )
    sums = blocks.block_sums(target.param, target, (2, 2))
    assert torch.equal(sums, torch.tensor([[4.0, 9.0], [8.0, 3.0]]))
    (mask,) = prune_masks(Targets((target,)), 0.5, pattern="block:2x2")
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "lamp"])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.9, 1.0])
def test_blocks_are_whole_and_as_many_as_asked(allocation, target):
    targets = targets_of((8, 16), (4, 24))
    masks = prune_masks(targets, target, allocation=allocation, pattern="block:2x4")
    assert num_dropped(masks) == num_zeros(target, targets.total // 8) * 8
    for mask, one in zip(masks, targets, strict=True):
        keep = blocks.block_any(mask, one, (2, 4))
        assert torch.equal(blocks.spread(keep, one, (2, 4)), mask)


@pytest.mark.parametrize(
    ("shape", "input_dim", "is_stacked", "axes"),
    [
        ((8, 4), 1, False, (0, 1)),
        ((4, 8), 0, False, (1, 0)),
        ((8, 4, 3, 3), 1, False, (0, 1)),
        ((2, 8, 4), 2, True, (1, 2)),
        ((2, 4, 8), 1, True, (2, 1)),
    ],
)
def test_blocks_lie_along_outputs_and_inputs_of_every_layout(shape, input_dim, is_stacked, axes):
    target = Target("w", torch.randn(shape), input_dim, is_stacked)
    assert blocks.axes(target) == axes
    (mask,) = prune_masks(Targets((target,)), 0.5, pattern="block:4x2")
    moved = mask.movedim(axes, (-2, -1)).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 4))
    share = moved.float().mean(dim=(-1, -3))
    assert ((share == 0) | (share == 1)).all()


def test_bounds_hold_for_blocks():
    targets = targets_of((8, 8), (8, 8))
    masks = prune_masks(targets, 0.5, pattern="block:2x2", max_sparsity=0.5)
    assert [int((~mask).sum()) for mask in masks] == [32, 32]


def test_a_shape_that_blocks_do_not_fit_is_named():
    with pytest.raises(RecipeError, match=r"E224.*layer\.1"):
        make_rules(targets_of((8, 8), (6, 8)), target=0.5, pattern="block:4x4")


@pytest.mark.parametrize("pattern", ["block:0x4", "block:4", "block:4x", "block:ax4"])
def test_no_blocks(pattern):
    with pytest.raises(RecipeError, match="E222"):
        make_rules(targets_of((8, 8)), target=0.5, pattern=pattern)


# --- lamp


def lamp_twin(score):
    order = sorted(range(score.numel()), key=lambda i: (float(score.view(-1)[i]), i))
    values = [float(score.view(-1)[i]) ** 2 for i in order]
    made = torch.empty(score.numel(), dtype=torch.float64)
    for place, index in enumerate(order):
        made[index] = values[place] / sum(values[place:])
    return made.view(score.shape)


def test_lamp_scores_are_those_of_the_definition():
    score = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).abs()
    score[1, :3] = score[0, 0]
    torch.testing.assert_close(layer_adaptive(score).double(), lamp_twin(score), rtol=1e-6, atol=0)
    assert layer_adaptive(score).max() == 1.0


def test_lamp_is_global_over_its_scores():
    targets = targets_of((8, 16), (4, 24))
    masks = prune_masks(targets, 0.7, allocation="lamp")
    twins = [lamp_twin(one.param.abs()) for one in targets]
    flat = torch.cat([twin.flatten() for twin in twins])
    cut = flat.sort().values[num_zeros(0.7, flat.numel()) - 1]
    for mask, twin in zip(masks, twins, strict=True):
        assert torch.equal(mask, twin > cut)


def test_lamp_keeps_zeros_of_all_zero_tensors():
    score = torch.zeros(4)
    assert torch.equal(layer_adaptive(score), torch.zeros(4))


@pytest.mark.parametrize("allocation", ["lamp", "owl"])
def test_bounds_hold_for_every_allocation(allocation):
    targets = targets_of((10, 10), (10, 20), (5, 8))
    masks = prune_masks(
        targets,
        0.6,
        allocation=allocation,
        min_sparsity=0.55,
        max_sparsity=0.65,
        outliers=[0.0, 0.1, 0.4],
    )
    assert num_dropped(masks) == num_zeros(0.6, targets.total)
    for mask in masks:
        assert 0.55 * mask.numel() - 1 < int((~mask).sum()) < 0.65 * mask.numel() + 1


# --- owl


def test_owl_by_hand():
    # equal sizes, outliers 0, 0.5, 1: densities 0.3 - 0.08, 0.3, 0.3 + 0.08
    counts = allocate([(100, 10)] * 3, 2100, "owl", outliers=[0.0, 0.5, 1.0])
    assert counts == [780, 700, 620]
    assert allocate([(10, 10)] * 2, 100, "owl", outliers=[0.2, 0.2]) == [50, 50]


@pytest.mark.parametrize("zeros", [0, 1, 50, 299, 300])
def test_owl_is_exact_to_the_ends(zeros):
    assert sum(allocate([(10, 10), (10, 20)], zeros, "owl", outliers=[0.0, 1.0])) == zeros


# --- scores


def test_first_order_is_the_change_of_the_loss():
    w = torch.tensor([[1.0, -2.0], [0.5, 0.0]], requires_grad=True)
    x = torch.tensor([3.0, 1.0])
    (w @ x).sum().backward()
    assert torch.equal(first_order(w), torch.tensor([[3.0, 2.0], [1.5, 0.0]]))


def test_fisher_is_the_root_of_what_the_loss_gains_and_magnitude_before_the_first_step():
    w = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    moments = {id(w): torch.tensor([[9.0, 0.25], [0.0, 4.0]])}
    score = make_fisher(lambda param: moments.get(id(param)))
    # w^2 g^2 is [[9, 1], [0, 0]]
    assert torch.equal(score(w), torch.tensor([[3.0, 1.0], [0.0, 0.0]]))
    moments.clear()
    assert torch.equal(score(w), w.abs())


def test_random_scores_are_the_same_at_each_asking_and_differ_by_seed_and_tensor():
    params = [torch.zeros(50), torch.zeros(50)]
    targets = Targets(tuple(Target(str(id(one)), one, 0) for one in params))
    score = make_random(targets, 3)
    assert torch.equal(score(params[0]), score(params[0]))
    assert not torch.equal(score(params[0]), score(params[1]))
    assert not torch.equal(score(params[0]), make_random(targets, 4)(params[0]))


# --- 2:4 as torch's semi-structured kernels take it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_packs_and_unpacks_our_two_of_four_bit_for_bit(dtype):
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    targets = targets_of((64, 128), (128, 64))
    masks = prune_masks(targets, 0.5, pattern="2:4")
    for mask, target in zip(masks, targets, strict=True):
        weight = torch.where(mask, target.param, 0.0).to(dtype)
        assert accepts(weight)
        values, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert values.numel() * 2 == weight.numel()
        back = sparse_semi_structured_to_dense_cutlass(values, meta)
        assert torch.equal(back.view(torch.int16), weight.view(torch.int16))


def test_the_twin_of_acceptance_refuses_what_is_not_two_of_four():
    weight = torch.zeros(64, 128, dtype=torch.float16)
    weight[0, :3] = 1.0
    assert not accepts(weight)
    assert not accepts(torch.zeros(20, 128, dtype=torch.float16))


def accepts(weight):
    """What to_sparse_semi_structured asks for, on any device: form, least shape, pattern."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS as Semi

    limits = Semi._DTYPE_SHAPE_CONSTRAINTS.get(weight.dtype)
    if limits is None or weight.dim() != 2 or not weight.is_contiguous():
        return False
    rows, columns = weight.shape
    if rows % limits.sparse_min_rows or columns % limits.sparse_min_cols:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hamcli.errors import RecipeError
from hamcli.sparsity.counting import num_zeros
from hamcli.sparsity.masks import (
    apply_masks_,
    choose_masks,
    nonzero_masks,
    num_dropped,
    prune_masks,
    zeros_at_end,
)
from hamcli.sparsity.rules import make_rules, parse_pattern
from hamcli.sparsity.targets import Target, Targets, select_targets
from tests.oracles import selection
from tests.sparsity import pico


def targets_of(*tensors: torch.Tensor) -> Targets:
    return Targets(tuple(Target(f"{i}", tensor, 1) for i, tensor in enumerate(tensors)))


def zeros_in(targets: Targets) -> int:
    return sum(int((param == 0).sum()) for param in targets.params)


def random_targets(*shapes: tuple[int, ...], natural: float = 0.0, seed: int = 0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in shapes:
        tensor = torch.randn(shape, generator=generator)
        tensor[torch.rand(shape, generator=generator) < natural] = 0.0
        tensors.append(tensor)
    return targets_of(*tensors)


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
@pytest.mark.parametrize("target", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "resnet", "albert"])
def test_a_pruned_model_has_exactly_the_zeros_asked_for(
    family: str, target: float, allocation: str
) -> None:
    targets = select_targets(pico.MODELS[family](), ["*"], None)
    apply_masks_(targets, prune_masks(targets, target, allocation=allocation))
    assert zeros_in(targets) == num_zeros(target, targets.total)


def test_global_masks_of_a_model_are_those_of_a_stable_sort() -> None:
    targets = select_targets(pico.bert().bfloat16(), ["*"], None)
    expected = selection.global_masks(
        [param.detach().abs() for param in targets.params], num_zeros(0.9, targets.total)
    )
    masks = prune_masks(targets, 0.9)
    assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_natural_zeros_count_among_the_zeros(allocation: str) -> None:
    targets = random_targets((8, 8), (4, 16), natural=0.3)
    before = nonzero_masks(targets)
    masks = prune_masks(targets, 0.5, allocation=allocation)
    assert num_dropped(masks) == 64
    for mask, nonzero in zip(masks, before, strict=True):
        assert not (mask & ~nonzero).any()


@pytest.mark.parametrize("bounds", [{}, {"max_sparsity": 0.6}, {"min_sparsity": 0.5}])
@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_a_model_sparser_than_the_target_keeps_its_zeros(
    allocation: str, bounds: dict[str, float]
) -> None:
    targets = random_targets((8, 8), (4, 16), natural=0.9)
    masks = prune_masks(targets, 0.5, allocation=allocation, **bounds)
    expected = nonzero_masks(targets)
    assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))


def test_bounds_hold_in_every_tensor() -> None:
    targets = targets_of(torch.rand(10, 10) * 1e-3, torch.rand(10, 10) + 1.0)
    masks = prune_masks(targets, 0.5, min_sparsity=0.1, max_sparsity=0.8)
    assert selection.zeros_of(masks) == [80, 20]


def test_equal_bounds_make_global_uniform() -> None:
    targets = targets_of(torch.rand(10, 10) * 1e-3, torch.rand(10, 10) + 1.0)
    masks = prune_masks(targets, 0.5, min_sparsity=0.5, max_sparsity=0.5)
    assert selection.zeros_of(masks) == [50, 50]


def test_no_negative_zero_and_no_nan_is_left_where_a_mask_drops() -> None:
    weights = torch.tensor([[-1.0, math.nan, math.inf, 2.0]])
    apply_masks_(targets_of(weights), [torch.tensor([[False, False, False, True]])])
    assert weights.tolist() == [[0.0, 0.0, 0.0, 2.0]]
    assert not torch.signbit(weights).any()


def test_kept_weights_keep_their_bits() -> None:
    weights = torch.tensor([[-0.0, 1e-45, -3.0, 2.0]])
    before = weights.view(torch.int32).clone()
    apply_masks_(targets_of(weights), [torch.ones(1, 4, dtype=torch.bool)])
    assert torch.equal(weights.view(torch.int32), before)


def test_strided_parameters_are_masked_in_place() -> None:
    storage = torch.arange(1.0, 13.0).view(3, 4)
    targets = targets_of(storage.t())
    apply_masks_(targets, prune_masks(targets, 0.5))
    assert storage.tolist() == [[0, 0, 0, 0], [0, 0, 7, 8], [9, 10, 11, 12]]


def test_a_single_weight_is_pruned_from_half_up() -> None:
    assert prune_masks(targets_of(torch.ones(1, 1)), 0.5)[0].item() is True
    assert prune_masks(targets_of(torch.ones(1, 1)), 0.51)[0].item() is False


# Groups of neighbours


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt-oss", "bert"])
def test_every_group_along_the_inputs_holds_the_pattern(family: str, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    targets = select_targets(pico.MODELS[family](), ["*"], None)
    for mask, target in zip(prune_masks(targets, 1 - n / m, pattern=pattern), targets, strict=True):
        kept = mask.movedim(target.input_dim, -1).unflatten(-1, (-1, m)).sum(-1)
        assert (kept == n).all()


def test_convolutions_hold_the_pattern_along_their_channels() -> None:
    targets = select_targets(pico.resnet(), ["*encoder*"], None)
    for mask in prune_masks(targets, 0.5, pattern="2:4"):
        assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()


def test_groups_with_more_natural_zeros_keep_them() -> None:
    weights = torch.tensor([[0.0, 0.0, 0.0, 1.0, 4.0, 3.0, 2.0, 1.0]])
    masks = prune_masks(targets_of(weights), 0.5, pattern="2:4")
    assert masks[0].tolist() == [[False, False, False, True, True, True, False, False]]


@given(st.integers(0, 40), st.sampled_from([0.0, 0.3, 0.7]), st.integers(0, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_zeros_on_the_way_to_a_pattern_lie_within_it(due: int, natural: float, seed: int) -> None:
    targets = random_targets((4, 8), (6, 8), natural=natural, seed=seed)
    rules = make_rules(targets, target=0.5, pattern="2:4")
    before = nonzero_masks(targets)
    end = choose_masks(targets, rules, zeros_at_end(targets, rules, before), masks=before)
    masks = choose_masks(targets, rules, due, masks=before)
    assert num_dropped(masks) == min(max(due, num_dropped(before)), num_dropped(end))
    for mask, last, nonzero in zip(masks, end, before, strict=True):
        assert not (~mask & last).any()
        assert not (mask & ~nonzero).any()


@given(st.sampled_from([0.0, 0.3, 0.7]), st.integers(0, 9))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_number_of_zeros_at_the_end_is_known_beforehand(natural: float, seed: int) -> None:
    targets = random_targets((4, 8), (6, 8), natural=natural, seed=seed)
    for pattern, target in (("unstructured", 0.6), ("2:4", 0.5), ("1:4", 0.75)):
        rules = make_rules(targets, target=target, pattern=pattern)
        expected = zeros_at_end(targets, rules, nonzero_masks(targets))
        assert num_dropped(prune_masks(targets, target, pattern=pattern)) == expected
        assert expected >= rules.num_zeros


def test_a_rounded_target_of_a_third_is_understood() -> None:
    for target in (0.667, 0.6667, 2 / 3):
        rules = make_rules(targets_of(torch.ones(4, 6)), target=target, pattern="1:3")
        assert rules.num_zeros == 16


# What is refused


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "4:4", "2:4:8", "2/4", "a:b", "", "-1:4", "2:"])
def test_unknown_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"E222.*N:M"):
        parse_pattern(pattern)


def test_another_target_than_the_patterns_is_refused_with_the_right_one() -> None:
    with pytest.raises(RecipeError, match=r"E223.*zeroes 2 of each 4.*0\.5"):
        prune_masks(targets_of(torch.ones(4, 4)), 0.9, pattern="2:4")


def test_erk_under_a_pattern_is_refused() -> None:
    with pytest.raises(RecipeError, match="E225"):
        prune_masks(targets_of(torch.ones(4, 4)), 0.5, pattern="2:4", allocation="erk")


def test_inputs_that_cannot_be_grouped_are_named_and_the_hint_works() -> None:
    model = pico.resnet()
    targets = select_targets(model, ["*"], None)
    with pytest.raises(RecipeError) as caught:
        prune_masks(targets, 0.5, pattern="2:4")
    assert caught.value.code == "E224"
    assert "resnet.embedder.embedder.convolution" in caught.value.why
    (hint,) = caught.value.hints
    exclude = hint.partition("[")[2].rstrip("]'").split(", ")
    assert prune_masks(select_targets(model, ["*"], exclude), 0.5, pattern="2:4")


def test_many_uneven_layers_are_named_by_few_globs() -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Linear(6, 8)) for _ in range(20)]
    targets = select_targets(nn.Sequential(*layers), ["*"], None)
    with pytest.raises(RecipeError, match="E224") as caught:
        prune_masks(targets, 0.5, pattern="2:4")
    assert len(caught.value.hints[0]) < 600
    assert "0.1.weight" in caught.value.why


@pytest.mark.parametrize("bounds", [(0.95, 1.0), (0.0, 0.8)])
def test_bounds_that_exclude_the_target_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(RecipeError, match=r"E221.*min_sparsity <= target <= max_sparsity"):
        prune_masks(
            targets_of(torch.ones(4, 4)), 0.9, min_sparsity=bounds[0], max_sparsity=bounds[1]
        )

"""What the layers see, Wanda and SparseGPT, against plain twins."""

import pytest
import torch
from torch import nn

from hamcli.calibration import activation_score, norms, outliers, watch
from hamcli.errors import RecipeError
from hamcli.pruning.layerwise import as_rows, from_rows, prune_layers_, row_mask
from hamcli.sparsity.counting import num_zeros
from hamcli.sparsity.reconstruct import sparsegpt
from hamcli.sparsity.rules import make_rules
from hamcli.sparsity.targets import Target, Targets
from tests.sparsity import pico


class Net(nn.Module):
    def __init__(self, **words):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, **{"padding": 1, **words})
        self.line = nn.Linear(8, 12)

    def forward(self, x):
        return self.line(torch.relu(self.conv(x)).mean((2, 3)))


def opened(**words):
    net = Net(**words)
    targets = Targets(
        (Target("conv.weight", net.conv.weight, 1), Target("line.weight", net.line.weight, 1))
    )
    batches = [{"x": torch.randn(6, 4, 5, 5)} for _ in range(2)]
    return net, targets, batches


def seen(net, targets, batches, *, full=False):
    return watch(net, targets, iter(batches), torch.device("cpu"), full=full)


@pytest.mark.parametrize(
    "words",
    [{}, {"groups": 2}, {"stride": 2, "dilation": 2}, {"padding": "valid"}],
)
def test_norms_are_those_of_the_inputs(words):
    net, targets, batches = opened(**words)
    conv, line = norms(targets, seen(net, targets, batches))
    x = torch.cat([one["x"] for one in batches])
    # |w| * ||x|| of one weight is the norm of what that weight alone contributes
    for place in [(0, 0, 0, 0), (5, 1, 2, 1)]:
        alone = torch.zeros_like(net.conv.weight)
        alone[place] = 1.0
        with torch.no_grad():
            out = torch.nn.functional.conv2d(
                x,
                alone,
                None,
                net.conv.stride,
                net.conv.padding,
                net.conv.dilation,
                net.conv.groups,
            )
        torch.testing.assert_close(conv[place], out.norm())
    with torch.no_grad():
        hidden = torch.relu(net.conv(x)).mean((2, 3))
    torch.testing.assert_close(line[0], hidden.norm(dim=0))


def test_whole_moments_have_the_squares_on_their_diagonal():
    net, targets, batches = opened()
    for one, two in zip(
        seen(net, targets, batches), seen(net, targets, batches, full=True), strict=True
    ):
        torch.testing.assert_close(one.squares, two.squares, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_transformers_are_seen_and_others_refused(family):
    from hamcli.sparsity.targets import select_targets

    model = pico.MODELS[family]()
    targets = select_targets(model, ["*"], None)
    ids = torch.arange(12).view(2, 6)
    found = seen(model, targets, [{"input_ids": ids}])
    for target, norm in zip(targets, norms(targets, found), strict=True):
        assert torch.broadcast_shapes(norm.shape, target.param.shape) == target.param.shape
        assert (norm > 0).any()


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("full", [False, True])
def test_places_of_padding_are_not_seen(family, full):
    from hamcli.sparsity.targets import select_targets

    model = pico.MODELS[family]()
    targets = select_targets(model, ["*"], None)
    short, long = torch.arange(5, 9).view(1, 4), torch.arange(5, 13).view(1, 8)
    padded = torch.cat([torch.nn.functional.pad(short, (0, 4)), long])
    mask = torch.tensor([[1] * 4 + [0] * 4, [1] * 8])
    together = seen(model, targets, [{"input_ids": padded, "attention_mask": mask}], full=full)
    apart = seen(model, targets, [{"input_ids": one} for one in (short, long)], full=full)
    for one, other in zip(together, apart, strict=True):
        assert one.rows == other.rows == 12
        torch.testing.assert_close(one.moments, other.moments, rtol=1e-4, atol=1e-5)


def test_experts_are_refused():
    from hamcli.sparsity.targets import select_targets

    model = pico.MODELS["mixtral"]()
    with pytest.raises(RecipeError, match="E227"):
        seen(model, select_targets(model, ["*"], None), [{"input_ids": torch.arange(6).view(1, 6)}])


def test_outliers_by_hand():
    net, targets, batches = opened()
    inputs = seen(net, targets, batches)
    score = activation_score(targets, inputs)
    expected = []
    for target in targets:
        one = score(target.param)
        expected.append(float((one > 5 * one.mean()).float().mean()))
    assert outliers(targets, inputs) == pytest.approx(expected)


@pytest.mark.parametrize("count", [0, 1, 7, 13, 24])
def test_rows_lose_as_many_each_their_smallest(count):
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    mask = row_mask(scores, count)
    assert int((~mask).sum()) == count
    lost = (~mask).sum(1)
    assert lost.max() - lost.min() <= 1
    for row, kept in zip(scores, mask, strict=True):
        if kept.any() and not kept.all():
            assert row[~kept].max() <= row[kept].min()


def test_rows_keep_the_zeros_they_have():
    scores = torch.ones(2, 4)
    scores[0] = 0.0
    assert row_mask(scores, 4).sum(1).tolist() == [0, 4]


def test_rows_and_back():
    for shape, input_dim in [((8, 4, 3, 3), 1), ((8, 4), 1), ((4, 8), 0)]:
        weight = torch.randn(shape)
        target = Target("w", weight, input_dim)
        assert torch.equal(from_rows(as_rows(weight, target, 1), target), weight)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "owl"])
@pytest.mark.parametrize("words", [{}, {"groups": 1, "bias": False}])
def test_pruning_by_layers_is_exact(method, pattern, allocation, words):
    if pattern != "unstructured" and allocation == "owl":
        pytest.skip("N:M is uniform")
    net, targets, batches = opened(**words)
    inputs = seen(net, targets, batches, full=method == "sparsegpt")
    rules = make_rules(targets, target=0.5, allocation=allocation, pattern=pattern)
    masks = prune_layers_(method, targets, rules, inputs)
    assert sum(int((one.param == 0).sum()) for one in targets) == num_zeros(0.5, targets.total)
    for mask, target in zip(masks, targets, strict=True):
        assert torch.equal(target.param != 0, mask)
        if pattern == "2:4":
            assert (mask.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_wanda_drops_the_smallest_of_each_row():
    net, targets, batches = opened()
    inputs = seen(net, targets, batches)
    score = activation_score(targets, inputs)(net.line.weight)
    rules = make_rules(targets, target=0.5, allocation="uniform")
    _, mask = prune_layers_("wanda", targets, rules, inputs)
    for row, kept in zip(score, mask, strict=True):
        assert row[~kept].max() <= row[kept].min()


def test_sparsegpt_refuses_blocks():
    net, targets, batches = opened()
    rules = make_rules(targets, target=0.5, pattern="block:2x2")
    with pytest.raises(RecipeError, match="E225"):
        prune_layers_("sparsegpt", targets, rules, seen(net, targets, batches, full=True))


# --- sparsegpt


def obs_twin(weight, hessian, mask):
    """For a given mask, column after column: OBS with the inverse of what is left, from scratch."""
    w = weight.double().clone()
    for column in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(w.shape[0]):
            if not mask[row, column]:
                factor = w[row, column] / inverse[0, 0]
                w[row, column:] -= factor * inverse[0]
                w[row, column] = 0.0
    return w


@pytest.mark.parametrize("kept_of", [None, (2, 4)])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(kept_of):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    moments = x.T @ x
    made, mask = sparsegpt(weight, moments, 48, kept_of)
    assert int((~mask).sum()) == 48
    hessian = moments + torch.eye(16) * 0.01 * moments.diagonal().mean()
    torch.testing.assert_close(made, obs_twin(weight, hessian, mask))
    plain = torch.where(mask, weight, 0.0)
    assert (x @ (made - weight).T).norm() < (x @ (plain - weight).T).norm()


def test_sparsegpt_counts_over_several_blocks():
    weight = torch.randn(4, 300)
    x = torch.randn(500, 300)
    for count in (0, 1, 599, 1200):
        made, mask = sparsegpt(weight, x.T @ x, count)
        assert int((~mask).sum()) == count
        assert made.isfinite().all()

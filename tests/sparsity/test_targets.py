import pytest
import torch
from torch import nn

from hamcli.errors import RecipeError
from hamcli.sparsity.masks import apply_masks_, prune_masks
from hamcli.sparsity.targets import Targets, select_targets
from tests.sparsity import pico


def everything(model: nn.Module) -> Targets:
    return select_targets(model, ["*"], None)


def the_error(model: nn.Module, include: list[str], exclude: list[str] | None) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        select_targets(model, include, exclude)
    return caught.value


# The default list


@pytest.mark.parametrize("family", pico.MODELS)
def test_the_automatic_list_resolved_to_names_selects_the_same(family: str) -> None:
    model = pico.MODELS[family]()
    targets = everything(model)
    assert None not in targets.exclude
    assert select_targets(model, ["*"], targets.exclude).names == targets.names
    assert select_targets(model, ["*"], ["auto"]).names == targets.names


@pytest.mark.parametrize("family", pico.MODELS)
def test_default_targets_leave_embeddings_heads_and_small_tensors_alone(family: str) -> None:
    for target in everything(pico.MODELS[family]()):
        for word in ("embeddings.word", "wte", "lm_head", "cls.", "classifier", "pooler", "bias"):
            assert word not in target.name
        assert target.param.dim() >= 2


@pytest.mark.parametrize(
    ("family", "exclude", "num_targets"),
    [
        ("llama", ("model.embed_tokens", "lm_head"), 14),
        ("tied llama", ("model.embed_tokens", "lm_head"), 14),
        ("gpt2", ("transformer.wte", "lm_head", "transformer.wpe"), 8),
        ("resnet", ("classifier.1",), 6),
        ("vit", ("vit.embeddings", "vit.embeddings.patch_embeddings.projection", "classifier"), 12),
        ("albert", None, 7),
        ("bert", None, 12),
        ("bert encoder", None, 12),
        ("bert classifier", None, 12),
        ("mixtral", None, 12),
        ("gpt-oss", None, 12),
    ],
)
def test_default_targets_of_each_family(
    family: str, exclude: tuple[str, ...] | None, num_targets: int
) -> None:
    targets = everything(pico.MODELS[family]())
    assert len(targets) == num_targets
    if exclude is not None:
        assert targets.exclude == exclude


def test_the_pooler_stays_dense_without_a_head() -> None:
    assert "pooler.dense" in everything(pico.bert_encoder()).exclude


def test_an_overlapping_stem_is_a_target_and_a_patch_embedding_is_not() -> None:
    assert "resnet.embedder.embedder.convolution.weight" in everything(pico.resnet()).names
    assert not [name for name in everything(pico.vit()).names if "patch" in name]


def test_routers_and_expert_biases_stay_dense() -> None:
    assert not [name for name in everything(pico.mixtral()).names if ".gate." in name]
    names = everything(pico.gpt_oss()).names
    assert not [name for name in names if "router" in name or "bias" in name]


def test_free_tensors_that_are_no_weight_stay_dense() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = nn.Parameter(torch.ones(4, 4))
            self.query_tokens = nn.Parameter(torch.ones(1, 2, 4))
            self.rnn = nn.LSTM(4, 4)

    targets = everything(Model())
    assert targets.names == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert targets.exclude == ("A_log", "query_tokens")


def test_shared_layers_are_one_target_each() -> None:
    targets = everything(pico.albert())
    assert len({id(param) for param in targets.params}) == len(targets)
    assert targets.total == 16 * 8 + 4 * 16 * 16 + 2 * 16 * 24


def test_a_module_used_under_two_names_is_one_target() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert everything(model).names == ["0.weight"]
    assert everything(model).total == 16


# Axes


def axes(model: nn.Module) -> dict[str, int]:
    return {target.name: target.input_dim for target in everything(model)}


def test_inputs_of_linear_and_convolution_lie_on_axis_one() -> None:
    assert set(axes(pico.llama()).values()) == {1}
    assert set(axes(pico.resnet()).values()) == {1}


def test_inputs_of_gpt2_layers_lie_on_axis_zero() -> None:
    assert set(axes(pico.gpt2()).values()) == {0}


def test_inputs_of_transposed_convolutions_lie_on_axis_zero() -> None:
    assert axes(nn.Sequential(nn.ConvTranspose2d(8, 4, 3))) == {"0.weight": 0}


@pytest.mark.parametrize(("family", "axis"), [("mixtral", 2), ("gpt-oss", 1)])
def test_inputs_of_fused_experts_lie_where_the_model_sums(family: str, axis: int) -> None:
    targets = everything(pico.MODELS[family]())
    experts = [target for target in targets if "experts" in target.name]
    assert len(experts) == 4
    assert all(target.is_stacked and target.input_dim == axis for target in experts)
    # hidden size 16, intermediate size 24
    inputs = {target.name.rpartition(".")[2]: target.param.shape[axis] for target in experts}
    assert inputs == {"gate_up_proj": 16, "down_proj": 24}


def test_unmarked_experts_tell_their_axis_by_their_shapes() -> None:
    class Experts(nn.Module):
        def __init__(self, first: tuple[int, ...], second: tuple[int, ...]) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.ones(first))
            self.down_proj = nn.Parameter(torch.ones(second))

    assert set(axes(Experts((2, 8, 12), (2, 6, 8))).values()) == {1}
    assert set(axes(Experts((2, 12, 8), (2, 8, 6))).values()) == {2}


# Globs


def test_globs_name_modules() -> None:
    targets = select_targets(pico.bert(), ["*.intermediate.dense", "*.output.dense"], None)
    assert len(targets) == 6


def test_a_glob_may_name_one_parameter_of_fused_experts() -> None:
    targets = select_targets(pico.mixtral(), ["*.experts.down_proj"], None)
    assert {name.rpartition(".")[2] for name in targets.names} == {"down_proj"}


def test_targets_keep_the_models_order_whatever_the_globs() -> None:
    model = pico.llama()
    names = select_targets(model, ["*v_proj", "*q_proj"], None).names
    order = [name for name, _ in model.named_parameters() if name in names]
    assert names == order
    assert len(names) == 4


def test_a_literal_name_overrides_the_automatic_list() -> None:
    model = pico.llama()
    targets = select_targets(model, ["*", "lm_head"], None)
    assert "lm_head.weight" in targets.names
    assert targets.exclude == ("model.embed_tokens",)
    assert select_targets(model, ["*", "lm_head"], targets.exclude).names == targets.names


def test_embeddings_are_targets_when_named() -> None:
    targets = select_targets(pico.bert(), ["bert.embeddings.word_embeddings"], None)
    assert targets.names == ["bert.embeddings.word_embeddings.weight"]
    assert "cls.predictions.decoder" not in targets.exclude


def test_own_excludes_may_be_added_to_the_automatic_ones() -> None:
    model = pico.bert()
    targets = select_targets(model, ["*"], ["auto", "*.attention.*"])
    assert targets.names == [name for name in everything(model).names if "attention" not in name]
    assert targets.exclude[0] == "*.attention.*"
    assert "auto" not in targets.exclude


def test_own_excludes_alone_replace_the_automatic_ones() -> None:
    targets = select_targets(pico.bert_classifier(), ["*"], ["*embeddings*"])
    assert "classifier.weight" in targets.names


def test_names_with_glob_characters_are_excluded_literally() -> None:
    model = nn.ModuleDict({"a[0]": nn.Embedding(4, 4), "a0": nn.Linear(4, 4)})
    targets = everything(model)
    assert targets.names == ["a0.weight"]
    assert select_targets(model, ["*"], targets.exclude).names == ["a0.weight"]


def test_a_glob_matching_nothing_is_an_error_with_the_nearest_glob() -> None:
    error = the_error(pico.bert(), ["encoder.*.qurey"], None)
    assert error.code == "E214"
    assert error.where == "targets.include"
    assert '"encoder.*.qurey" names 0 of ' in error.why

    error = the_error(pico.bert(), ["bert.encoder.*.qurey"], None)
    assert error.right == 'nearest: "bert.encoder.*.query"'


@pytest.mark.parametrize(
    ("glob", "right"),
    [
        ("bert.encoder", '"bert.encoder.*"'),
        ("encoder.layer.*.dense", '"*.encoder.layer.*.dense"'),
        ("intermediate", '"*.intermediate.*"'),
        ("bert.encoder.layer.0.attention.self.keys", '"bert.encoder.layer.0.attention.self.key"'),
        ("bert.encoder.layer.7.intermediate.dense", '"bert.encoder.layer.*.intermediate.dense"'),
    ],
)
def test_what_is_suggested_matches(glob: str, right: str) -> None:
    error = the_error(pico.bert(), [glob], None)
    assert error.right.startswith(f"nearest: {right}")
    assert select_targets(pico.bert(), [right.strip('"')], None).total > 0


def test_an_exclude_matching_nothing_is_an_error() -> None:
    error = the_error(pico.bert(), ["*"], ["*embed*", "lm_haed"])
    assert error.code == "E215"
    assert '"lm_haed"' in error.why


def test_an_exclude_may_match_what_is_not_prunable_anyway() -> None:
    targets = select_targets(pico.bert(), ["*"], ["*embeddings*", "cls.*", "*LayerNorm"])
    assert len(targets) == 12


def test_all_idle_globs_are_reported_at_once() -> None:
    error = the_error(pico.bert(), ["nonsense", "*"], ["rubbish"])
    assert [error.code, *(other.code for other in error.others)] == ["E214", "E215"]
    assert len(error.lines()) == 2


def test_nothing_left_is_an_error() -> None:
    assert the_error(pico.llama(), ["*"], ["*"]).code == "E216"
    assert the_error(pico.llama(), ["lm_h*"], None).code == "E216"


def test_a_model_without_matrices_is_an_error() -> None:
    assert the_error(nn.Sequential(nn.LayerNorm(4)), ["*"], None).code == "E216"


def test_integer_weights_are_no_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.packed = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert select_targets(model, ["*"], []).names == ["0.weight"]


# Tied tensors


@pytest.mark.parametrize("family", ["tied llama", "gpt2"])
def test_a_tied_head_reached_by_one_name_is_an_error(family: str) -> None:
    error = the_error(pico.MODELS[family](), ["*"], ["lm_head"])
    assert error.code == "E217"
    assert "lm_head.weight" in error.why
    assert the_error(pico.MODELS[family](), ["lm_h*"], []).code == "E217"


def test_a_tied_head_is_a_target_when_named() -> None:
    model = pico.llama(tied=True)
    for include, exclude in (["lm_head"], None), (["lm_head"], ["*embed*"]), (["lm_head"], []):
        targets = select_targets(model, include, exclude)
        assert targets.names == ["model.embed_tokens.weight"]
        assert targets.total == 64 * 16


def test_a_tied_tensor_reached_by_all_names_counts_once() -> None:
    model = pico.llama(tied=True)
    targets = select_targets(model, ["*"], [])
    assert targets.names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in targets.names
    assert targets.total == sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_pruning_the_default_targets_leaves_the_tied_embedding_alone() -> None:
    model = pico.llama(tied=True)
    before = model.get_input_embeddings().weight.clone()
    targets = everything(model)
    apply_masks_(targets, prune_masks(targets, 0.9))
    assert torch.equal(model.get_input_embeddings().weight, before)

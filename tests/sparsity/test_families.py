"""Targets told by names and shapes are those that the built network has, in the same order."""

import json

import pytest
import torch

from hamcli.checkpoint.headers import FLOATS, read_header
from hamcli.errors import RecipeError
from hamcli.sparsity.architectures import FAMILIES as KNOWN
from hamcli.sparsity.families import Undecided, by_family, by_names
from hamcli.sparsity.targets import select_targets
from tests.sparsity import pico

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 64,
}  # fmt: skip
CAUSAL = {**SMALL, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_key_value_heads": 2}  # fmt: skip # noqa: E501
FAMILIES = {
    "AlbertForMaskedLM": {**SMALL, "embedding_size": 16},
    "BertForMaskedLM": SMALL,
    "BertModel": SMALL,
    "BertForSequenceClassification": SMALL,
    "BertForTokenClassification": SMALL,
    "RobertaForMaskedLM": SMALL,
    "XLMRobertaModel": SMALL,
    "MPNetModel": SMALL,
    "DistilBertForMaskedLM": {
        "vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4,
    },
    "LlamaForCausalLM": CAUSAL,
    "LlamaModel": CAUSAL,
    "MistralForCausalLM": CAUSAL,
    "Qwen2ForCausalLM": {**CAUSAL, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": {**CAUSAL, "num_hidden_layers": 11, "head_dim": 8},
    "GemmaForCausalLM": {**CAUSAL, "head_dim": 8},
    "Gemma2ForCausalLM": {**CAUSAL, "head_dim": 8},
    "Phi3ForCausalLM": CAUSAL,
    "Qwen3MoeForCausalLM": {
        **CAUSAL, "moe_intermediate_size": 16, "head_dim": 8, "num_experts": 3,
        "num_experts_per_tok": 2,
    },
    "MixtralForCausalLM": {**CAUSAL, "num_local_experts": 11},
    "GPT2LMHeadModel": {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "GPTNeoXForCausalLM": SMALL,
    "OPTForCausalLM": {
        "vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "word_embed_proj_dim": 32,
    },
    "ViTForImageClassification": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
    },
    "ResNetForImageClassification": {
        "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "bottleneck",
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request, tmp_path_factory):
    """A model, its config.json, and the shapes in its file."""
    import transformers

    model_class = getattr(transformers, request.param)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**FAMILIES[request.param]))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    header = read_header(folder / "model.safetensors")
    shapes = {one.name: one.shape for one in header.tensors if one.dtype in FLOATS}
    return model, json.loads((folder / "config.json").read_text()), shapes


def told(targets):
    return [(one.name, tuple(one.shape), one.input_dim, one.is_stacked) for one in targets]


@pytest.mark.parametrize("exclude", [None, [], "last"], ids=["auto", "none", "globs"])
def test_the_targets_are_those_of_the_network(saved, exclude):
    model, config, shapes = saved
    if exclude == "last":
        exclude = ["auto", select_targets(model, ["*"], None)[-1].name]
    wanted = select_targets(model, ["*"], exclude)
    try:
        found = by_family(config, shapes, ["*"], exclude)
    except Undecided as error:
        why = str(error)
        found = None
    if found is None:
        # the order of several tensors of a head is not written down
        assert exclude is not None, why
        assert "several tensors of the head" in why
        return
    assert told(found) == told(wanted)
    names = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    assert [list(one.names) for one in found] == [names[id(one.param)] for one in wanted]
    assert set(found.exclude) == set(wanted.exclude)
    assert found.total == wanted.total


def test_every_parameter_is_counted_once(saved):
    model, config, shapes = saved
    found = by_family(config, shapes, ["*"], None)
    count = sum(torch.Size(shapes[name]).numel() for name in found.parameters)
    assert count == sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_prefix_and_tie_are_those_of_the_architecture(name):
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config, family = AutoConfig.for_model(name), KNOWN[name]
    assert MODEL_MAPPING[type(config)].base_model_prefix == family.prefix
    assert family.is_tied == bool(family.embedding and config.tie_word_embeddings)


def test_what_is_not_known_is_not_guessed():
    shapes = {"model.layers.0.self_attn.q_proj.weight": (4, 4)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert len(by_family(config, shapes, ["*"], None)) == 1
    with pytest.raises(Undecided, match="not known"):
        by_family({**config, "model_type": "new"}, shapes, ["*"], None)
    with pytest.raises(Undecided, match="no class"):
        by_family({**config, "architectures": ["LlamaForQuestions"]}, shapes, ["*"], None)
    with pytest.raises(Undecided, match="is no tensor of"):
        by_family(config, {**shapes, "model.layers.0.odd.weight": (4, 4)}, ["*"], None)
    with pytest.raises(Undecided, match="with and without"):
        by_family(config, {**shapes, "layers.0.self_attn.q_proj.weight": (4, 4)}, ["*"], None)


def test_a_tied_tensor_that_is_stored_twice_may_not_be_a_target():
    shapes = {"wte.weight": (8, 4), "lm_head.weight": (8, 4), "h.0.mlp.c_fc.weight": (4, 8)}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    assert [one.name for one in by_family(config, shapes, ["*"], None)] == [
        "transformer.h.0.mlp.c_fc.weight"
    ]
    with pytest.raises(Undecided, match="stored twice"):
        by_family(config, shapes, ["*"], [])


def test_a_glob_may_name_a_module_without_matrices():
    shapes = {"model.layers.0.self_attn.q_proj.weight": (4, 4), "model.norm.weight": (4,)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert len(by_family(config, shapes, ["*"], ["model.norm"])) == 1
    with pytest.raises(RecipeError, match="E215"):
        by_family(config, shapes, ["*"], ["model.norms"])


def test_copies_and_buffers_are_no_parameters():
    own = {"wte.weight": (8, 4), "h.0.mlp.c_fc.weight": (4, 8), "h.0.ln_1.weight": (4,)}
    others = {
        "lm_head.weight": (8, 4),
        "h.0.attn.bias": (1, 1, 4, 4),
        "transformer.h.0.attn.masked_bias": (),
    }
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    assert by_family(config, own | others, ["*"], None).parameters == own.keys()
    untied = {**config, "tie_word_embeddings": False}
    found = by_family(untied, own | others, ["*"], None).parameters
    assert found == {*own, "lm_head.weight"}


def test_two_tensors_of_a_head_have_no_order_that_is_known():
    shapes = {
        "bert.embeddings.word_embeddings.weight": (8, 4),
        "cls.predictions.transform.dense.weight": (4, 4),
        "cls.predictions.decoder.weight": (8, 4),
    }
    config = {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "tie_word_embeddings": False,
    }  # fmt: skip
    with pytest.raises(Undecided, match="several tensors of the head"):
        by_family(config, shapes, ["*"], [])
    assert len(by_family(config, shapes, ["*"], ["*transform*"])) == 2


def test_a_part_of_fused_experts_may_not_be_missing():
    stem = "model.layers.0.mlp.experts.0"
    shapes = {f"{stem}.gate_proj.weight": (4, 4), f"{stem}.down_proj.weight": (4, 4)}
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    with pytest.raises(Undecided, match="lacks a part"):
        by_family(config, shapes, ["*"], None)
    shapes[f"{stem}.up_proj.weight"] = (3, 4)
    (joined, _) = by_family(config, shapes, ["*"], None)
    assert joined.shape == (1, 7, 4)
    with pytest.raises(Undecided, match="differ in shape"):
        by_family(config, shapes | {f"{stem}.up_proj.weight": (4, 5)}, ["*"], None)


def test_a_file_without_a_config_goes_by_usual_names():
    shapes = {
        "layers.10.up.weight": (4, 4), "layers.9.up.weight": (4, 4), "embed.weight": (9, 4),
        "layers.9.norm.weight": (4,), "empty.weight": (0, 4), "experts.w1": (2, 4, 4),
    }  # fmt: skip
    found = by_names(shapes, ["*"], None)
    assert [(one.name, one.input_dim, one.piece_axis, one.is_stacked) for one in found] == [
        ("experts.w1", 2, 2, True), ("layers.9.up.weight", 1, 1, False),
        ("layers.10.up.weight", 1, 1, False),
    ]  # fmt: skip
    assert len(by_names(shapes, ["*"], ["layers.9.*"])) == 3
    with pytest.raises(RecipeError, match="E214"):
        by_names(shapes, ["attention*"], None)


@pytest.mark.parametrize("family", ["bert classifier", "llama"])
def test_usual_names_choose_what_the_network_has(family):
    model = pico.MODELS[family]()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = by_names(shapes, ["*"], None)
    assert {one.name for one in found} == set(select_targets(model, ["*"], None).names)
    again = by_names(shapes, ["*"], found.exclude)
    assert [one.name for one in again] == [one.name for one in found]

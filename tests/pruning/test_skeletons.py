"""Targets told by a network without weights, for architectures that are not written down."""

import json

import pytest
import torch

from hamcli.checkpoint.headers import FLOATS, read_header
from hamcli.checkpoint.source import find_model
from hamcli.pruning.skeletons import by_skeleton
from hamcli.sparsity.families import Undecided
from hamcli.sparsity.targets import select_targets
from tests.checkpoint import pico
from tests.sparsity.pico import gpt_oss


def shapes_of(folder):
    tensors = read_header(folder / "model.safetensors").tensors
    return {one.name: one.shape for one in tensors if one.dtype in FLOATS}


def electra():
    import transformers

    return pico.seeded(
        transformers.ElectraForMaskedLM, transformers.ElectraConfig(**pico.SMALL, embedding_size=16)
    )


def convnext():
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)
    return pico.seeded(transformers.ConvNextForImageClassification, config)


def openai_gpt():
    import transformers

    config = transformers.OpenAIGPTConfig(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4
    )
    return pico.seeded(transformers.OpenAIGPTLMHeadModel, config)


def regnet():
    import transformers

    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8
    )
    return pico.seeded(transformers.RegNetForImageClassification, config)


MAKERS = {
    "electra": electra,
    "convnext": convnext,
    "llama-tied": lambda: pico.llama(tie_word_embeddings=True),
    "openai-gpt": openai_gpt,  # inputs first
    "gpt-oss": gpt_oss,  # fused experts
    "regnet": regnet,  # buffers
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_targets_are_those_of_the_network_with_weights(make, tmp_path):
    model = make()
    pico.save(model, tmp_path)
    wanted = select_targets(model, ["*"], None)
    found = by_skeleton(find_model(str(tmp_path)), shapes_of(tmp_path), ["*"], None)
    assert [(one.name, one.shape, one.input_dim, one.is_stacked) for one in found] == [
        (one.name, tuple(one.shape), one.input_dim, one.is_stacked) for one in wanted
    ]
    assert all(one.pieces == (one.name,) for one in found)
    assert set(found.exclude) == set(wanted.exclude)
    count = sum(torch.Size(shapes_of(tmp_path)[name]).numel() for name in found.parameters)
    assert count == sum(param.numel() for param in model.parameters())


def test_names_may_lack_the_prefix_of_the_model(tmp_path):
    model = regnet()
    pico.save(model, tmp_path)
    source, shapes = find_model(str(tmp_path)), shapes_of(tmp_path)
    bare = {name.removeprefix("regnet."): shape for name, shape in shapes.items()}
    found = by_skeleton(source, bare, ["*"], None)
    assert [one.pieces[0] for one in found] == [
        one.name.removeprefix("regnet.") for one in select_targets(model, ["*"], None)
    ]


def test_a_tensor_of_another_shape_is_undecided(tmp_path):
    pico.save(electra(), tmp_path)
    shapes = shapes_of(tmp_path)
    name = "electra.encoder.layer.0.output.dense.weight"
    shapes[name] = shapes[name][::-1]
    with pytest.raises(Undecided, match=f"{name} is not stored as one tensor"):
        by_skeleton(find_model(str(tmp_path)), shapes, ["*"], None)


def test_what_is_stored_in_parts_or_too_much_is_undecided(tmp_path):
    pico.save(pico.mixtral(), tmp_path / "mixtral")
    source = find_model(str(tmp_path / "mixtral"))
    with pytest.raises(Undecided, match="not stored as one tensor"):
        by_skeleton(source, shapes_of(tmp_path / "mixtral"), ["*"], None)
    pico.save(pico.llama(), tmp_path / "llama")
    source, shapes = find_model(str(tmp_path / "llama")), shapes_of(tmp_path / "llama")
    with pytest.raises(Undecided, match="is no parameter"):
        by_skeleton(source, {**shapes, "extra.weight": (4, 4)}, ["*"], None)
    tied = json.loads((tmp_path / "llama" / "config.json").read_text())
    tied["tie_word_embeddings"] = True
    (tmp_path / "llama" / "config.json").write_text(json.dumps(tied))
    with pytest.raises(Undecided, match="tied, yet stored too"):
        by_skeleton(find_model(str(tmp_path / "llama")), shapes, ["*"], None)

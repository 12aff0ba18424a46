"""Targets told by a network without weights, for architectures that are not written down."""

import json

import pytest
import torch

from hamcli.checkpoint.headers import FLOATS, read_header
from hamcli.checkpoint.source import find_model
from hamcli.skeletons import by_skeleton
from hamcli.sparsity.families import Undecided
from hamcli.sparsity.targets import select_targets
from tests.checkpoint import pico


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


@pytest.mark.parametrize(
    "make", [electra, convnext, lambda: pico.llama(tie_word_embeddings=True)],
    ids=["electra", "convnext", "llama-tied"],
)  # fmt: skip
def test_the_targets_are_those_of_the_network_with_weights(make, tmp_path):
    model = make()
    pico.save(model, tmp_path)
    wanted = select_targets(model, ["*"], None)
    found = by_skeleton(find_model(str(tmp_path)), shapes_of(tmp_path), ["*"], None)
    assert [(one.name, one.shape, one.input_dim) for one in found] == [
        (one.name, tuple(one.shape), one.input_dim) for one in wanted
    ]
    assert all(one.pieces == (one.name,) for one in found)
    assert set(found.exclude) == set(wanted.exclude)
    count = sum(torch.Size(shapes_of(tmp_path)[name]).numel() for name in found.parameters)
    assert count == sum(param.numel() for param in model.parameters())


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

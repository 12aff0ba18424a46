"""Random inputs have the names, sizes and padding that a model and its processor ask for."""

from types import SimpleNamespace

import torch

from hamcli.runtime.inputs import input_names, longest, random_inputs
from tests.checkpoint import pico


def config(**known):
    return SimpleNamespace(**known)


def test_a_length_is_at_most_the_models():
    model = torch.nn.Module()
    model.config = config(max_position_embeddings=5)
    assert (longest(model, 4), longest(model, 5), longest(model, 6)) == (4, 5, 5)
    for other in (config(), config(max_position_embeddings=-1)):
        model.config = other
        assert longest(model, 6) == 6


def test_names_are_those_that_model_and_tokenizer_know():
    bert, llama = pico.bert(), pico.llama()
    types = config(model_input_names=["attention_mask", "token_type_ids", "input_ids"])
    assert input_names(bert) == ("input_ids", "attention_mask")
    assert input_names(bert, types) == ("input_ids", "attention_mask", "token_type_ids")
    assert input_names(llama, types) == ("input_ids", "attention_mask")
    assert input_names(bert, config(model_input_names=["input_ids"])) == ("input_ids",)
    assert input_names(pico.vit()) == ("pixel_values",)


def test_a_model_of_two_halves_has_no_inputs():
    bert = pico.bert()
    bert.config.is_encoder_decoder = True
    pico.refusal("E474", "Bert", input_names, bert)


def test_all_rows_but_the_first_end_in_padding():
    bert = pico.bert()
    found = random_inputs(bert, 3, 8, padded=True, seed=1)
    assert found["attention_mask"].sum(1).tolist() == [8, 5, 2]
    assert bool((found["attention_mask"].diff(dim=1) <= 0).all())
    assert random_inputs(bert, 3, 8, seed=1)["attention_mask"].all()
    assert random_inputs(bert, 9, 8, padded=True)["attention_mask"].sum(1).min() == 1
    again = random_inputs(bert, 3, 8, padded=True, seed=1)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.equal(random_inputs(bert, 3, 8, seed=2)["input_ids"], found["input_ids"])
    assert 32 < int(random_inputs(bert, 30, 30)["input_ids"].max()) < bert.config.vocab_size


def test_pixels_have_the_models_channels():
    vit = pico.vit()
    assert random_inputs(vit, 2, 99)["pixel_values"].shape == (2, 3, 16, 16)
    vit.config.num_channels = 1
    assert random_inputs(vit, 2, 99)["pixel_values"].shape == (2, 1, 16, 16)
    vit.config = config(num_channels=1)
    size = {"size": {"height": 7, "width": 9}}
    assert random_inputs(vit, 2, 99, processor=config(**size))["pixel_values"].shape == (2, 1, 7, 9)
    assert random_inputs(vit, 2, 99)["pixel_values"].shape == (2, 1, 32, 32)

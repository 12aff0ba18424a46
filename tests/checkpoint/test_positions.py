"""The longest text that a model takes, against the model itself."""

import pytest
import torch

from hamcli.checkpoint.positions import learned_positions
from hamcli.runtime.inputs import longest
from tests.checkpoint.pico import SMALL, bert, llama, seeded, vit

torch.set_num_threads(1)


def small(name, **changes):
    import transformers

    return seeded(
        getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")(**changes)
    )


MADE = {
    "bert": lambda: bert(max_position_embeddings=40),
    "roberta": lambda: small("Roberta", **SMALL, max_position_embeddings=42),
    "opt": lambda: small(
        "OPT", vocab_size=64, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16,
        num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=40,
    ),
    "gpt2": lambda: small("GPT2", vocab_size=64, n_embd=16, n_head=2, n_layer=1, n_positions=40),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MADE))
def test_the_longest_text_runs_and_one_token_more_does_not(name):
    model = MADE[name]()
    assert learned_positions(model) == 40
    assert longest(model, 999) == 40
    with torch.no_grad():
        model(input_ids=torch.full((1, 40), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 41), 5))


def test_computed_positions_set_no_limit():
    model = llama(max_position_embeddings=40)
    assert learned_positions(model) is None
    assert learned_positions(vit()) is None
    with torch.no_grad():
        model(input_ids=torch.full((1, 41), 5))


def test_what_a_config_says_limits_random_inputs():
    assert longest(llama(max_position_embeddings=40), 999) == 40
    assert longest(llama(max_position_embeddings=40), 7) == 7

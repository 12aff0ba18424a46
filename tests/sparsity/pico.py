"""Models of every family that matters here, built from a config: two layers, width 16, random."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def llama(*, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**_TEXT, tie_word_embeddings=tied)))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return _seeded(lambda: BertForMaskedLM(BertConfig(**_TEXT)))


def bert_encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    return _seeded(lambda: BertModel(BertConfig(**_TEXT)))


def bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return _seeded(lambda: BertForSequenceClassification(BertConfig(**_TEXT)))


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForMaskedLM

    return _seeded(lambda: AlbertForMaskedLM(AlbertConfig(**_TEXT, embedding_size=8)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_TEXT, num_key_value_heads=2, num_local_experts=4)
    return _seeded(lambda: MixtralForCausalLM(config))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_TEXT,
        num_key_value_heads=2,
        num_local_experts=4,
        head_dim=8,
        layer_types=["full_attention", "full_attention"],
    )
    return _seeded(lambda: GptOssForCausalLM(config))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=1, layer_type="basic"
    )
    return _seeded(lambda: ResNetForImageClassification(config))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    return _seeded(lambda: ViTForImageClassification(config))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied llama": lambda: llama(tied=True),
    "bert": bert,
    "bert encoder": bert_encoder,
    "bert classifier": bert_classifier,
    "albert": albert,
    "gpt2": gpt2,
    "mixtral": mixtral,
    "gpt-oss": gpt_oss,
    "resnet": resnet,
    "vit": vit,
}


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()

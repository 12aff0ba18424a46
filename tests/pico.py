"""Real models of a few thousand weights, built from a config with a fixed seed."""

import torch

VOCABULARY = 40


def pico_bert(task="masked-lm"):
    """A BERT of two layers, with the head of `task` or none."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    if task == "feature-extraction":
        return BertModel(config, add_pooling_layer=False).eval()
    head = BertForMaskedLM if task == "masked-lm" else BertForSequenceClassification
    return head(config).eval()


def pico_llama():
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def pico_resnet():
    """A ResNet of two stages on grey images, two classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=2,
    )
    torch.manual_seed(0)
    return ResNetForImageClassification(config).eval()

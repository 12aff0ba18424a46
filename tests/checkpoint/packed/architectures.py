"""Twenty architectures with random weights, a few thousand parameters each."""

from collections.abc import Callable
from typing import Any

from tests.checkpoint.pico import SMALL, SPECIAL, bert, llama, mixtral, seeded, vit


def made(model: str, config: str, **values: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return seeded(getattr(transformers, model), getattr(transformers, config)(**values))

    return make


PAIR: dict[str, Any] = {**SMALL, **SPECIAL, "num_key_value_heads": 2}
GPT: dict[str, Any] = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
    "decoder_start_token_id": 0,
}  # fmt: skip

CAUSAL, MASKED, IMAGES = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
)
ARCHITECTURES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": (CAUSAL, llama),
    "llama-tied": (CAUSAL, lambda: llama(tie_word_embeddings=True)),
    "mistral": (CAUSAL, made("MistralForCausalLM", "MistralConfig", **PAIR)),
    "qwen2": (CAUSAL, made("Qwen2ForCausalLM", "Qwen2Config", **PAIR)),
    "qwen3": (CAUSAL, made("Qwen3ForCausalLM", "Qwen3Config", **PAIR, head_dim=8)),
    "gemma2": (CAUSAL, made("Gemma2ForCausalLM", "Gemma2Config", **PAIR, head_dim=8)),
    "phi3": (CAUSAL, made("Phi3ForCausalLM", "Phi3Config", **PAIR)),
    "mixtral": (CAUSAL, mixtral),
    "gpt2": (CAUSAL, made("GPT2LMHeadModel", "GPT2Config", **GPT)),
    "gpt-neox": (
        CAUSAL,
        made("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL, bos_token_id=1, eos_token_id=2),
    ),
    "opt": (
        CAUSAL,
        made(
            "OPTForCausalLM",
            "OPTConfig",
            **{**SMALL, **SPECIAL},
            ffn_dim=64,
            word_embed_proj_dim=32,
        ),
    ),
    "bert": (MASKED, bert),
    "roberta": (MASKED, made("RobertaForMaskedLM", "RobertaConfig", **SMALL, **SPECIAL)),
    "distilbert": (
        MASKED,
        made(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=4,
            vocab_size=64,
        ),
    ),
    "albert": (
        MASKED,
        made("AlbertForMaskedLM", "AlbertConfig", **SMALL, embedding_size=16, **SPECIAL),
    ),
    "electra": (MASKED, made("ElectraForMaskedLM", "ElectraConfig", **SMALL, embedding_size=16)),
    "t5": ("AutoModelForSeq2SeqLM", made("T5ForConditionalGeneration", "T5Config", **T5)),
    "vit": (IMAGES, vit),
    "resnet": (
        IMAGES,
        made(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_labels=3,
        ),
    ),
    "convnext": (
        IMAGES,
        made(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_stages=2,
            num_labels=3,
        ),
    ),
}

"""The matrices of known architectures: their names in files and in the model, and input axes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """One kind of tensor: its names in files, its name in the model, its input axis."""

    files: tuple[str, ...]
    model: str
    axis: int | None
    """None where it stays dense."""
    is_buffer: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture.

    Attributes:
        prefix: Name of the base model within a model that has a head.
        lines: The matrices of the base model, in its order; `#` stands for a number.
        embedding: The one that may be tied to a head.
        head: The head that may be tied to it.
        is_tied: Whether it is where the config does not say.
        stored_head: The head's name in files, where it is another.
    """

    prefix: str
    lines: tuple[Line, ...]
    embedding: str = ""
    head: str = "lm_head.weight"
    is_tied: bool = False
    stored_head: str = ""


def _lines(text: str) -> tuple[Line, ...]:
    made = []
    for line in text.strip().splitlines():
        names, axis = line.rsplit(maxsplit=1)
        files, _, model = names.partition(" -> ")
        parts = tuple(_full(part) for part in files.split(" + "))
        made.append(
            Line(
                parts,
                _full(model) if model else parts[0],
                int(axis) if axis.isdecimal() else None,
                axis == "buffer",
            )
        )
    return tuple(made)


def _full(name: str) -> str:
    name = name.strip()
    return name.removeprefix("=") if name.startswith("=") else f"{name}.weight"


_BERT_LAYER = """
encoder.layer.#.attention.self.query 1
encoder.layer.#.attention.self.key 1
encoder.layer.#.attention.self.value 1
encoder.layer.#.attention.output.dense 1
encoder.layer.#.intermediate.dense 1
encoder.layer.#.output.dense 1
pooler.dense dense
"""
_BERT = _lines(
    """
embeddings.word_embeddings dense
embeddings.position_embeddings dense
embeddings.token_type_embeddings dense
"""
    + _BERT_LAYER.lstrip()
)
_ROBERTA = _lines(
    """
embeddings.word_embeddings dense
embeddings.token_type_embeddings dense
embeddings.position_embeddings dense
"""
    + _BERT_LAYER.lstrip()
)
_ALBERT = _lines(
    """
embeddings.word_embeddings dense
embeddings.position_embeddings dense
embeddings.token_type_embeddings dense
encoder.embedding_hidden_mapping_in 1
encoder.albert_layer_groups.#.albert_layers.#.attention.query 1
encoder.albert_layer_groups.#.albert_layers.#.attention.key 1
encoder.albert_layer_groups.#.albert_layers.#.attention.value 1
encoder.albert_layer_groups.#.albert_layers.#.attention.dense 1
encoder.albert_layer_groups.#.albert_layers.#.ffn 1
encoder.albert_layer_groups.#.albert_layers.#.ffn_output 1
pooler dense
"""
)
_DISTILBERT = _lines(
    """
embeddings.word_embeddings dense
embeddings.position_embeddings dense
transformer.layer.#.attention.q_lin 1
transformer.layer.#.attention.k_lin 1
transformer.layer.#.attention.v_lin 1
transformer.layer.#.attention.out_lin 1
transformer.layer.#.ffn.lin1 1
transformer.layer.#.ffn.lin2 1
"""
)
_MPNET = _lines(
    """
embeddings.word_embeddings dense
embeddings.position_embeddings dense
encoder.layer.#.attention.attn.q 1
encoder.layer.#.attention.attn.k 1
encoder.layer.#.attention.attn.v 1
encoder.layer.#.attention.attn.o 1
encoder.layer.#.intermediate.dense 1
encoder.layer.#.output.dense 1
encoder.relative_attention_bias dense
pooler.dense dense
"""
)
_ATTENTION = """
embed_tokens dense
layers.#.self_attn.q_proj 1
layers.#.self_attn.k_proj 1
layers.#.self_attn.v_proj 1
layers.#.self_attn.o_proj 1
"""
_LLAMA = _lines(
    _ATTENTION
    + """\
layers.#.mlp.gate_proj 1
layers.#.mlp.up_proj 1
layers.#.mlp.down_proj 1
"""
)
_PHI3 = _lines(
    """
embed_tokens dense
layers.#.self_attn.o_proj 1
layers.#.self_attn.qkv_proj 1
layers.#.mlp.gate_up_proj 1
layers.#.mlp.down_proj 1
"""
)
_QWEN3_MOE = _lines(
    _ATTENTION
    + """\
layers.#.mlp.experts.#.gate_proj + layers.#.mlp.experts.#.up_proj -> =layers.#.mlp.experts.gate_up_proj 2
layers.#.mlp.experts.#.down_proj -> =layers.#.mlp.experts.down_proj 2
layers.#.mlp.gate dense
layers.#.mlp.gate_proj 1
layers.#.mlp.up_proj 1
layers.#.mlp.down_proj 1
"""  # noqa: E501
)
_MIXTRAL = _lines(
    _ATTENTION
    + """\
layers.#.block_sparse_moe.gate -> layers.#.mlp.gate dense
layers.#.block_sparse_moe.experts.#.w1 + layers.#.block_sparse_moe.experts.#.w3 -> =layers.#.mlp.experts.gate_up_proj 2
layers.#.block_sparse_moe.experts.#.w2 -> =layers.#.mlp.experts.down_proj 2
"""  # noqa: E501
)
_GPT2 = _lines(
    """
wte dense
wpe dense
h.#.attn.c_attn 0
h.#.attn.c_proj 0
h.#.mlp.c_fc 0
h.#.mlp.c_proj 0
=h.#.attn.bias buffer
=h.#.attn.masked_bias buffer
"""
)
_GPT_NEOX = _lines(
    """
embed_in dense
layers.#.attention.query_key_value 1
layers.#.attention.dense 1
layers.#.mlp.dense_h_to_4h 1
layers.#.mlp.dense_4h_to_h 1
=layers.#.attention.bias buffer
=layers.#.attention.masked_bias buffer
"""
)
_OPT = _lines(
    """
decoder.embed_tokens dense
decoder.embed_positions dense
decoder.layers.#.self_attn.k_proj 1
decoder.layers.#.self_attn.v_proj 1
decoder.layers.#.self_attn.q_proj 1
decoder.layers.#.self_attn.out_proj 1
decoder.layers.#.fc1 1
decoder.layers.#.fc2 1
"""
)
_VIT = _lines(
    """
=embeddings.cls_token dense
=embeddings.position_embeddings dense
embeddings.patch_embeddings.projection dense
encoder.layer.#.attention.attention.query -> layers.#.attention.q_proj 1
encoder.layer.#.attention.attention.key -> layers.#.attention.k_proj 1
encoder.layer.#.attention.attention.value -> layers.#.attention.v_proj 1
encoder.layer.#.attention.output.dense -> layers.#.attention.o_proj 1
encoder.layer.#.intermediate.dense -> layers.#.mlp.fc1 1
encoder.layer.#.output.dense -> layers.#.mlp.fc2 1
pooler.dense dense
"""
)
_RESNET = _lines(
    """
embedder.embedder.convolution 1
encoder.stages.#.layers.#.shortcut.convolution 1
encoder.stages.#.layers.#.layer.#.convolution 1
"""
)

_WORDS = "embeddings.word_embeddings.weight"
_TOKENS = "embed_tokens.weight"
FAMILIES = {
    "bert": Family("bert", _BERT, _WORDS, "cls.predictions.decoder.weight", True),
    "roberta": Family("roberta", _ROBERTA, _WORDS, "lm_head.decoder.weight", True),
    "xlm-roberta": Family("roberta", _ROBERTA, _WORDS, "lm_head.decoder.weight", True),
    "albert": Family("albert", _ALBERT, _WORDS, "predictions.decoder.weight", True),
    "distilbert": Family("distilbert", _DISTILBERT, _WORDS, "vocab_projector.weight", True),
    "mpnet": Family("mpnet", _MPNET, _WORDS, "lm_head.decoder.weight", True),
    "llama": Family("model", _LLAMA, _TOKENS),
    "mistral": Family("model", _LLAMA, _TOKENS),
    "qwen2": Family("model", _LLAMA, _TOKENS),
    "qwen3": Family("model", _LLAMA, _TOKENS),
    "gemma": Family("model", _LLAMA, _TOKENS, is_tied=True),
    "gemma2": Family("model", _LLAMA, _TOKENS, is_tied=True),
    "phi3": Family("model", _PHI3, _TOKENS),
    "qwen3_moe": Family("model", _QWEN3_MOE, _TOKENS),
    "mixtral": Family("model", _MIXTRAL, _TOKENS),
    "gpt2": Family("transformer", _GPT2, "wte.weight", is_tied=True),
    "gpt_neox": Family("gpt_neox", _GPT_NEOX, "embed_in.weight", stored_head="embed_out.weight"),
    "opt": Family("model", _OPT, "decoder.embed_tokens.weight", is_tied=True),
    "vit": Family("vit", _VIT),
    "resnet": Family("resnet", _RESNET),
}

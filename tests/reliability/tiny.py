"""The tiny job: a Llama of 2 layers, 12 sequences of synthetic tokens, a recipe of 3 steps.

It has all that a resume can get wrong: dropout, shuffling, accumulation, warm-up and cosine, HAM
with AdamW's state, a mask that grows, a teacher, and an epoch that ends within a step.
"""

import json
import random
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, VOCABULARY = 32, 2, 64
SEQUENCES, LENGTH = 12, 10
STEPS, EVERY = 3, 1  # three checkpoints: the third makes the first go

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": VOCABULARY,
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
RECIPE = f"""\
model: {{task: causal-lm}}
data: {{source: DATA, max_length: {LENGTH}, pack: false, evaluation_fraction: 0.25}}
objective: {{task: 0.5, distill: {{logits: 0.5}}}}
optimizer: {{lr: 1e-3, warmup: 0.2, schedule: cosine}}
sparsity: {{target: 0.5, update_every: 0.1}}
training: {{steps: {STEPS}, batch_size: 2, accumulation: 2, checkpoint_every: {EVERY}, device: cpu}}
evaluation: {{examples: 3, batch_size: 3}}
"""


def make(folder: Path) -> None:
    """`untied/` and `tied/` models, `data.jsonl` and `recipe.yaml`, the same bytes each time."""
    import torch
    import transformers

    for name, tied in (("untied", False), ("tied", True)):
        torch.manual_seed(0)
        words = {**CONFIG, "tie_word_embeddings": tied}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**words))
        model.save_pretrained(folder / name)
        make_tokenizer(folder / name)
    write_data(folder / "data.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE.replace("DATA", str(folder / "data.jsonl")))


def make_tokenizer(folder: Path) -> None:
    """A word for each token of the vocabulary: `<pad>`, `<s>`, `</s>`, `t3` ... `t63`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"t{number}" for number in range(3, VOCABULARY))]
    known = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_data(path: Path, seed: int = 0) -> None:
    """Sequences of random tokens."""
    draw = random.Random(seed)
    rows = [
        " ".join(f"t{draw.randrange(3, VOCABULARY)}" for _ in range(LENGTH))
        for _ in range(SEQUENCES)
    ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def sparsify(folder: Path, out: Path, *more: str, model: str = "untied") -> list[str]:
    """The words of the tiny job."""
    words = ["sparsify", str(folder / model), "--recipe", str(folder / "recipe.yaml")]
    return [*words, "--out", str(out), *more]

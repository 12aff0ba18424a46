"""Small tokenizers, files and configs for the tests of data."""

import json
from types import SimpleNamespace

import numpy as np
from PIL import Image

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "play", "##ing", "##er", "word")


def bert_tokenizer(words=WORDS, **more):
    """WordPiece: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the words."""
    from transformers import BertTokenizer

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *words))}
    return BertTokenizer(vocab=vocabulary, **more)


def byte_tokenizer(**more):
    """Byte-level, a token a byte, no special token of its own but the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{char: index for index, char in enumerate(alphabet, 1)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", **more)


def config(**more):
    """What the data room reads of a model's config."""
    words = {
        "model_type": "bert",
        "id2label": {0: "ham", 1: "spam"},
        "num_labels": 2,
        "vocab_size": 5 + len(WORDS),
        "pad_token_id": 0,
        "max_position_embeddings": 512,
        "problem_type": None,
    }
    return SimpleNamespace(**{**words, **more})


def image_config(**more):
    """A config of an image model."""
    words = {"model_type": "resnet", "id2label": {0: "cat", 1: "dog"}, "num_labels": 2}
    return SimpleNamespace(**{**words, "num_channels": 1, **more})


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def random_pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

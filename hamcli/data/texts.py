"""Texts to token batches: packed or padded, masked for masked language models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # torch's cross-entropy passes over it
PAD_MULTIPLE = 8
TOKENIZE_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Masked language modelling: which tokens are hidden, and by what (arXiv 1810.04805)."""

    probability: float
    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]

    def corrupt(
        self, ids: Tensor, valid: Tensor, seed: int, evaluating: bool
    ) -> tuple[Tensor, Tensor]:
        """Corrupted ids and labels, -100 where nothing is asked.

        Training hides 80 % by the mask token, 10 % by a random token and leaves 10 %; evaluation
        hides all of them by the mask token. At least one token of the batch is asked for.
        """
        draw = torch.Generator().manual_seed(seed)
        special = torch.isin(ids, torch.tensor(self.special_ids))
        chance = torch.rand(ids.shape, generator=draw)
        chance = torch.where(valid.bool() & ~special, chance, 2.0)
        chosen = chance < self.probability
        if not bool(chosen.any()):
            chosen = chance == chance.min()
        labels = torch.where(chosen, ids, IGNORED)
        kind = torch.rand(ids.shape, generator=draw)
        noise = torch.randint(self.vocab_size, ids.shape, generator=draw)
        hidden = chosen & (kind < 0.8) if not evaluating else chosen
        made = torch.where(hidden, self.mask_id, ids)
        if not evaluating:
            made = torch.where(chosen & (kind >= 0.9), noise, made)
        return made, labels


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Token ids of each example, with what the task needs beside them.

    Attributes:
        ids: Token ids of each example.
        types: Token types of each example; None where the model takes none.
        labels: A class id an example, or a list of label ids a token; None without labels.
        pad_id: Fills short examples.
        rule: Set for masked language models.
        is_causal: Labels are the ids themselves.
        limit: Tokens that no example passes, filled up or not; None for no limit.
    """

    ids: Sequence[Sequence[int]]
    types: Sequence[Sequence[int]] | None
    labels: Sequence[Any] | None
    pad_id: int
    rule: MaskRule | None = None
    is_causal: bool = False
    limit: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int], seed: int, evaluating: bool) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` [batch, length] int64 and, by task, `labels`."""
        rows = [self.ids[i] for i in indices]
        longest = max(len(row) for row in rows)
        length = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
        if self.limit is not None:
            length = min(length, self.limit)
        ids = _padded(rows, length, self.pad_id)
        valid = _padded([[1] * len(row) for row in rows], length, 0)
        made = {"input_ids": ids, "attention_mask": valid}
        if self.types is not None:
            made["token_type_ids"] = _padded([self.types[i] for i in indices], length, 0)
        if self.rule is not None:
            made["input_ids"], made["labels"] = self.rule.corrupt(ids, valid, seed, evaluating)
        elif self.is_causal:
            made["labels"] = torch.where(valid.bool(), ids, IGNORED)
        elif self.labels is not None:
            chosen = [self.labels[i] for i in indices]
            per_token = isinstance(chosen[0], list)
            made["labels"] = _padded(chosen, length, IGNORED) if per_token else torch.tensor(chosen)
        return made


def _padded(rows: Sequence[Sequence[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([[*row, *([filler] * (length - len(row)))] for row in rows])


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    *,
    max_length: int,
    special: bool,
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids and, where the tokenizer gives them, token types of each text, cut to length."""
    ids: list[list[int]] = []
    types: list[list[int]] = []
    for begin in range(0, len(texts), TOKENIZE_AT_ONCE):
        part = list(texts[begin : begin + TOKENIZE_AT_ONCE])
        second = list(pairs[begin : begin + TOKENIZE_AT_ONCE]) if pairs is not None else None
        made = tokenizer(
            part,
            second,
            truncation=special,
            max_length=max_length if special else None,
            add_special_tokens=special,
            verbose=False,
        )
        ids += made["input_ids"]
        types += made.get("token_type_ids", [])
    return ids, types if pairs is not None and types else None


def pack(
    tokenizer: Any, texts: Sequence[str], *, max_length: int, is_causal: bool
) -> list[list[int]]:
    """Texts joined and cut into blocks of exactly `max_length` tokens; a short rest is left out.

    Causal models get the end-of-text token between texts; masked ones each block between their
    own special tokens.
    """
    ids, _ = encode(tokenizer, texts, None, max_length=max_length, special=False)
    end = [tokenizer.eos_token_id] if is_causal and tokenizer.eos_token_id is not None else []
    stream = [token for text in ids for token in (*text, *end)]
    head, tail = special_tokens(tokenizer) if not is_causal else ([], [])
    body = max_length - len(head) - len(tail)
    blocks = [stream[begin : begin + body] for begin in range(0, len(stream) - body + 1, body)]
    if not blocks and stream:
        blocks = [stream]
    return [[*head, *block, *tail] for block in blocks]


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a single text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return whole[:begin], whole[begin + len(plain) :]
    return [], []


def align_tags(
    tokenizer: Any, words: Sequence[Sequence[str]], tags: Sequence[Sequence[int]], max_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and a label a token: that of the word on its first token, -100 elsewhere."""
    ids, labels = [], []
    for row, row_tags in zip(words, tags, strict=True):
        made = tokenizer(
            list(row), is_split_into_words=True, truncation=True, max_length=max_length
        )
        before = None
        row_labels = []
        for word in made.word_ids():
            row_labels.append(IGNORED if word is None or word == before else row_tags[word])
            before = word
        ids.append(made["input_ids"])
        labels.append(row_labels)
    return ids, labels

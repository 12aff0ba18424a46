"""Texts → batches of token ids: encoding, packing into blocks, padding, masks for masked-LM.

Texts are tokenised when their batch is made, so a run starts at once whatever the size of the data;
blocks are made beforehand. Batches are padded on the right to the longest example, rounded up to a
multiple of 8: few different shapes, little waste. Nothing is sorted by length.

Masked-LM (Devlin et al. 2019, arXiv 1810.04805): of the tokens that are not special, each is
chosen with the probability of the recipe, at least one an example. Training shows 80 % of the
chosen as the mask token, 10 % as a random token, 10 % as they are. Measuring shows all of them as
the mask token, chosen by the example's number alone, so the question is the same for every model
and batch size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hamcli.data.labels import IGNORED

PAD_MULTIPLE = 8

_TOKENISED_AT_ONCE = 1000
_EVALUATION_DRAW = 0x4D4C4D  # any constant: its own stream of random numbers


@dataclass(frozen=True, slots=True)
class Encoding:
    """One example.

    Attributes:
        ids: Token ids, special ones included.
        types: Segment of each token, for models that want it.
        labels: A class, a class a token, or None.
    """

    ids: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]
    types: Sequence[int] | None = None
    labels: int | Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class MaskRule:
    """How tokens are hidden for masked-LM."""

    probability: float
    mask_id: int
    special: frozenset[int]
    """Ids that are never chosen."""
    replacements: np.ndarray[Any, np.dtype[np.int64]]
    """Ids that a random token is drawn from."""


class TextExamples:
    """Examples of text that make batches of any of them.

    Args:
        size: Number of examples.
        encode: Places to encodings.
        pad_id: Token id of padding; its attention mask is 0.
        limit: Longest row that the model takes.
        mask: For masked-LM.
        predicts_next: Whether labels are the tokens themselves, for causal-LM.
    """

    def __init__(
        self,
        size: int,
        encode: Callable[[Sequence[int]], list[Encoding]],
        *,
        pad_id: int,
        limit: int,
        mask: MaskRule | None = None,
        predicts_next: bool = False,
    ) -> None:
        self.size, self.encode, self.pad_id, self.limit = size, encode, pad_id, limit
        self.mask, self.predicts_next = mask, predicts_next

    def __len__(self) -> int:
        return self.size

    def batch(self, places: Sequence[int], draw: np.random.Generator | None) -> dict[str, Tensor]:
        """The examples at `places` in the keys of a model's forward, on the CPU.

        Args:
            places: Numbers of examples.
            draw: Random numbers of a training batch; None to measure.
        """
        rows = self.encode(places)
        width = self._width(rows)
        ids = _padded([row.ids for row in rows], width, self.pad_id)
        lengths = np.array([len(row.ids) for row in rows])
        attention = (np.arange(width) < lengths[:, None]).astype(np.int64)
        made = {"input_ids": ids, "attention_mask": attention}
        if rows[0].types is not None:
            made["token_type_ids"] = _padded([row.types or () for row in rows], width, 0)
        if self.mask is not None:
            made["input_ids"], made["labels"] = self._masked(ids, attention, places, draw)
        elif self.predicts_next:
            made["labels"] = np.where(attention == 1, ids, IGNORED)
        elif rows[0].labels is not None:
            made["labels"] = _labels([row.labels for row in rows], width)
        return {name: torch.from_numpy(values) for name, values in made.items()}

    def _width(self, rows: Sequence[Encoding]) -> int:
        longest = max(len(row.ids) for row in rows)
        rounded = -(-max(longest, 1) // PAD_MULTIPLE) * PAD_MULTIPLE
        return max(longest, min(rounded, self.limit))

    def _masked(
        self,
        ids: np.ndarray[Any, Any],
        attention: np.ndarray[Any, Any],
        places: Sequence[int],
        draw: np.random.Generator | None,
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        rule = self.mask
        assert rule is not None
        may = (attention == 1) & ~np.isin(ids, list(rule.special))
        if draw is None:
            chosen = np.zeros_like(may)
            for row, place in enumerate(places):
                own = np.random.default_rng((_EVALUATION_DRAW, place))
                length = int(attention[row].sum())
                chosen[row, :length] = choose(
                    may[row, :length], own.random(length), rule.probability
                )
            shown = np.where(chosen, rule.mask_id, ids)
        else:
            luck = draw.random(ids.shape)
            chosen = np.stack(
                [choose(*row, rule.probability) for row in zip(may, luck, strict=True)]
            )
            shown = corrupt(ids, chosen, rule, draw)
        return shown, np.where(chosen, ids, IGNORED)


def choose(
    may: np.ndarray[Any, Any], luck: np.ndarray[Any, Any], probability: float
) -> np.ndarray[Any, Any]:
    """Which tokens of one row are asked for: at least one, where one may be.

    Args:
        may: bool, [tokens].
        luck: Uniform numbers in 0..1, [tokens].
        probability: Of each token that may be asked for.
    """
    chosen = may & (luck < probability)
    if may.any() and not chosen.any():
        chosen[np.where(may, luck, 2.0).argmin()] = True
    return chosen


def corrupt(
    ids: np.ndarray[Any, Any],
    chosen: np.ndarray[Any, Any],
    rule: MaskRule,
    draw: np.random.Generator,
) -> np.ndarray[Any, Any]:
    """What a model in training sees: 80 % mask tokens, 10 % random ones, 10 % the true ones."""
    luck = draw.random(ids.shape)
    random_ids = rule.replacements[draw.integers(len(rule.replacements), size=ids.shape)]
    shown = np.where(chosen & (luck < 0.8), rule.mask_id, ids)
    return np.where(chosen & (luck >= 0.8) & (luck < 0.9), random_ids, shown)


def _padded(rows: Sequence[Any], width: int, value: int) -> np.ndarray[Any, Any]:
    made = np.full((len(rows), width), value, dtype=np.int64)
    for index, row in enumerate(rows):
        made[index, : len(row)] = row
    return made


def _labels(labels: Sequence[Any], width: int) -> np.ndarray[Any, Any]:
    if isinstance(labels[0], int):
        return np.array(labels, dtype=np.int64)
    return _padded(labels, width, IGNORED)


# ---- what the tokenizer does ----


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer with the length that the model and the recipe allow."""

    tokenizer: Any
    limit: int

    def texts(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of texts, or of pairs of them, with special tokens, cut to the limit."""
        made = self.tokenizer(
            list(texts),
            list(pairs) if pairs is not None else None,
            truncation=True,
            max_length=self.limit,
            return_attention_mask=False,
            verbose=False,
        )
        return made["input_ids"], made.get("token_type_ids")

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, whole and without special tokens."""
        made: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return made

    def around(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer puts before and after a text."""
        probe = self.plain(["a"])[0]
        whole: list[int] = self.tokenizer("a", verbose=False)["input_ids"]
        for begin in range(len(whole) - len(probe) + 1):
            if probe and whole[begin : begin + len(probe)] == probe:
                return whole[:begin], whole[begin + len(probe) :]
        return [], []

    def words(self, words: Sequence[str]) -> tuple[list[int], list[int | None], list[int] | None]:
        """Token ids of a list of words, which word each is of, and segments."""
        try:
            made = self.tokenizer(
                list(words),
                is_split_into_words=True,
                truncation=True,
                max_length=self.limit,
                verbose=False,
            )
            owners = made.word_ids()
        except (AssertionError, ValueError):
            # byte-level tokenizers that add no space of their own take words only as a text
            made, owners = self._words_of_text(words)
        return made["input_ids"], owners, made.get("token_type_ids")

    def _words_of_text(self, words: Sequence[str]) -> tuple[Any, list[int | None]]:
        made = self.tokenizer(
            " ".join(words),
            truncation=True,
            max_length=self.limit,
            return_offsets_mapping=True,
            verbose=False,
        )
        word_at = [number for number, word in enumerate(words) for _ in range(len(word) + 1)]
        owners: list[int | None] = [
            word_at[end - 1] if end > begin else None for begin, end in made["offset_mapping"]
        ]
        return made, owners


def tag_labels(owners: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """A label a token: the tag of the word whose first token it is, else -100."""
    made, before = [], None
    for owner in owners:
        made.append(tags[owner] if owner is not None and owner != before else IGNORED)
        before = owner
    return made


# ---- blocks ----


def pack(
    encoder: Encoder,
    texts: Sequence[str],
    order: Sequence[int],
    *,
    separator: int | None,
    keeps_special: bool,
    most: int | None = None,
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Texts joined and cut into blocks of the encoder's limit.

    Args:
        encoder: Says the length of a block.
        texts: In the order they are joined in.
        order: Places of texts in the order they are chosen in, where not all are needed.
        separator: Token between two texts.
        keeps_special: Whether a block begins and ends as a text does (masked-LM), or is a cut
            through a stream of texts (causal-LM).
        most: Blocks needed; what is beyond them is not even tokenised.

    Returns:
        Full blocks. What is left over makes a shorter one only where there is no full one.
    """
    before, after = encoder.around()
    inner = encoder.limit - (len(before) + len(after) if keeps_special else 0)
    head = [] if keeps_special else before
    tail = [separator] if separator is not None and separator not in after else []
    tail = tail if keeps_special else [*after, *tail]
    chosen: dict[int, np.ndarray[Any, Any]] = {}
    total = 0
    for begin in range(0, len(order), _TOKENISED_AT_ONCE):
        if most is not None and total >= most * inner:
            break
        places = order[begin : begin + _TOKENISED_AT_ONCE]
        for place, ids in zip(
            places, encoder.plain([texts[place] for place in places]), strict=True
        ):
            chosen[place] = np.array([*head, *ids, *tail], dtype=np.int64)
            total += len(chosen[place])
    if total == 0:
        return []
    stream = np.concatenate([chosen[place] for place in sorted(chosen)])
    number = len(stream) // inner
    number = min(number, most) if most is not None else number
    blocks = [stream[index * inner : (index + 1) * inner] for index in range(number)] or [stream]
    if keeps_special:
        return [np.concatenate([before, block, after]).astype(np.int64) for block in blocks]
    return blocks

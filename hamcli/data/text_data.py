"""The road of texts: rows → examples of tokens, for every task on text."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from typing import Any

import numpy as np

from hamcli.data.batches import Data
from hamcli.data.columns import check_lists, find_column, need_column, pair_of, read_texts
from hamcli.data.division import capped, content_order, divide
from hamcli.data.labels import ClassIds
from hamcli.data.sources import read_rows
from hamcli.data.table import Table, digest_of
from hamcli.data.texts import Encoder, Encoding, MaskRule, TextExamples, pack, tag_labels
from hamcli.errors import InputRefused
from hamcli.recipe.schema import DataSection

LANGUAGE = ("causal-lm", "masked-lm")

UNKNOWN_SHARE = 0.2
CUT_SHARE = 0.25
PROSE_SHARE = 0.5

_LOOKED_AT = 200  # texts
# position ids of these models begin after the id of padding
_OFFSET_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
)

Sides = tuple[TextExamples, TextExamples]


def open_texts(
    section: DataSection, *, task: str, tokenizer: Any, config: Any, most: int | None
) -> Data:
    """Data of a task on text; arguments as `open_data`."""
    return _Texts(section, task, tokenizer, config, most).open()


def builtin_text() -> Table:
    """The English sample of this package, a paragraph a line."""
    raw = (resources.files("hamcli.samples") / "english.txt").read_bytes()
    return Table(
        "built-in English sample",
        "paragraphs",
        {"text": raw.decode("utf-8").splitlines()},
        lambda row: f"english.txt:{row + 1}",
        hashlib.sha256(raw).hexdigest(),
    )


class _Texts:
    def __init__(
        self, section: DataSection, task: str, tokenizer: Any, config: Any, most: int | None
    ) -> None:
        self.section, self.task, self.tokenizer, self.config = section, task, tokenizer, config
        self.most, self.is_builtin = most, section.source is None
        self.notes: list[str] = []
        _refuse_head(task, config)
        self.encoder = Encoder(tokenizer, self._limit())

    def open(self) -> Data:
        train, held = self._rows()
        kind, column = self._main_column(train)
        pair = self._pair(train, column)
        if held is None:
            content = train.columns[column]
            values = content if pair is None else zip(content, train.columns[pair], strict=True)
            train, held = divide(train, values, self.section.evaluation_fraction)
        other = column if column in held.columns else need_column(held, None, kind)
        if self.task in LANGUAGE:
            sides, unit, has_labels = self._language(train, held, column, other)
            tail = ""
        else:
            train = capped(train, column, self.section.max_examples)
            sides, unit, has_labels = (
                self._words(train, held, column, other)
                if kind == "tokens"
                else self._plain(train, held, column, other, pair)
            )
            tail = f", {'with' if has_labels else 'without'} labels"
        for table, side in zip((train, held), sides, strict=True):
            if len(side) == 0:
                why = "its texts are empty or too short"
                raise InputRefused("E452", "data gives no example", table.name, why)
        return Data(
            *sides,
            has_labels,
            f"{train.name}: {len(sides[0]):,} {unit}{tail}",
            f"{held.name}: {len(sides[1]):,} {unit} held out",
            digest_of(train, held),
            tuple(dict.fromkeys(self.notes)),
        )

    def _rows(self) -> tuple[Table, Table | None]:
        if self.section.source is None:
            return builtin_text(), None
        return read_rows(
            self.section.source,
            split=self.section.split,
            evaluation=self.section.evaluation,
            evaluation_split=self.section.evaluation_split,
        )

    def _main_column(self, table: Table) -> tuple[str, str]:
        """Its kind, text or tokens, and its name."""
        if self.task == "token-classification":
            tokens = find_column(table, self.section.tokens, "tokens")
            if tokens is not None:
                return "tokens", tokens
            if self.section.text is None and find_column(table, None, "text") is None:
                return "tokens", need_column(table, None, "tokens")
        return "text", need_column(table, self.section.text, "text")

    def _pair(self, table: Table, column: str) -> str | None:
        """The column of second texts: asked for, or guessed to classify pairs."""
        if self.section.text_pair is not None or self.task == "text-classification":
            return pair_of(table, column, self.section.text_pair)
        return None

    def _limit(self) -> int:
        """Tokens an example: the recipe's, unless the model has fewer positions."""
        wanted = self.section.max_length
        positions = getattr(self.config, "max_position_embeddings", None)
        if isinstance(positions, int) and self.config.model_type in _OFFSET_POSITIONS:
            positions -= (self.config.pad_token_id or 0) + 1
        known = [
            number
            for number in (positions, getattr(self.tokenizer, "model_max_length", None))
            if isinstance(number, int) and 8 <= number < 10**9
        ]
        limit = min([wanted, *known])
        if limit < wanted:
            self.notes.append(
                f"data.max_length {wanted} is over the model's {limit}: {limit} is used"
            )
        return limit

    # ---- language models ----

    def _language(
        self, train: Table, held: Table, column: str, other: str
    ) -> tuple[Sides, str, bool]:
        texts = read_texts(train, column)[1]
        held_texts = read_texts(held, other)[1]
        self._look(texts)
        packs = self.section.pack
        if packs == "auto":
            packs = self.task == "causal-lm" or self._is_prose(texts)
        rule = self._mask_rule() if self.task == "masked-lm" else None
        most = self.section.max_examples
        if packs:
            wanted = min(
                (number for number in (self.most, most) if number is not None), default=None
            )
            sides = self._blocks(texts, rule, wanted), self._blocks(held_texts, rule, None)
            return sides, f"blocks of {self.encoder.limit} tokens", True
        if most is not None and most < len(texts):
            texts = [texts[place] for place in sorted(content_order(texts)[:most])]
        return (self._lines(texts, rule), self._lines(held_texts, rule)), _unit(train), True

    def _is_prose(self, texts: Sequence[str]) -> bool:
        """Whether texts fill half a block on average; below, each is an example of its own."""
        ids = self.encoder.plain(_spread(texts))
        return sum(map(len, ids)) >= PROSE_SHARE * self.encoder.limit * len(ids)

    def _blocks(
        self, texts: Sequence[str], rule: MaskRule | None, most: int | None
    ) -> TextExamples:
        is_causal = rule is None
        blocks = pack(
            self.encoder,
            texts,
            range(len(texts)) if most is None else content_order(texts),
            separator=self.tokenizer.eos_token_id if is_causal else self.tokenizer.sep_token_id,
            keeps_special=not is_causal,
            most=most,
        )
        blocks = [block for block in blocks if len(block) > 1]
        return self._examples(
            len(blocks),
            lambda places: [Encoding(blocks[place]) for place in places],
            mask=rule,
            predicts_next=is_causal,
        )

    def _lines(self, texts: Sequence[str], rule: MaskRule | None) -> TextExamples:
        encode = partial(self._encode, texts, None, None)
        return self._examples(len(texts), encode, mask=rule, predicts_next=rule is None)

    def _mask_rule(self) -> MaskRule:
        mask_id = self.tokenizer.mask_token_id
        if mask_id is None:
            right = "the tokenizer of a masked language model, or another --task"
            raise InputRefused("E464", "the tokenizer has no mask token", "data", "", right)
        special = frozenset(int(index) for index in self.tokenizer.all_special_ids)
        size = min(len(self.tokenizer), self.config.vocab_size)
        plain = np.array([index for index in range(size) if index not in special])
        return MaskRule(self.section.mask_probability, mask_id, special, plain)

    # ---- a text, an example ----

    def _plain(
        self, train: Table, held: Table, column: str, other: str, pair: str | None
    ) -> tuple[Sides, str, bool]:
        label = None
        if self.task == "text-classification":
            label = find_column(train, self.section.label, "label")
        sides = (
            self._plain_side(train, column, pair, label),
            self._plain_side(held, other, pair, label),
        )
        self._look(read_texts(train, column)[1])
        return sides, _unit(train), label is not None

    def _plain_side(
        self, table: Table, column: str, pair: str | None, label: str | None
    ) -> TextExamples:
        for name in (pair, label):
            find_column(table, name, "label")  # held-out rows may lack what the others have
        rows, texts = read_texts(table, column)
        if len(rows) < len(table):
            missing = len(table) - len(rows)
            self.notes.append(f"{table.name}: {missing:,} rows without a text are left out")
        kept = table.take(rows)
        pairs = labels = None
        if pair is not None:
            pairs = [value if isinstance(value, str) else "" for value in kept.columns[pair]]
        if label is not None:
            labels = ClassIds(self.config.id2label).of_column(kept, label)
        return self._examples(len(texts), partial(self._encode, texts, pairs, labels))

    def _encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        labels: Sequence[int] | None,
        places: Sequence[int],
    ) -> list[Encoding]:
        ids, types = self.encoder.texts(
            [texts[place] for place in places],
            None if pairs is None else [pairs[place] for place in places],
        )
        return [
            Encoding(
                row,
                None if types is None else types[index],
                None if labels is None else labels[places[index]],
            )
            for index, row in enumerate(ids)
        ]

    # ---- words with tags ----

    def _words(self, train: Table, held: Table, column: str, other: str) -> tuple[Sides, str, bool]:
        tags = find_column(train, self.section.label, "tags")
        sides = self._words_side(train, column, tags), self._words_side(held, other, tags)
        words = train.columns[column]
        self._look([" ".join(map(str, row)) for row in words[:_LOOKED_AT] if row])
        return sides, "sentences", tags is not None

    def _words_side(self, table: Table, column: str, tags: str | None) -> TextExamples:
        find_column(table, tags, "tags")
        check_lists(table, column)
        words = [[str(word) for word in row or ()] for row in table.columns[column]]
        kept = [row for row, one in enumerate(words) if any(word.strip() for word in one)]
        labels = None if tags is None else self._tag_ids(table, words, tags)

        def encode(places: Sequence[int]) -> list[Encoding]:
            made = []
            for row in (kept[place] for place in places):
                ids, owners, types = self.encoder.words(words[row])
                own = None if labels is None else tag_labels(owners, labels[row])
                made.append(Encoding(ids, types, own))
            return made

        return self._examples(len(kept), encode)

    def _tag_ids(
        self, table: Table, words: Sequence[Sequence[str]], column: str
    ) -> list[list[int]]:
        check_lists(table, column)
        classes = ClassIds(self.config.id2label)
        made = []
        for row, tags in enumerate(table.columns[column]):
            if len(tags or ()) != len(words[row]):
                raise InputRefused(
                    "E467",
                    "tags do not fit the words",
                    f"{table.place(row)}: {column}",
                    f"{len(tags or ())} tags, {len(words[row])} words",
                    "one tag a word",
                )
            made.append(classes.of_tags(table, row, column, tags or ()))
        return made

    # ---- shared ----

    def _examples(
        self,
        size: int,
        encode: Callable[[Sequence[int]], list[Encoding]],
        *,
        mask: MaskRule | None = None,
        predicts_next: bool = False,
    ) -> TextExamples:
        return TextExamples(
            size,
            encode,
            pad_id=_pad_id(self.tokenizer),
            limit=self.encoder.limit,
            mask=mask,
            predicts_next=predicts_next,
        )

    def _look(self, texts: Sequence[str]) -> None:
        """Note what a user should know of these texts: unknown tokens, cut ends."""
        ids = self.encoder.plain(_spread(texts))
        share = _unknown_share(ids, self.tokenizer.unk_token_id)
        if share > UNKNOWN_SHARE and self.is_builtin:
            self.notes.append(
                f"the model does not know {share:.0%} of the tokens of the built-in English "
                "sample: pass --data of the kind that it was trained on"
            )
        elif share > UNKNOWN_SHARE:
            self.notes.append(
                f"the model does not know {share:.0%} of the tokens of the data: "
                "is it of the kind that it was trained on?"
            )
        cut = sum(len(row) > self.encoder.limit for row in ids) / max(1, len(ids))
        if cut > CUT_SHARE and self.task not in LANGUAGE and not self.is_builtin:
            self.notes.append(
                f"{cut:.0%} of the texts are longer than {self.encoder.limit} tokens and are cut: "
                "data.max_length"
            )


def _refuse_head(task: str, config: Any) -> None:
    """Refuse heads that give no probabilities of classes, and those that cannot take a batch."""
    if task != "text-classification":
        return
    kind = getattr(config, "problem_type", None)
    if config.num_labels < 2 or kind in ("regression", "multi_label_classification"):
        raise InputRefused(
            "E465",
            "head of an unsupported kind",
            "config.json",
            kind or "one output, a regression",
            "one of two or more classes; --task feature-extraction keeps the body alone",
        )
    if getattr(config, "pad_token_id", None) is None:
        raise InputRefused(
            "E464",
            "the model has no padding token",
            "config.json",
            "texts of different lengths cannot share a batch",
            "pad_token_id in config.json",
        )


def _unknown_share(ids: Sequence[Sequence[int]], unknown: int | None) -> float:
    total = sum(map(len, ids))
    if unknown is None or total == 0:
        return 0.0
    return sum(list(row).count(unknown) for row in ids) / total


def _unit(table: Table) -> str:
    return "texts" if table.unit == "rows" else table.unit


def _pad_id(tokenizer: Any) -> int:
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(index) for index in found if index is not None)


def _spread(texts: Sequence[str]) -> list[str]:
    """At most 200 texts, spread evenly."""
    stride = max(1, len(texts) // _LOOKED_AT)
    return list(texts[::stride][:_LOOKED_AT])

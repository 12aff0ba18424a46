"""Data for training and measuring: from a file, a data set or the built-in sample to batches.

Every batch is a pure function of its number, so a resumed run sees what it would have seen.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hamcli.checkpoint.preprocessing import padding_id
from hamcli.data import images, texts
from hamcli.data.rows import Table, evaluation_folder, read_table
from hamcli.errors import InputRefused, RecipeError
from hamcli.recipe.schema import DataSection

__all__ = ["Data", "batch", "evaluation_batches", "label_names", "open_data"]

SPLIT_SEED = 0  # the held-out examples are the same for every seed of a run
UNKNOWN_LIMIT = 0.2
PROSE_SHARE = 0.5
GUESSES = {
    "text": ("text", "sentence", "content", "document", "smiles", "review", "body"),
    "label": ("label", "labels", "class", "target", "category"),
    "image": ("image", "img", "picture"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "labels", "pos_tags"),
}
LABELLED = ("text-classification", "image-classification", "token-classification")


class Examples(Protocol):
    """A set of examples that makes batches of any of them."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, indices: Sequence[int], seed: int, evaluating: bool) -> dict[str, Tensor]:
        """The examples at `indices`, in the keys of the model's forward."""


@dataclass(frozen=True, slots=True)
class Data:
    """Training and held-out examples.

    Attributes:
        train: Examples to learn from.
        evaluation: Examples held out.
        has_labels: Whether batches bring `labels`.
        description: What data, in words, for people.
        evaluation_description: What was held out, in words.
        notes: What a user should hear.
    """

    train: Examples
    evaluation: Examples
    has_labels: bool
    description: str
    evaluation_description: str
    notes: tuple[str, ...] = ()


def label_names(section: DataSection, task: str) -> list[str] | None:
    """Names of the classes in the data, sorted, to size a new head; None without labels."""
    if section.source is None or task not in LABELLED:
        return None
    table = read_table(section.source, section.split)
    if task == "token-classification":
        tags = _lists(table, _column(table, section.label, "tags"))
        return _sorted_names({str(tag) for row in tags for tag in row})
    labels = _find(table, section.label, "label")
    return None if labels is None else _sorted_names({str(label) for label in labels})


def _sorted_names(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))


def open_data(
    section: DataSection,
    *,
    task: str,
    tokenizer: Any,
    no_tokenizer: str = "",
    image_processor: Any,
    config: Any,
    positions: int | None = None,
) -> Data:
    """Read, split and prepare the data of a run.

    Args:
        section: The recipe's words on data.
        task: What the model does.
        tokenizer: Of the model; needed for text.
        no_tokenizer: Why there is none.
        image_processor: Of the model, or None.
        config: The model's config: its labels, sizes and channels.
        positions: Tokens that the model has a position for; None where their number is free.

    Raises:
        RecipeError: E250, examples of `max_length` tokens have more than the model has positions.
        InputRefused: A source is missing, empty or broken, a column is missing, a label unknown.
    """
    is_image = task == "image-classification"
    if section.source is None:
        train = _builtin(config, is_image)
        held = None
    else:
        train = read_table(section.source, section.split)
        held = _held_out(section)
    if held is None:
        train, held = _split(train, section.evaluation_fraction)
    if section.max_examples is not None:
        train = train.rows(range(min(len(train), section.max_examples)))
    if section.validation_fraction is not None:  # the held-out examples stay out of sight
        train, held = _split(train, section.validation_fraction)
    if is_image:
        return _image_data(section, train, held, image_processor, config)
    if tokenizer is None:
        raise InputRefused(
            "E459",
            "the model has no tokenizer",
            "data",
            no_tokenizer or "text needs one",
            "tokenizer files beside it",
        )
    return _text_data(section, train, held, task, tokenizer, config, positions)


def batch(data: Data, micro_step: int, *, batch_size: int, seed: int) -> dict[str, Tensor]:
    """The training batch of a micro-step, counted from 0: a pure function of its arguments.

    Each epoch is a permutation of its own; a batch may span two epochs, so every batch is full.
    """
    size = len(data.train)
    begin = micro_step * batch_size
    indices = []
    orders: dict[int, list[int]] = {}
    for place in range(begin, begin + batch_size):
        epoch = place // size
        if epoch not in orders:
            orders[epoch] = _order(size, seed, epoch)
        indices.append(orders[epoch][place % size])
    return data.train.batch(indices, (seed << 32) + micro_step, False)


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


def _order(size: int, seed: int, epoch: int) -> list[int]:
    key = (size, seed, epoch)
    if key not in _ORDERS:
        if len(_ORDERS) > 2:
            _ORDERS.clear()
        draw = torch.Generator().manual_seed((seed << 20) + epoch)
        _ORDERS[key] = torch.randperm(size, generator=draw).tolist()
    return _ORDERS[key]


def evaluation_batches(
    data: Data, *, batch_size: int, examples: int
) -> Iterator[dict[str, Tensor]]:
    """The held-out examples in order, at most `examples` of them; always the same batches."""
    count = min(examples, len(data.evaluation))
    for begin in range(0, count, batch_size):
        chosen = range(begin, min(begin + batch_size, count))
        yield data.evaluation.batch(chosen, begin, True)


# ---- rows ----


def _builtin(config: Any, is_image: bool) -> Table:
    if is_image:
        return Table(
            "built-in images (procedural dead leaves)", {"image": images.sample_images(config)}
        )
    text = (resources.files("hamcli.samples") / "english.txt").read_text(encoding="utf-8")
    return Table(
        "built-in English sample (State of the Union addresses, Moby-Dick)",
        {"text": text.splitlines()},
    )


def _held_out(section: DataSection) -> Table | None:
    assert section.source is not None
    if section.evaluation is not None:
        return read_table(section.evaluation, section.evaluation_split or "test")
    if section.evaluation_split is not None:
        return read_table(section.source, section.evaluation_split)
    folder = evaluation_folder(section.source)
    return read_table(folder, "") if folder is not None else None


def _split(table: Table, fraction: float) -> tuple[Table, Table]:
    size = len(table)
    held = max(1, round(size * fraction))
    if size < 2 or held >= size:
        raise InputRefused(
            "E452",
            "too few rows to hold some out",
            table.name,
            str(size),
            "at least 2, or data.evaluation",
        )
    order = list(range(size))
    random.Random(SPLIT_SEED).shuffle(order)
    return table.rows(sorted(order[held:])), table.rows(sorted(order[:held]))


def _find(table: Table, name: str | None, kind: str) -> Sequence[Any] | None:
    """The column of a kind, by name or guess; None where no guess fits."""
    if name is not None:
        if name not in table.columns:
            known = ", ".join(table.columns)
            raise InputRefused(
                "E456", "no such column", f"{table.name}: {name}", "", f"one of {known}"
            )
        return table.columns[name]
    return next((table.columns[guess] for guess in GUESSES[kind] if guess in table.columns), None)


def _column(table: Table, name: str | None, kind: str) -> Sequence[Any]:
    found = _find(table, name, kind)
    if found is None:
        known = ", ".join(table.columns)
        key = {"tags": "label"}.get(kind, kind)
        raise InputRefused(
            "E456",
            f"no column of {kind}",
            table.name,
            f"columns: {known}",
            f"--set data.{key}=COLUMN",
        )
    return found


def _strings(table: Table, values: Sequence[Any]) -> list[str]:
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise InputRefused("E454", "not text", table.row(index), f"{value!r}"[:80], "a string")
    return list(values)


def _lists(table: Table, values: Sequence[Any]) -> list[list[Any]]:
    for index, value in enumerate(values):
        if not isinstance(value, list | tuple):
            raise InputRefused("E454", "not a list", table.row(index), f"{value!r}"[:80], "a list")
    return [list(value) for value in values]


def _label_ids(table: Table, labels: Sequence[Sequence[Any]], config: Any) -> list[list[int]]:
    """The labels of each row as class ids of the model."""
    known = {str(name): int(index) for index, name in config.id2label.items()}
    made = []
    for index, row in enumerate(labels):
        ids = [_label_id(label, known) for label in row]
        if None in ids:
            shown = ", ".join(list(known)[:6])
            raise InputRefused(
                "E460",
                "label unknown to the model",
                table.row(index),
                f"{row[ids.index(None)]!r}"[:80],
                f"0 to {len(known) - 1}, or one of {shown}",
            )
        made.append([one for one in ids if one is not None])
    return made


def _label_id(label: Any, known: Mapping[str, int]) -> int | None:
    """Class id of a label, which is a name or the id itself; None where it is neither."""
    found = known.get(str(label))
    if found is None and (isinstance(label, int) or str(label).isdecimal()):
        return int(label) if 0 <= int(label) < len(known) else None
    return found


def _class_ids(section: DataSection, table: Table, config: Any) -> list[int] | None:
    """Class id of each row; None without a column of labels."""
    labels = _find(table, section.label, "label")
    if labels is None:
        return None
    return [one for [one] in _label_ids(table, [[label] for label in labels], config)]


# ---- kinds ----


def _image_data(
    section: DataSection, train: Table, held: Table, processor: Any, config: Any
) -> Data:
    pictures = _column(train, section.image, "image")
    form, note = images.image_form(config, processor, pictures, section.mean, section.std)

    def made(table: Table) -> images.ImageSet:
        chosen = _column(table, section.image, "image")
        ids = _class_ids(section, table, config)
        return images.ImageSet(chosen, ids, form, images.decode_all(chosen, form))

    first, second = made(train), made(held)
    if (first.labels is None) != (second.labels is None):
        raise InputRefused("E456", "only one of training and held-out data has labels", train.name)
    return _described(first, second, first.labels is not None, train, held, "images", (note,))


def _text_data(
    section: DataSection,
    train: Table,
    held: Table,
    task: str,
    tokenizer: Any,
    config: Any,
    positions: int | None,
) -> Data:
    unit = "texts"
    if task in ("causal-lm", "masked-lm"):
        rule = _mask_rule(section, tokenizer, config) if task == "masked-lm" else None
        packs = task == "causal-lm" if section.pack == "auto" else bool(section.pack)
        if task == "masked-lm" and section.pack == "auto":
            packs = _is_prose(tokenizer, _texts(train, section), section.max_length)
        unit = f"blocks of {section.max_length} tokens" if packs else "texts"
        first = _language_set(section, train, tokenizer, packs, rule)
        second = _language_set(section, held, tokenizer, packs, rule)
        has_labels = True
    elif task == "token-classification" and section.source is not None:
        first = _tag_set(section, train, tokenizer, config)
        second = _tag_set(section, held, tokenizer, config)
        has_labels = True
    else:
        first = _plain_set(section, train, task, tokenizer, config)
        second = _plain_set(section, held, task, tokenizer, config)
        has_labels = first.labels is not None and second.labels is not None
    notes = (_unknown_note(first, tokenizer, section.source is None),)
    first = _within(first, section.max_length, positions)
    second = _within(second, section.max_length, positions)
    return _described(first, second, has_labels, train, held, unit, notes)


def _within(part: texts.TokenSet, max_length: int, positions: int | None) -> texts.TokenSet:
    """The same, filled up to no more tokens than the model has positions."""
    if positions is None:
        return part
    longest = max(map(len, part.ids), default=0)
    if longest > positions:
        raise RecipeError(
            "E250",
            "the model has fewer positions than the texts have tokens",
            "data.max_length",
            f"{positions} positions, a text of {longest} tokens where max_length is {max_length}",
            f"max_length at most {positions}",
        )
    return replace(part, limit=positions)


def _described(
    first: Examples,
    second: Examples,
    has_labels: bool,
    train: Table,
    held: Table,
    unit: str,
    notes: Sequence[str],
) -> Data:
    for part, table in ((first, train), (second, held)):
        if len(part) == 0:
            raise InputRefused("E452", "data gives no example", table.name, "too short")
    labelled = "with labels" if has_labels else "without labels"
    return Data(
        first,
        second,
        has_labels,
        f"{_short(train.name)}: {len(first):,} {unit}, {labelled}",
        f"{len(second):,} held-out {unit} of {_short(held.name)}",
        tuple(note for note in notes if note),
    )


def _short(name: str) -> str:
    """A source without the folders that lead to it."""
    return "/".join(Path(name).parts[-2:]) if "/" in name and Path(name).exists() else name


def _texts(table: Table, section: DataSection) -> list[str]:
    return _strings(table, _column(table, section.text, "text"))


def _is_prose(tokenizer: Any, lines: Sequence[str], max_length: int) -> bool:
    ids, _ = texts.encode(tokenizer, lines[:200], None, max_length=max_length, special=False)
    return sum(map(len, ids)) / max(1, len(ids)) > PROSE_SHARE * max_length


def _mask_rule(section: DataSection, tokenizer: Any, config: Any) -> texts.MaskRule:
    if tokenizer.mask_token_id is None:
        raise InputRefused("E459", "the tokenizer has no mask token", "data", "", "another --task")
    special = tuple(sorted(set(tokenizer.all_special_ids)))
    return texts.MaskRule(
        section.mask_probability, tokenizer.mask_token_id, config.vocab_size, special
    )


def _language_set(
    section: DataSection, table: Table, tokenizer: Any, packs: bool, rule: texts.MaskRule | None
) -> texts.TokenSet:
    lines = _texts(table, section)
    length = section.max_length
    if packs:
        ids = texts.pack(tokenizer, lines, max_length=length, is_causal=rule is None)
    else:
        ids, _ = texts.encode(tokenizer, lines, None, max_length=length, special=True)
    minimum = 2 if rule is None else 1
    kept = [row for row in ids if len(row) >= minimum]
    return texts.TokenSet(kept, None, None, padding_id(tokenizer), rule, rule is None)


def _plain_set(
    section: DataSection, table: Table, task: str, tokenizer: Any, config: Any
) -> texts.TokenSet:
    lines = _texts(table, section)
    pairs = None
    if section.text_pair is not None:
        pairs = _strings(table, _column(table, section.text_pair, "text"))
    ids, types = texts.encode(tokenizer, lines, pairs, max_length=section.max_length, special=True)
    labels = _class_ids(section, table, config) if task == "text-classification" else None
    return texts.TokenSet(ids, types, labels, padding_id(tokenizer))


def _tag_set(section: DataSection, table: Table, tokenizer: Any, config: Any) -> texts.TokenSet:
    words = _lists(table, _column(table, section.tokens, "tokens"))
    tags = _lists(table, _column(table, section.label, "tags"))
    for index, (row, row_tags) in enumerate(zip(words, tags, strict=True)):
        if len(row) != len(row_tags):
            raise InputRefused(
                "E454",
                "tokens and tags differ in number",
                table.row(index),
                f"{len(row)} and {len(row_tags)}",
            )
        if not all(isinstance(word, str) for word in row):
            raise InputRefused("E454", "not text", table.row(index), f"{row!r}"[:80], "strings")
    numbered = _label_ids(table, tags, config)
    ids, labels = texts.align_tags(tokenizer, words, numbered, section.max_length)
    return texts.TokenSet(ids, None, labels, padding_id(tokenizer))


def _unknown_note(first: texts.TokenSet, tokenizer: Any, is_builtin: bool) -> str:
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return ""
    chosen = first.ids[:200]
    total = sum(len(row) for row in chosen)
    share = sum(token == unknown for row in chosen for token in row) / max(1, total)
    if share <= UNKNOWN_LIMIT:
        return ""
    what = "the built-in sample does not suit it; pass --data"
    if not is_builtin:
        what = "this data does not suit it"
    return f"{share:.0%} of the tokens are unknown to the model: {what}"

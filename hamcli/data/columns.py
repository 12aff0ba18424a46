"""Which column is what: by the recipe's word, else by the usual names.

text    text, sentence, content, ... ; a table with one column of text needs no known name
label   label, labels, class, target, ...
image   image, img, picture, ...
tokens  tokens, words; their tags: ner_tags, tags, labels, ...
"""

from collections.abc import Sequence
from typing import Any

from hamcli.data.table import Table
from hamcli.errors import InputRefused

_GUESSES = {
    "text": (
        "text",
        "sentence",
        "content",
        "document",
        "smiles",
        "sequence",
        "review",
        "body",
        "article",
        "abstract",
        "question",
        "sentence1",
        "premise",
        "question1",
        "prompt",
        "tweet",
        "title",
    ),
    "label": (
        "label",
        "labels",
        "class",
        "target",
        "category",
        "sentiment",
        "intent",
        "label_text",
    ),
    "image": ("image", "img", "picture", "photo", "pixels", "image_path", "file_name"),
    "tokens": ("tokens", "words"),
    "tags": ("ner_tags", "tags", "labels", "label", "pos_tags", "chunk_tags", "upos"),
}
_PAIRS = {
    "sentence1": "sentence2",
    "premise": "hypothesis",
    "question1": "question2",
    "question": "sentence",
    "text1": "text2",
}
_KEY_OF = {"tags": "label"}
_PEEK_ROWS = 100


def find_column(table: Table, asked: str | None, kind: str) -> str | None:
    """The name of the column of a kind: the one asked for, a usual one, or None.

    Raises:
        InputRefused: E456, the one asked for does not exist.
    """
    if asked is not None:
        if asked not in table.columns:
            raise InputRefused(
                "E456", "no such column", f"{table.name}: {asked}", "", f"one of {_shown(table)}"
            )
        return asked
    lower = {name.lower(): name for name in reversed(list(table.columns))}
    return next((lower[guess] for guess in _GUESSES[kind] if guess in lower), None)


def need_column(table: Table, asked: str | None, kind: str) -> str:
    """As `find_column`; none is an error that lists the columns.

    Raises:
        InputRefused: E456, there is none.
    """
    found = find_column(table, asked, kind)
    if found is None and kind == "text":
        found = _only_text(table)
    if found is None:
        raise InputRefused(
            "E456",
            f"no column of {kind}",
            table.name,
            f"its columns are {_shown(table)}",
            f"--set data.{_KEY_OF.get(kind, kind)}=COLUMN",
        )
    return found


def pair_of(table: Table, text: str, asked: str | None) -> str | None:
    """The column of second texts: the one asked for, or the usual partner of `text`."""
    if asked is not None:
        return find_column(table, asked, "text")
    lower = {name.lower(): name for name in table.columns}
    return lower.get(_PAIRS.get(text.lower(), ""))


def read_texts(table: Table, column: str) -> tuple[list[int], list[str]]:
    """Rows that hold a text, and the texts. Rows with none or a blank one are left out.

    Raises:
        InputRefused: E454, a value is no text.
    """
    rows, texts = [], []
    for row, value in enumerate(table.columns[column]):
        if value is None:
            continue
        if not isinstance(value, str):
            raise InputRefused(
                "E454",
                "not text",
                f"{table.place(row)}: {column}",
                f"a {type(value).__name__}, {brief(value)}",
                "a column of texts: --set data.text=COLUMN",
            )
        if value.strip():
            rows.append(row)
            texts.append(value)
    return rows, texts


def check_lists(table: Table, column: str) -> None:
    """Refuse a column of words or tags that holds anything but lists.

    Raises:
        InputRefused: E454.
    """
    for row, value in enumerate(table.columns[column]):
        if value is not None and not isinstance(value, list | tuple):
            place = f"{table.place(row)}: {column}"
            why = f"a {type(value).__name__}, {brief(value)}"
            raise InputRefused("E454", "not a list", place, why, "a list of words or tags a row")


def brief(value: Any) -> str:
    """A value as shown in a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _only_text(table: Table) -> str | None:
    named = [name for name in table.columns if _is_text(table.columns[name])]
    return named[0] if len(named) == 1 and len(table.columns) <= 2 else None


def _is_text(values: Sequence[Any]) -> bool:
    seen = [value for value in values[:_PEEK_ROWS] if value is not None]
    return bool(seen) and all(isinstance(value, str) for value in seen)


def _shown(table: Table) -> str:
    names = list(table.columns)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")

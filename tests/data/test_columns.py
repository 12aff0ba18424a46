"""Columns: asked for, guessed, or an error that lists them."""

import pytest

from hamcli.data.columns import find_column, need_column, pair_of, read_texts
from hamcli.data.table import Table
from hamcli.errors import InputRefused


def table(**columns):
    return Table("data", "rows", columns, lambda row: f"data:{row + 1}", "")


def test_the_usual_names_are_guessed_whatever_their_case():
    found = table(id=[1], Sentence=["x"], Label=[0])
    assert need_column(found, None, "text") == "Sentence"
    assert find_column(found, None, "label") == "Label"


def test_text_comes_before_weaker_names():
    assert need_column(table(title=["x"], text=["y"]), None, "text") == "text"


def test_the_recipe_decides():
    assert need_column(table(text=["x"], body=["y"]), "body", "text") == "body"


def test_the_only_text_needs_no_known_name():
    assert need_column(table(mol=["CCO"], label=[1]), None, "text") == "mol"


def test_a_missing_column_lists_those_there_are():
    with pytest.raises(InputRefused) as caught:
        need_column(table(first=["x"], second=["y"]), None, "text")
    assert caught.value.line() == (
        "ham: error[HAM-E456]: no column of text: data: its columns are first, second "
        "(--set data.text=COLUMN)"
    )
    with pytest.raises(InputRefused, match=r"no such column: data: body \(one of text\)"):
        need_column(table(text=["x"]), "body", "text")


def test_the_tags_column_is_named_by_the_label_key():
    with pytest.raises(InputRefused, match=r"--set data\.label=COLUMN"):
        need_column(table(words=[["x"]]), None, "tags")


def test_pairs_are_guessed_from_their_first_text():
    found = table(premise=["x"], hypothesis=["y"])
    assert pair_of(found, "premise", None) == "hypothesis"
    assert pair_of(table(text=["x"], other=["y"]), "text", None) is None
    assert pair_of(table(text=["x"], other=["y"]), "text", "other") == "other"


def test_rows_without_text_are_left_out():
    assert read_texts(table(text=["x", None, " \n", "y"]), "text") == ([0, 3], ["x", "y"])


def test_values_that_are_no_text_are_refused_at_their_row():
    with pytest.raises(InputRefused, match="not text: data:2: text: a int, 7"):
        read_texts(table(text=["x", 7]), "text")

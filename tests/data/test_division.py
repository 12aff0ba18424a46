"""What is held out: by content alone, exactly as many, equal rows on one side."""

import pytest

from hamcli.data.division import capped, content_order, divide
from hamcli.data.table import Table
from hamcli.errors import InputRefused


def table(values):
    return Table("data", "rows", {"text": values}, lambda row: f"data:{row + 1}", "")


def sides(values, fraction=0.1):
    return [list(side.columns["text"]) for side in divide(table(values), values, fraction)]


TEXTS = [f"text {number}" for number in range(200)]


def test_the_share_is_exact_and_every_row_is_on_one_side():
    train, held = sides(TEXTS)
    assert len(held) == 20
    assert sorted(train + held) == sorted(TEXTS)


def test_the_order_of_rows_does_not_matter():
    assert set(sides(TEXTS)[1]) == set(sides(TEXTS[::-1])[1])


def test_rows_keep_the_order_of_the_file():
    for side in sides(TEXTS):
        assert side == [text for text in TEXTS if text in set(side)]


def test_equal_rows_stand_on_one_side():
    for number in range(2, 40):
        train, held = sides(TEXTS[:number] * 3, 0.3)
        assert not set(train) & set(held)


def test_more_rows_move_few_others():
    before = set(sides(TEXTS)[1])
    after = set(sides([*TEXTS, "one more"])[1])
    assert len(before - after) <= 1


def test_places_are_those_of_the_whole():
    train, held = divide(table(TEXTS), TEXTS, 0.1)
    for side in (train, held):
        for row, text in enumerate(side.columns["text"]):
            assert side.place(row) == f"data:{int(text.split()[1]) + 1}"


@pytest.mark.parametrize("values", [["x"], ["x"] * 50])
def test_too_few_different_rows_are_refused(values):
    with pytest.raises(InputRefused, match="too few rows to hold some out: data: 1 different rows"):
        sides(values)


def test_two_rows_are_enough():
    train, held = sides(["x", "y"], 0.01)
    assert (len(train), len(held)) == (1, 1)


def test_a_cap_takes_no_prefix():
    rows = list(capped(table(TEXTS), "text", 50).columns["text"])
    assert len(rows) == 50
    assert rows != TEXTS[:50]
    assert rows == sorted(rows, key=TEXTS.index)
    assert len(capped(table(TEXTS), "text", None)) == 200


def test_images_are_told_apart_by_their_bytes():
    order = content_order([{"bytes": b"1", "path": "x"}, {"bytes": b"2", "path": "x"}, b"1"])
    # the first and the last are the same image, so they stand side by side, first come first
    assert order in ([0, 2, 1], [1, 0, 2])

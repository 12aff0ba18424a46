"""Labels to class ids: by name, by number, or refused at their row."""

import pytest

from hamcli.data.labels import ClassIds, names_of
from hamcli.data.table import Table
from hamcli.errors import InputRefused


def table(labels, names=()):
    known = {"label": tuple(names)} if names else {}
    place = lambda row: f"data.jsonl:{row + 1}"  # noqa: E731 - a stand-in for the reader's
    return Table("data.jsonl", "rows", {"label": labels}, place, "", class_names=known)


def ids(labels, classes=("ham", "spam"), names=()):
    found = ClassIds(dict(enumerate(classes)))
    return found.of_column(table(labels, names), "label")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["spam", "ham"], [1, 0]),
        (["Spam ", "HAM"], [1, 0]),
        ([1, 0], [1, 0]),
        (["1", "0"], [1, 0]),
        ([True, False], [1, 0]),
        ([1.0, 0.0], [1, 0]),
    ],
)
def test_names_and_numbers_are_classes(labels, expected):
    assert ids(labels) == expected


def test_a_name_that_looks_like_a_number_is_a_name():
    assert ids(["7", "3"], classes=("3", "7")) == [1, 0]


def test_names_that_differ_in_case_alone_are_told_apart():
    assert ids(["a", "A"], classes=("A", "a")) == [1, 0]


def test_the_datas_own_names_decide_what_its_numbers_mean():
    assert ids([0, 1], names=("spam", "ham")) == [1, 0]
    # names that the model does not know say nothing
    assert ids([0, 1], names=("no", "yes")) == [0, 1]


@pytest.mark.parametrize(
    ("label", "code"),
    [
        (2, "E460"),
        (-1, "E460"),
        ("eggs", "E460"),
        (0.5, "E460"),
        ("9" * 400, "E460"),
        ("²", "E460"),
        ([0], "E460"),
        (float("nan"), "E460"),
        (None, "E461"),
        ("", "E461"),
    ],
)
def test_any_other_label_is_refused_at_its_row(label, code):
    with pytest.raises(InputRefused) as caught:
        ids(["ham", label])
    assert (caught.value.code, caught.value.exit_code) == (code, 4)
    assert "data.jsonl:2: label" in caught.value.line()
    assert "0 to 1, or one of ham, spam" in caught.value.line()


def test_tags_without_a_class_stay_out_of_the_loss():
    found = ClassIds({0: "O", 1: "B"})
    assert found.of_tags(table([]), 0, "label", ["B", None, -100, 0]) == [1, -100, -100, 0]


def names(labels, known=()):
    return names_of(table(labels, known), "label", labels)


def test_new_classes_are_sorted_names():
    assert names(["spam", "ham", "spam", None, " ham"]) == ["ham", "spam"]


def test_new_classes_of_numbers_count_from_zero():
    assert names([3, 1, 1]) == ["0", "1", "2", "3"]
    assert names(["10", "2"]) == [str(number) for number in range(11)]


def test_new_classes_are_those_the_data_names():
    assert names([0, 0], ("no", "yes")) == ["no", "yes"]


@pytest.mark.parametrize("labels", [[0, -1], [0, 10**9], [0.5, 1.0], [[1], [2]], range(20_000)])
def test_values_that_are_no_classes_are_refused(labels):
    with pytest.raises(InputRefused) as caught:
        names(labels)
    assert caught.value.code == "E462"

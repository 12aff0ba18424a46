import dataclasses

import pytest
from report_samples import HOSTILE, report

from hamcli.report import wording
from hamcli.report.records import GateCondition, SizeRecord, SparsityRecord

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.9, "90.00%"),
        (1.0, "100.00%"),
        (0.999999, ">99.99%"),
        (0.0, "0.00%"),
        (1e-9, "<0.01%"),
        (0.12345, "12.35%"),
        (2.5, "250.00%"),
        (None, wording.UNKNOWN),
    ],
)
def test_percent_never_shows_nearly_all_as_all(fraction, text):
    assert wording.percent(fraction) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_500, "1.50 kB"),
        (90_864_192, "90.9 MB"),
        (5_726_000_000, "5.73 GB"),
    ],
)
def test_bytes_are_counted_in_powers_of_ten(size_bytes, text):
    assert wording.megabytes(size_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.14159, "3.142"),
        (20000.0, "20,000"),
        (1234567.0, "1,234,567"),
        (4e-05, f"4e{MINUS}5"),
        (-0.25, f"{MINUS}0.25"),
        (0.0, "0"),
        (1e12, "1e12"),
    ],
)
def test_numbers_keep_four_digits(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (22_713_216, "22.7 M"), (1_100_000_000, "1.1 G")]
)
def test_counts_are_shortened_to_three_digits(number, text):
    assert wording.short_count(number) == text


@pytest.mark.parametrize("text", HOSTILE.values())
def test_names_are_printable_and_short(text):
    shown = wording.name(text)
    assert shown.isprintable()
    assert len(shown) <= wording.NAME_LIMIT
    assert wording.sentence(text).isprintable()
    assert len(wording.sentence(text)) <= wording.TEXT_LIMIT


def test_a_long_name_keeps_both_its_ends():
    shown = wording.name("model." + "x" * 500 + ".weight")
    assert shown.startswith("model.")
    assert shown.endswith(".weight")


@pytest.mark.parametrize(
    ("metric", "lost", "higher", "text"),
    [
        ("accuracy", 0.0062, True, "0.62 points lower than dense"),
        ("accuracy", -0.01, True, "1.00 points higher than dense"),
        ("cosine to dense", 0.0588, True, "0.0588 lower than dense"),
        ("perplexity", 0.031, False, "3.10% higher than dense"),
        ("perplexity", -0.031, False, "3.10% lower than dense"),
        ("accuracy", 0.0, True, "no change from dense"),
        ("accuracy", None, True, "change not measured"),
    ],
)
def test_a_drop_says_its_size_and_its_way(metric, lost, higher, text):
    quality = dataclasses.replace(
        report().quality, metric=metric, drop=lost, higher_is_better=higher
    )
    assert wording.drop(quality) == text


@pytest.mark.parametrize(
    ("zeros", "text"),
    [(90, "exactly as asked"), (92, "2 more than asked"), (89, "1 fewer than asked")],
)
def test_zeros_are_held_against_what_was_asked(zeros, text):
    record = SparsityRecord.counted(0.9, zeros=zeros, total=100, num_parameters=100)
    assert wording.exactness(record) == text


def test_a_failed_condition_shows_the_digits_that_failed_it():
    words = wording.condition(GateCondition("max_drop", 0.01, 0.01000000002, passed=False))
    assert words == "drop 0.01000000002, at most 0.01"


def test_a_passed_condition_is_short():
    words = wording.condition(GateCondition("min_sparsity", 0.9, 0.90000000002, passed=True))
    assert words == "sparsity 0.9, at least 0.9"


def test_a_dense_file_is_not_called_smaller():
    line = wording.size_line(SizeRecord(1000, gzip_bytes=400, input_bytes=1000))
    assert line.startswith("File size unchanged")
    assert "400 B if compressed with gzip" in line


def test_a_file_of_another_size_is_told_by_how_much():
    assert "500 B smaller" in wording.size_line(SizeRecord(1000, input_bytes=1500))
    assert "500 B larger" in wording.size_line(SizeRecord(1500, input_bytes=1000))

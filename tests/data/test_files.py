"""Files of rows: what is read, and where what is not is."""

import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hamcli.data.files import read_files
from hamcli.errors import HamError, InputRefused
from tests.data.makers import write_jsonl


def read(*paths):
    return read_files(list(paths), "data")


def column(table, name="text"):
    return list(table.columns[name])


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path):
    with pytest.raises(InputRefused) as caught:
        read(path)
    return caught.value


# ---- text ----


def test_lines_are_rows_and_know_their_numbers(tmp_path):
    table = read(written(tmp_path, "a.txt", "CCO\nc1ccccc1\r\n  \nN\n"))
    # one blank line among three would make paragraphs: see below
    assert column(table) == ["CCO\nc1ccccc1", "N"]
    table = read(written(tmp_path, "b.txt", "CCO\nc1ccccc1\r\nN\n\n"))
    assert column(table) == ["CCO", "c1ccccc1", "N"]
    assert (table.unit, table.place(1)) == ("lines", "b.txt:2")


def test_one_stray_blank_line_in_many_makes_no_paragraphs(tmp_path):
    lines = ["C"] * 150
    table = read(written(tmp_path, "a.txt", "\n".join([*lines[:70], "", *lines[70:]])))
    assert (len(table), table.unit) == (150, "lines")
    assert table.place(70) == "a.txt:72"


def test_blocks_between_blank_lines_are_paragraphs_with_their_line_breaks(tmp_path):
    table = read(written(tmp_path, "a.txt", "\n\nCall me\nIshmael.\n\n\nSome years\nago.\n"))
    assert column(table) == ["Call me\nIshmael.", "Some years\nago."]
    assert (table.unit, table.place(1)) == ("paragraphs", "a.txt:7")


def test_only_a_line_feed_ends_a_line(tmp_path):
    table = read(written(tmp_path, "a.txt", "one\x0cstill\u2028one\ntwo\n"))
    assert column(table) == ["one\x0cstill\u2028one", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert column(read(written(tmp_path, "a.txt", b"\xef\xbb\xbfone\ntwo\n"))) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("a.txt", b"good\nb\xe9d\n", "E455", "a.txt:2"),
        ("a.txt", b"\xff\xfeo\x00n\x00e\x00", "E455", "a.txt:1"),
        ("a.txt", b"one\ntwo\nth\x00ree\n", "E455", "a.txt:3"),
        ("a.txt", b"", "E452", "no rows"),
        ("a.txt", b"\n \n", "E452", "no rows"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "E457", "a.jsonl:3"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "E457", "a.jsonl:2: a list"),
        ("a.jsonl", b"[" * 100_000, "E457", "a.jsonl:1: nested too deep"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "E457", "a.jsonl:1: a number too long"),
        ("a.jsonl", b"\n", "E452", "no rows"),
        ("a.csv", b"text,label\nx,0\ny\n", "E458", "a.csv:3: 1 cells where the header has 2"),
        ("a.csv", b'text\n"never closed\n', "E458", "a.csv:2"),
        ("a.csv", b"text,text\nx,y\n", "E458", "two columns named 'text'"),
        ("a.csv", b"text,label\n", "E452", "no rows"),
        ("a.csv", b"", "E452", "no rows"),
        ("a.parquet", b"PAR1 or so", "E459", "not parquet"),
        ("a.parquet", b"", "E459", "not parquet"),
        ("a.docx", b"x", "E451", "unknown kind"),
        ("a.json", b"[]", "E451", ".jsonl"),
    ],
)
def test_broken_files_are_refused_at_their_place(tmp_path, name, content, code, words):
    error = refusal(written(tmp_path, name, content))
    assert (error.code, error.exit_code) == (code, 4)
    assert words in error.line()


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    begun = time.monotonic()
    assert refusal(tmp_path / "pipe.txt").code == "E451"
    assert refusal(tmp_path / "zero.txt").code == "E451"
    assert refusal(tmp_path / "missing.txt").code == "E450"
    assert time.monotonic() - begun < 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_no_fault_of_the_data(tmp_path):
    path = written(tmp_path, "a.txt", "x")
    path.chmod(0)
    with pytest.raises(HamError) as caught:
        read(path)
    assert (caught.value.code, caught.value.exit_code) == ("E545", 5)


# ---- rows ----


def test_rows_may_lack_keys(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "x"}, {"text": "y", "label": 1}])
    table = read(path)
    assert column(table, "label") == [None, 1]


def test_csv_keeps_quoted_commas_and_line_breaks(tmp_path):
    table = read(written(tmp_path, "a.csv", 'text,label\n"one, ""two""\nthree",ham\nx,spam\n'))
    assert column(table) == ['one, "two"\nthree', "x"]
    assert table.place(1) == "a.csv:4"


def test_csv_cells_may_be_longer_than_the_modules_default(tmp_path):
    table = read(written(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n"))
    assert len(column(table)[0]) == 200_000


def test_tabs_separate_in_tsv(tmp_path):
    table = read(written(tmp_path, "a.tsv", "text\tlabel\none, two\t1\n"))
    assert (column(table), column(table, "label")) == (["one, two"], ["1"])


def test_files_of_a_kind_are_read_one_after_another(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "z", "label": 1}])
    table = read(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert column(table) == ["x", "y", "z"]
    assert column(table, "label") == [None, None, 1]
    assert [table.place(row) for row in range(3)] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]


def test_parquet_files_are_read_column_by_column(tmp_path):
    for name, rows in (("a", [1, 2, 3]), ("b", [4])):
        table = pa.table({"n": rows, "text": [f"text {row}" for row in rows]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    table = read(tmp_path / "a.parquet", tmp_path / "b.parquet")
    values = table.columns["n"]
    assert (list(values), values[3], values[1:3], len(table)) == ([1, 2, 3, 4], 4, [2, 3], 4)
    assert table.place(3) == "b.parquet: row 0"
    assert column(table.take([3, 0])) == ["text 4", "text 1"]


def test_parquet_files_of_other_columns_do_not_fit_together(tmp_path):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(InputRefused, match=r"b\.parquet: its columns are not those of a\.parquet"):
        read(tmp_path / "a.parquet", tmp_path / "b.parquet")


def test_names_of_classes_are_read_from_the_schema(tmp_path):
    from datasets import ClassLabel, Dataset, Features, List, Value

    names = ClassLabel(names=["ham", "spam"])
    features = Features({"text": Value("string"), "label": names, "tags": List(names)})
    rows = {"text": ["x"], "label": [1], "tags": [[0, 1]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet").class_names
    assert found == {"label": ("ham", "spam"), "tags": ("ham", "spam")}


def test_a_schema_that_lies_about_classes_is_passed_over(tmp_path):
    metadata = {b"huggingface": b'{"info": {"features": {"label": {"names": [1, {}]}}}}'}
    schema = pa.schema([("label", pa.int64())], metadata=metadata)
    pq.write_table(pa.table({"label": [0]}, schema=schema), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").class_names == {}


def test_the_digest_is_that_of_the_bytes(tmp_path):
    one = read(written(tmp_path, "a.txt", "x\ny\n")).digest
    assert read(written(tmp_path, "b.txt", "x\ny\n")).digest == one
    assert read(written(tmp_path, "a.txt", "x\nz\n")).digest != one

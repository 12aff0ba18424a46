import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import HOSTILE, SAMPLES, bare, report

from hamcli.errors import InputRefused
from hamcli.report.records import (
    CURVE_LIMIT,
    REPORT_NAME,
    Curves,
    GateCondition,
    GateRecord,
    Report,
    SparsityRecord,
    TensorRecord,
    read_report,
)

# The contract of report.json: more keys may stand beside these, none of these may go.
CONTRACT = {
    "ham_version": None,
    "model": {"id", "revision", "sha256"},
    "recipe": None,
    "environment": {"versions", "device", "threads"},
    "sparsity": {"target", "achieved", "zeros", "total", "overall_achieved", "threshold"},
    "quality": {"metric", "dense", "sparse", "drop", "data", "num_examples"},
    "size": {"dense_bytes", "packed_bytes", "gzip_bytes"},
    "speed": None,
    "training": {"steps", "seconds", "ham_moved_fraction", "sign_flips", "curves"},
    "gate": None,
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_json_reads_back_as_the_same_report(sample):
    made = SAMPLES[sample]()
    assert Report.from_json(made.to_json()) == made


def test_every_key_of_the_contract_is_there():
    document = report().to_dict()
    for key, inner in CONTRACT.items():
        assert key in document
        assert inner is None or inner <= document[key].keys()
    assert document["tensors"][0].keys() == {"name", "shape", "dtype", "zeros", "total", "sparsity"}
    assert document["files"][0].keys() >= {"path", "bytes"}


def test_a_bare_report_has_the_same_keys_as_a_full_one():
    assert bare().to_dict().keys() == report().to_dict().keys()


def test_speed_is_an_honest_null_with_a_reason():
    document = report().to_dict()
    assert document["speed"] is None
    assert "No speed-up is claimed" in document["speed_reason"]


def test_volatile_names_only_fields_that_can_exist():
    document = report().to_dict()
    for name in document["volatile"]:
        room, _, field = name.partition(".")
        assert room in document
        assert not field or field in document[room]


def test_json_is_sorted_ascii_and_free_of_control_bytes():
    text = SAMPLES["hostile"]().to_json()
    assert set(text.encode()) <= {0x0A, *range(0x20, 0x7F)}
    document = json.loads(text)
    assert list(document) == sorted(document)
    assert [tensor["name"] for tensor in document["tensors"]] == list(HOSTILE.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_numbers_that_are_not_finite_become_null(value):
    base = report()
    made = dataclasses.replace(base, training=dataclasses.replace(base.training, seconds=value))
    assert json.loads(made.to_json())["training"]["seconds"] is None


def test_numpy_integers_stay_integers():
    made = dataclasses.replace(bare(), recipe={"steps": np.int64(3), "lr": np.float32(0.5)})
    assert '"steps": 3\n' in made.to_json()
    assert '"lr": 0.5,' in made.to_json()


@settings(derandomize=True, deadline=None)
@given(
    st.recursive(
        st.text() | st.integers() | st.booleans() | st.none() | st.just([1.5, 2.0]),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
def test_compact_number_lists_change_no_value(value):
    made = dataclasses.replace(bare(), recipe={"any": value})
    assert json.loads(made.to_json())["recipe"] == {"any": value}


def test_a_list_of_numbers_stands_on_one_line():
    assert '"shape": [2, 2]' in bare().to_json()


@pytest.mark.parametrize("text", ["[\n 1,\n 2\n]", "[ 1,   2 ]", "[   ]"])
def test_text_that_looks_like_a_list_is_left_alone(text):
    made = dataclasses.replace(bare(), warnings=(text,))
    assert Report.from_json(made.to_json()).warnings == (text,)


@pytest.mark.parametrize(
    ("target", "total", "asked"),
    [
        (0.9, 10, 9),
        (0.5, 3, 2),
        (0.5, 5, 2),
        (0.7, 5, 4),
        (1.0, 7, 7),
        (0.0, 7, 0),
        (0.29, 100, 29),
        (0.9, 10**16 + 1, 9 * 10**15 + 1),
        (1e-05, 50_000, 0),
    ],
)
def test_asked_zeros_round_half_to_even_without_float_error(target, total, asked):
    record = SparsityRecord.counted(target, zeros=0, total=total, num_parameters=total)
    assert record.asked_zeros == asked


def test_fractions_follow_from_the_counts():
    record = SparsityRecord.counted(0.9, zeros=9, total=12, num_parameters=36)
    assert (record.achieved, record.overall_achieved) == (0.75, 0.25)
    empty = TensorRecord.counted("w", shape=(0, 3), dtype="F32", zeros=0, total=0)
    assert empty.sparsity == 0.0


def test_a_gate_passes_only_when_all_its_conditions_do():
    good = GateCondition("min_sparsity", 0.9, 0.9, passed=True)
    bad = GateCondition("max_drop", 0.01, 0.02, passed=False)
    assert GateRecord.of(good).passed
    assert not GateRecord.of(good, bad).passed


def test_curves_keep_first_and_last_step_of_a_long_run():
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 50_001)]
    curves = Curves.from_rows(rows)
    assert len(curves.step) == CURVE_LIMIT
    assert (curves.step[0], curves.step[-1]) == (1, 50_000)
    assert list(curves.step) == sorted(set(curves.step))


def test_curves_hold_null_where_a_row_has_no_number():
    curves = Curves.from_rows([{"step": 1, "loss": math.nan}, {"step": 2, "loss": 0.5}])
    assert curves.loss == (None, 0.5)
    assert curves.lr == (None, None)


def test_keys_of_a_later_version_are_passed_over():
    document = bare().to_dict()
    document["later"] = 1
    document["model"]["later"] = 1
    assert Report.from_dict(document) == bare()


def broken(**changes):
    return json.dumps({**bare().to_dict(), **changes})


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", ""),
        ("[" * 100_000, ""),
        ("[]", "schema_version"),
        ("{}", "schema_version"),
        (broken(schema_version=99), "schema_version"),
        (broken(schema_version="1"), "schema_version"),
        (broken(model=None), "model"),
        (broken(model={}), "model.id"),
        (broken(ham_version=1), "ham_version"),
        (broken(files=[{"path": "x", "bytes": True}]), "files[0].bytes"),
        (broken(files=[{"path": "x", "bytes": 1.5}]), "files[0].bytes"),
        (broken(sparsity={**bare().to_dict()["sparsity"], "target": None}), "sparsity.target"),
        (broken(tensors=[[]]), "tensors[0]"),
        (broken(warnings=[1]), "warnings[0]"),
    ],
)
def test_what_is_no_report_is_refused_with_its_place(tmp_path, text, where):
    (tmp_path / REPORT_NAME).write_text(text)
    with pytest.raises(InputRefused) as caught:
        read_report(tmp_path)
    assert caught.value.code == "E447"
    assert caught.value.where == f"{tmp_path / REPORT_NAME}" + (f": {where}" if where else "")


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"a": "\xff"}'])
def test_bytes_that_are_no_text_are_refused(tmp_path, content):
    (tmp_path / REPORT_NAME).write_bytes(content)
    with pytest.raises(InputRefused, match="UTF-8"):
        read_report(tmp_path)


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(InputRefused) as caught:
        read_report(tmp_path)
    assert caught.value.code == "E446"


def test_a_report_is_read_by_its_folder_or_by_its_name(tmp_path):
    (tmp_path / REPORT_NAME).write_text(bare().to_json())
    assert read_report(tmp_path) == read_report(tmp_path / REPORT_NAME) == bare()


def test_records_import_no_torch_and_no_templates():
    code = (
        "import sys, hamcli.report.records; sys.exit(bool({'torch', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

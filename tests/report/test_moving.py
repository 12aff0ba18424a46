"""A folder in another form: the report's files and sizes are those that lie beside it."""

import hashlib
import json

import pytest

from hamcli.exporting import export
from hamcli.onnx.exporting import export_onnx
from hamcli.pipeline import sparsify
from hamcli.progress import Silent
from tests.test_cli import RESNET

SETTINGS = {"training.batch_size": 4, "evaluation.examples": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("moving") / "dense"
    sparsify(model=str(RESNET), target=0.9, steps=2, settings=SETTINGS, out=out)
    return out


def moved(folder, form, out):
    export(folder, form, out=out, overwrite=False, progress=Silent())
    return out


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def assert_true(folder):
    report = report_of(folder)
    named = {one["path"] for one in report["files"]}
    assert named == {path.name for path in folder.iterdir()} - {
        "report.json", "report.html", "README.md"
    }  # fmt: skip
    for one in report["files"]:
        content = (folder / one["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (one["bytes"], one["sha256"])
    weights = sum(one["bytes"] for one in report["files"] if one["path"].endswith(".safetensors"))
    assert weights == report["size"][f"{report['size']['format']}_bytes"]


def test_a_packed_folder_says_what_lies_in_it_and_going_back_gives_the_same_bytes(folder, tmp_path):
    assert_true(folder)
    packed = moved(folder, "packed", tmp_path / "packed")
    assert_true(packed)
    assert report_of(packed)["size"]["format"] == "packed"
    assert "import hamcli" in (packed / "README.md").read_text()
    assert "of dense weights" in (packed / "report.html").read_text()
    assert "of dense weights" not in (folder / "report.html").read_text()
    again = moved(packed, "dense", tmp_path / "again")
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_report_of_a_run_that_writes_packed_is_the_same_as_after_export(folder, tmp_path):
    out = tmp_path / "packed"
    settings = {**SETTINGS, "export.format": "packed"}
    sparsify(model=str(RESNET), target=0.9, steps=2, settings=settings, out=out)
    assert_true(out)
    found, exported = (report_of(one) for one in (out, moved(folder, "packed", tmp_path / "other")))
    assert found["size"] == exported["size"]
    assert "import hamcli" in (out / "README.md").read_text()


def test_what_a_person_has_edited_stays_and_is_named(folder, tmp_path):
    source = moved(moved(folder, "packed", tmp_path / "packed"), "dense", tmp_path / "source")
    (source / "README.md").write_text("mine\n")
    warned = []

    class Warned(Silent):
        def warn(self, text):
            warned.append(text)

    export(source, "packed", out=tmp_path / "out", overwrite=False, progress=Warned())
    assert (tmp_path / "out" / "README.md").read_text() == "mine\n"
    assert_true(tmp_path / "out")
    assert [text.partition(" ")[0] for text in warned] == ["README.md"]
    document = report_of(source)
    (source / "report.json").write_text(json.dumps(document))
    export(source, "packed", out=tmp_path / "more", overwrite=False, progress=Warned())
    assert report_of(tmp_path / "more") == document
    assert warned[-1].startswith("report.json")
    (source / "report.json").write_text("[")
    export(source, "packed", out=tmp_path / "most", overwrite=False, progress=Warned())
    assert (tmp_path / "most" / "report.json").read_text() == "["


def test_an_onnx_folder_has_no_report_that_tells_of_other_files(folder, tmp_path):
    export_onnx(folder, out=tmp_path / "onnx", overwrite=False, progress=Silent())
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"model.onnx", "config.json"}

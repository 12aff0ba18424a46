"""Names of folders that the user leaves open."""

from pathlib import Path

import pytest

from hamcli.defaults import compare_folder, export_path, out_folder


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("builtin:minilm", "minilm"),
        ("org/name@main", "name"),
        ("a/b.safetensors", "b"),
        ("models/of mine/", "of mine"),
        ("/", "model"),
        (".", "inner"),
        ("./", "inner"),
        ("..", "outer"),
    ],
)
def test_the_folder_is_named_after_the_model(model, name, tmp_path, monkeypatch):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "outer" / "inner")
    assert out_folder(model, 0.9) == Path(f"{name}-ham-90")
    assert compare_folder(model) == Path(f"{name}-compare")


def test_an_export_lies_beside_what_it_is_of(tmp_path, monkeypatch):
    here = tmp_path / "outer" / "inner"
    here.mkdir(parents=True)
    (here / "m.safetensors").touch()
    monkeypatch.chdir(here)
    assert export_path(Path("a/b.c"), "packed") == Path("a/b.c-packed")
    assert export_path(Path("m.safetensors"), "dense") == Path("m-dense.safetensors")
    assert export_path(Path(), "packed") == tmp_path / "outer" / "inner-packed"
    assert export_path(Path(".."), "onnx") == tmp_path / "outer-onnx"

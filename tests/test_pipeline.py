"""The road of a run, and what is refused before anything is opened."""

from pathlib import Path

import pytest
import torch

from hamcli.errors import RecipeError, UsageError
from hamcli.pipeline import sparsify

RESNET = str(Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny")


def test_an_argument_that_there_is_not_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"'modle'.*model, "):
        sparsify(modle=RESNET, target=0.5, out=tmp_path / "out")


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps"])
def test_a_device_that_is_not_here_is_refused_and_no_other_is_taken(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=f"E246.*argument: training.device: {device}"):
        sparsify(model=RESNET, target=0.5, device=device, out=tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_a_device_beyond_those_here_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match="cuda:2, and torch finds 2 CUDA devices"):
        sparsify(model=RESNET, target=0.5, device="cuda:2", out=tmp_path / "out")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_fp16_is_refused_where_nothing_scales_its_gradients(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = {"training.precision": "fp16"}
    with pytest.raises(RecipeError, match=r"E251.*training\.precision: its gradients are scaled"):
        sparsify(model=RESNET, device=device, out=tmp_path / "out", settings=settings)
    assert [*tmp_path.iterdir()] == []


def test_out_may_be_no_input_of_the_recipe(tmp_path):
    (tmp_path / "held").mkdir()
    settings = {"data.evaluation": str(tmp_path / "held")}
    with pytest.raises(UsageError, match="E110"):
        sparsify(model=RESNET, out=tmp_path / "held", overwrite=True, settings=settings)

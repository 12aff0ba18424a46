"""The speed in a report: what is measured and said, not how fast this machine is."""

import json

import pytest
import torch

from hamcli import speed
from hamcli.cli.shown import show_report
from hamcli.cli.words import layers_of
from hamcli.completing import complete
from hamcli.console import Screen
from hamcli.progress import Silent
from hamcli.pruning.in_memory import prune
from hamcli.report.records import Report
from hamcli.runtime.calibrating import Calibration
from tests.checkpoint import pico


def vit(hidden):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2, image_size=16,
        num_attention_heads=4, patch_size=4, num_labels=3,
    )  # fmt: skip
    return pico.seeded(transformers.ViTForImageClassification, config)


def sparse(model):
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 2 and "layer" in name:
                param[torch.rand(param.shape) < 0.9] = 0.0
    return model


@pytest.fixture
def model():
    return sparse(vit(256))


@pytest.fixture
def csr_gains(monkeypatch):
    found = {"dense": 1.0, "csr": 0.5, "native": 0.6}
    monkeypatch.setattr(
        Calibration,
        "times",
        lambda _, module, rows: {k: found[k] for k in ("dense", *module.backends)},
    )


def of(model, *, wanted=True, dtype="F32", is_cpu=True):
    return speed.speed_of(model, wanted=wanted, dtype=dtype, is_cpu=is_cpu)


@pytest.mark.usefixtures("csr_gains")
def test_dense_and_sparse_are_measured_in_turns_and_their_ratio_is_theirs(model, monkeypatch):
    monkeypatch.setattr(speed, "ROUND_SECONDS", 1e-4)
    seen = []
    timed = speed.time_rounds

    def noted(jobs, **arguments):
        seen.append((list(jobs), arguments["rounds"]))
        return timed(jobs, **arguments)

    monkeypatch.setattr(speed, "time_rounds", noted)
    found, reason = of(model)
    assert seen == [(["dense", "sparse"], 7)]
    if found is None:
        assert "of the dense speed here" in reason
    else:
        assert reason is None
        assert found.ratio == pytest.approx(found.sparse / found.dense)


@pytest.mark.usefixtures("csr_gains")
def test_a_gain_is_a_record_and_a_loss_is_null_with_its_size(model, monkeypatch):
    monkeypatch.setattr(speed, "_seconds", lambda *_: (0.03, 0.01))
    found, reason = of(model)
    assert (found.runtime, round(found.ratio, 6), reason) == ("hamcli.load", 3.0, None)
    assert found.unit.startswith("images a second, ")
    monkeypatch.setattr(speed, "_seconds", lambda *_: (0.01, 0.02))
    found, reason = of(sparse(vit(256)))
    assert found is None
    assert "0.50 of the dense speed here. Stock runtimes" in reason


def test_what_is_not_measured_has_a_reason_that_does_not_depend_on_time(model, monkeypatch):
    monkeypatch.setattr(speed, "use_runtime_", lambda *_, **__: pytest.fail("measured"))
    for more, why in (
        ({"wanted": False}, "evaluation.speed is off"),
        ({"is_cpu": False}, "of a CPU"),
        ({"dtype": "BF16"}, "no kernel on a CPU takes weights in BF16"),
    ):
        found, reason = of(model, **more)
        assert found is None
        assert why in reason
        assert "No speed-up is claimed" in reason
    assert "fewer than 1,000,000" in of(sparse(vit(64)))[1]
    assert "0 weights lie in linear modules" in of(vit(256))[1]
    monkeypatch.setattr(speed, "MOST_WEIGHTS", 10)
    assert "ham bench runtime" in of(model)[1]


def test_where_no_module_gains_the_reason_says_so(model, monkeypatch):
    monkeypatch.setattr(
        Calibration,
        "times",
        lambda _, module, rows: dict.fromkeys(("dense", *module.backends), 1.0),
    )
    assert "No module gained a tenth" in of(model)[1]


@pytest.mark.usefixtures("csr_gains")
def test_equal_runs_differ_in_volatile_fields_alone(tmp_path, monkeypatch, capsys):
    folder = pico.save(vit(256), tmp_path / "dense")
    words = {"model": str(folder), "target": "0.9", "setting": ["evaluation.examples=4"]}

    def run(name, seconds):
        monkeypatch.setattr(speed, "_seconds", lambda *_: seconds)
        read = complete(layers_of(words), has_recipe=False)
        return prune(read, out=tmp_path / name, overwrite=False, progress=Silent())

    first, second = run("first", (0.03, 0.01)), run("second", (0.01, 0.03))
    assert first.speed.ratio == pytest.approx(3.0)
    assert second.speed is None
    documents = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "second")
    ]
    for document in documents:
        for name in document["volatile"]:
            room, _, field = name.partition(".")
            if field and document[room]:
                del document[room][field]
            elif not field:
                del document[room]
    assert documents[0] == documents[1]
    for path in (tmp_path / "first").iterdir():
        if path.name not in ("report.json", "report.html", "README.md"):
            assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert Report.from_json((tmp_path / "first" / "report.json").read_text()) == first
    assert "3 times the dense model's" in (tmp_path / "first" / "README.md").read_text()
    assert "0.33 of the dense speed here" in (tmp_path / "second" / "README.md").read_text()
    assert "the dense speed" in (tmp_path / "first" / "report.html").read_text()
    show_report(Screen(), first, tmp_path / "first")
    assert "speed: 3.00 x dense with hamcli.load" in capsys.readouterr().out

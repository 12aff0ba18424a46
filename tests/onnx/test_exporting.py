"""Folders of several families as ONNX: the same outputs, the same zeros, or a clear refusal."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hamcli.checkpoint.recount import count_zeros
from hamcli.exporting import export
from hamcli.onnx import checking, exporting, graph
from hamcli.onnx.exporting import export_onnx
from hamcli.onnx.graph import weights_of, write_graph
from hamcli.progress import Silent
from hamcli.runtime.inputs import input_names, random_inputs
from tests.checkpoint import pico
from tests.test_cli import RESNET, assert_clean_error, ham

ALBERT = Path(__file__).parents[1] / "assets" / "rxnmapper-albert-mlm"


MODELS = {
    "masked-lm": pico.bert,
    "feature-extraction": lambda: pico.bert("BertModel"),
    "text-classification": lambda: pico.bert("BertForSequenceClassification"),
    "token-classification": lambda: pico.bert("BertForTokenClassification"),
    "causal-lm": lambda: pico.llama(tie_word_embeddings=True),
    "causal-lm, transposed": lambda: pico.gpt2(n_positions=64),
    "image-classification": pico.vit,
}


def sparse(model):
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() >= 2:
                param[torch.rand(param.shape) < 0.9] = 0.0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_task_gives_the_outputs_and_the_zeros_of_the_folder(name, tmp_path):
    torch.manual_seed(0)
    folder = pico.save(sparse(MODELS[name]()), tmp_path / "dense")
    found = export_onnx(folder, out=tmp_path / "onnx", overwrite=False, progress=Silent())
    assert found.task == name.partition(",")[0]
    assert 0 < found.max_relative_error < 1e-5
    counts = [one for one in count_zeros(folder).values() if len(one.shape) >= 2]
    assert found.zeros == sum(one.zeros for one in counts)
    assert found.total == sum(one.total for one in counts)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == sorted(found.files)
    assert {"model.onnx", "config.json"} <= set(found.files)
    assert not any(name.endswith(".safetensors") for name in found.files)
    import onnx

    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"))


@pytest.mark.parametrize("asset", [ALBERT, RESNET], ids=["albert", "resnet"])
def test_real_models_run_in_onnxruntime_as_in_torch(asset, tmp_path):
    import onnxruntime
    from transformers import AutoModelForImageClassification, AutoModelForMaskedLM

    is_text = asset == ALBERT
    found = export_onnx(asset, out=tmp_path / "onnx", overwrite=False, progress=Silent())
    auto = AutoModelForMaskedLM if is_text else AutoModelForImageClassification
    model = auto.from_pretrained(asset).eval()
    inputs = random_inputs(model, 2, 33, names=found.inputs, padded=True, seed=5)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    (logits,) = session.run(["logits"], {name: one.numpy() for name, one in inputs.items()})
    with torch.inference_mode():
        expected = model(**inputs).logits.numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    assert found.outputs == ("logits",)
    names = {name for name, _ in model.named_parameters()}
    assert names <= set(weights_of(tmp_path / "onnx" / "model.onnx"))


def test_a_packed_folder_gives_the_graph_of_the_dense_one(tmp_path):
    folder = pico.save(sparse(pico.bert()), tmp_path / "dense")
    export(folder, "packed", out=tmp_path / "packed", overwrite=False, progress=Silent())
    for name in ("dense", "packed"):
        export_onnx(
            tmp_path / name, out=tmp_path / f"{name}-onnx", overwrite=False, progress=Silent()
        )
    first, second = tmp_path / "dense-onnx", tmp_path / "packed-onnx"
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_graph_that_computes_something_else_is_refused(tmp_path):
    model, other = pico.bert(), pico.bert()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[3, 5] += 0.5
    inputs = random_inputs(model, 2, 9, seed=1)
    write_graph(model, inputs, tmp_path / "model.onnx")
    assert checking.greatest_error(model, tmp_path / "model.onnx", [inputs]) < 1e-5
    pico.refusal(
        "E472", "off by", checking.greatest_error, other, tmp_path / "model.onnx", [inputs]
    )
    pico.refusal("E472", "bit for bit", checking.count_weights, other, tmp_path / "model.onnx", {})
    name = "bert.encoder.layer.0.output.dense.weight"
    pico.refusal(
        "E472", "1 in the checkpoint", checking.count_weights, model, tmp_path / "model.onnx",
        {name: 1},
    )  # fmt: skip


def test_an_error_is_relative_and_another_shape_is_infinitely_wrong():
    assert checking.relative_error(torch.tensor([1.0, 5.0]), torch.tensor([2.0, -4.0])) == 2.25
    assert checking.relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5
    assert checking.relative_error(torch.ones(2), torch.ones(2, 1)) == float("inf")


def test_outputs_that_are_no_numbers_are_refused(tmp_path, monkeypatch):
    model = pico.bert()
    inputs = random_inputs(model, 2, 9, seed=1)
    write_graph(model, inputs, tmp_path / "model.onnx")
    monkeypatch.setattr(checking, "relative_error", lambda *_: float("nan"))
    pico.refusal("E472", "nan", checking.greatest_error, model, tmp_path / "model.onnx", [inputs])


def test_a_weight_that_is_not_there_or_has_other_zeros_is_refused(tmp_path, monkeypatch):
    model = sparse(pico.bert())
    write_graph(model, random_inputs(model, 2, 9, seed=1), tmp_path / "model.onnx")
    name = "bert.encoder.layer.0.output.dense.weight"
    zeros = int((model.get_parameter(name) == 0).sum())
    path = tmp_path / "model.onnx"
    for spelled in (name, name.removeprefix("bert.")):
        checking.count_weights(model, path, {spelled: zeros})
        for wrong in (zeros - 1, zeros + 1):
            pico.refusal("E472", f"{wrong:,} in the", checking.count_weights, model, path,
                         {spelled: wrong})  # fmt: skip
    held = checking.weights_of(path)
    del held[name]
    monkeypatch.setattr(checking, "weights_of", lambda _: held)
    pico.refusal("E472", "bit for bit", checking.count_weights, model, path, {})
    # what lies there once, under another name, is there
    held["tied"] = model.get_parameter(name).detach().numpy()
    checking.count_weights(model, path, {})


def test_a_file_is_tried_with_other_shapes_and_with_padding(tmp_path, monkeypatch):
    tried = []
    whole = exporting.greatest_error

    def noted(model, path, trials):
        tried.extend(trials)
        return whole(model, path, tried)

    monkeypatch.setattr(exporting, "greatest_error", noted)
    folder = pico.save(pico.bert(), tmp_path / "dense")
    export_onnx(folder, out=tmp_path / "onnx", overwrite=False, progress=Silent())
    shapes = {tuple(one["input_ids"].shape) for one in tried}
    assert len(shapes) >= 3
    assert exporting.TRACED not in shapes
    assert {1} < {rows for rows, _ in shapes}
    assert any(not one["attention_mask"].all() for one in tried)


def test_a_model_too_large_for_a_protobuf_is_refused_before(tmp_path, monkeypatch):
    model = pico.bert()
    size = sum(one.numel() * 4 for one in model.state_dict().values())
    monkeypatch.setattr(graph, "LIMIT_BYTES", size // 2)
    pico.refusal("E473", "too large", write_graph, model, random_inputs(model, 2, 9),
                 tmp_path / "model.onnx")  # fmt: skip
    assert not (tmp_path / "model.onnx").exists()


def test_nothing_appears_where_the_check_fails(tmp_path, monkeypatch):
    folder = pico.save(pico.bert(), tmp_path / "dense")
    monkeypatch.setattr(checking, "TOLERANCE", -1.0)
    arguments = {"out": tmp_path / "onnx", "overwrite": False, "progress": Silent()}
    pico.refusal("E472", "off by", export_onnx, folder, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_an_operator_that_onnx_lacks_is_refused_in_one_line(tmp_path, capfd):
    folder = pico.save(pico.mixtral(), tmp_path / "dense")
    arguments = {"out": tmp_path / "onnx", "overwrite": False, "progress": Silent()}
    capfd.readouterr()
    pico.refusal("E471", "Mixtral", export_onnx, folder, **arguments)
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "onnx").exists()
    os.write(1, b"heard again")
    assert capfd.readouterr().out == "heard again"


def test_a_model_that_takes_something_else_has_no_inputs():
    class Speech:
        main_input_name = "input_values"
        config = None

    pico.refusal("E474", "Speech", input_names, Speech())


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = {"out": tmp_path / "onnx", "overwrite": False, "progress": Silent()}
    line = pico.refusal("E120", "onnxruntime", export_onnx, RESNET, **arguments)
    assert 'pip install "hamcli[onnx]"' in line


@pytest.mark.slow
def test_the_command_prints_the_error_and_the_zeros(tmp_path):
    shutil.copytree(RESNET, tmp_path / "model")
    done = ham("export", "model", "--format", "onnx", cwd=tmp_path)
    assert "greatest relative error against torch" in done.stdout
    assert (tmp_path / "model-onnx" / "model.onnx").exists()
    again = ham("export", "model", "--format", "onnx", cwd=tmp_path, code=2)
    assert_clean_error(again, "E112")
    assert_clean_error(ham("export", "model", "--format", "tf", cwd=tmp_path, code=2), "E118")


def test_a_weight_that_no_output_depends_on_is_left_out_and_told(tmp_path):
    import transformers

    sizes = {key: value for key, value in pico.SMALL.items() if key != "vocab_size"}
    config = transformers.Dinov2Config(**sizes, image_size=16, patch_size=4, num_labels=3)
    model = sparse(pico.seeded(transformers.Dinov2ForImageClassification, config))
    folder = pico.save(model, tmp_path / "dense")
    heard = []
    progress = Silent()
    progress.note = heard.append
    found = export_onnx(folder, out=tmp_path / "onnx", overwrite=False, progress=progress)
    mask = model.dinov2.embeddings.mask_token  # of images with patches hidden, in training alone
    assert heard == [
        "not in the graph, since no output depends on it: dinov2.embeddings.mask_token"
    ]
    matrices = [one for one in model.parameters() if one.dim() >= 2 and one is not mask]
    assert found.total == sum(one.numel() for one in matrices)
    assert found.zeros == sum(int((one == 0).sum()) for one in matrices)


def test_a_graph_that_onnxruntime_cannot_run_is_refused(tmp_path):
    import transformers

    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4
    )
    folder = pico.save(pico.seeded(transformers.MambaForCausalLM, config), tmp_path / "mamba")
    out = tmp_path / "onnx"  # its scan is traced step by step, for one length
    pico.refusal(
        "E472", "onnxruntime", export_onnx, folder, out=out, overwrite=False, progress=Silent()
    )
    assert not out.exists()
    model = pico.bert()
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    pico.refusal("E472", "onnxruntime", checking.greatest_error, model, tmp_path / "model.onnx", [])

"""`ham bench step` as a user meets it, on tiny models."""

import json

import pytest

from tests.checkpoint import pico
from tests.test_cli import RESNET, assert_clean_error, ham

pytestmark = pytest.mark.slow


def test_json_is_one_document_with_every_part(tmp_path):
    folder = pico.save(pico.bert(), tmp_path / "bert")
    words = ["bench", "step", folder, "--rounds", "2", "--threads", "1", "--json"]
    done = ham(*words, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert set(found) == {
        "model", "step", "selection", "training", "conclusion", "environment"
    }  # fmt: skip
    step = found["step"]
    assert (step["threads"], step["clock"], step["rounds"]) == (1, "cpu", 2)
    assert (step["base"], step["dtype"]) == ("adamw", "float32")
    # the shapes are those of the file
    total = sum(tensor.numel() for tensor in pico.bert().state_dict().values())
    tied = pico.bert().get_output_embeddings()
    assert step["num_weights"] == total - tied.weight.numel() - tied.bias.numel()
    names = [one["name"] for one in step["variants"]]
    assert names[0] == "torch fused"
    assert {"blocks", "foreach", "published"} <= set(names)
    assert 0 < step["step_share"] < 1
    assert "16 x 64" in found["training"]
    assert step["exponents"]["moved_fraction"] > 0
    assert found["selection"]["variants"][0]["ratio"] == 1.0
    assert found["conclusion"].endswith(".")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_model_of_images_has_no_share_and_says_why(tmp_path):
    words = ["bench", "step", RESNET, "--rounds", "1", "--base", "sgd", "--dtype", "bfloat16"]
    done = ham(*words, cwd=tmp_path)
    assert "training: not measured: " in done.stdout
    assert "torch's fused sgd" in done.stdout
    assert "bfloat16" in done.stdout
    assert "ham: " in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "pattern"),
    [
        (["./absent"], 4, "absent"),
        ([RESNET, "--base", "lion"], 2, "E101"),
        ([RESNET, "--dtype", "int8"], 2, "E101"),
        ([RESNET, "--threads", "0"], 2, "E101"),
        ([RESNET, "--rounds", "0"], 2, "E101"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(words, code, pattern, tmp_path):
    done = ham("bench", "step", *words, cwd=tmp_path, code=code)
    assert_clean_error(done, pattern)
    assert done.stdout == ""

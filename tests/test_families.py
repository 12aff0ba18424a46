"""The main road on every task, on small models of several families with random weights."""

import json

import pytest
import torch

from hamcli.pipeline import sparsify
from hamcli.recipe import shipped_names

SMALL = {
    "training.steps": 4,
    "training.batch_size": 2,
    "evaluation.examples": 4,
    "data.max_length": 16,
    "sparsity.freeze_last": 0.25,
}
RXN = "tests/assets/rxnmapper-albert-mlm"
RESNET = "tests/assets/fashion-mnist-resnet-tiny"
SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "CCN(CC)CC", "O=C(O)c1ccccc1", "CCCC", "CNC", "CO"] * 3


@pytest.fixture(scope="module")
def smiles(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "smiles.txt"
    path.write_text("\n".join(SMILES))
    return str(path)


@pytest.fixture(scope="module")
def albert(request):
    return str(request.config.rootpath / RXN)


def exact(report):
    assert report.sparsity.zeros == round(report.sparsity.target * report.sparsity.total)
    return report


def test_masked_language_model_with_shared_layers(albert, smiles, tmp_path):
    report = sparsify(model=albert, data=smiles, target=0.8, out=tmp_path / "out", settings=SMALL)
    assert exact(report).quality.metric == "masked perplexity"
    names = [tensor.name for tensor in report.tensors]
    assert len(names) == len(set(names))
    assert not any("word_embeddings" in name for name in names)


def test_a_new_head_is_trained_from_labels_alone(albert, tmp_path):
    rows = [{"text": text, "label": "ring" if "1" in text else "chain"} for text in SMILES]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = sparsify(
        model=albert, task="text-classification", data=str(path), target=0.5,
        out=tmp_path / "out", settings=SMALL,
    )  # fmt: skip
    assert exact(report).quality.metric == "accuracy"
    assert report.quality.dense is None
    assert report.training.objective == "0.1 task"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(config["id2label"].values()) == ["chain", "ring"]


def test_target_zero_is_a_dense_fine_tune(albert, smiles, tmp_path):
    report = sparsify(model=albert, data=smiles, target=0.0, out=tmp_path / "out", settings=SMALL)
    assert report.sparsity.zeros == report.sparsity.natural_zeros == 0


def test_two_of_four(albert, smiles, tmp_path):
    report = sparsify(
        model=albert, data=smiles, pattern="2:4", out=tmp_path / "out", settings=SMALL
    )
    assert report.sparsity.achieved == 0.5


def test_encoder_without_a_head_learns_its_dense_self(albert, smiles, tmp_path):
    report = sparsify(
        model=albert, task="feature-extraction", data=smiles, target=0.5, out=tmp_path / "out",
        settings=SMALL,
    )  # fmt: skip
    assert exact(report).quality.metric == "cosine to dense"
    assert report.quality.dense == pytest.approx(1.0)
    assert report.quality.sparse < 1.0


def pico_llama(albert, folder):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(albert)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_causal_language_model_with_tied_embeddings(albert, smiles, tmp_path):
    model = pico_llama(albert, tmp_path / "llama")
    report = sparsify(model=model, data=smiles, target=0.5, out=tmp_path / "out", settings=SMALL)
    assert exact(report).quality.metric == "perplexity"
    assert not any("embed" in tensor.name for tensor in report.tensors)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("quick", "masked-lm"),
        ("masked-lm-80", "masked-lm"),
        ("text-encoder-90", "feature-extraction"),
        ("text-classifier-90", "text-classification"),
        ("causal-lm-50", "causal-lm"),
        ("image-classifier-95", "image-classification"),
    ],
)
def test_every_shipped_recipe_runs_small(name, task, albert, smiles, tmp_path, request):
    words = {"model": albert, "data": smiles}
    if task == "image-classification":
        words = {"model": str(request.config.rootpath / RESNET)}
    elif task == "text-classification":
        rows = [{"text": text, "label": "1" in text} for text in SMILES]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words["data"] = str(path)
    elif task == "causal-lm":
        words["model"] = pico_llama(albert, tmp_path / "llama")
    exact(sparsify(name, task=task, out=tmp_path / "out", settings=SMALL, **words))


def test_the_list_above_has_every_shipped_recipe():
    assert len(shipped_names()) == 6

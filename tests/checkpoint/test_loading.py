import json
import os
import shutil
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamcli.checkpoint.fitting import has_head
from hamcli.checkpoint.loading import load_model, quiet_transformers
from hamcli.checkpoint.reading import read_tensor
from hamcli.checkpoint.source import Source, find_model
from hamcli.completing import complete
from hamcli.opening import open_run
from hamcli.progress import Silent
from hamcli.recipe import values_layer
from tests.checkpoint.pico import (
    EVIL,
    bert,
    edit_config,
    edit_tensors,
    gpt2,
    llama,
    mixtral,
    refusal,
    save,
    vit,
)
from tests.oracles.safetensors_reader import read_file

ASSETS = Path(__file__).parents[1] / "assets"
RESNET = ASSETS / "fashion-mnist-resnet-tiny"
ALBERT = ASSETS / "rxnmapper-albert-mlm"
THREE = {0: "no", 1: "maybe", 2: "yes"}

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(llama(), tmp_path / "llama")


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    return save(bert("BertForPreTraining"), tmp_path / "bert")


def load(folder: Path, task: str = "auto", **arguments: Any) -> Any:
    return load_model(find_model(str(folder), hashed=False), task, **arguments)


def assert_same_state(left: Any, right: Any) -> None:
    left, right = left.state_dict(), right.state_dict()
    assert set(left) == set(right)
    assert not [name for name in left if not torch.equal(left[name], right[name])]


# ---- what is loaded ----


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(tie_word_embeddings=True), mixtral, vit, bert]
)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_model_equals_the_one_that_was_saved(
    tmp_path: Path, make: Any, max_shard_size: str
) -> None:
    model = make()
    loaded = load(save(model, tmp_path / "m", max_shard_size=max_shard_size))
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    assert_same_state(loaded.model, model)


def test_real_weights_are_those_of_the_file() -> None:
    loaded = load(RESNET)
    state = loaded.model.state_dict()
    for name, values in read_file(RESNET / "model.safetensors").items():
        assert np.array_equal(state[name].numpy(), values)
    assert loaded.tokenizer is None
    assert "preprocessor_config.json" in loaded.no_image_processor


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = load(save(llama(tie_word_embeddings=True), tmp_path / "m")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dtype_is_that_of_the_file_whatever_the_config_says(folder: Path) -> None:
    edit_config(folder, dtype="bfloat16")
    loaded = load(folder)
    assert {param.dtype for param in loaded.model.parameters()} == {torch.float32}
    assert "bfloat16" in loaded.notes[0]


def test_dtype_asked_for_leaves_the_rotary_table_wide(folder: Path) -> None:
    model = load(folder, dtype="bfloat16").model
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tokenizer_comes_with_its_whole_vocabulary() -> None:
    loaded = load(ALBERT)
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size == 591
    assert loaded.tokenizer.name_or_path == str(ALBERT)


def test_tokenizer_that_is_not_the_models_is_none_with_the_reason(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "m")
    shutil.copy(ALBERT / "tokenizer.json", folder)
    loaded = load(folder)
    assert loaded.tokenizer is None
    assert "591 tokens, the model 64" in loaded.no_tokenizer


def test_tokenizer_that_is_nearly_empty_is_none_with_the_reason(folder: Path) -> None:
    vocabulary = {token: index for index, token in enumerate("abcde")}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary}}
    tokenizer["model"]["unk_token"] = "a"  # type: ignore[index]
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": []}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    loaded = load(folder)
    assert loaded.tokenizer is None
    assert "5 tokens, the model 64" in loaded.no_tokenizer


def test_missing_tokenizer_is_none_with_the_reason(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.tokenizer is None
    assert "no tokenizer files" in loaded.no_tokenizer


def test_data_that_need_a_tokenizer_are_refused_with_why_there_is_none(folder: Path) -> None:
    words = {"model.id": str(folder), "model.task": "causal-lm"}
    read = complete([values_layer(words, "test")], has_recipe=False)
    refusal("E459", "no tokenizer files", open_run, read, Silent())


def test_image_processor_is_found(tmp_path: Path) -> None:
    folder = save(vit(), tmp_path / "m")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        )
    )
    loaded = load(folder)
    assert loaded.no_image_processor == ""
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    pixels = loaded.image_processor(image, return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape) == (1, 3, 16, 16)


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_config(folder, eos_token_id=99_999, nonsense=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, "feature-extraction")
    assert capfd.readouterr() == ("", "")


def test_bars_verbosity_and_network_are_as_before(folder: Path) -> None:
    from huggingface_hub import constants
    from transformers.utils import logging

    def state() -> tuple[object, ...]:
        bars = logging.is_progress_bar_enabled()
        return logging.get_verbosity(), bars, constants.HF_HUB_OFFLINE

    before = state()
    with quiet_transformers():
        # whatever a config names, a local model asks no server
        assert state()[1:] == (False, True)
    load(folder)
    assert state() == before


# ---- heads ----


def test_other_head_is_dropped_and_told(bert_folder: Path) -> None:
    loaded = load(bert_folder, "feature-extraction")
    assert type(loaded.model).__name__ == "BertModel"
    assert "cls.seq_relationship.weight" in loaded.dropped
    assert "another head" in loaded.notes[0]


def test_second_head_and_pooler_beside_the_masked_one_are_dropped(bert_folder: Path) -> None:
    edit_config(bert_folder, architectures=["BertForMaskedLM"])
    loaded = load(bert_folder)
    assert loaded.task == "masked-lm"
    assert set(loaded.dropped) == {
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    }


def test_no_pooler_is_made_up(tmp_path: Path) -> None:
    loaded = load(save(bert("BertForMaskedLM"), tmp_path / "m"), "feature-extraction")
    assert not [name for name, _ in loaded.model.named_parameters() if "pooler" in name]


def test_new_head_must_be_allowed(bert_folder: Path) -> None:
    refusal("E426", "no head", load, bert_folder, "text-classification", id2label=THREE)


def test_new_head_has_the_labels_and_the_same_bytes_each_time(bert_folder: Path) -> None:
    state = torch.get_rng_state()
    first, second = (
        load(bert_folder, "text-classification", id2label=THREE, allow_new_head=True)
        for _ in range(2)
    )
    assert first.new_head
    assert first.model.config.id2label == THREE
    assert first.model.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert first.model.classifier.weight.shape == (3, 32)
    assert int(first.model.classifier.weight.count_nonzero()) == 96
    assert_same_state(first.model, second.model)
    assert torch.equal(torch.get_rng_state(), state)


def test_new_head_on_a_decoder_without_a_padding_token_takes_a_batch(tmp_path: Path) -> None:
    folder = save(gpt2(n_layer=1), tmp_path / "m")
    vocabulary = {f"t{index}": index for index in range(64)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary}}
    tokenizer["model"]["unk_token"] = "t0"  # type: ignore[index]
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": []}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2"})
    )
    loaded = load(folder, "text-classification", id2label=THREE, allow_new_head=True)
    assert any("no token for padding: 2 is taken" in note for note in loaded.notes)
    ids = torch.tensor([[5, 6, 7], [5, 2, 2]])  # the second one is short
    both = loaded.model(input_ids=ids, attention_mask=(ids != 2).long()).logits
    short = loaded.model(input_ids=ids[1:, :1]).logits
    torch.testing.assert_close(both[1:], short)
    language = load(folder, "causal-lm")  # it needs none, and its config stays as it is
    assert language.model.config.pad_token_id is None


def test_new_head_keeps_the_pooler_of_the_file(bert_folder: Path) -> None:
    loaded = load(bert_folder, "text-classification", id2label=THREE, allow_new_head=True)
    pooler = read_file(bert_folder / "model.safetensors")["bert.pooler.dense.weight"]
    assert np.array_equal(loaded.model.bert.pooler.dense.weight.detach().numpy(), pooler)


def test_other_seed_makes_another_head(bert_folder: Path) -> None:
    heads = [
        load(bert_folder, "text-classification", allow_new_head=True, seed=seed).model.classifier
        for seed in (0, 1)
    ]
    assert not torch.equal(heads[0].weight, heads[1].weight)


def test_head_of_another_size_is_replaced_only_when_allowed(tmp_path: Path) -> None:
    folder = save(bert("BertForSequenceClassification"), tmp_path / "m")
    arguments = {"id2label": THREE}
    refusal("E426", "no head", load, folder, "text-classification", **arguments)
    loaded = load(folder, "text-classification", allow_new_head=True, **arguments)
    assert loaded.new_head
    assert loaded.model.num_labels == 3


def test_head_of_the_same_size_is_kept(tmp_path: Path) -> None:
    model = bert("BertForSequenceClassification", id2label={0: "ham", 1: "spam"})
    folder = save(model, tmp_path / "m")
    loaded = load(folder, "text-classification", id2label={0: "a", 1: "b"}, allow_new_head=True)
    assert not loaded.new_head
    assert loaded.model.config.id2label == {0: "ham", 1: "spam"}
    assert_same_state(loaded.model, model)


def test_language_model_head_is_never_made_up(tmp_path: Path) -> None:
    folder = save(bert("BertModel"), tmp_path / "m")
    refusal("E426", "cls.predictions", load, folder, "masked-lm", allow_new_head=True)


def test_half_a_head_is_refused(tmp_path: Path) -> None:
    folder = save(bert("BertForSequenceClassification"), tmp_path / "m")
    edit_tensors(folder, lambda tensors: tensors.pop("classifier.bias"))
    refusal("E425", "classifier.bias", load, folder, allow_new_head=True)
    edit_config(folder, architectures=["BertModel"])
    refusal("E425", "classifier.bias", load, folder, "text-classification", allow_new_head=True)


def test_has_head_follows_the_architecture(bert_folder: Path) -> None:
    source = find_model(str(bert_folder), hashed=False)
    assert has_head(source, "masked-lm")
    assert not has_head(source, "text-classification")


def test_task_that_the_architecture_lacks_is_refused(folder: Path) -> None:
    refusal("E424", "llama", load, folder, "image-classification")


def test_unknown_task_is_refused(folder: Path) -> None:
    refusal("E423", "no such task", load, folder, "translation")


# ---- F7: not what it says ----

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", [QUERY, "model.norm.weight", "lm_head.weight"])
def test_missing_tensor_is_named(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refusal("E425", name, load, folder, allow_new_head=True)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.odd", "odd.weight"])
def test_extra_tensor_is_named(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    refusal("E427", name, load, folder)


def test_layers_that_the_config_omits_are_named(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    refusal("E427", "model.layers.1.", load, folder)


def test_layers_that_the_file_lacks_are_named(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3, layer_types=None)
    refusal("E425", "model.layers.2.", load, folder)


def test_wrong_shape_is_named_with_both(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: torch.ones(16, 32)}))
    line = refusal("E429", QUERY, load, folder)
    assert "[16, 32]" in line
    assert "[32, 32]" in line


def test_same_number_of_elements_is_not_the_same_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: torch.ones(64, 16)}))
    refusal("E429", QUERY, load, folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integers_in_a_float_slot_are_named(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: torch.ones(32, 32).to(dtype)}))
    refusal("E428", QUERY, load, folder)


def test_eight_bit_floats_are_named(folder: Path) -> None:
    half = torch.ones(32, 32).to(torch.float8_e4m3fn)
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: half}))
    refusal("E428", QUERY, load, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY][3, 7] = value

    edit_tensors(folder, poison)
    assert "1 of 1024" in refusal("E430", QUERY, load, folder)


def test_value_that_overflows_the_dtype_asked_for_is_named(folder: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY][0, 0] = 1e5

    edit_tensors(folder, enlarge)
    load(folder)
    refusal("E430", QUERY, load, folder, dtype="float16")


def test_one_tensor_under_two_names_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(32)}))
    refusal("E412", "norm.weight", load, folder)


def test_missing_expert_is_refused(tmp_path: Path) -> None:
    folder = save(mixtral(), tmp_path / "m")
    name = "model.layers.0.block_sparse_moe.experts.10.w1.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(Exception, match=r"HAM-E4(29|31)"):
        load(folder)


def test_config_of_a_wider_model_is_refused_before_memory_is_taken(folder: Path) -> None:
    edit_config(folder, hidden_size=2**16, head_dim=2**14)
    refusal("E420", "parameters, the file holds", load, folder)


def test_nonsense_in_the_config_is_one_line(folder: Path) -> None:
    for key, value in [("hidden_act", "evil()"), ("num_attention_heads", 0), ("hidden_size", "x")]:
        other = folder.with_name(key)
        shutil.copytree(folder, other)
        edit_config(other, **{key: value})
        refusal("E431", "", load, other)


# ---- F4: changes while it is read ----


def test_file_that_was_cut_after_the_check_is_refused(folder: Path) -> None:
    source = find_model(str(folder), hashed=False)
    os.truncate(folder / "model.safetensors", 4000)
    refusal("E416", "changed", load_model, source, "auto")


def test_file_that_was_replaced_after_the_check_is_refused(folder: Path) -> None:
    source = find_model(str(folder), hashed=False)
    header = source.headers[0]
    stamp = (0, header.file_bytes, 0)
    refusal("E416", "changed", read_tensor, header.path, header.tensors[0], stamp)


# ---- H: code ----


@pytest.fixture
def evil(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A Llama folder with everything in it that ever ran code or reached out."""
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(EVIL.format(canary=str(canary)))
    auto_map = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.M",
        "AutoTokenizer": ["evil.T", None],
        "AutoImageProcessor": "evil.P",
    }
    edit_config(
        folder,
        auto_map=auto_map,
        trust_remote_code=True,
        _attn_implementation_internal="org/kernel",
        _attn_implementation="org/kernel",
        transformers_weights="../elsewhere.safetensors",
        tokenizer_class="EvilTokenizer",
    )
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "EvilTokenizer",
                "auto_map": auto_map,
                "trust_remote_code": True,
                "vocab_file": str(secret),
                "tokenizer_file": str(secret),
                "fast_tokenizer_files": ["../secret.json"],
            }
        )
    )
    shutil.copy(ALBERT / "tokenizer.json", folder)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/evil", "peft_type": "LORA"})
    )

    def no_network(*_: object) -> None:
        raise AssertionError("a local model reached for the network")

    def no_question(*_: object) -> None:
        raise AssertionError("a question was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("builtins.input", no_question)
    return find_model(str(folder))


def test_code_beside_a_known_architecture_is_ignored(evil: Source, tmp_path: Path) -> None:
    loaded = load_model(evil, "auto")
    assert type(loaded.model).__module__ == "transformers.models.llama.modeling_llama"
    assert not (tmp_path / "canary").exists()
    assert "evil" not in sys.modules
    assert not hasattr(loaded.model.config, "auto_map")


def test_unknown_architecture_is_refused_without_running_its_code(
    evil: Source, tmp_path: Path
) -> None:
    edit_config(evil.folder, model_type="evil")
    refusal("E422", "not run", load, evil.folder)
    assert not (tmp_path / "canary").exists()

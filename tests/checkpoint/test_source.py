import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hamcli.checkpoint.config import infer_task
from hamcli.checkpoint.source import find_model, find_weights
from hamcli.errors import HamError
from tests.checkpoint.pico import (
    edit_config,
    edit_tensors,
    entry,
    llama,
    refusal,
    save,
    write_header,
)
from tests.reliability.hostile_models import NAMES

ASSETS = Path(__file__).parents[1] / "assets"
RESNET = ASSETS / "fashion-mnist-resnet-tiny"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(llama(), folder / "single")
    save(llama(), folder / "sharded", max_shard_size="20KB")
    return folder


@pytest.fixture
def single(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "single", tmp_path / "single"))


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))


def edit_index(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def with_config_word(path: Path) -> object:
    return find_model(str(path))


def without_config_word(path: Path) -> object:
    return find_model(str(path), takes_config=False)


def first_tensor(index: dict[str, Any]) -> str:
    return str(min(index["weight_map"]))


# ---- what is found ----


def test_folder_is_found_with_the_hash_of_each_file(single: Path) -> None:
    source = find_model(str(single))
    sums = subprocess.run(
        ["sha256sum", *source.files], cwd=single, capture_output=True, text=True, check=True
    )
    assert source.files == {line[66:]: line[:64] for line in sums.stdout.splitlines()}
    assert set(source.files) == {"config.json", "generation_config.json", "model.safetensors"}


def test_sharded_folder_holds_the_tensors_of_all_shards(single: Path, sharded: Path) -> None:
    one, many = find_model(str(single)), find_model(str(sharded))
    assert len(many.weights) > 1
    assert many.names == one.names
    assert many.total == one.total
    assert "model.safetensors.index.json" in many.files


def test_bare_file_takes_its_config_from_a_file_or_a_folder(single: Path, tmp_path: Path) -> None:
    bare = tmp_path / "weights.safetensors"
    shutil.move(single / "model.safetensors", bare)
    for config in (single, single / "config.json"):
        source = find_model(str(bare), config=str(config))
        assert source.weights == (bare,)
        assert source.folder == single
        assert set(source.files) == {
            "config.json",
            "generation_config.json",
            "weights.safetensors",
        }


def test_finding_a_model_imports_no_torch() -> None:
    code = (
        "import sys; from hamcli.checkpoint.source import find_model, infer_task;"
        "from hamcli.checkpoint import inspection;"
        f"s = find_model({str(RESNET)!r}); infer_task(s.config); inspection.inspect(s.folder);"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_relative_path_is_a_folder_before_it_is_a_hub_id(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(single.parent.parent)
    assert find_model(f"{single.parent.name}/single").folder == single


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "causal-lm"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertForMaskedLM", "masked-lm"),
        ("BertForPreTraining", "masked-lm"),
        ("RobertaForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("DeiTForImageClassificationWithTeacher", "image-classification"),
        ("BertModel", "feature-extraction"),
    ],
)
def test_task_follows_the_architecture(architecture: str, task: str) -> None:
    assert infer_task({"architectures": [architecture]}) == task


@pytest.mark.parametrize(
    "architectures", [None, [], [7], "BertModel", ["T5ForConditionalGeneration"], ["\x1b[2J"]]
)
def test_unknown_task_asks_for_the_flag(architectures: Any) -> None:
    refusal("E423", "--task", infer_task, {"architectures": architectures})


# ---- names that are no model ----


@pytest.mark.parametrize(
    "model",
    ["", " ", "a\0b", "./nowhere", "/nowhere/at/all", "a/b/c", "x" * 5000, "org/na me", "../x"],
)
def test_what_is_no_model_is_refused(model: str) -> None:
    refusal("E401", "", find_model, model)


def test_address_is_refused_without_repeating_its_password() -> None:
    line = refusal("E401", "URL", find_model, "https://me:hf_secret@huggingface.co/org/name")
    assert "hf_secret" not in line


def test_unknown_built_in_names_the_known_one() -> None:
    refusal("E404", "builtin:minilm", find_model, "builtin:maxilm")


def test_missing_built_in_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refusal("E404", "not installed", find_model, "builtin:minilm")


def test_bare_file_without_config_asks_for_one(single: Path) -> None:
    refusal("E405", "--config", find_model, str(single / "model.safetensors"))


def test_one_shard_points_at_its_folder(sharded: Path) -> None:
    shard = next(sharded.glob("*-00001-of-*"))
    line = refusal("E405", "one shard", find_model, str(shard), config=str(sharded))
    assert str(sharded) in line


def test_folder_without_config_asks_for_one(single: Path) -> None:
    (single / "config.json").unlink()
    refusal("E405", "--config", find_model, str(single))


def test_missing_config_is_named(single: Path) -> None:
    weights = str(single / "model.safetensors")
    refusal("E405", "nowhere.json", find_model, weights, config="nowhere.json")


def test_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    write_header(tmp_path / "adapter_model.safetensors", {})
    refusal("E409", "adapter", find_model, str(tmp_path))


def test_other_safetensors_in_a_folder_are_pointed_at(tmp_path: Path) -> None:
    write_header(tmp_path / "other.safetensors", {})
    refusal("E407", "other.safetensors", find_model, str(tmp_path))


@pytest.mark.parametrize(
    ("open_", "has_config", "hint"),
    [
        (with_config_word, False, "name the file itself: {0}/other.safetensors"),
        (with_config_word, True, "name the file itself: {0}/other.safetensors --config {0}"),
        (without_config_word, True, "rename {0}/other.safetensors to model.safetensors"),
        (find_weights, True, "name the file itself: {0}/other.safetensors"),
    ],
)
def test_the_hint_names_a_config_that_is_there_and_can_be_named(
    open_: Callable[[Path], object], has_config: bool, hint: str, tmp_path: Path
) -> None:
    write_header(tmp_path / "other.safetensors", {})
    if has_config:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HamError) as caught:
        open_(tmp_path)
    assert caught.value.lines()[1].strip() == "hint: " + hint.format(tmp_path)


def test_the_only_file_of_a_folder_without_a_config_may_have_any_name(tmp_path: Path) -> None:
    write_header(tmp_path / "other.safetensors", {})
    assert list(find_weights(tmp_path)) == ["other.safetensors"]
    write_header(tmp_path / "second.safetensors", {})
    refusal("E407", "other.safetensors", find_weights, tmp_path)


def test_who_cannot_name_a_config_is_not_told_to(single: Path) -> None:
    line = refusal("E405", "config.json", without_config_word, single / "model.safetensors")
    assert "--config" not in line
    (single / "config.json").unlink()
    assert "--config" not in refusal("E405", "no config.json", without_config_word, single)


@pytest.mark.parametrize("open_", [with_config_word, find_weights])
def test_shards_without_their_index_are_no_single_file(
    open_: Callable[[Path], object], sharded: Path
) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(HamError) as caught:
        open_(sharded)
    (line,) = caught.value.lines()
    assert "E407]: shards without their index" in line
    assert "model.safetensors.index.json" in line


def test_folder_that_may_not_be_read_is_a_permission_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "m").mkdir(mode=0)
    refusal("E541", "", find_model, str(tmp_path / "m"))


# ---- F8: pickles and other formats ----


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.gguf", "model.onnx"]
)
@pytest.mark.parametrize("alone", [True, False])
def test_other_formats_are_refused_with_a_way_to_convert(
    tmp_path: Path, name: str, alone: bool
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / name).write_bytes(b"\x80\x02.")
    # without a right to read it, opening it would fail otherwise
    (tmp_path / name).chmod(0)
    refusal("E407", name, find_model, str(tmp_path / name if alone else tmp_path))


def test_stray_pickles_are_not_in_the_way(single: Path) -> None:
    for name in ("optimizer.pt", "pytorch_model.bin", "training_args.bin"):
        os.mkfifo(single / name)  # opening one would hang
    assert set(find_model(str(single)).files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


# ---- F5: names in the index ----


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:24])
def test_shard_names_that_lead_elsewhere_are_refused(sharded: Path, name: Any) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({first_tensor(index): name}))
    refusal("E411", "", find_model, str(sharded))


@pytest.mark.parametrize("kind", ["directory", "pipe", "socket link", "gone"])
def test_shards_that_are_no_files_are_refused(sharded: Path, kind: str) -> None:
    shard = next(sharded.glob("*-00001-of-*"))
    shard.unlink()
    if kind == "directory":
        shard.mkdir()
    elif kind == "pipe":
        os.mkfifo(shard)
    elif kind == "socket link":
        shard.symlink_to("/dev/zero")
    refusal("E415" if kind == "gone" else "E410", shard.name, find_model, str(sharded))


# ---- F6: links ----


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_link_out_of_the_folder_is_refused(single: Path, tmp_path: Path, name: str) -> None:
    shutil.move(single / name, tmp_path / "elsewhere")
    (single / name).symlink_to(tmp_path / "elsewhere")
    refusal("E410", "link", find_model, str(single))


def test_link_inside_the_folder_is_refused(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights")
    (single / "model.safetensors").symlink_to("weights")
    refusal("E410", "link", find_model, str(single))


def test_loop_of_links_is_refused(single: Path) -> None:
    (single / "config.json").unlink()
    (single / "config.json").symlink_to("config.json")
    refusal("E410", "link", find_model, str(single))


def test_side_folder_that_is_a_link_is_refused(single: Path, tmp_path: Path) -> None:
    (tmp_path / "pooling").mkdir()
    (tmp_path / "pooling" / "config.json").write_text("{}")
    (single / "1_Pooling").symlink_to(tmp_path / "pooling")
    refusal("E410", "outside", find_model, str(single))


def cache_layout(folder: Path, root: Path) -> Path:
    """`folder` as the hub's cache keeps it."""
    snapshot = root / "models--org--name" / "snapshots" / ("ab" * 20)
    blobs = root / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, blobs / f"blob-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-of-{path.name}")
    return snapshot


def test_links_of_the_hubs_cache_are_followed(single: Path, tmp_path: Path) -> None:
    snapshot = cache_layout(single, tmp_path)
    assert find_model(str(snapshot)).files == find_model(str(single)).files


def test_bare_file_in_the_hubs_cache_is_found(single: Path, tmp_path: Path) -> None:
    snapshot = cache_layout(single, tmp_path)
    source = find_model(str(snapshot / "model.safetensors"), config=str(snapshot))
    assert source.files["model.safetensors"] == find_model(str(single)).files["model.safetensors"]


@pytest.mark.parametrize("target", ["../../../secret", "../../blobs/../../secret", "../x"])
def test_links_that_leave_the_blobs_are_refused(single: Path, tmp_path: Path, target: str) -> None:
    snapshot = cache_layout(single, tmp_path)
    shutil.copy(single / "config.json", tmp_path / "secret")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(target)
    refusal("E410", "link", find_model, str(snapshot))


def test_blob_that_is_a_link_is_refused(single: Path, tmp_path: Path) -> None:
    snapshot = cache_layout(single, tmp_path)
    blob = snapshot.parents[1] / "blobs" / "blob-of-config.json"
    blob.unlink()
    blob.symlink_to(single / "config.json")
    refusal("E410", "link", find_model, str(snapshot))


# ---- F7: index and shards ----


def test_tensor_missing_from_its_shard_is_named(sharded: Path) -> None:
    edit_index(
        sharded,
        lambda index: index["weight_map"].update(
            {"model.extra": next(iter(index["weight_map"].values()))}
        ),
    )
    refusal("E412", "model.extra", find_model, str(sharded))


def test_tensor_that_the_index_lacks_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop("model.norm.weight"))
    refusal("E412", "model.norm.weight", find_model, str(sharded))


def test_tensor_in_two_shards_is_named(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shutil.copy(shards[0], shards[1])
    refusal("E412", "in", find_model, str(sharded))


@pytest.mark.parametrize("size", [1, -1, "many", 1e300, [], True])
def test_wrong_total_size_is_refused(sharded: Path, size: Any) -> None:
    edit_index(sharded, lambda index: index["metadata"].update(total_size=size))
    refusal("E412", "total_size", find_model, str(sharded))


def test_index_without_total_size_is_accepted(sharded: Path) -> None:
    edit_index(sharded, lambda index: index.pop("metadata"))
    assert find_model(str(sharded)).total > 0


@pytest.mark.parametrize("weight_map", [None, [], {}, 7])
def test_index_without_a_map_is_refused(sharded: Path, weight_map: Any) -> None:
    edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    refusal("E412", "weight_map", find_model, str(sharded))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"weight_map": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
        "{",
        "[]",
        '"x"',
        '{"a": [' + "{}," * 600_000 + "{}]}",
        '{"a": "' + "x" * (33 * 2**20) + '"}',
    ],
    ids=["deep list", "deep object", "cut", "list", "text", "many", "50 MB"],
)
def test_hostile_json_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    line = refusal("E417" if len(text) > 2**25 else "E412", "", find_model, str(sharded))
    assert "index" in line


# ---- F7: the config, before a module is built ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10_000),
        ("num_hidden_layers", 10**30),
        ("num_hidden_layers", -5),
        ("num_hidden_layers", float("nan")),
        ("vocab_size", 10**9),
        ("hidden_size", 10**9),
        ("intermediate_size", 2**40),
        ("num_labels", 10**9),
        ("max_position_embeddings", 10**12),
        ("num_local_experts", 10**6),
        ("depths", [10**6, 1]),
        ("text_config", {"inner": {"num_layers": 10**6}}),
    ],
)
def test_config_that_asks_for_more_than_the_file_holds_is_refused(
    single: Path, key: str, value: Any
) -> None:
    edit_config(single, **{key: value})
    refusal("E420", "while the weights hold", find_model, str(single))


def test_layer_numbers_in_names_do_not_vouch_for_layers(tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", {"x.9999999.w": entry("F32", [0], 0, 0)})
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 1000}')
    refusal("E420", "num_hidden_layers", find_model, str(tmp_path))


def test_shared_layers_need_no_tensors_of_their_own() -> None:
    source = find_model(str(ASSETS / "rxnmapper-albert-mlm"))
    assert source.config["num_hidden_layers"] == 12
    assert not [name for name in source.names if ".11." in name]


@pytest.mark.parametrize("text", ["{", "[]", "7", "{}", '{"model_type": 7}', "[" * 200_000])
def test_config_that_is_none_is_refused(single: Path, text: str) -> None:
    (single / "config.json").write_text(text)
    refusal("E406", "config.json", find_model, str(single))


def test_quantised_checkpoint_is_refused(single: Path) -> None:
    edit_config(single, quantization_config={"quant_method": "gptq", "bits": 4})
    refusal("E421", "quantised", find_model, str(single))


def test_config_naming_weights_elsewhere_is_refused(single: Path) -> None:
    edit_config(single, backbone="org/evil", use_pretrained_backbone=True)
    refusal("E421", "use_pretrained_backbone", find_model, str(single))


def test_config_is_cleaned_of_code_and_places_at_any_depth(single: Path) -> None:
    evil = {"auto_map": {"AutoModel": "x.Y"}, "_attn_implementation_internal": "org/kernel"}
    edit_config(single, **evil, _name_or_path="/home/me", text_config={"deep": [evil]})
    config = find_model(str(single)).config
    assert config["text_config"] == {"deep": [{}]}
    assert not {*evil, "_name_or_path"} & set(config)


def test_input_is_not_touched(single: Path) -> None:
    def state() -> list[tuple[str, int, int]]:
        return [
            (path.name, path.stat().st_mtime_ns, path.stat().st_size)
            for path in sorted([single, *single.iterdir()])
        ]

    before = state()
    find_model(str(single))
    assert state() == before


def test_integers_alone_are_no_weights(single: Path) -> None:
    def to_int8(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(torch.int8) for name, tensor in tensors.items()})

    edit_tensors(single, to_int8)
    source = find_model(str(single))
    refusal("E428", "floating-point", lambda: source.dtype)

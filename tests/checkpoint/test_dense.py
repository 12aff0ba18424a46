import errno
import hashlib
import json
import os
import resource
import shutil
import stat
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamcli.checkpoint import dense
from hamcli.checkpoint.dense import write_model
from hamcli.checkpoint.loading import load_model
from hamcli.checkpoint.recount import count_zeros
from hamcli.checkpoint.source import Source, find_model
from hamcli.errors import ResourceError
from tests.checkpoint.pico import bert, edit_config, llama, mixtral, save, vit
from tests.oracles.safetensors_reader import count_negative_zeros, read_folder

ASSETS = Path(__file__).parents[1] / "assets"
ALBERT = ASSETS / "rxnmapper-albert-mlm"

torch.set_num_threads(1)


def opened(folder: Path) -> tuple[Source, Any]:
    source = find_model(str(folder))
    return source, load_model(source, "auto").model


def prune(model: Any, sparsity: float) -> dict[str, int]:
    """Zero the first weights of each matrix; name -> zeros."""
    zeros = {}
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() >= 2:
                count = round(sparsity * param.numel())
                param.view(-1)[:count] = 0
                zeros[name] = count
    return zeros


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "bert": bert,
    "mixtral": mixtral,
    "vit": vit,
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_written_zeros_are_those_of_the_model(
    tmp_path: Path, kind: str, max_shard_size: str
) -> None:
    source, model = opened(save(MODELS[kind](), tmp_path / "in"))
    zeros = prune(model, 0.5)
    written = write_model(model, source, tmp_path / "out", max_shard_size=max_shard_size)
    counts = count_zeros(tmp_path / "out")
    for name, count in zeros.items():
        assert sum(counts[one].zeros for one in written.names[name]) == count
    stored = {name for names in written.names.values() for name in names}
    assert stored == set(counts)


@pytest.mark.parametrize("kind", MODELS)
def test_stock_transformers_reads_back_the_same_bits(tmp_path: Path, kind: str) -> None:
    source, model = opened(save(MODELS[kind](), tmp_path / "in"))
    prune(model, 0.9)
    write_model(model, source, tmp_path / "out", max_shard_size="20KB")
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert again.dtype == model.dtype
    state = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    inputs = {"input_ids": torch.arange(8)[None]}
    if kind == "vit":
        inputs = {"pixel_values": torch.ones(1, 3, 16, 16)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_untouched_model_is_written_with_the_bytes_it_came_with(tmp_path: Path) -> None:
    source, model = opened(ALBERT)
    write_model(model, source, tmp_path / "out")
    written = read_folder(tmp_path / "out")
    assert {name: values.tobytes() for name, values in written.items()} == {
        name: values.tobytes() for name, values in read_folder(ALBERT).items()
    }


def test_same_model_gives_the_same_bytes_each_time(tmp_path: Path) -> None:
    source, model = opened(save(llama(), tmp_path / "in"))
    trees = []
    for index in range(6):
        write_model(model, source, tmp_path / str(index), max_shard_size="20KB")
        trees.append(tree(tmp_path / str(index)))
    assert all(one == trees[0] for one in trees)


def test_gathered_tensors_wait_on_the_disk_one_whole_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(tie_word_embeddings=True)
    monkeypatch.setattr(dense, "ON_DISK_FROM", 64)
    files, lent = [], []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        assert all(one() is None for one in lent), "the whole tensor before is still held"
        whole = tensor.detach().to(torch.float64)
        lent.append(weakref.ref(whole))
        return whole

    def save_(model: Any, state: Any, *more: Any) -> None:
        files.append([one.untyped_storage().filename for one in state.values()])
        saved(model, state, *more)

    saved = dense._save
    monkeypatch.setattr(dense, "_save", save_)
    write_model(model, None, tmp_path / "one")
    write_model(model, None, tmp_path / "two", gather=gather)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert not any(files[0])
    assert len(files[1]) > 5
    assert all(str(one).endswith("/two/.gathered") for one in files[1])
    assert len(lent) == len(dense.stored_tensors(model))


def test_no_room_for_a_gathered_tensor_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dense, "ON_DISK_FROM", 64)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="E542") as caught:
        write_model(llama(), None, tmp_path / "out", gather=torch.Tensor.detach)
    assert "No space left" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_record_is_of_the_files_as_they_are(tmp_path: Path) -> None:
    source, model = opened(ALBERT)
    written = write_model(model, source, tmp_path / "out")
    assert {file.path: file.sha256 for file in written.files} == tree(tmp_path / "out")
    for file in written.files:
        assert file.bytes == (tmp_path / "out" / file.path).stat().st_size


def test_one_expert_is_found_under_its_name_in_the_file(tmp_path: Path) -> None:
    source, model = opened(save(mixtral(), tmp_path / "in"))
    param = "model.layers.1.mlp.experts.gate_up_proj"
    with torch.no_grad():
        model.get_parameter(param)[10] = 0
    written = write_model(model, source, tmp_path / "out")
    counts = count_zeros(tmp_path / "out")
    assert len(written.names[param]) == 22
    zeroed = [name for name in written.names[param] if counts[name].zeros]
    assert zeroed == [
        "model.layers.1.block_sparse_moe.experts.10.w1.weight",
        "model.layers.1.block_sparse_moe.experts.10.w3.weight",
    ]


def test_tied_weight_is_stored_once(tmp_path: Path) -> None:
    source, model = opened(save(llama(tie_word_embeddings=True), tmp_path / "in"))
    written = write_model(model, source, tmp_path / "out")
    assert "lm_head.weight" not in count_zeros(tmp_path / "out")
    assert written.names["model.embed_tokens.weight"] == ("model.embed_tokens.weight",)


def test_tied_weight_is_stored_once_in_another_dtype_too(tmp_path: Path) -> None:
    source, model = opened(save(llama(tie_word_embeddings=True), tmp_path / "in"))
    write_model(model, source, tmp_path / "out", dtype="bfloat16")
    assert "lm_head.weight" not in count_zeros(tmp_path / "out")


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_narrower_dtype_keeps_zeros_rounds_once_and_turns_no_sign(
    tmp_path: Path, dtype: str, name: str
) -> None:
    source, model = opened(save(llama(), tmp_path / "in"))
    zeros = prune(model, 0.5)
    before = {key: param.detach().double().numpy() for key, param in model.named_parameters()}
    written = write_model(model, source, tmp_path / "out", dtype=dtype)
    assert written.dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert {one.dtype for one in count_zeros(tmp_path / "out").values()} == {name}
    half_ulp = torch.finfo(getattr(torch, dtype)).eps / 2
    for key, values in read_folder(tmp_path / "out").items():
        after = values.astype(np.float64)
        assert np.count_nonzero(after == 0) >= zeros.get(key, 0)
        assert not np.any(after * before[key] < 0)
        # half a unit in the last place, and what underflows
        assert np.all(np.abs(after - before[key]) <= half_ulp * np.abs(before[key]) + 2**-24)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32


def test_no_negative_zero_is_written(tmp_path: Path) -> None:
    source, model = opened(save(llama(), tmp_path / "in"))
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0] = -0.0
        weight[1] = -1e-12  # underflows in float16
    write_model(model, source, tmp_path / "out", dtype="float16")
    for values in read_folder(tmp_path / "out").values():
        assert count_negative_zeros(values) == 0
    assert torch.signbit(weight[0]).all()


def test_norms_kept_wide_stay_wide(tmp_path: Path) -> None:
    source, model = opened(save(llama().to(torch.bfloat16), tmp_path / "in"))
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    write_model(model, source, tmp_path / "out")
    counts = count_zeros(tmp_path / "out")
    assert counts.pop("model.norm.weight").dtype == "F32"
    assert {one.dtype for one in counts.values()} == {"BF16"}


# ---- what lies beside the weights ----


def test_tokenizer_files_are_those_of_the_source(tmp_path: Path) -> None:
    source, model = opened(ALBERT)
    write_model(model, source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (ALBERT / name).read_bytes()
    tokenizer = load_model(find_model(str(tmp_path / "out")), "auto").tokenizer
    assert tokenizer is not None
    assert len(tokenizer) == 591


def test_export_names_no_code_and_no_place(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "secret-place")
    auto_map = {"AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    edit_config(folder, auto_map=auto_map, _name_or_path="/home/me/m", custom_pipelines={})
    config = {"auto_map": auto_map, "vocab_file": "/home/me/vocab.txt", "model_max_length": 7}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(ALBERT / "tokenizer.json", folder)
    for name in ("evil.py", "README.md", "optimizer.pt", "pytorch_model.bin", ".env"):
        (folder / name).write_text("evil")
    source, model = opened(folder)
    write_model(model, source, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        for word in (b"evil", b"auto_map", b"/home", b"secret-place", b"_name_or_path"):
            assert word not in content, (path.name, word)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "model_max_length": 7
    }


def test_settings_for_generation_are_those_of_the_source(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "in")
    # transformers itself would refuse to save a temperature without sampling
    text = json.dumps({"temperature": 0.2, "eos_token_id": 2})
    (folder / "generation_config.json").write_text(text)
    source, model = opened(folder)
    write_model(model, source, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


def sentence_folder(tmp_path: Path, modules: list[dict[str, str]]) -> Path:
    folder = save(bert("BertModel"), tmp_path / "in")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def test_pooling_of_a_sentence_encoder_comes_along(tmp_path: Path) -> None:
    source, model = opened(sentence_folder(tmp_path, MODULES))
    written = write_model(model, source, tmp_path / "out")
    assert {"modules.json", "1_Pooling/config.json"} <= {file.path for file in written.files}
    assert written.notes == ()


@pytest.mark.parametrize(
    "module",
    [
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"path": "", "type": "evil.Module"},
        {"path": "../x", "type": "sentence_transformers.models.Pooling"},
        {},
    ],
)
def test_modules_with_weights_or_code_of_their_own_are_left_out(
    tmp_path: Path, module: dict[str, str]
) -> None:
    source, model = opened(sentence_folder(tmp_path, [*MODULES, module]))
    written = write_model(model, source, tmp_path / "out")
    assert "modules.json" not in {file.path for file in written.files}
    assert "left out" in written.notes[0]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    source, model = opened(sentence_folder(tmp_path, MODULES))
    before = os.umask(mask)
    try:
        write_model(model, source, tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~mask, path


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, model = opened(ALBERT)
    write_model(model, source, tmp_path / "out", max_shard_size="1MB")
    assert capfd.readouterr() == ("", "")


def test_no_link_is_written(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in ALBERT.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    source, model = opened(snapshot)
    write_model(model, source, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]


def test_full_disk_is_a_disk_error(tmp_path: Path) -> None:
    source, model = opened(ALBERT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResourceError) as caught:
            write_model(model, source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "E542"
    assert "MiB free" in caught.value.line()


def test_stage_that_is_not_empty_is_our_own_mistake(tmp_path: Path) -> None:
    source, model = opened(ALBERT)
    (tmp_path / "model-00001-of-00002.safetensors").write_text("somebody's")
    with pytest.raises(AssertionError):
        write_model(model, source, tmp_path)
    assert (tmp_path / "model-00001-of-00002.safetensors").read_text() == "somebody's"

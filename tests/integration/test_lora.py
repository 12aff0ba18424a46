"""LoRA on a sparse model: what is trained is what is merged, and no zero is lost."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hamcli.errors import UsageError
from hamcli.integration.lora import keep_zeros, merge_keeping_zeros
from hamcli.sparsity.masks import apply_masks_, prune_masks
from hamcli.sparsity.targets import select_targets
from tests.integration import pico

# PEFT asks transformers by a name that is going out of use
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

TARGET = 0.9
OPTIONS = {"r": 4, "target_modules": "all-linear"}
IDS = torch.arange(32).reshape(4, 8)


@pytest.fixture(name="sparse")
def make_sparse():
    model = pico.model().eval()
    targets = select_targets(model, ["*"], None)
    apply_masks_(targets, prune_masks(targets, TARGET))
    return model


def trained(model, config, **changes):
    """The adapter after some steps of AdamW, in evaluation mode; the base model is copied."""
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), config).train()
    params = [param for param in adapted.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for _ in range(5):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def zeros_lost(before, after):
    old, new = (select_targets(each, ["*"], None) for each in (before, after))
    assert old.names == new.names
    zeros = sum(int((item.param == 0).sum()) for item in old)
    assert zeros == round(TARGET * old.total)
    return sum(
        int(((left.param == 0) & (right.param != 0)).sum())
        for left, right in zip(old, new, strict=True)
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_peft_alone_loses_every_zero_in_the_merge(sparse):
    merged = trained(sparse, LoraConfig(**OPTIONS)).merge_and_unload()
    assert zeros_lost(sparse, merged) == round(TARGET * select_targets(sparse, ["*"], None).total)


@pytest.mark.parametrize("keeps", [False, True])
def test_no_zero_is_lost_by_the_merge_and_none_is_negative(sparse, keeps):
    config = LoraConfig(**OPTIONS)
    adapted = trained(sparse, keep_zeros(config) if keeps else config)
    merged = merge_keeping_zeros(adapted)
    assert zeros_lost(sparse, merged) == 0
    for item in select_targets(merged, ["*"], None):
        assert not bool(torch.signbit(item.param[item.param == 0]).any())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.1},
        {"use_rslora": True},
        {"lora_bias": True},
        {"init_lora_weights": False},
    ],
)
def test_the_merged_model_computes_what_was_trained(sparse, options):
    for layer in sparse.model.layers:  # LoRA with a bias needs one below it
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    adapted = trained(sparse, keep_zeros(LoraConfig(**OPTIONS, **options)))
    before = logits(adapted)
    assert not torch.allclose(before, logits(sparse), atol=1e-3)  # it has learned something
    merged = merge_keeping_zeros(adapted)
    # W x + D x against (W + D) x: some roundings of fp32 for logits below 1
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-6)


def test_an_adapter_trained_without_the_zeros_changes_in_the_merge(sparse):
    adapted = trained(sparse, LoraConfig(**OPTIONS))
    before = logits(adapted)
    assert float((logits(merge_keeping_zeros(adapted)) - before).abs().max()) > 1e-2


def test_the_base_weights_are_not_touched_and_the_adapter_can_be_turned_off(sparse):
    adapted = trained(sparse, keep_zeros(LoraConfig(**OPTIONS)))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(sparse))


def test_an_adapter_is_saved_and_loaded_as_ever(sparse, tmp_path):
    adapted = trained(sparse, keep_zeros(LoraConfig(**OPTIONS)))
    adapted.save_pretrained(tmp_path)
    config = keep_zeros(LoraConfig.from_pretrained(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(sparse), tmp_path, config=config).eval()
    assert torch.equal(logits(loaded), logits(adapted))


def test_two_adapters_are_summed_and_masked(sparse):
    adapted = trained(sparse, keep_zeros(LoraConfig(**OPTIONS)))
    other = keep_zeros(LoraConfig(**OPTIONS, init_lora_weights=False))
    adapted.add_adapter("other", other)
    adapted.base_model.set_adapter(["default", "other"])
    before = logits(adapted)
    merged = merge_keeping_zeros(adapted)
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-5)
    assert zeros_lost(sparse, merged) == 0


def test_low_precision_is_merged_as_it_was_trained(sparse):
    model = sparse.to(torch.bfloat16)
    adapted = trained(model, keep_zeros(LoraConfig(**OPTIONS)))
    merged = merge_keeping_zeros(adapted)
    assert zeros_lost(sparse, merged) == 0
    assert all(item.param.dtype == torch.bfloat16 for item in select_targets(merged, ["*"], None))


def test_other_sums_are_refused(sparse):
    config = keep_zeros(LoraConfig(**OPTIONS, use_dora=True))
    with pytest.raises(UsageError, match=r"E116.*Dora"):
        get_peft_model(copy.deepcopy(sparse), config)


def test_merging_twice_is_refused(sparse):
    adapted = trained(sparse, LoraConfig(**OPTIONS))
    adapted.merge_adapter()
    with pytest.raises(UsageError, match=r"E116.*merged already"):
        merge_keeping_zeros(adapted)


def test_a_batch_of_mixed_adapters_is_refused(sparse):
    adapted = trained(sparse, keep_zeros(LoraConfig(**OPTIONS)))
    with pytest.raises(UsageError, match=r"E116.*mixes"):
        adapted(input_ids=IDS, adapter_names=["default"] * 3 + ["__base__"])


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_moves_the_base_weights_is_refused_and_leaves_them(sparse, start):
    config = keep_zeros(LoraConfig(**OPTIONS, init_lora_weights=start))
    model = copy.deepcopy(sparse)
    with pytest.raises(UsageError, match=r"E116.*zeros of the base weight.*init_lora_weights=True"):
        get_peft_model(model, config)
    held = {name.replace(".base_layer", ""): one for name, one in model.state_dict().items()}
    assert all(torch.equal(held[name], one) for name, one in sparse.state_dict().items())

"""The examples run as they stand; their zeros are in the files that they leave."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hamcli.sparsity.targets import select_targets
from tests.integration.pico import assert_same, zeros_in

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, out, capsys):
    """What `main(out)` returned and what was printed."""
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)["main"]
    made = main(out)
    return made, capsys.readouterr().out


def assert_exact(model, folder, target, printed):
    """Zeros are `round(target * total)` in the model, in the file and in what was printed."""
    targets = select_targets(model, ["*"], None)
    exact = round(target * targets.total)
    assert sum(int((item.param == 0).sum()) for item in targets) == exact
    assert zeros_in(folder, targets.names) == exact
    assert re.search(rf"\b{exact} zeros of {targets.total} weights", printed)


def assert_reloads(model, folder, loader, **inputs):
    """Stock `from_pretrained` gives the same weights and the same outputs, bit for bit."""
    loaded = loader.from_pretrained(folder)
    assert_same(model.state_dict(), loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, loaded.eval()(**inputs).logits)


IDS = torch.arange(48, 112).reshape(2, 32)


def test_plain_torch_loop(tmp_path, capsys):
    model, printed = run("plain_torch_loop", tmp_path, capsys)
    assert_exact(model, tmp_path, 0.9, printed)
    torch.manual_seed(0)
    images = torch.randn(4, 1, 28, 28)
    assert_reloads(model, tmp_path, AutoModelForImageClassification, pixel_values=images)


def test_trainer(tmp_path, capsys):
    model, printed = run("trainer", tmp_path, capsys)
    assert_exact(model, tmp_path / "model", 0.8, printed)
    assert_reloads(model, tmp_path / "model", AutoModelForCausalLM, input_ids=IDS)
    assert re.search(r"best step (100|120), of those from step 84 on", printed)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(tmp_path, capsys):
    (sparse, merged), printed = run("lora", tmp_path, capsys)
    assert_exact(sparse, tmp_path / "model", 0.9, printed)  # the merged file has as many
    assert_exact(merged, tmp_path / "model", 0.9, printed)
    assert_reloads(merged, tmp_path / "model", AutoModelForCausalLM, input_ids=IDS)
    assert re.search(r"^0 of 84787 zeros lost by the merge", printed, re.MULTILINE)
    losses = re.findall(r"loss ([\d.]+) with the adapter, ([\d.]+) merged", printed)
    (plain, plain_merged), (kept, kept_merged) = [map(float, pair) for pair in losses]
    assert plain_merged > plain + 0.5  # the masks took away what had been learned
    assert kept_merged == kept
    before = float(re.search(r"loss ([\d.]+) before adapting", printed).group(1))
    assert kept < before - 1.0

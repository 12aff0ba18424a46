"""What a run looks at before it trains, and leaves as it was."""

from pathlib import Path

import pytest

from hamcli.pipeline import sparsify
from hamcli.sparsifying import Sparsification

RESNET = str(Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny")


@pytest.mark.parametrize("look", ["_empty_loss", "_one_shot"])
def test_weights_that_a_look_changes_are_put_back(look, tmp_path, monkeypatch):
    found = []
    original = getattr(Sparsification, look)

    def watched(self, *given):
        before = [param.detach().clone() for param in self.targets.params]
        value = original(self, *given)
        after = list(self.targets.params)
        found.append(all(bool((a == b).all()) for a, b in zip(after, before, strict=True)))
        return value

    monkeypatch.setattr(Sparsification, look, watched)
    tiny_run(tmp_path / "out")
    assert found == [True]


def test_the_bare_loss_is_that_of_targets_all_zero(tmp_path, monkeypatch):
    found = []
    original = Sparsification._empty_loss

    def watched(self, objective):
        def spy(model, *given):
            zero = all(not bool(param.any()) for param in self.targets.params)
            loss = objective(model, *given)
            found.append((zero, model.training, float(loss)))
            return loss

        value = original(self, spy)
        found.append(value)
        return value

    monkeypatch.setattr(Sparsification, "_empty_loss", watched)
    tiny_run(tmp_path / "out")
    (zero, training, loss), value = found
    assert zero
    assert not training
    assert value == loss > 0


def tiny_run(out):
    settings = {"training.batch_size": 4, "evaluation.examples": 8, "evaluation.speed": "off"}
    sparsify(model=RESNET, target=0.5, steps=1, out=out, settings=settings)

"""Who is in training mode while a model trains."""

import pytest
import torch
from torch import nn

from hamcli.training import make_accelerator, make_engine


class Dropping(nn.Module):
    """Drops half of what it sees by a function, as attention does, and by a module; knows means."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(64, affine=False)
        self.unused = nn.Parameter(torch.zeros(2, 2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.norm(rows)
        return nn.functional.dropout(self.drop(rows), 0.5, self.training)


def engine_of(model: nn.Module, has_dropout: bool):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = make_accelerator("cpu", "fp32")
    return make_engine(accelerator, model, optimizer, has_dropout=has_dropout)


@pytest.mark.parametrize("has_dropout", [True, False])
def test_without_dropout_nothing_is_dropped_and_statistics_are_learnt(has_dropout):
    engine = engine_of(Dropping(), has_dropout)
    rows = torch.rand(8, 64) + 1
    engine.model.eval()
    engine.enter_training_mode()
    seen = engine.wrapped(rows)
    assert bool((seen == 0).any()) == has_dropout
    assert has_dropout or torch.equal(seen, rows)
    # a tenth of the batch's mean, by the momentum of batch norm
    assert torch.allclose(engine.model.norm.running_mean, 0.1 * rows.mean(0))

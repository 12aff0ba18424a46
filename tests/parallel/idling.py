"""One of two processes that train a layer that no row of the first one reaches: FILE."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from hamcli.parallel.launch import end_process
from hamcli.parallel.parts import part_of
from hamcli.parallel.world import World, joined
from hamcli.training import Hooks, has_idle_parameters, make_accelerator, make_engine, train


class Routed(nn.Module):
    """Two experts; a row goes to the second where it begins with a positive number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        is_second = rows[:, 0] > 0
        reached = [~is_second, is_second]
        made = [
            expert(rows[here]).square().sum()
            for expert, here in zip(self.experts, reached, strict=True)
            if bool(here.any())
        ]
        return torch.stack(made).sum() / len(rows)


def trained(world: World) -> tuple[bool, list[list[float]]]:
    """Whether anything is idle, and the weights after three steps."""
    torch.manual_seed(1)
    rows = torch.randn(8, 3).abs()
    rows[:6, 0] *= -1
    model = Routed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = Hooks(
        batch_at=lambda micro: {"rows": rows},
        loss_of=lambda called, values, whole: called(values["rows"]),
        lr_at=lambda step: 0.1,
        measures=lambda step: False,
        exponents=lambda: None,
        after_step=lambda step: 0.0,
        part_of=lambda whole: part_of(whole, world.rank, world.size),
        mean=world.mean,
    )
    accelerator = make_accelerator("cpu", "fp32", world.size)
    has_idle = has_idle_parameters(model, hooks)
    engine = make_engine(accelerator, model, optimizer, has_idle=has_idle)
    steps = train(
        engine, hooks, first_step=1, last_step=3, accumulation=1, max_grad_norm=0.0, seed=0
    )
    assert len(list(steps)) == 3
    return has_idle, [param.flatten().tolist() for param in model.parameters()]


if __name__ == "__main__":
    with joined("ddp", "cpu") as here:
        found = trained(here)
    Path(f"{sys.argv[1]}.{here.rank}").write_text(json.dumps(found))
    end_process(0)

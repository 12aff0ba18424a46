"""A small network, its optimizers and its gradients, the same in every test."""

import torch
from torch import nn

from hamcli.optim import HAM
from tests.optim.numbers import normal

BASES = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.05}),
    "sgd": (torch.optim.SGD, {"weight_decay": 0.05}),
    "momentum": (torch.optim.SGD, {"weight_decay": 0.05, "momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}
SCALINGS = ["raw", "calibrated", "tracked", "normalised"]


def make(params, name="adamw", **options):
    base = name if name in ("adamw", "adam") else "sgd"
    return HAM(params, base=base, **{"lr": 1e-2, **BASES[name][1], **options})


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 4)).to(dtype)


def set_grads(model, step, scale=1e-2):
    for i, param in enumerate(model.parameters()):
        param.grad = normal(*param.shape, seed=100 * step + i, scale=scale, dtype=param.dtype)


def run(model, optimizer, steps, first=0, scale=1e-2):
    for step in range(first, first + steps):
        set_grads(model, step, scale)
        optimizer.step()


def weights(model):
    return torch.cat([param.detach().flatten().double() for param in model.parameters()])


def some_mask(param, seed=1):
    return normal(*param.shape, seed=seed) > 0

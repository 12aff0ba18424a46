"""Optimizers that look like HAM and are not: what the checks must tell from it."""

import torch

from hamcli.theory.descent import ham_sgd


class Wrong(torch.optim.SGD):
    """SGD, then a mirror step with a fault."""

    def __init__(self, weights, alpha, beta, *, fault):
        super().__init__([weights], lr=1.0)
        self.alpha, self.beta, self.fault = alpha, beta, fault

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for w in group["params"]:
                sign = torch.ones_like(w) if self.fault == "no sign" else torch.sign(w)
                pull = self.alpha * sign * w.grad
                if self.fault == "turned":
                    pull = -pull
                if self.fault != "no beta":
                    pull = pull + self.beta
                if self.fault == "adds":
                    w.add_(pull, alpha=-group["lr"])
                else:
                    w.mul_(torch.exp(torch.clamp(-group["lr"] * pull, -5, 5)))


def faulty(fault):
    return lambda weights, alpha, beta: Wrong(weights, alpha, beta, fault=fault)


def right(weights, alpha, beta):
    """The rule written once more: proves that the class fails by its fault alone."""
    return Wrong(weights, alpha, beta, fault="none")


def no_mirror(weights, alpha, beta):
    return torch.optim.SGD([weights], lr=1.0)


def other_alpha(weights, alpha, beta):
    """As if the reference had the wrong alpha."""
    return ham_sgd(weights, 1.5 * alpha, beta)

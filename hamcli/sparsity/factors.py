"""Weights as products of two factors, w = m * v: spred, PILoT and Sign-In.

    spred    m = |v| at the start. loss + a * sum(m^2 + v^2) has the minima of loss + 2a * sum|w|
             (Ziyin & Wang, arXiv 2210.01212)
    pilot    m^2 - v^2 = 1 at the start, the same penalty; a grows while ||w||_1 is above the share
             1 - target of what it was, and shrinks below (Jacobs & Burkholz, arXiv 2408.09966)
    sign-in  a fixed mask, no penalty; every few steps m and v are set anew so that m^2 - v^2 = 1
             with w kept, which lets signs flip (arXiv 2504.12801)

Both factors are trained, with moments of their own, and the model's weights stay beside them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hamcli.sparsity.courses import Course, Held, trained_copy
from hamcli.sparsity.methods import Sparsifier
from hamcli.sparsity.targets import Targets

KINDS = ("spred", "pilot", "sign-in")
GROWTH = 1.1  # of PILoT's penalty at each choice of masks


@torch.no_grad()
def balanced(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors m = sqrt|w| and v = sign(w) sqrt|w|."""
    root = weight.abs().sqrt()
    return root, weight.sign() * root


@torch.no_grad()
def unbalanced(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors m > 0 and v with m * v = w and m^2 - v^2 = 1: m^2 = (1 + sqrt(1 + 4 w^2)) / 2."""
    m = ((1 + (1 + 4 * weight.square()).sqrt()) / 2).sqrt()
    return m, weight / m


class Factors(Course):
    """The course of the methods that train m and v; see the module.

    Args:
        targets: The model's own weights, written before each forward pass.
        sparsifier: Stands on `targets`; its masks hold v at zero.
        kind: spred, pilot or sign-in.
        regularisation: Weight a of the penalty at the start; not of sign-in. It is off while the
            final zeros are trained.
        rescale_every: Steps between two times that sign-in sets its factors anew.
    """

    copies = 6  # each factor has a gradient and two moments; the model's weights have a gradient

    def __init__(
        self,
        targets: Targets,
        sparsifier: Sparsifier,
        *,
        kind: str,
        regularisation: float,
        rescale_every: int,
    ) -> None:
        super().__init__(targets, sparsifier)
        self._kind = kind
        self._rescale_every = rescale_every
        self._penalty = 0.0 if kind == "sign-in" else regularisation
        split = balanced if kind == "spred" else unbalanced
        made = [split(target.param.detach()) for target in targets]
        self._pairs = [(trained_copy(m), trained_copy(v)) for m, v in made]
        self.params = [factor for pair in self._pairs for factor in pair]
        self._norm_at_start = self._norm()

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The factors of each target."""
        return list(self._pairs)

    @torch.no_grad()
    def _norm(self) -> float:
        """||w||_1 of the model's weights."""
        return sum(float(param.abs().sum(dtype=torch.float64)) for param in self.targets.params)

    @torch.no_grad()
    def _write(self) -> None:
        for target, (m, v) in zip(self.targets, self._pairs, strict=True):
            # + 0.0: -0.0 is no zero to those who compare bytes
            torch.mul(m, v, out=target.param.detach()).add_(0.0)

    def before_step(self, step: int) -> None:
        """Multiply the factors into the model."""
        self._write()

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """The chain rule, and the penalty's gradient: g_m = v g + 2 a m, g_v = m g + 2 a v."""
        factor = 2 * (self._penalty if step <= self.sparsifier.last_update else 0.0)
        for target, (m, v) in zip(self.targets, self._pairs, strict=True):
            grad = target.param.grad
            if grad is None:
                m.grad = v.grad = None
                continue
            m.grad = (v * grad).add_(m.detach(), alpha=factor)
            v.grad = (m * grad).add_(v.detach(), alpha=factor)

    def after_step(self, step: int) -> Held:
        """Choose masks by |m * v|, steer the penalty, set the factors anew where it is time."""
        self._write()
        before = self.sparsifier.masks
        held = super().after_step(step)
        if step > 0 and self.sparsifier.masks is not before and self._kind == "pilot":
            bound = (1 - self.sparsifier.target) * self._norm_at_start
            self._penalty *= GROWTH if self._norm() >= bound else 1 / GROWTH
        if step > 0 and self._kind == "sign-in" and step % self._rescale_every == 0:
            self._rescale()
        for target in self.targets:
            target.param.grad = None  # nobody else clears it: the optimizer does not hold it
        return held

    def _held(self, masks: Sequence[Tensor]) -> Held:
        return {v: mask for (_, v), mask in zip(self._pairs, masks, strict=True)}

    @torch.no_grad()
    def _rescale(self) -> None:
        """Set the factors so that m^2 - v^2 = 1, with the products kept."""
        for m, v in self._pairs:
            new_m, new_v = unbalanced(m * v)
            m.copy_(new_m)
            v.copy_(new_v)

    def finish(self) -> None:
        """Write the products into the model, masked."""
        self._write()
        super().finish()

    def state(self) -> dict[str, Tensor]:
        """Masks, factors and what steers the penalty."""
        state = super().state()
        state["penalty"] = torch.tensor(self._penalty, dtype=torch.float64)
        state["norm_at_start"] = torch.tensor(self._norm_at_start, dtype=torch.float64)
        for name, (m, v) in zip(self.targets.names, self._pairs, strict=True):
            state[f"m.{name}"], state[f"v.{name}"] = m.detach(), v.detach()
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        super().load_state(state)
        self._penalty = float(state["penalty"])
        self._norm_at_start = float(state["norm_at_start"])
        for name, (m, v) in zip(self.targets.names, self._pairs, strict=True):
            m.copy_(state[f"m.{name}"])
            v.copy_(state[f"v.{name}"])

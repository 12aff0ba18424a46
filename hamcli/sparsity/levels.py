"""Several sparsities from one run: alternating sparse training with gradient correction (AST)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hamcli.sparsity.courses import Course, Held
from hamcli.sparsity.methods import Sparsifier
from hamcli.sparsity.targets import Targets

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@torch.no_grad()
def corrected(grads: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    """Gradients without what works against `before`.

    g - <g, p> / <p, p> * p where <g, p> < 0, over all tensors as one vector; else g.
    """
    product = sum(
        float((g * p).sum(dtype=torch.float64)) for g, p in zip(grads, before, strict=True)
    )
    square = sum(float(p.square().sum(dtype=torch.float64)) for p in before)
    if not product < 0 or square == 0:
        return list(grads)
    return [torch.add(g, p, alpha=-product / square) for g, p in zip(grads, before, strict=True)]


class Levels(Course):
    """AST (*Get more at once*, NeurIPS 2022): K sparsities over one set of latent weights.

    Each step trains one level, in turn: the model sees the latent weights under that level's mask
    and with that level's batch-norm statistics. Its gradient loses what works against the gradient
    of the step before, which was another level's. The masks of all levels are chosen by the
    magnitude of the same latent weights, so that the sparser ones lie within the denser ones.

    Args:
        targets: The model's own weights, written before each forward pass.
        latent: The same over trained copies.
        sparsifiers: One a level, standing on `latent`; the sparsest last.
        model: Whose batch-norm statistics each level has its own of.
    """

    copies = 2

    def __init__(
        self, targets: Targets, latent: Targets, sparsifiers: Sequence[Sparsifier], model: nn.Module
    ) -> None:
        super().__init__(targets, sparsifiers[-1])
        self.params = latent.params
        self.sparsifiers = list(sparsifiers)
        self._buffers = {
            f"{name}.{key}": buffer
            for name, module in model.named_modules()
            if isinstance(module, _NORMS)
            for key, buffer in module.named_buffers(recurse=False)
        }
        self._statistics = [
            {name: buffer.clone() for name, buffer in self._buffers.items()} for _ in sparsifiers
        ]
        self._before: list[Tensor] | None = None

    def _level(self, step: int) -> int:
        return (step - 1) % len(self.sparsifiers)

    @torch.no_grad()
    def _show(self, level: int) -> None:
        """The model becomes that of one level."""
        masks = self.sparsifiers[level].masks
        for index, target in enumerate(self.targets):
            latent = self.params[index].detach()
            shown = latent if masks is None else torch.where(masks[index], latent, 0.0)
            target.param.detach().copy_(shown)
        for name, buffer in self._buffers.items():
            buffer.copy_(self._statistics[level][name])

    def before_step(self, step: int) -> None:
        """Show the model of the level whose turn it is."""
        self._show(self._level(step))

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Mask and correct the gradients of this level; keep its statistics."""
        level = self._level(step)
        masks = self.sparsifiers[level].masks
        grads = []
        for index, target in enumerate(self.targets):
            grad, target.param.grad = target.param.grad, None
            latent = self.params[index]
            grad = torch.zeros_like(latent) if grad is None else grad.to(latent.dtype)
            grads.append(grad if masks is None else torch.where(masks[index], grad, 0.0))
        made = grads if self._before is None else corrected(grads, self._before)
        for latent, grad in zip(self.params, made, strict=True):
            latent.grad = grad
        # the optimizer's clipping writes into what it is given
        self._before = [grad.clone() for grad in grads] if len(self.sparsifiers) > 1 else None
        for name, buffer in self._buffers.items():
            self._statistics[level][name].copy_(buffer)

    def after_step(self, step: int) -> Held:
        """Choose the masks of all levels; the optimizer holds nothing: every level has its own."""
        for sparsifier in self.sparsifiers:
            sparsifier.masks_due(step)
        return {}

    def finish(self) -> None:
        """Write the sparsest level into the model."""
        self.finish_level(len(self.sparsifiers) - 1)

    def finish_level(self, level: int) -> None:
        """Write one level, statistics too, into the model."""
        self._show(level)
        self.sparsifier = self.sparsifiers[level]

    def state(self) -> dict[str, Tensor]:
        """Masks and statistics of each level, latent weights, and the gradient of the last step."""
        state: dict[str, Tensor] = {}
        for level, sparsifier in enumerate(self.sparsifiers):
            state |= {f"{level}.{key}": value for key, value in sparsifier.state().items()}
            state |= {
                f"statistics.{level}.{name}": value
                for name, value in self._statistics[level].items()
            }
        for index, name in enumerate(self.targets.names):
            state[f"latent.{name}"] = self.params[index].detach()
            if self._before is not None:
                state[f"gradient.{name}"] = self._before[index]
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for level, sparsifier in enumerate(self.sparsifiers):
            head = f"{level}."
            sparsifier.load_state(
                {key.removeprefix(head): one for key, one in state.items() if key.startswith(head)}
            )
            for name, value in self._statistics[level].items():
                value.copy_(state[f"statistics.{level}.{name}"])
        before = []
        for index, name in enumerate(self.targets.names):
            self.params[index].copy_(state[f"latent.{name}"])
            if f"gradient.{name}" in state:
                before.append(state[f"gradient.{name}"].to(self.params[index].device))
        self._before = before or None

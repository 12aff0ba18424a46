"""Soft thresholding in the forward pass: STR, with thresholds that meet the schedule exactly."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hamcli.sparsity.courses import Course, Held
from hamcli.sparsity.methods import Sparsifier
from hamcli.sparsity.targets import Targets


@torch.no_grad()
def soft_threshold(latent: Tensor, mask: Tensor, threshold: Tensor) -> Tensor:
    """sign(w) * relu(|w| - threshold) where the mask keeps, else 0."""
    shrunk = latent.sign() * torch.relu(latent.abs() - threshold)
    return torch.where(mask, shrunk, 0.0)


class Thresholding(Course):
    """Soft threshold weight reparametrisation (STR, arXiv 2002.03231), steered by the schedule.

    Latent weights w are trained; the model sees sign(w) * relu(|w| - tau) with one tau a tensor.
    The gradient passes straight through where the model's weight is not zero and is zero
    elsewhere. The published method learns tau and reaches whatever sparsity weight decay gives;
    here the masks are chosen by |w| with exact counts, and tau of a tensor is the greatest |w| that
    its mask drops, so that pruning takes no step. Where the final zeros begin to be trained, the
    thresholded weights become the latent ones, and tau 0.
    """

    copies = 1

    def __init__(self, targets: Targets, latent: Targets, sparsifier: Sparsifier) -> None:
        super().__init__(targets, sparsifier)
        self.params = latent.params
        self.thresholds = [torch.zeros((), dtype=one.dtype) for one in self.params]

    def before_step(self, step: int) -> None:
        """Threshold the latent weights into the model."""
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        masks = self.sparsifier.masks
        for index, target in enumerate(self.targets):
            latent = self.params[index].detach()
            if masks is not None:
                threshold = self.thresholds[index].to(latent.device)
                latent = soft_threshold(latent, masks[index], threshold)
            target.param.detach().copy_(latent)

    def after_backward(self, step: int) -> None:
        """Pass the gradients on where the model's weights are not zero."""
        for latent, target in zip(self.params, self.targets, strict=True):
            grad, target.param.grad = target.param.grad, None
            if grad is not None:
                grad = torch.where(target.param != 0, grad, 0.0).to(latent.dtype)
            latent.grad = grad

    def after_step(self, step: int) -> Held:
        """Choose masks and thresholds; at the last choice what the model sees becomes latent."""
        masks = self.sparsifier.masks_due(step)
        if masks is None:
            return {}
        self.thresholds = [
            _threshold(latent.detach(), mask)
            for latent, mask in zip(self.params, masks, strict=True)
        ]
        if step < self.sparsifier.last_update:
            return {}
        self._write()
        with torch.no_grad():
            for latent, target in zip(self.params, self.targets, strict=True):
                latent.copy_(target.param)
        self.thresholds = [torch.zeros_like(threshold) for threshold in self.thresholds]
        return self._held(masks)

    def finish(self) -> None:
        """Write the latent weights, thresholded, into the model."""
        self._write()

    def state(self) -> dict[str, Tensor]:
        """Masks, latent weights and thresholds."""
        state = super().state()
        for index, name in enumerate(self.targets.names):
            state[f"latent.{name}"] = self.params[index].detach()
            state[f"threshold.{name}"] = self.thresholds[index]
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        super().load_state(state)
        for index, name in enumerate(self.targets.names):
            self.params[index].copy_(state[f"latent.{name}"])
            self.thresholds[index] = state[f"threshold.{name}"].clone()


def _threshold(latent: Tensor, mask: Tensor) -> Tensor:
    """The greatest |w| that the mask drops, less one ulp, so that ties that are kept stay."""
    dropped = torch.where(mask, 0.0, latent.abs()).max()
    return torch.nextafter(dropped, torch.zeros_like(dropped)).cpu()

"""The course of the weights in a run: what the model sees, what is trained, what is held at zero.

The plain course trains the model's own weights under masks. Others train something else (latent
weights, factors), write the model's weights from it before each forward pass, and turn the model's
gradients into those of what is trained after each backward pass. Each has the same few hooks, and
everything in it but the tensors of `state` is a function of the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hamcli.sparsity.masks import apply_masks_
from hamcli.sparsity.methods import Sparsifier
from hamcli.sparsity.targets import Targets

Held = dict[Tensor, Tensor | None]


class Course:
    """The model's own weights, masked by the optimizer: what most methods need.

    Attributes:
        params: What the optimizer trains in the targets' place, one tensor or more each.
        sparsifier: Which masks hold after which step.
    """

    copies = 0  # memory beside that of plain training, in tensors of the targets' size

    def __init__(self, targets: Targets, sparsifier: Sparsifier) -> None:
        self.targets = targets
        self.sparsifier = sparsifier
        self.params: list[Tensor] = targets.trained

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Factors x, y whose product alone matters, for balancedness-aware regularisation."""
        return []

    @property
    def sparsity(self) -> float:
        """Share of the targets that is masked now."""
        return self.sparsifier.sparsity

    def before_step(self, step: int) -> None:
        """Before the forward pass of a step, counted from 1: the model's weights are written."""

    def after_backward(self, step: int) -> None:
        """After the last backward pass of a step: what is trained gets its gradients."""

    def after_step(self, step: int) -> Held:
        """After the optimizer's step, gradients still there; step 0 is before the first.

        Returns:
            Of what is trained, what the optimizer is to hold at zero from now on: bool masks, True
            where kept, None to hold nothing; empty where nothing changes.
        """
        masks = self.sparsifier.masks_due(step)
        return {} if masks is None else self._held(masks)

    def _held(self, masks: Sequence[Tensor]) -> Held:
        if self.sparsifier.num_masked == 0:
            return dict.fromkeys(self.params)
        return dict(zip(self.params, masks, strict=True))

    def finish(self) -> None:
        """Write the final weights into the model."""
        if self.sparsifier.masks is not None:
            apply_masks_(self.targets, self.sparsifier.masks)

    def state(self) -> dict[str, Tensor]:
        """What a run checkpoint must hold beside model and optimizer; plain tensors."""
        return self.sparsifier.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.sparsifier.load_state(state)


def latent_targets(targets: Targets) -> Targets:
    """The same targets over copies of their weights that can be trained, fp32 at least."""
    return Targets(
        tuple(replace(target, param=trained_copy(target.param)) for target in targets),
        targets.exclude,
    )


def trained_copy(tensor: Tensor) -> nn.Parameter:
    """A parameter with the same values, in fp32 at least."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return nn.Parameter(tensor.detach().to(dtype, copy=True))

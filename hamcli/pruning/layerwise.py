"""Pruning by what the layers see, without training: Wanda and SparseGPT over all targets."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hamcli.calibration import Inputs, activation_score, outliers
from hamcli.errors import RecipeError
from hamcli.sparsity.allocate import allocate, share_out
from hamcli.sparsity.masks import apply_masks_, choose_masks, nonzero_masks, zeros_at_end
from hamcli.sparsity.reconstruct import sparsegpt
from hamcli.sparsity.rules import Rules
from hamcli.sparsity.select import n_m_mask
from hamcli.sparsity.targets import Target, Targets


def prune_layers_(
    method: str, targets: Targets, rules: Rules, inputs: Sequence[Inputs]
) -> list[Tensor]:
    """Prune in place, exactly; returns the masks, True where kept.

    Args:
        method: wanda or sparsegpt.
        targets: Their weights are changed; by sparsegpt those that stay too.
        rules: How many, and where they may lie.
        inputs: Of each target; sparsegpt needs whole matrices.

    Raises:
        RecipeError: E225, sparsegpt does not go with blocks.
    """
    if method == "sparsegpt" and rules.block is not None:
        raise RecipeError(
            "E225",
            "the method does not go with the pattern",
            "sparsity.pattern",
            "sparsegpt prunes column by column, not in blocks",
            "unstructured or N:M, or method wanda",
        )
    natural = nonzero_masks(targets)
    due = zeros_at_end(targets, rules, natural)
    score = activation_score(targets, inputs)
    if rules.block is not None or (rules.kept_of is not None and method == "wanda"):
        masks = choose_masks(targets, rules, due, masks=natural, score=score)
        apply_masks_(targets, masks)
        return masks
    counts = [0] * len(targets)
    if rules.kept_of is None:
        counts = allocate(
            [target.param.shape for target in targets],
            due,
            rules.allocation,
            scores=[score(target.param) for target in targets]
            if rules.allocation in ("global", "lamp")
            else None,
            min_sparsity=rules.min_sparsity,
            max_sparsity=rules.max_sparsity,
            already=[int((~mask).sum()) for mask in natural],
            outliers=outliers(targets, inputs) if rules.allocation == "owl" else None,
        )
    masks = []
    for target, one, count in zip(targets, inputs, counts, strict=True):
        if method == "wanda":
            rows = as_rows(score(target.param), target, len(one.moments)).flatten(0, 1)
            mask = row_mask(rows, count).view(len(one.moments), -1, rows.shape[1])
            masks.append(from_rows(mask, target))
        else:
            masks.append(_reconstructed_(target, one, count, rules.kept_of))
    apply_masks_(targets, masks)
    return masks


def as_rows(tensor: Tensor, target: Target, groups: int) -> Tensor:
    """[groups, outputs, inputs] of a weight-shaped tensor, input channels innermost."""
    if target.input_dim == 0:
        return tensor.t().unsqueeze(0)
    moved = tensor.movedim(1, -1)
    return moved.reshape(groups, tensor.shape[0] // groups, -1)


def from_rows(rows: Tensor, target: Target) -> Tensor:
    """What `as_rows` undid."""
    shape = target.param.shape
    if target.input_dim == 0:
        return rows[0].t().contiguous()
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


@torch.no_grad()
def row_mask(scores: Tensor, num_zeros: int) -> Tensor:
    """Bool mask that drops `num_zeros` scores, in each row as many, its smallest ones.

    What is left over goes to the first rows; a row that has more zeros already keeps them.

    Args:
        scores: [rows, columns], at least 0.
        num_zeros: At least the number of zero scores.
    """
    rows, columns = scores.shape
    zeros = (scores == 0).sum(dim=1)
    counts = share_out(num_zeros, [1] * rows, zeros.tolist(), [columns] * rows)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks >= torch.tensor(counts, device=scores.device).unsqueeze(1)


@torch.no_grad()
def _reconstructed_(
    target: Target, inputs: Inputs, count: int, kept_of: tuple[int, int] | None
) -> Tensor:
    """SparseGPT on one target: its weights are mended in place; the mask."""
    groups = len(inputs.moments)
    rows = as_rows(target.param.detach(), target, groups)
    if bool((inputs.squares == 0).all()):  # nothing is seen, so nothing can be mended
        scores = as_rows(target.param.detach().float().abs(), target, groups)
        flat = scores.flatten(0, 1)
        mask = row_mask(flat, count) if kept_of is None else n_m_mask(flat, *kept_of, 1)
        return from_rows(mask.view(rows.shape), target)
    order = _column_order(target, rows.shape[2])
    made = torch.empty_like(rows)
    mask = torch.empty_like(rows, dtype=torch.bool)
    share, extra = divmod(count, groups)
    for group in range(groups):
        moments = inputs.moments[group][order][:, order]
        due = share + (group < extra)
        made[group], mask[group] = sparsegpt(rows[group], moments, due, kept_of)
    target.param.copy_(from_rows(made, target))
    return from_rows(mask, target)


def _column_order(target: Target, inputs: int) -> Tensor:
    """Places of `as_rows`'s columns among the inputs, which have the channel outermost."""
    if target.param.dim() == 2:
        return torch.arange(inputs)
    return torch.arange(inputs).view(target.param.shape[1], -1).t().flatten()

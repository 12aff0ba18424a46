"""SparseGPT: prune a matrix column by column and mend what stays (arXiv 2301.00774)."""

import torch
from torch import Tensor

from hamcli.sparsity.select import exact_mask, n_m_mask

BLOCK = 128  # columns whose mask is chosen at once; the paper's
DAMPING = 0.01  # of the mean diagonal, added to it; the paper's


@torch.no_grad()
def sparsegpt(
    weight: Tensor, moments: Tensor, num_zeros: int, kept_of: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Prune one matrix so that its outputs on the calibration inputs change little.

    With U the upper Cholesky factor of the inverse of X^T X, the weights with the smallest
    (w / U_jj)^2 of each block of columns go, and the error of each is spread over the columns to
    its right.

    Args:
        weight: [outputs, inputs].
        moments: Sum of x x^T over the inputs, [inputs, inputs], not all 0.
        num_zeros: Exact number of zeros, shared out evenly over the blocks of columns.
        kept_of: (n, m) of an N:M pattern instead; `num_zeros` is then not looked at.

    Returns:
        The mended weights, in the dtype of `weight`, and the mask, True where kept.
    """
    w = weight.detach().double().clone()
    hessian = moments.double().clone()
    # an input that is never on has the damping alone, and so goes first
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    rows, columns = w.shape
    done = 0
    step = BLOCK if kept_of is None else max(1, BLOCK // kept_of[1]) * kept_of[1]
    for start in range(0, columns, step):
        end = min(start + step, columns)
        scores = (w[:, start:end] / upper.diagonal()[start:end]).square()
        if kept_of is None:
            due = round(num_zeros * end / columns) - done
            due = min(max(due, 0), rows * (end - start))
            mask[:, start:end] = exact_mask(scores, due)
            done += due
        else:
            mask[:, start:end] = n_m_mask(scores, *kept_of, 1)
        _mend_(w, upper, mask, start, end)
    return torch.where(mask, w, 0.0).to(weight.dtype), mask


def _mend_(w: Tensor, upper: Tensor, mask: Tensor, start: int, end: int) -> None:
    """Zero what the mask drops in some columns and make the columns to their right atone."""
    errors = torch.zeros_like(w[:, start:end])
    for column in range(start, end):
        lost = torch.where(mask[:, column], 0.0, w[:, column])
        errors[:, column - start] = lost / upper[column, column]
        w[:, column:end] -= torch.outer(errors[:, column - start], upper[column, column:end])
    w[:, end:] -= errors @ upper[start:end, end:]

"""2:4 sparsity as torch's semi-structured tensors take it, on CUDA and in half precision.

Whether a weight would be taken can be told anywhere; torch itself checks the shape only where there
is a CUDA device, and the pattern nowhere: it drops what a group of four has too much.
"""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
# Of both of torch's backends, CUTLASS and cuSPARSELt, the stricter one for half precision.
ROWS, COLUMNS = 32, 64
KEPT, GROUP = 2, 4


def refusal(weight: Tensor) -> str:
    """Why torch would not take a weight, or would change it; empty where it is taken as it is.

    Args:
        weight: [out, in], on any device.
    """
    if weight.dim() != 2:
        return f"it has {weight.dim()} dimensions, not 2"
    if weight.dtype not in DTYPES:
        return f"it is {str(weight.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    rows, columns = weight.shape
    if rows == 0 or columns == 0 or rows % ROWS or columns % COLUMNS:
        return f"{rows} x {columns} is no multiple of {ROWS} x {COLUMNS}"
    most = most_kept(weight)
    return "" if most <= KEPT else f"{most} of {GROUP} weights in a row are not zero"


def most_kept(weight: Tensor) -> int:
    """Most weights that are not zero in a group of four inputs.

    Args:
        weight: [out, in], `in` a multiple of four.
    """
    groups = (weight != 0).reshape(weight.shape[0], -1, GROUP)
    return int(groups.sum(dim=-1).max())

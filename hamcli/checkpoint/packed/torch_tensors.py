"""Packed tensors as torch holds them: flat bytes in, a dense tensor out."""

import torch
from torch import Tensor

from hamcli.checkpoint.packed.native import coder
from hamcli.checkpoint.packed.planes import UNSIGNED
from hamcli.checkpoint.packed.tensors import MAGIC, decode_into, read_head
from hamcli.errors import InputRefused

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def is_packed_tensor(tensor: Tensor) -> bool:
    """Whether `tensor` is flat bytes that begin like a packed tensor."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) <= len(MAGIC):
        return False
    return bytes(tensor[: len(MAGIC)].tolist()) == MAGIC


def unpack_tensor(packed: Tensor, where: object) -> Tensor:
    """The dense tensor, on the CPU.

    Raises:
        InputRefused: The packed tensor is damaged.
    """
    payload = packed.cpu().contiguous().numpy().data
    found = read_head(lambda begin, length: payload[begin : begin + length], len(payload), where)
    dense = torch.empty(found.shape, dtype=_DTYPES[found.dtype])
    bits = dense.reshape(-1).view(torch.uint8).numpy().view(UNSIGNED[found.width])
    if len(bits) != found.total:
        raise InputRefused("E442", "damaged packed tensor", where, "its shape is not its size")
    decode_into(
        found, lambda begin, length: payload[begin : begin + length], bits, where, coder()[1]
    )
    return dense

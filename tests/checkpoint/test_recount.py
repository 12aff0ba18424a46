from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hamcli.checkpoint.recount import BLOCK_BYTES, count_zeros
from tests.checkpoint.pico import refusal
from tests.oracles.safetensors_reader import count_negative_zeros, read_file

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def sparse_values(dtype: torch.dtype) -> torch.Tensor:
    """300 x 7 values, a third of them zero, some of those negative, three not finite."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 7, generator=generator)
    values[torch.rand(300, 7, generator=generator) < 0.3] = 0.0
    values[0, :4] = -0.0
    values[1, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    # the smallest number that is not zero
    values = values.to(dtype)
    values[2, 0] = torch.finfo(dtype).smallest_normal
    return values


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_counts_are_those_of_the_independent_reader(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": sparse_values(dtype)}, path)
    values = read_file(path)["w"]
    count = count_zeros(path)["w"]
    assert count.total == 2100
    assert count.zeros == int(np.count_nonzero(values == 0))
    assert count.negative_zeros == count_negative_zeros(values) == 4
    assert count.nonfinite == 3


@pytest.mark.parametrize(
    ("dtype", "bits", "zeros", "negative", "nonfinite"),
    [
        (torch.float8_e4m3fn, [0x00, 0x80, 0x01, 0x7F, 0xFF, 0x7E], 2, 1, 2),
        (torch.float8_e5m2, [0x00, 0x80, 0x01, 0x7C, 0xFF, 0x7B], 2, 1, 2),
    ],
)
def test_eight_bit_floats_are_counted_by_their_bits(
    tmp_path: Path, dtype: torch.dtype, bits: list[int], zeros: int, negative: int, nonfinite: int
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.tensor(bits, dtype=torch.uint8).view(dtype)}, path)
    count = count_zeros(path)["w"]
    assert (count.zeros, count.negative_zeros, count.nonfinite) == (zeros, negative, nonfinite)


def test_integers_and_empty_tensors_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {
        "i": torch.tensor([0, 256, -1, 0]),
        "b": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(0.0),
    }
    save_file(tensors, path)
    counts = count_zeros(path)
    assert {name: (one.zeros, one.total) for name, one in counts.items()} == {
        "i": (2, 4),
        "b": (1, 2),
        "none": (0, 0),
        "scalar": (1, 1),
    }


def test_tensor_larger_than_a_block_is_counted_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    values = torch.ones(BLOCK_BYTES // 4 + 3)
    values[0] = values[BLOCK_BYTES // 4 - 1] = values[BLOCK_BYTES // 4] = values[-1] = 0
    save_file({"w": values}, path)
    assert count_zeros(path)["w"].zeros == 4


def test_more_than_two_to_the_24_elements_are_counted_exactly(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    values = torch.zeros(2**24 + 3, dtype=torch.float16)
    values[5] = 1
    save_file({"w": values}, path)
    # float32 cannot tell 2^24 + 1 from 2^24
    assert count_zeros(path)["w"].zeros == 2**24 + 2


def test_folder_is_counted_over_its_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    assert {name: one.zeros for name, one in count_zeros(tmp_path).items()} == {"a": 3, "b": 0}


def test_name_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "two.safetensors")
    refusal("E412", "two files", count_zeros, tmp_path)


def test_folder_without_files_is_refused(tmp_path: Path) -> None:
    refusal("E407", "no safetensors", count_zeros, tmp_path)

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hamcli.checkpoint.inspection import NEAR_ZERO, inspect
from hamcli.checkpoint.recount import BLOCK_BYTES, count_zeros
from tests.checkpoint.pico import entry, refusal, write_header
from tests.oracles.safetensors_reader import read_file

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_near_zero_mass_is_relative_to_the_root_mean_square(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "m.safetensors"
    values = torch.randn(1000, 9, generator=torch.Generator().manual_seed(0))
    values[:100] *= 1e-4
    values[100:200] = 0
    save_file({"w": values.to(dtype)}, path)
    stored = read_file(path)["w"].astype(np.float64)
    rms = float(np.sqrt(np.mean(stored**2)))
    one = inspect(path).tensors[0]
    assert one.rms == pytest.approx(rms, rel=1e-12)
    assert one.near_zero == np.count_nonzero((np.abs(stored) < NEAR_ZERO * rms) & (stored != 0))
    assert one.near_zero > 500
    assert one.zeros == 900
    assert one.sparsity == 0.1


def test_share_of_groups_that_fit_two_of_four(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    fits, tight, wide = [0, 0, 1, 2], [0, 0, 0, 0], [0, 1, 2, 3]
    save_file({"w": torch.tensor([fits + tight, wide + fits], dtype=torch.float32)}, path)
    # 4:8: two and four non-zeros... the second row has five
    assert inspect(path).tensors[0].fits == {"2:4": 0.75, "4:8": 0.5}


def test_groups_are_whole_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    values = torch.ones(3, BLOCK_BYTES // 4)
    values[:, ::2] = 0
    save_file({"w": values}, path)
    assert inspect(path).tensors[0].fits == {"2:4": 1.0, "4:8": 1.0}


def test_axis_that_groups_do_not_divide_has_no_fit(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(4, 6), "bias": torch.ones(8)}, path)
    assert [one.fits for one in inspect(path).tensors] == [{}, {}]


def test_sums_are_those_of_the_tensors(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 4), "b": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"v": torch.ones(2, 2).half()}, tmp_path / "two.safetensors")
    record = inspect(tmp_path)
    assert (record.total, record.zeros) == (23, 19)
    assert (record.matrix_total, record.matrix_zeros) == (20, 16)
    assert record.dtypes == {"F32": 19, "F16": 4}
    assert record.files == ("one.safetensors", "two.safetensors")
    assert record.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_real_model_is_counted_as_the_recount_counts() -> None:
    folder = ASSETS / "rxnmapper-albert-mlm"
    counts = count_zeros(folder)
    record = inspect(folder)
    assert {one.name: one.zeros for one in record.tensors} == {
        name: one.zeros for name, one in counts.items()
    }


def test_not_finite_values_do_not_hide_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.tensor([[3.0, float("nan")], [4.0, float("inf")]])}, path)
    one = inspect(path).tensors[0]
    assert (one.nonfinite, one.rms) == (2, 2.5)


def test_packed_dtypes_are_shown_without_counts(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.safetensors", {"q": entry("F4", [2, 4], 0, 4)}, bytes(4))
    one = inspect(path).tensors[0]
    assert (one.dtype, one.total, one.bytes, one.zeros) == ("F4", 8, 4, 0)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    refusal("E401", "no such checkpoint", inspect, tmp_path / "nowhere")


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "elsewhere.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").symlink_to("../elsewhere.safetensors")
    refusal("E410", "link", inspect, tmp_path / "m")

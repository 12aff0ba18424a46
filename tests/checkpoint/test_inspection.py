from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hamcli.checkpoint.inspection import EDGES, NEAR_ZERO, inspect
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
    one = inspect(path, values=True).tensors[0]
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
    assert inspect(path, values=True).tensors[0].fits == {"2:4": 0.75, "4:8": 0.5}


def test_groups_are_whole_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    values = torch.ones(3, BLOCK_BYTES // 4)
    values[:, ::2] = 0
    save_file({"w": values}, path)
    assert inspect(path, values=True).tensors[0].fits == {"2:4": 1.0, "4:8": 1.0}


def test_axis_that_groups_do_not_divide_has_no_fit(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(4, 6), "bias": torch.ones(8)}, path)
    assert [one.fits for one in inspect(path, values=True).tensors] == [{}, {}]


def test_sums_are_those_of_the_tensors(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 4), "b": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"v": torch.ones(2, 2).half()}, tmp_path / "two.safetensors")
    record = inspect(tmp_path, values=True)
    assert (record.total, record.zeros) == (23, 19)
    assert (record.matrix_total, record.matrix_zeros) == (20, 16)
    assert record.dtypes == {"F32": 19, "F16": 4}
    assert record.files == ("one.safetensors", "two.safetensors")
    assert record.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_real_model_is_counted_as_the_recount_counts() -> None:
    folder = ASSETS / "rxnmapper-albert-mlm"
    counts = count_zeros(folder)
    record = inspect(folder, values=True)
    assert {one.name: one.zeros for one in record.tensors} == {
        name: one.zeros for name, one in counts.items()
    }


def test_not_finite_values_do_not_hide_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.tensor([[3.0, float("nan")], [4.0, float("inf")]])}, path)
    one = inspect(path, values=True).tensors[0]
    assert (one.nonfinite, one.rms) == (2, 2.5)


def test_packed_dtypes_are_shown_without_counts(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.safetensors", {"q": entry("F4", [2, 4], 0, 4)}, bytes(4))
    one = inspect(path, values=True).tensors[0]
    assert (one.dtype, one.total, one.bytes, one.zeros) == ("F4", 8, 4, 0)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    refusal("E401", "no such checkpoint", inspect, tmp_path / "nowhere")


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "elsewhere.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").symlink_to("../elsewhere.safetensors")
    refusal("E410", "link", inspect, tmp_path / "m")


def test_headers_alone_read_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hamcli.checkpoint import inspection

    def refuse(*_: object) -> None:
        raise AssertionError("values were read")

    monkeypatch.setattr(inspection, "chunks", refuse)
    save_file({"w": torch.zeros(4, 4), "b": torch.zeros(3)}, tmp_path / "m.safetensors")
    record = inspect(tmp_path)
    assert (record.total, record.matrix_total, record.dense_bytes) == (19, 16, 76)
    assert (record.zeros, record.matrix_zeros, record.duplicates) == (None, None, None)
    assert {one.name: (one.shape, one.bytes, one.zeros, one.fits) for one in record.tensors} == {
        "w": ((4, 4), 64, None, None), "b": ((3,), 12, None, None),
    }  # fmt: skip


def test_the_same_place_in_every_layer_is_one_group(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.up.weight": torch.full((4, 4), float(i)) for i in range(12)}
    tensors |= {f"layers.{i}.experts.0.w": torch.ones(2, i + 1) for i in range(2)}
    save_file({**tensors, "norm": torch.zeros(3)}, tmp_path / "m.safetensors")
    groups = inspect(tmp_path, values=True).groups
    assert [(one.name, one.num_tensors, one.total) for one in groups] == [
        ("layers.*.experts.0.w", 2, 6), ("layers.*.up.weight", 12, 192), ("norm", 1, 3),
    ]  # fmt: skip
    assert groups[0].shapes == ((2, 1), (2, 2))
    assert groups[1].zeros == 16
    assert groups[1].fits == {"2:4": pytest.approx(1 / 12)}


def test_duplicates_have_the_same_bytes_shape_and_dtype(tmp_path: Path) -> None:
    ones = torch.ones(4, 4)
    tensors = {"a": ones, "b": ones.clone(), "c": ones.clone().view(2, 8), "d": ones * 2}
    save_file(tensors, tmp_path / "m.safetensors")
    assert inspect(tmp_path, values=True).duplicates == (("a", "b"),)


def test_histogram_counts_every_finite_weight_once(tmp_path: Path) -> None:
    values = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    values[0], values[1, 0], values[2] = 0, float("nan"), values[2] * 1e-4
    save_file({"w": values, "zeros": torch.zeros(8)}, tmp_path / "m.safetensors")
    one, zeros = inspect(tmp_path, values=True).tensors
    sizes = values.abs().double().numpy().ravel()
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    assert one.rms is not None
    edges = [0, *(edge * one.rms for edge in EDGES), np.inf]
    assert one.histogram == tuple(np.histogram(sizes, edges)[0])
    assert zeros.histogram == (0,) * (len(EDGES) + 1)


def test_groups_of_a_convolution_lie_along_its_inputs(tmp_path: Path) -> None:
    values = torch.ones(2, 4, 3, 3)
    values[:, ::2] = 0
    save_file({"w": values}, tmp_path / "m.safetensors")
    one = inspect(tmp_path, values=True).tensors[0]
    assert (one.input_dim, one.fits) == (1, {"2:4": 1.0})


def test_ties_are_told_by_config_and_by_the_files_metadata(tmp_path: Path) -> None:
    record = inspect(ASSETS / "rxnmapper-albert-mlm")
    tied = {one.name: one.tied for one in record.tensors if one.tied}
    assert tied == {"albert.embeddings.word_embeddings.weight": ("predictions.decoder.weight",)}
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"head": "w"})
    assert inspect(tmp_path).tensors[0].tied == ("head",)


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    refusal("E412", "two files", inspect, tmp_path)

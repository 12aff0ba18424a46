from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hamcli.checkpoint.inspection import EDGES, NEAR_ZERO, dense_size, inspect
from hamcli.checkpoint.packed.files import pack_file
from hamcli.checkpoint.recount import BLOCK_BYTES, count_zeros
from tests.checkpoint import pico
from tests.checkpoint.pico import entry, refusal, seeded, write_header
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


def test_weights_that_lie_there_once_more_are_left_out(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    save_file({"w": torch.ones(4, 4).half()}, tmp_path / "model.fp16.safetensors")
    save_file({"v": torch.ones(4, 4)}, tmp_path / "consolidated.safetensors")
    record = inspect(tmp_path, values=True)
    assert (record.files, record.zeros, record.total) == (("model.safetensors",), 16, 16)
    assert list(count_zeros(tmp_path)) == ["w"]


def test_of_shards_those_of_the_index_are_read_and_none_may_be_missing(tmp_path: Path) -> None:
    pico.save(pico.llama(), tmp_path / "m", max_shard_size="20KB")
    shards = inspect(tmp_path / "m").files
    save_file({"once.more": torch.ones(4, 4)}, tmp_path / "m" / "consolidated.safetensors")
    assert inspect(tmp_path / "m").files == shards
    (tmp_path / "m" / shards[1]).unlink()
    refusal("E415", shards[1], inspect, tmp_path / "m")


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
    assert (one.nonfinite, one.rms) == (2, 12.5**0.5)


def test_elements_that_share_bytes_are_not_counted(tmp_path: Path) -> None:
    entries = entry("F4", [2, 4], 0, 4), entry("F32", [2, 2], 4, 20), entry("I8", [4], 20, 24)
    names = dict(zip(("layers.0.w", "layers.1.w", "ids"), entries, strict=True))
    path = write_header(tmp_path / "m.safetensors", names, bytes(24))
    advanced: list[int] = []
    record = inspect(path, values=True, advance=advanced.append)
    four, full, ids = record.tensors
    assert (four.dtype, four.total, four.bytes) == ("F4", 8, 4)
    assert (four.zeros, four.negative_zeros, four.nonfinite, four.near_zero) == (None,) * 4
    assert four.sparsity is None
    assert (full.zeros, full.near_zero, ids.zeros, ids.near_zero) == (4, 0, 4, None)
    assert (record.total, record.counted, record.zeros) == (16, 8, 8)
    assert (record.matrix_total, record.matrix_counted, record.matrix_zeros) == (12, 4, 4)
    group = next(one for one in record.groups if one.name == "layers.*.w")
    assert (group.total, group.counted, group.measured, group.zeros) == (12, 4, 4, 4)
    assert group.sparsity == 1.0
    assert sum(advanced) == 2 * dense_size(path)


def test_nothing_that_can_be_counted_is_no_zeros_at_all(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.safetensors", {"q": entry("F6_E2M3", [2, 4], 0, 6)}, bytes(6))
    record = inspect(path, values=True)
    assert (record.counted, record.zeros, record.matrix_zeros) == (0, None, None)
    assert (record.groups[0].zeros, record.groups[0].sparsity) == (None, None)


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


def test_axes_are_those_of_the_architecture_where_a_config_tells_it(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    model = seeded(transformers.GPT2LMHeadModel, config)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[::2] = 0  # [in, out]
    model.save_pretrained(tmp_path)
    found = {one.name: one for one in inspect(tmp_path, values=True).tensors}
    one = found["transformer.h.0.mlp.c_fc.weight"]
    assert (one.shape, one.input_dim, one.fits) == ((8, 32), 0, {"2:4": 1.0, "4:8": 1.0})
    assert found["transformer.ln_f.weight"].input_dim is None


def test_zeros_with_a_sign_are_zeros(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([[-0.0, 0.0, 1.0, -2.0]])}, tmp_path / "m.safetensors")
    one = inspect(tmp_path, values=True).tensors[0]
    assert (one.zeros, one.negative_zeros, one.fits) == (2, 1, {"2:4": 1.0})


def test_a_packed_file_holds_the_same_and_tells_of_dense_bytes(tmp_path: Path) -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[values.abs() < 1] = 0
    tensors = {"w": values, "b": torch.ones(5), "none": torch.ones(0, 4)}
    save_file(tensors, tmp_path / "dense.safetensors")
    pack_file(tmp_path / "dense.safetensors", tmp_path / "packed.safetensors")
    read: list[int] = []
    one = inspect(tmp_path / "dense.safetensors", values=True)
    other = inspect(tmp_path / "packed.safetensors", values=True, advance=read.append)
    size = dense_size(tmp_path / "packed.safetensors")
    assert size == dense_size(tmp_path / "dense.safetensors") == 64 * 64 * 2 + 20
    assert one.dense_bytes == other.dense_bytes == size
    assert sum(read) == 2 * size
    assert other.file_bytes < one.file_bytes
    for ours, theirs in zip(one.tensors, other.tensors, strict=True):
        assert replace(ours, file="", bytes=0) == replace(theirs, file="", bytes=0)


def test_bytes_that_are_not_counted_are_told_as_done(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.safetensors", {"q": entry("F4", [2, 4], 0, 4)}, bytes(4))
    read: list[int] = []
    inspect(path, values=True, advance=read.append)
    assert sum(read) == 2 * dense_size(path) == 8


def test_fits_of_a_group_are_weighted_by_elements(tmp_path: Path) -> None:
    tensors = {"layers.0.w": torch.zeros(2, 4), "layers.1.w": torch.ones(6, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    (group,) = inspect(tmp_path, values=True).groups
    assert group.fits == {"2:4": 0.25}
    assert group.sparsity == 0.25
    (group,) = inspect(tmp_path).groups
    assert (group.fits, group.zeros, group.near_zero, group.sparsity) == (None,) * 4


def test_metadata_that_names_a_tensor_that_is_there_ties_nothing(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2), "head": torch.ones(2)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"head": "w", "format": "pt"})
    assert [one.tied for one in inspect(tmp_path).tensors] == [(), ()]


def test_groups_too_wide_for_memory_have_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed tensor of zeros may be any size, in a file of a few bytes."""
    from hamcli.checkpoint import inspection

    save_file({"w": torch.zeros(1, 8, 6)}, tmp_path / "m.safetensors")
    monkeypatch.setattr(inspection, "UNIT_LIMIT", 24)
    assert inspect(tmp_path, values=True).tensors[0].fits == {"2:4": 1.0}
    monkeypatch.setattr(inspection, "UNIT_LIMIT", 23)
    one = inspect(tmp_path, values=True).tensors[0]
    assert (one.fits, one.zeros) == ({}, 48)

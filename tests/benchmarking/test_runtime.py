"""The benchmark of runtimes on tiny models: what is there and what is said, not times."""

import json
import math

import pytest
import torch

from hamcli.benchmarking import runtime
from hamcli.benchmarking.runtime import RuntimeCell, bench_runtime, conclude
from hamcli.progress import Silent
from hamcli.runtime.calibrating import Calibration
from tests.checkpoint import pico
from tests.test_cli import RESNET, assert_clean_error, ham


def bench(model, **more):
    arguments = {"progress": Silent(), "rounds": 2, "calibration": Calibration(), **more}
    return bench_runtime(str(model), **arguments)


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch):
    monkeypatch.setattr(runtime, "ROUND_SECONDS", 1e-4)
    # a training in a process where OpenVINO has run crashed in native code; the command runs it
    monkeypatch.setitem(runtime.ENGINES, "openvino", "no-such-package")


@pytest.fixture
def folder(tmp_path):
    return pico.save(pico.bert(), tmp_path / "bert")


@pytest.mark.slow
def test_every_runtime_gives_the_dense_outputs_at_every_shape_and_number_of_threads(folder):
    before = torch.get_num_threads()
    found = bench(folder, target=0.8, shapes=[(1, 8), (3, 5)], threads=(1, 2))
    assert torch.get_num_threads() == before
    runtimes = [
        "dense",
        "auto",
        "csr",
        *([] if "onnxruntime" in found.missing else ["onnxruntime"]),
    ]
    runtimes += [] if "openvino" in found.missing else ["openvino"]
    told = [(one.threads, one.shape, one.runtime) for one in found.cells]
    assert told == [
        (threads, shape, name)
        for threads in (1, 2)
        for shape in ("1 x 8", "3 x 5")
        for name in runtimes
    ]
    for one in found.cells:
        assert one.error <= 1e-5
        assert one.clock == ("cpu" if one.threads == 1 else "wall")
        assert 0 < one.ratio_spread[0] <= one.ratio_spread[1] < math.inf
        assert one.spread[0] <= one.seconds <= one.spread[1]
    assert {one.ratio for one in found.cells if one.runtime == "dense"} == {1.0}
    assert "pruned in one shot to 0.8" in found.model
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["unit"] == "rows x tokens"


def test_a_finished_folder_is_measured_as_it_is(folder):
    found = bench(folder, shapes=[(1, 8)])
    assert found.model == str(folder)
    assert found.zeros < 0.1 * found.total
    assert found.replaced == {"1": 0}


def test_a_target_of_0_leaves_the_built_in_model_dense(folder, monkeypatch):
    monkeypatch.setattr(runtime, "DEFAULT_MODEL", str(folder))
    arguments = {"shapes": [(1, 4)], "rounds": 1, "calibration": Calibration()}
    assert "to 0.9 in memory" in bench_runtime(progress=Silent(), **arguments).model
    found = bench_runtime(progress=Silent(), target=0.0, **arguments)
    assert "to 0 in memory" in found.model
    assert found.zeros < 0.1 * found.total


def test_images_are_counted_by_rows_alone():
    found = bench(RESNET, target=0.9, shapes=[(1, 8), (2, 0), (1, 0)])
    assert [one.shape for one in found.cells if one.runtime == "dense"] == ["1", "2"]
    assert found.unit == "images"


def test_an_engine_that_cannot_run_the_graph_has_a_line_and_no_cell(tmp_path):
    import transformers

    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4
    )
    folder = pico.save(pico.seeded(transformers.MambaForCausalLM, config), tmp_path / "mamba")
    found = bench(folder, shapes=[(1, 8)])  # its scan is traced step by step, for one length
    assert {one.runtime for one in found.cells} == {"dense", "auto", "csr"}
    assert found.missing["onnxruntime"].startswith("cannot run the graph: InvalidArgument: ")
    assert any(line.startswith("onnxruntime: cannot run") for line in found.conclusions)


def test_an_engine_that_computes_something_else_is_no_measure(folder, monkeypatch):
    real = runtime._onnxruntime_run

    def wrong(graph, threads):
        run = real(graph, threads)
        return lambda values: run(values)[:, :1]

    monkeypatch.setattr(runtime, "_onnxruntime_run", wrong)
    found = bench(folder, shapes=[(1, 8)])
    assert found.missing["onnxruntime"] == "its output is off by inf"
    assert "onnxruntime" not in {one.runtime for one in found.cells}


def test_an_engine_that_is_not_there_has_a_line_and_no_cell(folder, monkeypatch):
    monkeypatch.setitem(runtime.ENGINES, "openvino", "no-such-package")
    found = bench(folder, shapes=[(1, 4)])
    assert found.missing == {"openvino": "not installed (pip install no-such-package)"}
    assert "openvino" not in {one.runtime for one in found.cells}
    assert "openvino: not installed (pip install no-such-package)." in found.conclusions


def test_a_graph_that_cannot_be_written_is_no_end(tmp_path):
    folder = pico.save(pico.mixtral(), tmp_path / "mixtral")
    found = bench(folder, shapes=[(1, 4)])
    assert {one.runtime for one in found.cells} == {"dense", "auto", "csr"}
    assert "cannot be written as ONNX" in found.missing["onnxruntime"]


def cell(name, ratio, shape=(1, 8)):
    spread = (ratio, ratio)
    return RuntimeCell(name, *shape, 1, "cpu", 1 / ratio, spread, ratio, spread, ratio, 0.0)


def test_every_losing_cell_is_named():
    cells = [cell("dense", 1.0), cell("auto", 2.0), cell("onnxruntime", 1.5)]
    cells += [cell("auto", 0.99, (8, 128)), cell("openvino", 1.98, (8, 128))]
    text = " ".join(conclude(cells, {"onnxruntime": "no reason"}))
    assert "0.99 to 2.00 times as fast as dense" in text
    assert "gained nothing over dense at 8 x 128, 1 thread(s)." in text
    assert "or faster, in 1 cell(s)" in text
    assert "was faster at 8 x 128, 1 thread(s) (openvino, 2.00 times)." in text
    assert text.endswith("onnxruntime: no reason.")


def test_one_ratio_is_no_range():
    text = conclude([cell("dense", 1.0), cell("auto", 0.912), cell("auto", 0.909, (8, 8))], {})[0]
    assert text == "hamcli.load ran 0.91 times as fast as dense."


def test_a_cell_is_named_by_the_tokens_that_ran_not_by_those_asked_for(folder):
    positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    found = bench(folder, shapes=[(1, positions + 1), (1, 9999), (1, 4)])
    assert {cell.shape for cell in found.cells} == {f"1 x {positions}", "1 x 4"}


def test_a_text_model_needs_tokens(folder):
    pico.refusal("E108", "without tokens", bench, folder, shapes=[(1, 0)])


@pytest.mark.slow
def test_the_command_shows_a_table_and_refuses_what_makes_no_sense(folder, tmp_path):
    words = ["bench", "runtime", folder, "--target", "0.9", "--shapes", "1x8", "--rounds", "1"]
    # another cache of times, and so no extension, which would be built in it
    done = ham(*words, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"), HAM_NATIVE="0")
    assert "1 thread(s), CPU time" in done.stdout
    assert "x dense" in done.stdout
    assert "times as fast as dense." in done.stdout
    for bad in (["--threads", "0"], ["--threads", "1,1"], ["--shapes", "1x"], ["--shapes", "ax8"]):
        done = ham("bench", "runtime", folder, *bad, cwd=tmp_path, code=2)
        assert_clean_error(done, "E108")
        assert done.stdout == ""

"""`ham bench runtime`: whether sparsity pays at inference here, beside what one would take instead.

Every round goes through all runtimes in turn, in one process for each number of threads. They are

    dense          the model as transformers makes it, in torch: the measure of all others
    auto           the same by hamcli.load: sparse modules where they paid when measured
    csr            every module that can be by torch's CSR product
    onnxruntime    the dense graph, zeros and all, in onnxruntime
    openvino       the same graph in OpenVINO, in fp32
"""

import copy
import importlib.metadata
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hamcli.benchmarking.measuring import Clock, Job, ratio_spread, spread, time_rounds
from hamcli.benchmarking.model import environment, warn_if_busy
from hamcli.checkpoint.loading import load_model
from hamcli.checkpoint.source import find_model
from hamcli.errors import HamError, UsageError, printable
from hamcli.onnx.checking import TOLERANCE, open_session, relative_error
from hamcli.onnx.graph import PlainModel, require_onnx, write_graph
from hamcli.progress import Progress
from hamcli.runtime import use_runtime_
from hamcli.runtime.calibrating import Calibration, cache_path
from hamcli.runtime.inputs import input_names, longest, random_inputs, takes_images
from hamcli.sparsity.masks import apply_masks_, prune_masks
from hamcli.sparsity.targets import select_targets

DEFAULT_MODEL, DEFAULT_TARGET = "builtin:minilm", 0.9
SHAPES = ((1, 8), (1, 32), (1, 128), (8, 128))  # rows and tokens
IMAGES = ((1, 0), (8, 0), (32, 0))
BASELINE = "dense"
ENGINES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
ROUND_SECONDS = 0.02  # of one runtime in one round: shorter calls are repeated
TRACED = (2, 12)

Shape = tuple[int, int]
Run = Callable[[Mapping[str, Tensor]], Tensor]
"""Inputs -> the first output."""


@dataclass(frozen=True, slots=True)
class RuntimeCell:
    """One runtime at one shape of input and one number of threads.

    Attributes:
        runtime: Which.
        rows: Texts or images at once.
        tokens: Of each text; 0 for images.
        threads: Of torch, or of the engine.
        clock: wall, or cpu: the process's own time.
        seconds: Median of one call.
        spread: Tenth and ninetieth percentile of it.
        ratio: How many times as fast as dense, by the medians.
        ratio_spread: Tenth and ninetieth percentile of that inside one round.
        fastest_ratio: The same by the least times: what a loaded machine hides least.
        error: Greatest difference from dense, over dense's greatest magnitude.
    """

    runtime: str
    rows: int
    tokens: int
    threads: int
    clock: str
    seconds: float
    spread: tuple[float, float]
    ratio: float
    ratio_spread: tuple[float, float]
    fastest_ratio: float
    error: float

    @property
    def shape(self) -> str:
        """`8 x 128`, or the number of images."""
        return f"{self.rows} x {self.tokens}" if self.tokens else f"{self.rows}"


@dataclass(frozen=True, slots=True)
class RuntimeCost:
    """What runtimes gain on a model.

    Attributes:
        model: As named, and how it was made.
        task: What it does.
        unit: What a shape counts.
        zeros: Among the matrices.
        total: Elements of the matrices.
        rounds: Measured rounds.
        replaced: Number of threads -> modules that auto made sparse, at the shapes measured.
        cells: All that was measured.
        missing: Runtime -> why it could not be.
        conclusions: Sentences, the losing cells among them.
        environment: CPU, cores, load of the machine, versions.
    """

    model: str
    task: str
    unit: str
    zeros: int
    total: int
    rounds: int
    replaced: dict[str, int]
    cells: tuple[RuntimeCell, ...]
    missing: dict[str, str]
    conclusions: tuple[str, ...]
    environment: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_runtime(
    model: str | None = None,
    *,
    progress: Progress,
    config: str | None = None,
    target: float | None = None,
    shapes: Sequence[Shape] | None = None,
    threads: Sequence[int] = (1,),
    rounds: int = 9,
    calibration: Calibration | None = None,
) -> RuntimeCost:
    """Time the runtimes on one model.

    One thread is timed by the process's own time, more by the wall.

    Args:
        model: Hub id, folder or .safetensors file; None for builtin:minilm, pruned to 0.9.
        progress: Who watches.
        config: config.json of a bare file.
        target: Prune in one shot to it, in memory, before measuring.
        shapes: Rows and tokens of each input, tokens up to the model's positions; rows alone count
            for a model of images.
        threads: Each is measured by itself; torch is left as it was.
        rounds: How often each runtime is timed.
        calibration: Times of modules; by default those of this machine's cache.

    Raises:
        InputRefused: The model cannot be opened, or takes neither tokens nor pixels alone.
        UsageError: E108, shapes of a text model without tokens.
    """
    where = environment()
    warn_if_busy(progress, where["load"][0], where["cores"])
    name = model or DEFAULT_MODEL
    if not model and target is None:
        target = DEFAULT_TARGET
    progress.stage(f"opening {name}")
    loaded = load_model(find_model(name, config=config, hashed=False), "auto", dtype="float32")
    dense = loaded.model.eval().requires_grad_(False)
    names = input_names(dense, loaded.tokenizer)
    if target is not None:
        _prune_(dense, target)
        name += f", pruned in one shot to {target:g} in memory"
    shapes = shapes or (IMAGES if takes_images(dense) else SHAPES)
    if takes_images(dense):
        shapes = tuple(dict.fromkeys((rows, 0) for rows, _ in shapes))
    elif not all(tokens for _, tokens in shapes):
        raise UsageError("E108", "shapes without tokens", "--shapes", "", "as 1x8,8x128")
    else:  # what is told is what ran: a model has so many positions and no more
        shapes = tuple(dict.fromkeys((rows, longest(dense, tokens)) for rows, tokens in shapes))
    inputs = {
        shape: random_inputs(dense, *shape, names=names, processor=loaded.image_processor)
        for shape in shapes
    }
    times = calibration or Calibration(cache_path())
    before = torch.get_num_threads()
    cells: list[RuntimeCell] = []
    replaced: dict[str, int] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="ham-") as folder:
            graph, missing = _graph(dense, names, loaded.image_processor, Path(folder), progress)
            for number in threads:
                torch.set_num_threads(number)
                progress.stage(f"preparing runtimes, {number} thread(s)")
                runs, count = _runs(dense, names, inputs, graph, number, times, missing)
                replaced[str(number)] = count
                for shape, values in inputs.items():
                    progress.stage(f"timing {_words(shape)}, {number} thread(s), {rounds} rounds")
                    cells += _time(runs, shape, values, number, rounds)
        times.save()
    finally:
        torch.set_num_threads(before)
    matrices = [one for one in dense.parameters() if one.dim() >= 2]
    return RuntimeCost(
        model=name,
        task=loaded.task,
        unit="images" if takes_images(dense) else "rows x tokens",
        zeros=sum(one.numel() - int(one.count_nonzero()) for one in matrices),
        total=sum(one.numel() for one in matrices),
        rounds=rounds,
        replaced=replaced,
        cells=tuple(cells),
        missing=missing,
        conclusions=conclude(cells, missing),
        environment=where | {name: _version(name) for name in ENGINES},
    )


def conclude(cells: Sequence[RuntimeCell], missing: Mapping[str, str]) -> tuple[str, ...]:
    """What auto gains over dense and over the better engine, and each cell where it does not."""
    ours = [one for one in cells if one.runtime == "auto"]
    ratios = [one.ratio for one in ours]
    ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios)))
    lines = [f"hamcli.load ran {' to '.join(ends)} times as fast as dense."]
    if slower := [_cell_words(one) for one in ours if one.ratio <= 1.0]:
        lines.append(f"It gained nothing over dense at {', '.join(slower)}.")
    lost, won = [], 0
    for one in ours:
        others = [
            other
            for other in cells
            if other.runtime in ENGINES and (other.shape, other.threads) == (one.shape, one.threads)
        ]
        if not others:
            continue
        best = max(others, key=lambda other: other.ratio)
        won += one.ratio >= best.ratio
        if one.ratio < best.ratio:
            factor = best.ratio / one.ratio
            lost.append(f"{_cell_words(one)} ({best.runtime}, {factor:.2f} times)")
    if lost or won:
        lines.append(f"It was as fast as the better of the engines, or faster, in {won} cell(s).")
    if lost:
        lines.append(f"An engine with dense weights was faster at {', '.join(lost)}.")
    lines += [f"{name}: {why}." for name, why in missing.items()]
    return tuple(lines)


def _cell_words(one: RuntimeCell) -> str:
    return f"{one.shape}, {one.threads} thread(s)"


def _words(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]} tokens" if shape[1] else f"{shape[0]} images"


def _prune_(model: nn.Module, target: float) -> None:
    """Zero the smallest of the weights that `ham prune` would, in one shot."""
    targets = select_targets(model, ["*"], None)
    apply_masks_(targets, prune_masks(targets, target, allocation="global", pattern="unstructured"))


def _graph(
    model: nn.Module, names: tuple[str, ...], processor: Any, folder: Path, progress: Progress
) -> tuple[Path | None, dict[str, str]]:
    """The model as ONNX, for the engines that can run; and why the others cannot."""
    missing = {
        runtime: f"not installed (pip install {package})"
        for runtime, package in ENGINES.items()
        if _version(package) is None
    }
    if len(missing) == len(ENGINES):
        return None, missing
    progress.stage("writing the graph for other engines")
    path = folder / "model.onnx"
    try:
        require_onnx("ham bench runtime")
        inputs = random_inputs(model, *TRACED, names=names, processor=processor, padded=True)
        write_graph(model, inputs, path)
    except HamError as error:
        why = f"{error.what}: {error.why}".rstrip(": ")
        return None, {name: missing.get(name, why) for name in ENGINES}
    return path, missing


def _runs(
    dense: nn.Module,
    names: tuple[str, ...],
    inputs: Mapping[Shape, Mapping[str, Tensor]],
    graph: Path | None,
    threads: int,
    times: Calibration,
    missing: dict[str, str],
) -> tuple[dict[str, Run], int]:
    """Every runtime that can run here, and how many modules auto made sparse.

    An engine that fails at one of the inputs, or computes something else, is put into `missing`.
    """
    rows = [math.prod(one["input_ids"].shape) for one in inputs.values() if "input_ids" in one]
    auto, csr = _twin(dense), _twin(dense)
    replaced = use_runtime_(auto, "auto", rows=rows or [shape[0] for shape in inputs],
                            calibration=times)  # fmt: skip
    use_runtime_(csr, "csr")
    runs = {
        BASELINE: _torch_run(dense, names),
        "auto": _torch_run(auto, names),
        "csr": _torch_run(csr, names),
    }
    makers = {"onnxruntime": _onnxruntime_run, "openvino": _openvino_run}
    for name, make in makers.items():
        if graph is None or name in missing:
            continue
        try:
            run = make(graph, threads)
            errors = [relative_error(run(one), runs[BASELINE](one)) for one in inputs.values()]
        except Exception as error:  # noqa: BLE001 - their kinds of errors have no common parent
            missing[name] = f"cannot run the graph: {_first_line(error)}"
            continue
        if wrong := [one for one in errors if not one <= TOLERANCE]:  # NaN is above nothing
            missing[name] = f"its output is off by {max(wrong):.2g}"
        else:
            runs[name] = run
    return runs, len(replaced)


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {printable(first[:160])}"


def _twin(model: nn.Module) -> nn.Module:
    """The same modules again over the same weights."""
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _torch_run(model: nn.Module, names: tuple[str, ...]) -> Run:
    plain = PlainModel(model, names)

    def run(values: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return plain(*values.values())[0]  # type: ignore[no-any-return]  # a module's call

    return run


def _onnxruntime_run(graph: Path, threads: int) -> Run:
    session = open_session(graph, threads)
    first = session.get_outputs()[0].name

    def run(values: Mapping[str, Tensor]) -> Tensor:
        feed = {name: one.numpy() for name, one in values.items()}
        return torch.from_numpy(session.run([first], feed)[0])

    return run


def _openvino_run(graph: Path, threads: int) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(
        str(graph),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # some CPUs would take bf16
        },
    )
    request = compiled.create_infer_request()

    def run(values: Mapping[str, Tensor]) -> Tensor:
        request.infer({name: one.numpy() for name, one in values.items()})
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def _time(
    runs: Mapping[str, Run], shape: Shape, values: Mapping[str, Tensor], threads: int, rounds: int
) -> list[RuntimeCell]:
    """The cells of one shape."""
    expected = runs[BASELINE](values)
    errors = {name: relative_error(run(values), expected) for name, run in runs.items()}
    repeats = {name: _repeats(run, values) for name, run in runs.items()}
    clock: Clock = "cpu" if threads == 1 else "wall"
    jobs = {name: _repeated(run, values, repeats[name]) for name, run in runs.items()}
    found = time_rounds(jobs, rounds=rounds, clock=clock)
    times = {name: [one / repeats[name] for one in found[name]] for name in runs}
    dense = times[BASELINE]
    return [
        RuntimeCell(
            runtime=name,
            rows=shape[0],
            tokens=shape[1],
            threads=threads,
            clock=clock,
            seconds=statistics.median(own),
            spread=spread(own),
            ratio=statistics.median(dense) / statistics.median(own),
            ratio_spread=ratio_spread(dense, own),
            fastest_ratio=min(dense) / min(own),
            error=errors[name],
        )
        for name, own in times.items()
    ]


def _repeated(run: Run, values: Mapping[str, Tensor], count: int) -> Job:
    def job() -> None:
        for _ in range(count):
            run(values)

    return job


def _repeats(run: Run, values: Mapping[str, Tensor]) -> int:
    """Calls that take long enough to be timed; the first ones warm up."""
    run(values)
    began = time.perf_counter()
    run(values)
    return max(1, math.ceil(ROUND_SECONDS / max(1e-6, time.perf_counter() - began)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

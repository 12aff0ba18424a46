"""`ham export --format onnx`: a model folder -> an ONNX file, checked before it appears."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hamcli.checkpoint.loading import LoadedModel, load_model
from hamcli.checkpoint.recount import count_zeros
from hamcli.checkpoint.source import find_model
from hamcli.errors import InputRefused
from hamcli.exporting import copy_beside, files_of
from hamcli.onnx.checking import WeightCount, count_weights, greatest_error
from hamcli.onnx.graph import OPSET, require_onnx, write_graph
from hamcli.progress import Progress
from hamcli.runstate import RunState, disk_errors
from hamcli.runtime.inputs import input_names, longest, random_inputs

GRAPH = "model.onnx"
TRACED = (2, 12)  # rows and tokens that the graph is traced with
TRIED = ((1, 1), (1, 7), (3, 40))  # and those that it is held against torch with


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """What was written.

    Attributes:
        path: The input.
        out: The result.
        format: onnx.
        task: What the model does.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        opset: Version of the operators.
        max_relative_error: Greatest error against torch, over the greatest magnitude.
        zeros: Among the matrices, counted in the file.
        total: Elements of the matrices.
        files: Names in the result, with their bytes.
    """

    path: str
    out: str
    format: str
    task: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    max_relative_error: float
    zeros: int
    total: int
    files: dict[str, int]


def export_onnx(path: Path, *, out: Path, overwrite: bool, progress: Progress) -> OnnxExport:
    """Write the model of a folder, dense or packed, as ONNX in fp32.

    Args:
        path: A model folder.
        out: Folder of the result.
        overwrite: Whether `out` may be replaced.
        progress: Who watches.

    Raises:
        InputRefused: There is no model, or its graph cannot be written or is not the model.
        UsageError: `out` may not be used; onnx or onnxruntime is not installed.
        ResourceError: The disk, or the memory.
    """
    require_onnx("ham export --format onnx")
    if not path.exists():
        raise InputRefused("E401", "no such checkpoint", path, "", "a model folder")
    progress.stage(f"opening {path}")
    source = find_model(str(path), hashed=False, takes_config=False)
    loaded = load_model(source, "auto", dtype="float32")
    for note in loaded.notes:
        progress.note(note)
    zeros = {name: one.zeros for name, one in count_zeros(path).items()}
    with RunState(out, inputs=[path], overwrite=overwrite) as run:
        stage = run.stage()
        with disk_errors("cannot write the model", stage):
            copy_beside(path, stage)
            names, outputs, error, count = _write(loaded, stage / GRAPH, zeros, progress)
        for name in count.left_out:
            progress.note(f"not in the graph, since no output depends on it: {name}")
        files = files_of(stage)
        for text in run.publish(stage):
            progress.warn(text)
        run.finish()
    return OnnxExport(
        str(path), str(out), "onnx", loaded.task, names, outputs, OPSET, error,
        count.zeros, count.total, files,
    )  # fmt: skip


def _write(
    loaded: LoadedModel, target: Path, zeros: Mapping[str, int], progress: Progress
) -> tuple[tuple[str, ...], tuple[str, ...], float, WeightCount]:
    model, processor = loaded.model, loaded.image_processor
    names = input_names(model, loaded.tokenizer)

    def inputs(rows: int, tokens: int) -> dict[str, Tensor]:
        return random_inputs(
            model, rows, longest(model, tokens), names=names, processor=processor,
            padded=True, seed=tokens,
        )  # fmt: skip

    progress.stage("writing the graph")
    outputs = write_graph(model, inputs(*TRACED), target)
    progress.stage("comparing with torch")
    error = greatest_error(model, target, [inputs(*one) for one in TRIED])
    count = count_weights(model, target, zeros, inputs(*TRACED))
    return names, outputs, error, count

"""J: the numbers are true, judged by a reader of thirty lines that shares nothing with hamcli."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracles.safetensors_reader import count_negative_zeros, read_folder
from tests.reliability import hostile_models, tiny
from tests.reliability.assertions import assert_clean_error
from tests.reliability.server import PLAIN, ROOT, Server

pytestmark = pytest.mark.slow

TARGETS = ["0", "0.5", "0.9", "0.99", "1", "2:4"]
WEIGHTS = hostile_models.WEIGHTS
PROJECTIONS = ("_proj.weight",)


def cast(folder: Path, dtype: str) -> None:
    """The weights in another dtype, by hand."""
    content = hostile_models.tensors(folder / WEIGHTS)
    for name, (_, shape, raw) in content.items():
        values = np.frombuffer(raw, "<f4")
        if dtype == "F16":
            raw = values.astype("<f2").tobytes()
        elif dtype == "BF16":
            raw = (values.view("<u4") >> 16).astype("<u2").tobytes()
        content[name] = dtype, shape, raw
    hostile_models.pack(folder / WEIGHTS, content)


def reseed(folder: Path, seed: int) -> None:
    """Other weights of the same shapes, many of them equal in magnitude."""
    content = hostile_models.tensors(folder / WEIGHTS)
    draw = np.random.default_rng(seed)
    for name, (dtype, shape, raw) in content.items():
        if len(shape) == 2:
            raw = np.round(draw.normal(size=shape), 2 + seed % 3).astype("<f4").tobytes()
        content[name] = dtype, shape, raw
    hostile_models.pack(folder / WEIGHTS, content)


def expected_targets(folder: Path) -> dict[str, np.ndarray]:
    """What is prunable in the tiny Llama: its projections; embeddings, head and norms are not."""
    return {k: v for k, v in read_folder(folder).items() if k.endswith(PROJECTIONS)}


def prune(
    server: Server, model: Path, out: Path, target: str, *more: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    words = ["--pattern", target] if ":" in target else ["--target", target]
    done = server.run(["prune", str(model), "--out", str(out), "--json", *words, *more])
    assert done.code == 0, done.stderr
    return json.loads(done.stdout), read_folder(out)


def faults_of_counts(
    report: dict[str, Any], written: dict[str, np.ndarray], target: str, dense: dict[str, Any]
) -> list[str]:
    """Where a report does not say what the files hold, or the files not what was asked for."""
    found = []
    zeros = {name: int((written[name] == 0).sum()) for name in dense}
    total = sum(values.size for values in dense.values())
    told = {one["name"]: (one["zeros"], one["total"]) for one in report["tensors"]}
    if told != {name: (zeros[name], dense[name].size) for name in dense}:
        found.append("tensors")
    sparsity = report["sparsity"]
    if (sparsity["zeros"], sparsity["total"]) != (sum(zeros.values()), total):
        found.append("sum")
    natural = sum(int((values == 0).sum()) for values in dense.values())
    if ":" in target:
        kept, group = map(int, target.split(":"))
        for name in dense:
            rows = (written[name].reshape(-1, group) != 0).sum(axis=1)
            if (rows > kept).any():
                found.append(f"{name}: {rows.max()} of {group} kept")
    elif sum(zeros.values()) != max(round(float(target) * total), natural):
        found.append(f"{sum(zeros.values())} zeros of {total}, not {target}")
    for name, values in dense.items():
        kept_values = written[name] != 0
        if not np.array_equal(written[name][kept_values], values[kept_values]):
            found.append(f"{name}: a kept weight changed")
    for name, values in written.items():
        if name not in dense and not np.array_equal(values, read_again(dense, name, values)):
            found.append(f"{name}: changed, and no target")
    if negative := sum(count_negative_zeros(written[name]) for name in dense):
        found.append(f"{negative} of them -0.0")
    return found


def read_again(dense: dict[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    """Tensors outside the targets are compared where the test has the whole model."""
    return dense.get(name, values)


# ---- J1 and J6 ----


def recount(server: Server, tmp_path: Path, seeds: range, targets: list[str]) -> tuple[int, int]:
    runs = zeros = 0
    for seed in seeds:
        for dtype in ("F32", "BF16", "F16"):
            model = tmp_path / f"m{seed}{dtype}"
            shutil.copytree(server.tiny / ("tied" if seed % 2 else "untied"), model)
            if seed:
                reseed(model, seed)
            cast(model, dtype)
            dense = expected_targets(model)
            for target in targets:
                out = tmp_path / "out"
                report, written = prune(server, model, out, target)
                assert faults_of_counts(report, written, target, dense) == [], (seed, dtype, target)
                runs, zeros = runs + 1, zeros + report["sparsity"]["zeros"]
                shutil.rmtree(out)
    return runs, zeros


def test_J1_recount(server: Server, tmp_path: Path, figure: Any) -> None:
    runs, zeros = recount(server, tmp_path, range(3), TARGETS)
    figure(models=3, dtypes=3, targets=len(TARGETS), runs=runs, zeros_counted=zeros, faults=0)


@pytest.mark.nightly
def test_J1_recount_of_twenty_models(server: Server, tmp_path: Path, figure: Any) -> None:
    runs, zeros = recount(server, tmp_path, range(20), TARGETS)
    figure(models=20, dtypes=3, targets=len(TARGETS), runs=runs, zeros_counted=zeros, faults=0)


def test_J1_a_wrong_counter_and_a_wrong_pruner_are_flagged(server: Server, tmp_path: Path) -> None:
    model = server.tiny / "untied"
    dense = expected_targets(model)
    report, written = prune(server, model, tmp_path / "out", "0.5")
    assert faults_of_counts(report, written, "0.5", dense) == []
    name = next(iter(dense))
    wrong = json.loads(json.dumps(report))
    wrong["tensors"][0]["zeros"] += 1
    assert faults_of_counts(wrong, written, "0.5", dense) == ["tensors"]
    wrong = json.loads(json.dumps(report))
    wrong["sparsity"]["zeros"] -= 1
    assert faults_of_counts(wrong, written, "0.5", dense) == ["sum"]
    place = np.argwhere(written[name] != 0)[0]
    one_more = {**written, name: written[name].copy()}
    one_more[name][tuple(place)] = 0.0
    assert len(faults_of_counts(report, one_more, "0.5", dense)) == 3
    changed = {**written, name: written[name].copy()}
    changed[name][tuple(place)] *= 1.0001
    assert "kept weight changed" in faults_of_counts(report, changed, "0.5", dense)[0]
    signed = {**written, name: np.where(written[name] == 0, np.float32(-0.0), written[name])}
    assert "-0.0" in faults_of_counts(report, signed, "0.5", dense)[0]
    assert faults_of_counts(report, written, "2:4", dense)


@pytest.mark.parametrize("words", [["prune"], ["sparsify"]])
def test_J6_no_negative_zero(server: Server, tmp_path: Path, words: list[str]) -> None:
    """Weights whose dense value is negative are written as plain zeros, in every dtype."""
    for dtype in ("float32", "bfloat16", "float16"):
        out = tmp_path / dtype
        job = [*words, *tiny.sparsify(server.tiny, out, "--set", f"export.dtype={dtype}")[1:]]
        done = server.run(job)
        assert done.code == 0, done.stderr
        assert sum(count_negative_zeros(values) for values in read_folder(out).values()) == 0


# ---- J2 ----


def test_J2_zeros_stay(server: Server, tmp_path: Path, figure: Any) -> None:
    """Of 50 steps with decay and HAM: what the mask drops is zero at each save and at the end."""
    keep = tmp_path / "kept"
    keep.mkdir()
    out = tmp_path / "out"
    more = ["--set", "training.steps=50", "--set", "optimizer.weight_decay=0.1"]
    here = "tests.reliability.test_j_numbers:keep_every_checkpoint"
    done = server.run(tiny.sparsify(server.tiny, out, *more), before=here, env={"KEEP": str(keep)})
    assert done.code == 0, done.stderr
    saves = wrong = dropped = 0
    for folder in sorted(keep.iterdir()):
        model = hostile_models.tensors(folder / "model.safetensors")
        masks = hostile_models.tensors(folder / "sparsifier.safetensors")
        for name, kept in masked(model, masks):
            values = np.frombuffer(model[name][2], "<f4").reshape(kept.shape)
            wrong += int(np.count_nonzero(values[~kept]))
            dropped += int(kept.size - np.count_nonzero(kept))
        saves += 1
    figure(steps=50, saves=saves, weights_that_came_back=wrong)
    assert saves >= 40
    assert wrong == 0
    assert dropped > 20 * 9000  # the control: masks there were
    dropped = sum(int((values == 0).sum()) for values in expected_targets(out).values())
    assert dropped == 9216


def masked(model: dict[str, Any], masks: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Target -> True where kept."""
    found = []
    for name in model:
        if name.endswith(PROJECTIONS) and f"mask.{name}" in masks:  # none yet while all is dense
            _, shape, raw = masks[f"mask.{name}"]
            found.append((name, np.frombuffer(raw, "?").reshape(shape)))
    return found


def in_model_order(names: list[str]) -> list[str]:
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return sorted(names, key=lambda name: (name.split(".")[2], parts.index(name.split(".")[-2])))


def keep_every_checkpoint() -> None:
    """In a case: copy each run checkpoint aside as soon as it is committed."""
    from hamcli.runstate.checkpoints import Checkpoints

    whole = Checkpoints.save

    def save(self: Any, step: int, *args: Any, **words: Any) -> Path:
        path = whole(self, step, *args, **words)
        shutil.copytree(path, Path(os.environ["KEEP"]) / path.name)
        return path

    Checkpoints.save = save  # type: ignore[method-assign]


# ---- J3 ----

TIES = {
    "all equal": lambda shape, draw: np.ones(shape),
    "signs only": lambda shape, draw: draw.choice([-1.0, 1.0], size=shape),
    "bf16 noise": lambda shape, draw: draw.normal(size=shape),
    "integers": lambda shape, draw: draw.integers(-3, 4, size=shape),
    "99 % zero": lambda shape, draw: np.where(
        draw.random(shape) < 0.99, 0, draw.normal(size=shape)
    ),
}


@pytest.mark.parametrize("kind", TIES)
@pytest.mark.parametrize("target", ["0.37", "0.9"])
def test_J3_ties(server: Server, tmp_path: Path, kind: str, target: str) -> None:
    """The exact count, the first ones of the equal go, the same again; zeros are never undone."""
    model = tmp_path / "m"
    shutil.copytree(server.tiny / "untied", model)
    content = hostile_models.tensors(model / WEIGHTS)
    draw = np.random.default_rng(0)
    for name in in_model_order([name for name in content if name.endswith(PROJECTIONS)]):
        dtype, shape, _ = content[name]
        values = np.asarray(TIES[kind](shape, draw), "<f4").view("<u4") & np.uint32(0xFFFF0000)
        content[name] = dtype, shape, values.astype("<u4").tobytes()
    hostile_models.pack(model / WEIGHTS, content)
    dense = expected_targets(model)
    report, written = prune(server, model, tmp_path / "a", target)
    again = prune(server, model, tmp_path / "b", target)[1]
    assert all(np.array_equal(written[name], again[name]) for name in dense)
    total = sum(values.size for values in dense.values())
    before = sum(int((values == 0).sum()) for values in dense.values())
    due = max(round(float(target) * total), before)
    assert report["sparsity"]["zeros"] == due
    assert sum(int((written[name] == 0).sum()) for name in dense) == due
    # by magnitude, then by place: a stable sort over the targets in the model's order
    names = in_model_order(list(dense))
    flat = np.concatenate([np.abs(dense[name]).ravel() for name in names])
    lost = np.argsort(flat, kind="stable")[:due]
    found = np.concatenate([written[name].ravel() == 0 for name in names])
    assert np.array_equal(np.flatnonzero(found), np.sort(lost))


# ---- J4 ----


def test_J4_tied(server: Server, tmp_path: Path) -> None:
    model = server.tiny / "tied"
    report, _ = prune(server, model, tmp_path / "out", "0.5")
    names = [one["name"] for one in report["tensors"]]
    assert len(names) == len(set(names)) == 14
    tensors = read_folder(model)
    assert "lm_head.weight" not in tensors
    assert report["sparsity"]["num_parameters"] == sum(v.size for v in tensors.values())
    include = ["--set", "targets.include=['*', lm_head]", "--set", "targets.exclude=[]"]
    both = ["--set", "targets.include=['*']", "--set", "targets.exclude=[model.embed_tokens]"]
    done = server.run(["prune", str(model), "--target", "0.5", "--out", str(tmp_path / "x"), *both])
    assert_clean_error(done, 2, "E217.*tied")
    asked, written = prune(server, model, tmp_path / "asked", "0.5", *include)
    tied = [one for one in asked["tensors"] if "embed" in one["name"] or "lm_head" in one["name"]]
    assert len(tied) == 1
    assert tied[0]["zeros"] == int((written["model.embed_tokens.weight"] == 0).sum())
    for folder in ("out", "asked"):
        found = in_a_fresh_process(tmp_path / folder)
        assert found["tied"]
        assert found["problems"] == []


# ---- J5 ----

RELOAD = """
import json, sys, torch, hashlib
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
bad = [str(x) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for x in info[key]]
with torch.no_grad():
    logits = model.eval()(torch.arange(3, 13)[None]).logits.float().contiguous()
head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
print(json.dumps({
    "problems": bad, "tied": head is embedding,
    "dtypes": sorted({str(param.dtype) for param in model.parameters()}),
    "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
}))
"""


def in_a_fresh_process(folder: Path) -> dict[str, Any]:
    """What stock transformers finds, without hamcli."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RELOAD, str(folder)],
        cwd=folder,
        env={**os.environ, **PLAIN, "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_J5_reload(server: Server, tmp_path: Path, dtype: str) -> None:
    """A fresh process finds nothing missing; logits are those of the packed twin, bit for bit."""
    import hashlib

    import torch

    import hamcli

    torch.set_num_threads(1)
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    job = tiny.sparsify(server.tiny, dense, "--set", f"export.dtype={dtype}")
    assert server.run(job).code == 0
    words = ["export", str(dense), "--format", "packed", "--out", str(packed)]
    assert server.run(words).code == 0
    found = in_a_fresh_process(dense)
    assert found["problems"] == []
    assert found["dtypes"] == [f"torch.{dtype}"]
    model = hamcli.load(packed, runtime="dense")
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 13)[None]).logits.float().contiguous()
    assert hashlib.sha256(logits.numpy().tobytes()).hexdigest() == found["logits"]


# ---- J7 ----


def big_file(path: Path, rows: int, columns: int, dtype: str = "F32") -> None:
    """One matrix with the value of its row's parity and column: half of it small."""
    width = 4 if dtype == "F32" else 2
    header = {"w": {"dtype": dtype, "shape": [rows, columns],
                    "data_offsets": [0, rows * columns * width]}}  # fmt: skip
    small, large = (0.5, 2.0) if dtype == "F32" else (0x3F00, 0x4000)
    row = np.where(np.arange(columns) % 2 == 0, small, large).astype("<f4" if width == 4 else "<u2")
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(rows):
            file.write(row.tobytes())


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(4097, 4097, "F32"), pytest.param(2**16 + 1, 2**15 + 2, "BF16", marks=pytest.mark.nightly)],
)
def test_J7_big_tensor(
    server: Server, tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, dtype: str,
    figure: Any,
) -> None:  # fmt: skip
    """More than 2^24 elements, and nightly more than 2^31: exact counts of 64 bits."""
    place = tmp_path_factory.mktemp("big")
    big_file(place / "w.safetensors", rows, columns, dtype)
    words = ["prune", str(place / "w.safetensors"), "--target", "0.5", "--out", str(place / "out")]
    done = server.run([*words, "--json"], timeout=500)
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    total = rows * columns
    assert report["sparsity"]["total"] == total > 2**24
    assert report["sparsity"]["zeros"] == round(0.5 * total)
    counted = 0
    (path,) = (place / "out").glob("*.safetensors")
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(2**24):
            bits = np.frombuffer(block, "<u4" if dtype == "F32" else "<u2")
            counted += bits.size - int(np.count_nonzero(bits))
    assert counted == round(0.5 * total)
    figure(elements=total, zeros=counted, grown_mib=round(done.grown_bytes / 2**20))
    shutil.rmtree(place)


# ---- J8 ----


def test_J8_honest_size(server: Server, tmp_path: Path) -> None:
    import gzip

    out = tmp_path / "out"
    done = server.run(tiny.sparsify(server.tiny, out, "--json"))
    report = json.loads(done.stdout)
    for one in report["files"]:
        if one["path"] not in ("report.json", "report.html", "README.md"):
            assert one["bytes"] == (out / one["path"]).stat().st_size, one["path"]
    weights = (out / WEIGHTS).read_bytes()
    size = report["size"]
    assert size["dense_bytes"] == (server.tiny / "untied" / WEIGHTS).stat().st_size
    assert abs(len(weights) - size["dense_bytes"]) < 1024  # the header alone may differ
    assert 0.9 < size["gzip_bytes"] / len(gzip.compress(weights, 6, mtime=0)) < 1.1
    packed = tmp_path / "packed"
    words = ["export", str(out), "--format", "packed", "--out", str(packed)]
    assert server.run(words).code == 0
    assert size["packed_bytes"] == (packed / WEIGHTS).stat().st_size
    card = (out / "README.md").read_text()
    assert "File size unchanged" in card
    assert "packed" in card
    assert "gzip" in card
    assert ROOT.is_dir()

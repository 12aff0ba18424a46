"""`ham prune` by files alone: the same zeros as through memory, and nothing half done."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hamcli.checkpoint.dense import write_model
from hamcli.checkpoint.loading import load_model
from hamcli.checkpoint.source import find_model
from hamcli.completing import complete
from hamcli.errors import HamError
from hamcli.progress import Silent
from hamcli.pruning.by_files import prune, prune_files
from hamcli.recipe import recipe_layer, values_layer
from hamcli.sparsity.masks import apply_masks_, prune_masks
from hamcli.sparsity.targets import select_targets
from tests.checkpoint import pico
from tests.checkpoint.pico import edit_config, entry, write_header
from tests.oracles.safetensors_reader import count_negative_zeros, read_file, read_folder

ASSETS = Path(__file__).parents[1] / "assets"
ALBERT, RESNET = ASSETS / "rxnmapper-albert-mlm", ASSETS / "fashion-mnist-resnet-tiny"


def by_files(model, out, progress=None, **settings):
    read = complete([values_layer({"model.id": str(model), **settings}, "test")], has_recipe=False)
    return prune_files(read, out=out, overwrite=False, progress=progress or Silent())


def through_memory(model, out, target, **how):
    """The same by a network, as a folder that holds its weights."""
    source = find_model(str(model), hashed=False)
    loaded = load_model(source, "auto", dtype="float32")
    targets = select_targets(loaded.model, ["*"], None)
    apply_masks_(targets, prune_masks(targets, target, **how))
    write_model(loaded.model, source, out)
    return read_folder(out)


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype
        assert found[name].tobytes() == values.tobytes(), name


@pytest.mark.parametrize("model", [ALBERT, RESNET], ids=["albert", "resnet"])
@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_real_models_get_the_same_bytes_as_through_memory(model, allocation, tmp_path):
    report = by_files(
        model, tmp_path / "out", **{"sparsity.target": 0.83, "sparsity.allocation": allocation}
    )
    wanted = through_memory(model, tmp_path / "memory", 0.83, allocation=allocation)
    same(read_folder(tmp_path / "out"), wanted)
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "memory"))
    assert one.read_bytes() == other.read_bytes()
    assert report.sparsity.zeros == round(0.83 * report.sparsity.total)
    assert report.sparsity.threshold is not None


@pytest.mark.parametrize(
    ("make", "settings", "how"),
    [
        (pico.gpt2, {"sparsity.pattern": "2:4", "sparsity.target": 0.5}, {"pattern": "2:4"}),
        (pico.gpt2, {"sparsity.target": 0.5}, {}),
        (pico.mixtral, {"sparsity.target": 0.5}, {}),
        (pico.mixtral, {"sparsity.target": 0.5, "sparsity.allocation": "erk"}, {"allocation": "erk"}),  # noqa: E501
        (pico.mixtral, {"sparsity.pattern": "2:4", "sparsity.target": 0.5}, {"pattern": "2:4"}),
        (pico.vit, {"sparsity.target": 0.5, "sparsity.min_sparsity": 0.4, "sparsity.allocation": "uniform"}, {"allocation": "uniform", "min_sparsity": 0.4}),  # noqa: E501
        (pico.vit, {"sparsity.target": 0.5, "sparsity.max_sparsity": 0.51, "sparsity.allocation": "erk"}, {"allocation": "erk", "max_sparsity": 0.51}),  # noqa: E501
        (lambda: pico.llama(tie_word_embeddings=True), {"sparsity.target": 0.5}, {}),
    ],
    ids=[
        "gpt2-2:4", "gpt2", "mixtral", "mixtral-erk", "mixtral-2:4", "vit", "vit-erk", "llama-tied",
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_models_get_the_same_weights_as_through_memory(make, settings, how, dtype, tmp_path):
    pico.save(make().to(dtype), tmp_path / "model")
    by_files(tmp_path / "model", tmp_path / "out", **settings)
    wanted = through_memory(tmp_path / "model", tmp_path / "memory", 0.5, **how)
    same(read_folder(tmp_path / "out"), wanted)


def test_convolutions_are_grouped_along_their_inputs(tmp_path):
    settings = {"sparsity.pattern": "2:4", "targets.exclude": ["*embedder*", "classifier*"]}
    by_files(RESNET, tmp_path / "out", **settings, **{"sparsity.target": 0.5})
    found = read_folder(tmp_path / "out")
    before = read_folder(RESNET)
    weight = found["resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"]
    groups = np.count_nonzero(weight.reshape(16, 4, 4, 3, 3), axis=2)
    assert (groups == 2).all()
    name = "resnet.embedder.embedder.convolution.weight"
    assert np.array_equal(found[name], before[name])


def test_an_architecture_that_is_not_written_down_is_told_by_its_skeleton(tmp_path):
    import transformers

    config = transformers.ElectraConfig(**pico.SMALL, embedding_size=16)
    pico.save(pico.seeded(transformers.ElectraForMaskedLM, config), tmp_path / "model")
    by_files(tmp_path / "model", tmp_path / "out", **{"sparsity.target": 0.5})
    wanted = through_memory(tmp_path / "model", tmp_path / "memory", 0.5)
    same(read_folder(tmp_path / "out"), wanted)


def stored(values, dtype):
    if dtype == "BF16":
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return np.asarray(values).astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def bare(path, tensors):
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        raw = stored(values, dtype)
        header[name] = entry(dtype, list(shape), len(data), len(data) + len(raw))
        data += raw
    return write_header(path, header, data)


def odd_tensors(dtype, other):
    generator = np.random.default_rng(0)
    values = generator.standard_normal((37, 13))
    values[::3] = 0.5
    values[1::3, ::2] = -0.5
    values[2, :4] = -0.0
    return {
        "a": (dtype, (37, 13), values),
        "b": (other, (5, 3, 7), np.full((5, 3, 7), 0.5)),
        "zeros": (dtype, (4, 4), np.zeros((4, 4))),
        "empty": (dtype, (0, 8), np.zeros((0, 8))),
        "scalar": ("F32", (), np.float64(3.0)),
        "norm": (dtype, (9,), np.full(9, 1e-3)),
        "embed.weight": (dtype, (6, 2), np.full((6, 2), 1e-3)),
    }


@pytest.mark.parametrize("target", [0.0, 0.02, 0.31, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(
    ("dtype", "other"),
    [("F16", "F16"), ("BF16", "BF16"), ("F32", "F32"), ("F64", "F64"), ("BF16", "F16"), ("F32", "F64")],  # noqa: E501
)  # fmt: skip
def test_a_bare_file_is_cut_exactly_with_ties_by_position(dtype, other, target, tmp_path):
    path = bare(tmp_path / "m.safetensors", odd_tensors(dtype, other))
    report = by_files(path, tmp_path / "out", **{"sparsity.target": target})
    before, after = read_file(path), read_file(tmp_path / "out" / "m.safetensors")
    names = ["a", "b", "zeros"]
    flat = np.concatenate([np.abs(before[name].astype(np.float64)).ravel() for name in names])
    count = max(round(target * flat.size), int(np.count_nonzero(flat == 0)))
    keeps = np.ones(flat.size, bool)
    keeps[np.argsort(flat, kind="stable")[:count]] = False
    found = np.concatenate([after[name].astype(np.float64).ravel() for name in names])
    kept = np.concatenate([before[name].astype(np.float64).ravel() for name in names])
    assert np.array_equal(found, np.where(keeps, kept, 0.0))
    assert report.sparsity.zeros == count
    assert report.sparsity.natural_zeros == np.count_nonzero(flat == 0)
    assert sum(count_negative_zeros(after[name]) for name in names) == 0
    for name in ("empty", "scalar", "norm", "embed.weight"):
        assert after[name].tobytes() == before[name].tobytes()
    assert [one.name for one in report.tensors] == names


def test_weights_in_quantised_dtypes_are_left_alone_and_told(tmp_path):
    path = tmp_path / "m.safetensors"
    entries = {
        "a": entry("F8_E4M3", [2, 4], 0, 8),
        "b": entry("I8", [2, 4], 8, 16),
        "mask": entry("BOOL", [2, 4], 16, 24),
        "w": entry("F32", [2, 4], 24, 56),
    }
    write_header(
        path, entries, np.arange(24, dtype=np.uint8).tobytes() + np.ones(8, "f4").tobytes()
    )
    report = by_files(path, tmp_path / "out", **{"sparsity.target": 0.5})
    assert report.warnings == ("2 tensor(s) in F8_E4M3, I8 are neither pruned nor counted",)
    assert (report.sparsity.zeros, report.sparsity.num_parameters) == (4, 8)
    assert (tmp_path / "out" / "m.safetensors").read_bytes()[-56:-32] == bytes(range(24))


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_zeros_that_are_there_count_towards_the_target_and_are_told(allocation, tmp_path):
    sparse = np.arange(1.0, 17.0).reshape(4, 4)
    sparse[:3] = 0.0
    tensors = {"a": ("F32", (4, 4), sparse), "b": ("F32", (4, 8), np.arange(1.0, 33.0))}
    settings = {"sparsity.target": 0.5, "sparsity.allocation": allocation}
    report = by_files(bare(tmp_path / "m.safetensors", tensors), tmp_path / "out", **settings)
    assert [one.zeros for one in report.tensors] == [12, 12]
    assert report.sparsity.zeros == 24
    assert report.sparsity.natural_zeros == 12
    assert report.sparsity.threshold == 12.0


def test_zeros_of_all_tensors_are_told_of_a_pattern_too(tmp_path):
    values = np.arange(4.0)
    tensors = {name: ("F32", (1, 4), values[None]) for name in ("a", "b")}
    settings = {"sparsity.target": 0.5, "sparsity.pattern": "2:4"}
    report = by_files(bare(tmp_path / "m.safetensors", tensors), tmp_path / "out", **settings)
    assert (report.sparsity.natural_zeros, report.sparsity.zeros) == (2, 4)
    assert report.sparsity.threshold is None


def test_shards_keep_their_names_and_their_index(tmp_path):
    pico.save(pico.llama(), tmp_path / "model", max_shard_size="20KB")
    names = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(names) > 3
    by_files(tmp_path / "model", tmp_path / "out", **{"sparsity.target": 0.5})
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    for name in ("config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (tmp_path / "model" / index).read_bytes()
    wanted = through_memory(tmp_path / "model", tmp_path / "memory", 0.5)
    same(read_folder(out), wanted)


def test_the_hubs_cache_is_read_and_left_alone(tmp_path):
    pico.save(pico.llama(), tmp_path / "plain")
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "c0ffee", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    by_files(snapshot, tmp_path / "out", **{"sparsity.target": 0.5})
    out = tmp_path / "out"
    assert (out / "model.safetensors").is_file()
    assert not any(path.is_symlink() for path in out.iterdir())
    assert all(path.is_symlink() for path in snapshot.iterdir())


def test_packed_goes_in_and_out(tmp_path):
    settings = {"sparsity.target": 0.5}
    by_files(RESNET, tmp_path / "dense", **settings)
    report = by_files(RESNET, tmp_path / "packed", **settings, **{"export.format": "packed"})
    assert report.size.packed_bytes == (tmp_path / "packed" / "model.safetensors").stat().st_size
    # pruned further from the packed form, as from the dense one
    more = {"sparsity.target": 0.9}
    by_files(tmp_path / "dense", tmp_path / "one", **more)
    by_files(tmp_path / "packed", tmp_path / "other", **more)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_file_with_a_config_from_elsewhere_becomes_a_model(tmp_path):
    pico.save(pico.llama(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (tmp_path / "model" / "config.json").rename(tmp_path / "model" / "mine.json")
    config = {"model.config": str(tmp_path / "model" / "mine.json"), "sparsity.target": 0.5}
    by_files(tmp_path / "weights.safetensors", tmp_path / "out", **config)
    model = load_model(find_model(str(tmp_path / "out"), hashed=False), "auto").model
    zeros = sum(int((param == 0).sum()) for param in select_targets(model, ["*"], None).params)
    assert zeros == round(0.5 * select_targets(model, ["*"], None).total)


def test_what_names_code_or_places_is_left_out(tmp_path):
    pico.save(pico.llama(), tmp_path / "model")
    edit_config(tmp_path / "model", auto_map={"AutoModel": "evil.Model"}, _name_or_path="/secret")
    (tmp_path / "model" / "evil.py").write_text("1")
    by_files(tmp_path / "model", tmp_path / "out", **{"sparsity.target": 0.5})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "_name_or_path"} & config.keys()
    assert config["model_type"] == "llama"
    assert not (tmp_path / "out" / "evil.py").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_target_that_is_not_finite_is_refused_by_name(bad, tmp_path):
    for pattern, target in (("unstructured", 0.9), ("2:4", 0.5)):
        tensors = {"a": ("F32", (4, 4), np.ones((4, 4))), "b": ("F32", (4, 4), np.ones((4, 4)))}
        tensors["b"][2][1, 2] = bad
        path = bare(tmp_path / "m.safetensors", tensors)
        settings = {"sparsity.target": target, "sparsity.pattern": pattern}
        with pytest.raises(HamError, match=r"E430.*m\.safetensors: b") as caught:
            by_files(path, tmp_path / "out", **settings)
        assert caught.value.exit_code == 4
        assert sorted(tmp_path.iterdir()) == [path]


def test_one_shard_of_several_and_unknown_architectures_are_refused(tmp_path):
    save_file({"w": torch.ones(4, 4)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(HamError, match="E405"):
        by_files(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "out")
    pico.save(pico.llama(), tmp_path / "model")
    edit_config(tmp_path / "model", model_type="another")
    with pytest.raises(HamError, match="E422"):
        by_files(tmp_path / "model", tmp_path / "out")
    edit_config(tmp_path / "model", model_type="llama", architectures=["LlamaForQuestions"])
    with pytest.raises(HamError, match="E423"):
        by_files(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_with_more_than_the_network_go_through_memory_which_is_said(tmp_path, monkeypatch):
    pico.save(pico.bert("BertForPreTraining"), tmp_path / "model")
    told, gone = [], []

    class Watcher(Silent):
        def warn(self, text):
            told.append(text)

    from hamcli.pruning import in_memory

    monkeypatch.setattr(in_memory, "prune", lambda read, **_: gone.append(read))
    words = {"model.id": str(tmp_path / "model"), "sparsity.target": 0.5}
    read = complete([values_layer(words, "test")], has_recipe=False)
    prune(read, out=tmp_path / "out", overwrite=False, progress=Watcher())
    assert len(gone) == 1
    assert "pruned in memory" in told[0]
    assert "is no parameter of BertForMaskedLM" in told[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"data.source": "x.txt"}, {"gate.max_drop": 0.1}, {"sparsity.method": "wanda"},
        {"sparsity.score": "random"}, {"sparsity.allocation": "lamp"},
        {"sparsity.pattern": "block:4x4"}, {"sparsity.max_sparsity": 0.95},
        {"export.dtype": "float16"}, {"model.dtype": "float16"}, {"model.task": "masked-lm"},
        {"export.max_shard_size": "1MB"}, {"sparsity.min_sparsity": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_what_files_cannot_tell_goes_through_memory(settings, tmp_path, monkeypatch):
    from hamcli.pruning import in_memory

    gone = []
    monkeypatch.setattr(in_memory, "prune", lambda read, **_: gone.append(read))
    words = {"model.id": str(RESNET), "sparsity.target": 0.9, **settings}
    read = complete([values_layer(words, "test")], has_recipe=False)
    prune(read, out=tmp_path / "out", overwrite=False, progress=Silent())
    assert len(gone) == 1


class Meddler(Silent):
    """Does something to the input between the last byte read and the report."""

    def __init__(self, meddle):
        self.meddle = meddle

    def end_bytes(self):
        self.meddle()


def appended(path):
    path.write_bytes(path.read_bytes() + b" ")


def touched(path):
    os.utime(path, ns=(1, 1))


def replaced(path):
    status = path.stat()
    path.with_name("other").write_bytes(path.read_bytes())
    path.with_name("other").replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("meddle", [appended, touched, replaced])
def test_an_input_that_changes_meanwhile_is_refused(meddle, tmp_path):
    path = bare(tmp_path / "m.safetensors", {"w": ("F32", (4, 4), np.arange(16.0))})
    with pytest.raises(HamError, match=r"E416.*m\.safetensors"):
        by_files(path, tmp_path / "out", Meddler(lambda: meddle(path)))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("model", [ALBERT, RESNET], ids=["albert", "resnet"])
def test_the_report_of_files_is_that_of_memory(model, tmp_path):
    from hamcli.pruning import in_memory

    words = {
        "model.id": str(model), "sparsity.target": 0.5, "gate.min_sparsity": 0.5,
        "evaluation.examples": 4,
    }  # fmt: skip
    read = complete([values_layer(words, "test")], has_recipe=False)
    where = {"overwrite": False, "progress": Silent()}
    one = prune_files(read, out=tmp_path / "one", **where)
    other = in_memory.prune(read, out=tmp_path / "other", **where)
    assert one.sparsity == other.sparsity
    assert one.tensors == other.tensors
    assert (one.gate, one.gate.passed) == (other.gate, True)
    assert one.model == other.model
    assert {one.path for one in one.files} == {one.path for one in other.files}


def test_a_model_of_the_hub_is_named_with_its_commit(tmp_path, monkeypatch):
    from hamcli import completing
    from hamcli.pruning import by_files as streamed

    def found(name, **_):
        assert name == "org/tiny@main"
        return dataclasses.replace(find_model(str(RESNET), hashed=False), revision="c0ffee")

    for room in (completing, streamed):
        monkeypatch.setattr(room, "find_model", found)
    report = by_files("org/tiny@main", tmp_path / "out", **{"sparsity.target": 0.5})
    assert (report.model.id, report.model.revision) == ("org/tiny", "c0ffee")
    assert report.model.is_hub
    assert "org/tiny@c0ffee" in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.parametrize("score", ["fisher", "first-order"])
def test_scores_that_need_gradients_are_refused(score, tmp_path):
    words = {"model.id": str(RESNET), "sparsity.target": 0.5, "sparsity.score": score}
    read = complete([values_layer(words, "test")], has_recipe=False)
    with pytest.raises(HamError, match="E228"):
        prune(read, out=tmp_path / "out", overwrite=False, progress=Silent())
    assert not (tmp_path / "out").exists()


def test_out_may_not_be_the_input(tmp_path):
    pico.save(pico.llama(), tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    words = {"model.id": str(tmp_path / "model"), "sparsity.target": 0.5}
    read = complete([values_layer(words, "test")], has_recipe=False)
    with pytest.raises(HamError, match="E110"):
        prune_files(read, out=tmp_path / "model", overwrite=True, progress=Silent())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before


@pytest.mark.parametrize("key", ["model.config", "data.evaluation"])
def test_out_may_be_no_other_input_either(key, tmp_path):
    (tmp_path / "given").mkdir()
    model, given = tmp_path / "m.safetensors", tmp_path / "given" / "config.json"
    model.write_bytes((RESNET / "model.safetensors").read_bytes())
    given.write_bytes((RESNET / "config.json").read_bytes())
    words = {"model.id": str(model), "model.config": str(given), "sparsity.target": 0.5}
    read = complete([values_layer({**words, key: str(given)}, "test")], has_recipe=False)
    with pytest.raises(HamError, match="E110"):
        prune(read, out=tmp_path / "given", overwrite=True, progress=Silent())
    assert [path.name for path in (tmp_path / "given").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("key", "code"), [("targets.include", "E214"), ("targets.exclude", "E215")]
)
def test_a_glob_that_fits_nothing_is_told_with_its_key(key, code, tmp_path):
    with pytest.raises(HamError, match=code) as caught:
        by_files(RESNET, tmp_path / "out", **{key: ["nowhere*"], "sparsity.target": 0.5})
    assert caught.value.where == f"test: {key}"
    assert caught.value.line().count(key) == 1


@pytest.mark.parametrize(
    ("place", "settings"),
    [
        ("--method", {"sparsity.method": "random"}),
        ("--set", {"sparsity.method": "ac-dc"}),
        ("--target", {"sparsity.target": [0.5, 0.8]}),
    ],
)
def test_what_one_shot_cannot_give_is_refused_not_passed_over(place, settings, tmp_path):
    layers = [values_layer({"model.id": str(RESNET), **settings}, place)]
    with pytest.raises(HamError, match=f"E106.*{place}: sparsity"):
        prune(
            complete(layers, has_recipe=False),
            out=tmp_path / "o",
            overwrite=False,
            progress=Silent(),
        )
    assert not list(tmp_path.iterdir())


def test_a_recipe_for_training_says_by_what_one_shot_prunes(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{id: {RESNET}}}\nsparsity: {{method: ac-dc, target: 0.5}}\n")
    read = complete([recipe_layer(str(path))], has_recipe=True)
    report = prune(read, out=tmp_path / "o", overwrite=False, progress=Silent())
    assert (report.sparsity.method, report.sparsity.target) == ("one-shot", 0.5)


def test_a_config_that_names_nothing_of_a_place_stays_byte_for_byte(tmp_path):
    pico.save(pico.llama(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace("\n", "\n \n"))
    by_files(tmp_path / "model", tmp_path / "out", **{"sparsity.target": 0.5})
    assert (tmp_path / "out" / "config.json").read_bytes() == path.read_bytes()


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    from hamcli.runstate import disk

    size = (RESNET / "model.safetensors").stat().st_size
    # dense files are there until they are packed
    for free, words in ((size, {"export.format": "packed"}), (size - 1, {})):
        monkeypatch.setattr(disk, "free_bytes", lambda _, free=free: free)
        with pytest.raises(HamError, match="E504"):
            by_files(RESNET, tmp_path / "out", **words)
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(disk, "free_bytes", lambda _: size)
    by_files(RESNET, tmp_path / "out")


def test_progress_counts_every_byte(tmp_path):
    class Watcher(Silent):
        total = done = 0

        def begin_bytes(self, text, total):
            self.total = total

        def bytes_done(self, count):
            self.done += count

    for number, settings in enumerate(
        [{"sparsity.target": 0.5}, {"sparsity.target": 0.5, "sparsity.allocation": "uniform"}]
    ):
        watcher = Watcher()
        by_files(RESNET, tmp_path / str(number), watcher, **settings)
        assert watcher.total > RESNET.joinpath("model.safetensors").stat().st_size
        assert watcher.done == watcher.total

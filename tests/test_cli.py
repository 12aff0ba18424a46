"""The command line as a user meets it, in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from hamcli.cli.exits import exit_code
from tests.checkpoint.pico import entry, write_header
from tests.oracles.safetensors_reader import read_file

RESNET = Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny"
ENVIRONMENT = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
QUICK = ["--steps", "6", "--set", "training.batch_size=8", "--set", "evaluation.examples=32"]


def ham(*words, cwd, code=0, **more):
    done = subprocess.run(
        [sys.executable, "-m", "hamcli", *map(str, words)],
        cwd=cwd,
        env={**ENVIRONMENT, **more},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert done.returncode == code, done.stderr
    return done


def assert_clean_error(done, pattern):
    errors = [line for line in done.stderr.splitlines() if line.startswith("ham: error[HAM-E")]
    assert len(errors) == 1
    first = errors[0]
    assert pattern in first
    assert len(first) <= 300
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    done = ham("sparsify", RESNET, "--target", "0.9", "--out", "out", "--json", *QUICK, cwd=folder)
    return folder / "out", json.loads(done.stdout)


def test_sparsify_leaves_a_whole_folder_and_exact_zeros(sparse):
    folder, report = sparse
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "report.json", "report.html", "README.md", "recipe.yaml"}
    assert json.loads((folder / "report.json").read_text()) == report
    assert not Path(f"{folder}.run").exists()
    zeros = 0
    tensors = read_file(folder / "model.safetensors")
    for tensor in report["tensors"]:
        zeros += int((tensors[tensor["name"]] == 0).sum())
    assert zeros == report["sparsity"]["zeros"] == round(0.9 * report["sparsity"]["total"])
    assert report["sparsity"]["total"] == 173840


def test_the_result_loads_with_stock_transformers(sparse):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(sparse[0])
    count = sum(int((param == 0).sum()) for param in model.parameters() if param.dim() >= 2)
    assert count >= sparse[1]["sparsity"]["zeros"]


def test_the_report_tells_what_the_mirror_step_did(sparse):
    training = sparse[1]["training"]
    assert training["steps"] == 6
    assert training["ham"]["exponent_mean"] > 0
    assert training["ham_moved_fraction"] > 0.5
    assert sparse[1]["speed"] is None
    assert sparse[1]["speed_reason"]


def test_the_effective_recipe_gives_the_same_bytes(sparse, tmp_path):
    ham("sparsify", "--recipe", sparse[0] / "recipe.yaml", "--out", "again", cwd=tmp_path)
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (sparse[0] / "model.safetensors").read_bytes()


def test_the_line_that_measures_quality_can_be_run_as_it_stands(tmp_path):
    shutil.copytree(RESNET, tmp_path / "models" / "of mine")
    words = ("models/of mine", "--target", "0.5", "--out", "half of it")
    done = ham("prune", *words, cwd=tmp_path)
    assert "ham eval 'half of it' --against 'models/of mine'" in done.stdout


def test_the_line_that_measures_quality_names_the_config_of_a_bare_file(tmp_path):
    shutil.copytree(RESNET, tmp_path / "m")
    words = ("m/model.safetensors", "--target", "0.5", "--out")
    done = ham("prune", *words, "named", "--config", "m", cwd=tmp_path)
    assert "ham eval named --against m/model.safetensors --config m\n" in done.stdout
    assert "ham eval" not in ham("prune", *words, "bare", cwd=tmp_path).stdout


def test_check_passes_and_fails(sparse, tmp_path):
    ham("check", sparse[0], "--min-sparsity", "0.9", cwd=tmp_path)
    done = ham("check", sparse[0], "--min-sparsity", "0.91", cwd=tmp_path, code=3)
    assert_clean_error(done, "below 0.91")


def test_an_unmet_gate_exits_3_with_everything_written(tmp_path):
    words = ["sparsify", RESNET, "--target", "0.98", "--max-drop", "0.0", "--out", "out", *QUICK]
    done = ham(*words, cwd=tmp_path, code=3)
    assert_clean_error(done, "max_drop")
    assert (tmp_path / "out" / "report.json").exists()


def test_prune_is_exact_and_trains_nothing(tmp_path):
    words = ["prune", RESNET, "--target", "0.5", "--out", "out", "--json"]
    report = json.loads(ham(*words, "--set", "evaluation.examples=32", cwd=tmp_path).stdout)
    assert report["sparsity"]["zeros"] == 86920
    assert report["training"] is None


def test_inspect_counts_and_eval_measures(sparse, tmp_path):
    found = json.loads(ham("inspect", sparse[0], "--values", "--json", cwd=tmp_path).stdout)
    assert found["matrix_zeros"] >= sparse[1]["sparsity"]["zeros"]
    words = ["eval", sparse[0], "--against", RESNET, "--json", "--set", "evaluation.examples=32"]
    found = json.loads(ham(*words, cwd=tmp_path).stdout)
    assert found["metric"] == "agreement"
    assert found["drop"] == pytest.approx(1 - found["value"])


def test_plan_writes_nothing(tmp_path):
    words = ["plan", RESNET, "--target", "0.9", "--json", "--set", "training.batch_size=4"]
    found = json.loads(ham(*words, cwd=tmp_path).stdout)
    assert found["zeros"] == 156456
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["recipe", "list"], ["recipe", "schema"]])
def test_light_commands_import_no_torch(words, tmp_path):
    code = (
        "import sys\nfrom hamcli.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, cwd=tmp_path)


def test_a_command_without_a_model_is_refused_before_anything_heavy_is_imported(tmp_path):
    code = (
        "import sys\nfrom hamcli.cli import main\n"
        "try:\n    main(['sparsify'])\nexcept SystemExit as stop:\n    assert stop.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, cwd=tmp_path)


def test_an_interrupt_while_the_command_line_loads_shows_no_trace(tmp_path):
    code = (
        "import sys\n"
        "class Pressed:\n"
        "    @staticmethod\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'hamcli.cli':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed)\n"
        "from hamcli.__main__ import main\nmain()"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "\nham: interrupted before anything was saved\n"


def test_check_and_completion_import_no_torch(sparse, tmp_path):
    code = (
        "import sys\nfrom hamcli.cli import main\n"
        f"try:\n    main(['check', {str(sparse[0])!r}])\nexcept SystemExit as stop:\n"
        "    assert not stop.code\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, cwd=tmp_path)
    more = {"_HAM_COMPLETE": "complete_bash", "COMP_WORDS": "ham sp", "COMP_CWORD": "1"}
    assert "sparsify" in ham(cwd=tmp_path, **more).stdout


@pytest.mark.parametrize(
    ("words", "code", "pattern"),
    [
        (["sparsify"], 2, "E103"),
        (["sparsify", "x", "--nonsense"], 2, "E101"),
        (["sparsify", "x", "--set", "no"], 2, "E102"),
        (["sparsify", RESNET, "--target", "90"], 2, "did you mean 0.9?"),
        (["sparsify", RESNET, "--recipe", "quik"], 2, 'did you mean "quick"?'),
        (["sparsify", "./absent", "--target", "0.9"], 4, "absent"),
        (["sparsify", RESNET, "--data", "absent.txt"], 4, "no such data"),
        (["sparsify", RESNET, "--resume"], 8, "nothing to go on from"),
        (["sparsify", RESNET, "--set", "targets.include=[nothing.*]"], 2, "targets.include"),
        (["sparsify", RESNET, "--out", RESNET], 2, "E11"),
        (["sparsify", RESNET, "--out", "/proc/none/out"], 5, "E50"),
        (["sparsify", RESNET, "--set", "optimizer.lr=1e30", *QUICK], 7, "E701"),
        (["check", "absent"], 4, "E401"),
        (["recipe", "validate", "absent.yaml"], 2, "E201"),
    ],
)
def test_bad_input_is_one_clear_line_with_its_code(words, code, pattern, tmp_path):
    done = ham(*words, cwd=tmp_path, code=code)
    assert_clean_error(done, pattern)
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
    assert not any(path.suffix == "" and path.name != "out.run" for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["check", "any", "--max-drop", "nan"],
        ["eval", "any", "--against", "other", "--max-drop", "nan"],
        ["check", "any", "--max-drop", "inf"],
    ],
)
def test_a_gate_that_nothing_could_fail_is_refused(words, capsys):
    from hamcli import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "is no finite number" in capsys.readouterr().err


def test_recipes_are_listed_with_what_they_are_for(capsys):
    from hamcli import cli

    with pytest.raises(SystemExit):
        cli.main(["recipe", "list"])
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["text-classifier-90"] == (
        "A text classifier (of whole texts or of single tokens) at 90 %"
    )
    assert told["quick"] == "A short run to see the whole road on any model"


@pytest.mark.parametrize(
    ("error", "code", "number"),
    [
        (ZeroDivisionError("of ours"), 1, "E001"),
        (MemoryError(), 5, "E543"),
        (OSError(28, "No space left on device"), 5, "E506"),
    ],
)
def test_what_escapes_is_one_line_too(error, code, number, monkeypatch, capsys):
    from hamcli import cli, gate

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(gate, "check", fails)
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "any"])
    assert stop.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ham: error[HAM-{number}]: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [["inspect", RESNET], ["inspect", RESNET, "--json"], ["check", RESNET, "--min-sparsity", "0"],
     ["recipe", "list"], ["recipe", "show", "quick"], ["recipe", "schema"],
     ["recipe", "validate", "quick"], ["--help"], ["--version"]],
    ids=lambda words: " ".join(map(str, words)).replace(str(RESNET), "PATH"),
)  # fmt: skip
def test_a_result_lost_on_a_full_disk_is_an_error(words, unbuffered, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hamcli", *map(str, words)],
            cwd=tmp_path,
            env={**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 5
    assert_clean_error(done, "E506]: the system refused")
    assert "Exception ignored" not in done.stderr


def test_ctrl_c_where_nothing_is_saved_has_its_line(capsys):
    def interrupted():
        raise typer.Abort  # what a command makes of KeyboardInterrupt

    assert exit_code(interrupted) == 130
    assert capsys.readouterr().err == "\nham: interrupted before anything was saved\n"


def test_inspect_shows_a_dash_where_nothing_is_counted(tmp_path):
    path = tmp_path / "m.safetensors"
    entries = {"q": entry("F4", [2, 4], 0, 4), "w": entry("F32", [2, 4], 4, 36)}
    write_header(path, entries, bytes(36))
    for words in ([], ["--all"]):
        done = ham("inspect", path, "--values", *words, cwd=tmp_path)
        four, full, *_ = (line.split() for line in done.stdout.splitlines()[1:])
        assert four[-3:] == ["-", "-", "-"]
        assert full[-3:] == ["100.00%", "0.00%", "100.0%"]
        assert "matrices: 8 zeros of 8 (100.0000%); all: 8 of 8" in done.stdout
        assert "not counted: 8 weights of 4 or 6 bits" in done.stdout


def test_inspect_names_what_is_not_finite_and_no_hundred_duplicates(tmp_path):
    tensors = {f"layers.{place}.bias": torch.zeros(3) for place in range(100)}
    tensors["w"] = torch.tensor([[1.0, -2.0, 0.0], [2.0, float("nan"), float("inf")]])
    save_file(tensors, tmp_path / "m.safetensors")
    lines = ham("inspect", "m.safetensors", "--values", cwd=tmp_path).stdout.splitlines()
    assert "duplicates: layers.0.bias, layers.1.bias, layers.10.bias and 97 more" in lines
    assert "NaN or infinite: w, 2" in lines
    # the rms is 1.5 over the four that are finite; 1, 2 and 2 are not zero
    (shares,) = (line for line in lines if line.startswith("of matrices, zeros aside"))
    assert shares.split()[-8:] == [*["0.00%"] * 5, "33.33%", "100.00%", "100.00%"]
    done = ham("inspect", "m.safetensors", "--values", "--all", cwd=tmp_path)
    (line,) = (one for one in done.stdout.splitlines() if one.startswith("duplicates"))
    assert line.count("layers.") == 100


def test_packed_and_back_is_bit_for_bit_and_both_are_read(sparse, tmp_path):
    dense, report = sparse
    packed, back = tmp_path / "packed", tmp_path / "back"
    done = ham("export", dense, "--format", "packed", "--out", packed, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["dense_bytes"] == (dense / "model.safetensors").stat().st_size
    assert found["packed_bytes"] == (packed / "model.safetensors").stat().st_size
    assert found["packed_bytes"] == report["size"]["packed_bytes"] < found["dense_bytes"] / 7
    assert (
        "passed: sparsity 0.9 " in ham("check", packed, "--min-sparsity", 0.9, cwd=tmp_path).stdout
    )
    seen = [
        json.loads(ham("inspect", one, "--values", "--json", cwd=tmp_path).stdout)
        for one in (dense, packed)
    ]
    assert [one["zeros"] for one in seen[0]["tensors"]] == [
        one["zeros"] for one in seen[1]["tensors"]
    ]
    ham("export", packed, "--format", "dense", "--out", back, cwd=tmp_path)
    assert files_of(back) == files_of(dense)
    done = ham("export", packed, "--format", "packed", "--out", "again", cwd=tmp_path, code=4)
    assert_clean_error(done, "E443")
    done = ham("export", packed, "--format", "dense", "--out", back, cwd=tmp_path, code=2)
    assert_clean_error(done, "E112")
    done = ham("export", packed, "--format", "gif", cwd=tmp_path, code=2)
    assert_clean_error(done, "E118")


def test_a_bare_file_is_packed_and_unpacked(tmp_path):
    source = RESNET / "model.safetensors"
    ham("export", source, "--format", "packed", "--out", "p.safetensors", cwd=tmp_path)
    ham("export", "p.safetensors", "--format", "dense", "--out", "d.safetensors", cwd=tmp_path)
    assert (tmp_path / "d.safetensors").read_bytes() == source.read_bytes()
    done = ham(
        "export", source, "--format", "packed", "--out", "p.safetensors", cwd=tmp_path, code=2
    )
    assert_clean_error(done, "E112")


def test_a_packed_file_that_is_larger_is_told_as_such(tmp_path):
    write_header(tmp_path / "m.safetensors", {"w": entry("U8", [8], 0, 8)}, bytes(range(8)))
    done = ham("export", "m.safetensors", "--format", "packed", cwd=tmp_path)
    assert " x larger" in done.stdout
    assert "smaller" not in done.stdout


def test_sparsify_writes_the_packed_form(tmp_path):
    words = ("sparsify", RESNET, "--target", "0.9", "--format", "packed", "--out", "out", "--json")
    report = json.loads(ham(*words, *QUICK, cwd=tmp_path).stdout)
    size, listed = report["size"], {one["path"]: one["bytes"] for one in report["files"]}
    assert listed["model.safetensors"] == size["packed_bytes"] < size["gzip_bytes"]
    assert size["dense_bytes"] == (RESNET / "model.safetensors").stat().st_size
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == size["packed_bytes"]
    assert "import hamcli" in (tmp_path / "out" / "README.md").read_text()
    ham("check", "out", "--min-sparsity", 0.9, cwd=tmp_path)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

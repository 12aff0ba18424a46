"""The road: how many runs, which rows they see, what is cached, what a stop or divergence does."""

import json
import os
import signal

import pytest
from typer.testing import CliRunner

from hamcli.cli import app
from hamcli.comparison import Grid, compare, comparing, running
from hamcli.comparison.cells import find_inputs
from hamcli.comparison.grid import Arm, Cell, cell_recipe
from hamcli.errors import Preempted, RecipeError, UsageError
from hamcli.opening import open_run
from hamcli.progress import Silent
from tests.comparison.conftest import SETTINGS

pytestmark = pytest.mark.slow

SMALL = Grid(("gradual",), (0.8,), (0, 1), (False, True), trials=2)


class Watcher(Silent):
    """Counts runs and their steps; may end the process's patience at one of them."""

    def __init__(self, stop_at=None, sent=signal.SIGTERM):
        self.stages, self.steps, self.runs, self.warnings = [], 0, 0, []
        self.stop_at, self.sent = stop_at, sent

    def stage(self, text):
        self.stages.append(text)

    def begin_steps(self, *, steps, done, target):
        self.runs += 1

    def step(self, record):
        self.steps += 1
        if self.steps == self.stop_at:
            os.kill(os.getpid(), self.sent)

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """One comparison that was never stopped, its folder and what its watcher saw."""
    from hamcli.opening import complete
    from hamcli.recipe import values_layer

    read = complete(
        [values_layer({**SETTINGS, "data.source": str(pictures)}, "test")], has_recipe=False
    )
    out, watcher = tmp_path_factory.mktemp("one") / "out", Watcher()
    found = compare(read, SMALL, out=out, progress=watcher)
    return found, out, watcher


def test_the_grid_has_exactly_its_trials_and_cells(finished):
    found, out, watcher = finished
    assert [len(one.trials) for one in found.tunings] == [2, 2]
    assert len(found.rows) == 4
    assert watcher.runs == 4 + 4 == SMALL.num_trials + SMALL.num_cells
    assert watcher.steps == 8 * 4  # the same budget for each
    assert len(list((out / "cells").iterdir())) == 8
    assert not (out / "runs").exists()  # no model is kept
    counted = [one for one in watcher.stages if one.startswith("cell ")]
    assert counted[0].startswith("cell 1 of 8: gradual at 80 %, trying lr ")
    assert counted[7].startswith("cell 8 of 8, about ")
    assert counted[7].endswith(" left: gradual + HAM at 80 %, seed 1")


def test_every_cell_has_exactly_its_zeros_and_ham_only_where_asked(finished):
    found, _, _ = finished
    for row in found.rows:
        assert row.outcome.zeros == round(0.8 * row.outcome.total)
        assert (row.outcome.exponent_mean is not None) is row.cell.arm.ham
    rates = {one.arm: one.lr for one in found.tunings}
    assert all(row.cell.lr == rates[row.cell.arm] for row in found.rows)


def test_trials_measure_validation_rows_and_cells_the_held_out_ones(finished):
    found, _, _ = finished
    for one in found.tunings:
        assert all(row.outcome.num_examples == 4 for row in one.trials)  # a tenth of 40
    assert all(row.outcome.num_examples == 16 for row in found.rows)


def pixels(examples):
    batch = examples.batch(range(len(examples)), 0, True)["pixel_values"]
    mean, std = examples.form.mean[0], examples.form.std[0]
    return {((one * std + mean) * 255).round().byte().numpy().tobytes() for one in batch}


@pytest.mark.parametrize("has_folder", [True, False])
def test_validation_rows_come_from_the_training_rows_and_never_from_the_held_out(
    base, pictures, has_folder
):
    source = pictures if has_folder else pictures / "train"
    recipe = base(**{"data.source": str(source)}).recipe
    arm = Arm("gradual", False)
    real, trial = (
        open_run(cell_recipe(recipe, Cell(arm, 0.8, 0, 1e-3, is_trial)), Silent()).data
        for is_trial in (False, True)
    )
    learned, held = pixels(real.train), pixels(real.evaluation)
    tried, validated = pixels(trial.train), pixels(trial.evaluation)
    assert len(validated) == 4
    assert tried | validated == learned
    assert not tried & validated
    assert not validated & held
    assert not learned & held


def test_a_second_run_trains_nothing_and_writes_the_same(finished, base):
    _, out, _ = finished
    files = [out / name for name in ("compare.json", "compare.html", "table.md")]
    before = [one.read_bytes() for one in files]
    watcher = Watcher()
    compare(base(), SMALL, out=out, progress=watcher)
    assert watcher.runs == 0
    assert [one.read_bytes() for one in files] == before


def test_a_wider_grid_makes_only_what_is_new(finished, base, tmp_path):
    _, out, _ = finished
    copied = tmp_path / "out"
    copied.mkdir()
    (copied / "cells").symlink_to(out / "cells")
    watcher = Watcher()
    compare(base(), Grid(("gradual",), (0.8,), (0, 1, 2), trials=2), out=copied, progress=watcher)
    assert watcher.runs == 2  # seed 2, with HAM and without


def test_a_damaged_cell_is_made_again(finished, base, tmp_path):
    found, out, _ = finished
    copied = tmp_path / "out" / "cells"
    copied.mkdir(parents=True)
    for one in (out / "cells").iterdir():
        (copied / one.name).write_bytes(one.read_bytes())
    path = copied / f"{found.rows[0].key}.json"
    path.write_bytes(path.read_bytes()[:100])
    watcher = Watcher()
    compare(base(), SMALL, out=tmp_path / "out", progress=watcher)
    assert watcher.runs == 1
    assert (tmp_path / "out" / "compare.json").read_bytes() == (out / "compare.json").read_bytes()


def test_other_data_or_steps_are_other_cells(base, pictures):
    inputs = comparing.find_inputs(base().recipe)
    cell = Cell(Arm("gradual", True), 0.8, 0, 1e-3)

    def key(recipe, inputs=inputs):
        return comparing.key_of(comparing.identity(cell_recipe(recipe, cell).recipe, inputs))

    assert key(base().recipe) == key(base(**{"optimizer.lr": 0.5}).recipe)  # the cell's lr holds
    assert key(base().recipe) != key(base(**{"training.steps": 5}).recipe)
    narrow = base(**{"data.source": str(pictures / "train")}).recipe
    assert key(narrow, comparing.find_inputs(narrow)) != key(base().recipe)


def test_a_change_in_either_of_two_folders_of_one_name_is_other_data(base, tmp_path):
    folders = [tmp_path / part / "images" for part in ("train", "test")]
    for folder in folders:
        folder.mkdir(parents=True)
    read = base(**{"data.source": str(folders[0]), "data.evaluation": str(folders[1])})
    found = [find_inputs(read.recipe).data]
    for folder in folders:
        (folder / "new.png").write_bytes(b"new")
        found.append(find_inputs(read.recipe).data)
    assert len({json.dumps(one, sort_keys=True) for one in found}) == 3


@pytest.mark.parametrize("stop_at", [6, 18])  # in a trial; in a cell
def test_a_stop_in_the_middle_resumes_the_run_and_gives_the_same_document(
    finished, base, tmp_path, stop_at
):
    _, out, _ = finished
    with pytest.raises(Preempted, match=r"runs were made; .*: saved step [1-9]"):
        compare(base(), SMALL, out=tmp_path / "out", progress=Watcher(stop_at))
    made = (stop_at - 1) // 4
    assert len(list((tmp_path / "out" / "cells").iterdir())) == made
    assert not (tmp_path / "out" / "compare.json").exists()
    watcher = Watcher()
    compare(base(), SMALL, out=tmp_path / "out", progress=watcher)
    assert watcher.steps == 8 * 4 - stop_at  # not one step twice
    assert (tmp_path / "out" / "compare.json").read_bytes() == (out / "compare.json").read_bytes()


def test_a_signal_after_the_last_step_stops_before_the_next_run(base, tmp_path, monkeypatch):
    real = running.outcome_of

    def late(report):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(report)

    monkeypatch.setattr(running, "outcome_of", late)
    with pytest.raises(Preempted, match="1 runs were made"):
        compare(base(), SMALL, out=tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1


def test_a_signal_before_the_first_step_is_not_told_as_saved(base, tmp_path, monkeypatch):
    from hamcli import pipeline

    real = pipeline.open_run

    def early(*words, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*words, **more)

    monkeypatch.setattr(pipeline, "open_run", early)
    with pytest.raises(Preempted, match="nothing was saved before the first step"):
        compare(base(), SMALL, out=tmp_path / "out")


def test_a_signal_while_a_run_is_written_leaves_it_saved(base, tmp_path, monkeypatch):
    from hamcli import conclusion

    real = conclusion.write_folder

    def late(*words):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*words)

    monkeypatch.setattr(conclusion, "write_folder", late)
    with pytest.raises(Preempted, match=r"0 runs were made; .*: saved step [1-9]"):
        compare(base(), SMALL, out=tmp_path / "out")


def test_what_diverges_is_a_row_and_the_rest_goes_on(base, tmp_path):
    read = base(**{"optimizer.base": "sgd", "optimizer.lr": 1e20, "optimizer.warmup": 0.0})
    grid = Grid(("gradual",), (0.8,), (0,), trials=1)
    watcher = Watcher()
    found = compare(read, grid, out=tmp_path / "out", progress=watcher)
    assert [row.outcome.status for row in found.rows] == ["diverged", "diverged"]
    assert "E701" in found.rows[0].outcome.why
    assert found.pairs[0].lost == 1
    assert found.pairs[0].verdict == "no pair"
    assert len(watcher.warnings) == 2
    assert not (tmp_path / "out" / "runs").exists()
    page = (tmp_path / "out" / "compare.html").read_text("utf-8")
    assert "Runs that gave no number" in page
    json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    again = Watcher()
    compare(read, grid, out=tmp_path / "out", progress=again)
    assert again.runs == 0


def test_one_diverged_trial_leaves_the_lr_to_the_others(base, tmp_path, monkeypatch):
    read = base(**{"optimizer.base": "sgd", "optimizer.lr": 1e20, "optimizer.warmup": 0.0})
    monkeypatch.setattr(comparing, "learning_rates", lambda lr, trials: [1e-3, lr])
    found = compare(read, Grid(("gradual",), (0.8,), (0,), (False,), 2), out=tmp_path / "out")
    assert [one.outcome.status for one in found.tunings[0].trials] == ["done", "diverged"]
    assert found.tunings[0].lr == 1e-3
    assert found.rows[0].outcome.status == "done"


def test_a_refused_run_is_a_row(base, tmp_path):
    read = base(**{"optimizer.bar": 0.05})  # which needs factors
    found = compare(read, Grid(("gradual", "pilot"), (0.8,), (0,), (False,), 1), out=tmp_path / "o")
    assert [row.outcome.status for row in found.rows] == ["refused", "done"]
    assert "E226" in found.rows[0].outcome.why


def test_dense_is_trained_as_long_without_zeros_or_ham(base, tmp_path):
    found = compare(base(), Grid(("dense", "random"), (0.8,), (0,), trials=1), out=tmp_path / "out")
    labels = [(row.cell.arm.label, row.cell.target) for row in found.rows]
    assert labels == [("dense", 0.0), ("random", 0.8), ("random + HAM", 0.8)]
    assert found.rows[0].outcome.zeros == 0
    assert [one.method for one in found.pairs] == ["random"]
    assert "dense, fine-tuned as long" in (tmp_path / "out" / "table.md").read_text("utf-8")


def test_models_are_kept_when_asked(base, tmp_path):
    grid = Grid(("gradual",), (0.8,), (0,), (True,), trials=2)
    found = compare(base(), grid, out=tmp_path / "out", keep=True)
    kept = [one.name for one in (tmp_path / "out" / "runs").iterdir()]
    assert kept == [f"gradual-ham-80-seed0-{found.rows[0].key[:12]}"]
    assert (tmp_path / "out" / "runs" / kept[0] / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("grid", "error", "told"),
    [
        (Grid(("gradul",), (0.8,), (0,)), RecipeError, "did you mean"),
        (Grid(("gradual",), (80.0,), (0,)), RecipeError, "did you mean 0.8"),
        (Grid(("gradual", "gradual"), (0.8,), (0,)), UsageError, "E108.*twice"),
        (Grid(("gradual",), (), (0,)), UsageError, "E108.*empty"),
        (Grid(("wanda",), (0.8,), (0,)), UsageError, "E106.*ham prune --method wanda"),
        (Grid(("gradual",), (0.8,), (-1,)), RecipeError, "training.seed"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_made(base, tmp_path, grid, error, told):
    with pytest.raises(error, match=told):
        compare(base(), grid, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(base, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="E109"):
        compare(base(), SMALL, out=tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_prints_what_it_writes(finished, pictures):
    _, out, _ = finished
    settings = {key: value for key, value in SETTINGS.items() if key != "model.id"}
    words = ["compare", SETTINGS["model.id"], "--methods", "gradual", "--targets", "0.8"]
    words += ["--seeds", "0,1", "--trials", "2", "--data", str(pictures), "--out", str(out)]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    found = CliRunner().invoke(app, [*words, "--json", "-q"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == json.loads((out / "compare.json").read_text("utf-8"))
    shown = CliRunner().invoke(app, [*words, "-q"]).stdout
    assert "gradual" in shown
    assert "HAM on minus off" in shown


@pytest.mark.parametrize("words", [("--seeds", "a"), ("--targets", "0.9,x"), ("--ham", "maybe")])
def test_words_that_are_no_list_are_refused(words):
    found = CliRunner().invoke(app, ["compare", SETTINGS["model.id"], *words])
    assert "E108" in str(found.exception)


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--seeds", "-1", "training.seed"),
        ("--targets", "nan", "sparsity.target"),
        ("--methods", "none", "sparsity.method"),
    ],
)
def test_a_value_that_no_recipe_takes_is_told_with_its_own_option(option, value, key):
    found = CliRunner().invoke(app, ["compare", SETTINGS["model.id"], f"{option}={value}"])
    assert f"{option}: {key}: {value}" in str(found.exception)

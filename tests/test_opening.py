"""What a run stands on."""

from pathlib import Path

import pytest

from hamcli.opening import data_digests, open_run
from hamcli.optim.eta import mean_magnitude
from hamcli.progress import Silent
from hamcli.recipe import read_recipe, values_layer

RESNET = str(Path(__file__).parent / "assets" / "fashion-mnist-resnet-tiny")


def digests(source, evaluation):
    words = {"data.source": str(source), "data.evaluation": str(evaluation)}
    return data_digests(read_recipe([values_layer(words, "test")]).recipe)


def test_two_files_of_one_name_have_a_digest_each(tmp_path):
    paths = [tmp_path / folder / "rows.jsonl" for folder in ("train", "test")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    before = digests(*paths)
    assert len(set(before.values())) == 2
    for path in paths:
        path.write_text("changed")
        assert digests(*paths) != before
        path.write_text(path.parent.name)


def test_a_file_that_is_held_out_too_has_one_digest(tmp_path):
    (tmp_path / "rows.jsonl").write_text("rows")
    assert list(digests(*[tmp_path / "rows.jsonl"] * 2)) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ({}, None),
        ({"optimizer.ham.eta": 0.002}, (0.002, 0.05)),
        ({"optimizer.ham.eta": 0.002, "optimizer.ham.clamp": 0.5}, (0.002, 0.5)),
        ({"optimizer.ham.alpha": 0.0}, (None, None)),
    ],
)
def test_the_recipe_of_a_run_tells_the_eta_and_clamp_that_fit_the_targets(words, found):
    words = {"model.id": RESNET, "optimizer.lr": 1e-5, **words}
    opened = open_run(read_recipe([values_layer(words, "test")]), Silent(), hashed=False)
    ham = opened.recipe.optimizer.ham
    if found is None:
        eta = 1e-5 / (4 * mean_magnitude(opened.targets.params))
        assert 0 < eta < 0.001
        found = pytest.approx((eta, 25 * eta), rel=0.01)
    assert (ham.eta, ham.clamp) == found

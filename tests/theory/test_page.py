"""Page, picture, document and command, from results made by hand and from a small run."""

import json
import re

import pytest

from hamcli import cli
from hamcli.errors import UsageError
from hamcli.theory import checks, page, records
from tests.theory import broken
from tests.theory.test_checks import SMALL

pytestmark = pytest.mark.slow


def made(value):
    plot = records.Plot(
        "Error <b>",
        "alpha",
        "error",
        (
            records.Curve("HAM", (1.0, 10.0, 1e4), (0.5, 0.1, 0.01), "first", marked=True),
            records.Curve("convex", (1.0, 10.0, 1e4), (0.5, 0.1, 0.01), "second", hollow=True),
        ),
        log_x=True,
        level=(0.7, "start"),
    )
    check = records.Check(
        "one", "A <claim>", (records.claim("error", value, 0.02),), ("alpha", "t"),
        ((1.0, None), ("x<y", 2.0)), plot,
    )  # fmt: skip
    return records.Results(3, (check,) * 4)


@pytest.mark.parametrize(
    ("value", "limit", "relation", "passed"),
    [
        (0.1, 0.1, "at most", True),
        (0.11, 0.1, "at most", False),
        (5.0, 5.0, "at least", True),
        (4.9, 5.0, "at least", False),
        (float("nan"), 1.0, "at most", False),
        (float("nan"), 1.0, "at least", False),
        (float("inf"), 1.0, "at least", False),
    ],
)
def test_a_claim_passes_on_its_side_of_the_limit_only(value, limit, relation, passed):
    found = records.claim("x", value, limit, relation)
    assert found.passed is passed
    assert found.line.startswith("PASS" if passed else "FAIL")


def test_the_page_shows_verdicts_and_escapes_names():
    text = page.render(made(0.5))
    assert "✗ 0 of 4 claims hold" in text
    assert "A &lt;claim&gt;" in text
    assert "x&lt;y" in text
    assert "<claim>" not in text
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="', text)
    assert "✓ 4 of 4 claims hold" in page.render(made(0.01))


def test_three_files_are_written_and_replaced(tmp_path):
    page.write_results(made(0.5), tmp_path)
    page.write_results(made(0.01), tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {page.PAGE, page.PICTURE, page.DOCUMENT}
    assert (tmp_path / page.PICTURE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    document = json.loads((tmp_path / page.DOCUMENT).read_text("utf-8"))
    assert document["passed"] is True
    assert document["checks"][0]["table"][0] == {"alpha": 1.0, "t": None}


def test_equal_results_give_equal_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        page.write_results(made(0.01), tmp_path / name)
    for name in (page.PAGE, page.PICTURE, page.DOCUMENT):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="it is a file"):
        page.make_folder(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def small_run(make):
    real = checks.run_checks
    return lambda seed, *, stage: real(seed, sizes=SMALL, make=make, stage=stage)


def ham(monkeypatch, capsys, make, *words):
    monkeypatch.setattr("hamcli.theory.run_checks", small_run(make))
    monkeypatch.setattr("sys.argv", ["ham"])
    with pytest.raises(SystemExit) as caught:
        cli.main(["theory", *map(str, words)])
    return caught.value.code, capsys.readouterr()


def test_the_command_passes_and_writes_json(monkeypatch, capsys, tmp_path):
    words = ("--json", "--seed", 4, "--out", tmp_path / "out")
    code, shown = ham(monkeypatch, capsys, checks.ham_sgd, *words)
    document = json.loads(shown.out)
    assert code == 0
    assert document["passed"] is True
    assert document["seed"] == 4
    assert [one["name"] for one in document["checks"]] == ["bregman", "path", "flip", "recovery"]
    assert json.loads((tmp_path / "out" / "theory.json").read_text("utf-8")) == document
    assert "PASS" not in shown.err


def test_the_command_exits_3_with_a_line_for_each_failed_claim(monkeypatch, capsys):
    code, shown = ham(monkeypatch, capsys, broken.faulty("turned"))
    assert code == 3
    failed = shown.out.count("FAIL")
    errors = [one for one in shown.err.splitlines() if one.startswith("ham: error[HAM-E302]: ")]
    assert len(errors) == failed > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_the_full_size_passes_for_any_seed(seed):
    assert [one.line for one in checks.run_checks(seed).failures] == []

"""Page and table from numbers made by hand."""

import re

import numpy as np

from hamcli.comparison import page
from hamcli.comparison.grid import Arm, Cell, Grid
from hamcli.comparison.records import Comparison, Outcome, Row, Tuning
from hamcli.comparison.summary import means, pairs


def made(methods=("dense", "gradual", "ac-dc"), targets=(0.9, 0.95, 0.98), seeds=(0, 1, 2)):
    """A comparison with known numbers and one diverged run."""
    grid, draw = Grid(methods, targets, seeds, trials=2), np.random.default_rng(1)
    rows, tunings = [], []
    for arm in grid.arms:
        height = 0.02 * methods.index(arm.method) + 0.01 * arm.ham
        trials = tuple(
            Row(Cell(arm, 0.98, 0, lr, True), "key", Outcome("done", "", "accuracy", True, 0.8))
            for lr in (1e-3, 3.2e-3)
        )
        tunings.append(Tuning(arm, grid.tuned_at(arm), 1e-3, arm.ham, trials))
        for cell in grid.cells(arm, 1e-3):
            value = 0.9 - cell.target**20 * 0.1 + height + 0.004 * float(draw.normal())
            rows.append(
                Row(cell, "key", Outcome("done", "", "accuracy", True, value, 0.3, dense=0.91,
                                         one_shot=0.2, num_examples=100, data="100 <b> images",
                                         zeros=9, total=10))
            )  # fmt: skip
    last = Row(rows[-1].cell, "key", Outcome("diverged", "ham: error <i>: loss nan"))
    rows[-1] = last
    facts = {
        "model": {"id": "a|b<script>", "sha256": {}},
        "recipe": {"training": {"steps": 1000, "batch_size": 64, "accumulation": 2}},
    }
    return Comparison(
        grid, facts, tuple(tunings), tuple(rows), means(grid, rows), pairs(grid, rows)
    )


def test_the_page_is_self_contained_and_escapes_names():
    text = page.render(made())
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="', text)
    assert "error &lt;i&gt;" in text
    assert "1,000 steps of 128" in text
    assert "best of 2 on validation rows" in text
    assert "0.001 (edge)" in text


def test_every_arm_is_a_line_with_a_bar_at_each_sparsity():
    text = page.render(made())
    lines = re.findall(r'class="line (m\d(?: plain)?)"', text)
    assert lines[:4] == ["m0 plain", "m0", "m1 plain", "m1"]  # dense is a level
    assert len(re.findall(r'class="line spread m\d(?: plain)?"', text)) == 4 * 3 + 2 * 3
    assert "dense, fine-tuned" in text


def test_a_hover_tells_mean_and_standard_error():
    found = made()
    one = next(one for one in found.means if one.arm == Arm("gradual", True))
    told = f"{one.value.mean:.4g}"
    assert re.search(rf"gradual \+ HAM\nsparsity of the targets, % 90: {told}", page.render(found))


def test_the_table_has_a_row_an_arm_and_hides_no_lost_run():
    text = page.markdown(made())
    assert "| gradual | on | 0.001 |" in text
    assert "a\\|b&lt;script>" in text
    assert "(2 of 3)" in text
    assert "ac-dc + HAM at 98 %, seed 2: diverged" in text
    assert "2 of 3 | HAM" in text


def test_one_seed_and_one_sparsity_are_drawn_too():
    text = page.render(made(("gradual",), (0.9,), (0,)))
    assert 'class="dot m0 plain"' in text
    assert "spread m" not in text.partition("</style>")[2]


def test_nothing_done_gives_a_page_without_charts():
    found = made(("gradual",), (0.9,), (0,))
    rows = tuple(Row(row.cell, "k", Outcome("diverged", "nan")) for row in found.rows)
    lost = Comparison(
        found.grid,
        found.facts,
        found.tunings,
        rows,
        means(found.grid, rows),
        pairs(found.grid, rows),
    )
    text = page.render(lost)
    assert '<svg class="chart' not in text
    assert "gradual at 90 %, seed 0: diverged" in text

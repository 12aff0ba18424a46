import dataclasses
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import bert, counted, llama, near_zero

from hamcli.report import axes, charts, heatmap
from hamcli.report.records import TensorRecord


def shapes(svg, tag, style=""):
    """Elements of a drawing; reading it as XML proves it well-formed."""
    found = ElementTree.fromstring(str(svg)).iter(tag)
    return [item for item in found if style in item.get("class", "").split() or not style]


def points(svg, style):
    (path,) = shapes(svg, "path", style)
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML](\S+?) ([\d.]+)", path.get("d"))]


def curve(values, **options):
    line = charts.Line("loss", values, "first")
    return charts.curve(range(1, len(values) + 1), [line], label="loss", **options)


def test_a_single_spike_survives_thinning():
    values = [0.1] * 100_000
    values[54_321] = 9.0
    drawn = points(curve(values), "first")
    assert len(drawn) <= 2 * charts.POINT_LIMIT
    (spike,) = [x for x, y in drawn if y == min(y for _, y in drawn)]
    flat = curve([0.1] * 100_000)
    assert spike == pytest.approx(points(flat, "first")[0][0] + 0.54321 * 390, abs=1)


def test_unknown_values_leave_a_gap():
    (path,) = shapes(curve([1.0, 2.0, None, 3.0, 4.0]), "path", "first")
    assert path.get("d").count("M") == 2


@pytest.mark.parametrize("values", [[], [None, None]])
def test_nothing_to_draw_is_no_chart(values):
    assert curve(values) is None


def test_values_that_are_not_positive_are_left_out_of_a_log_axis():
    assert curve([0.0, -1.0], log=True) is None
    assert len(points(curve([0.0, 1e-3, 1e-2, 1e-4], log=True), "first")) == 3


def test_one_step_is_a_dot():
    assert len(shapes(curve([0.5]), "circle", "dot")) == 1


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(-1e12, 1e12) | st.none(), min_size=1, max_size=30), st.booleans())
def test_any_finite_curve_stays_inside_its_frame(values, log):
    svg = curve(values, log=log)
    if svg is None:
        return
    assert "nan" not in svg
    assert "inf" not in svg
    for path in shapes(svg, "path", "first"):
        for x, y in re.findall(r"[ML](\S+?) ([\d.-]+)", path.get("d")):
            assert 56 <= float(x) <= 446
            assert 12 - 0.01 <= float(y) <= 210.01


@settings(derandomize=True, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(2, 10))
def test_ticks_enclose_their_range_by_round_steps(low, span, about):
    high = low + span
    if high <= low or span < 1e-6 * abs(low):
        return
    ticks = axes.round_ticks(low, high, about)
    assert ticks[0] <= low + 1e-6 * span
    assert ticks[-1] >= high - 1e-6 * span
    assert 2 <= len(ticks) <= about + 3


def test_the_smoothed_curve_starts_at_the_first_value_and_settles():
    smooth = charts.smoothed([1.0] * 10 + [0.0] * 990)
    assert smooth[0] == 1.0
    assert smooth[-1] == pytest.approx(0.0, abs=1e-9)


def test_an_encoder_is_six_kinds_by_twelve_layers():
    grid = heatmap.grid(bert())
    assert grid is not None
    assert len(grid.rows) == 6
    assert grid.columns == tuple(range(12))
    assert len(shapes(heatmap.heatmap(grid), "rect", "cell")) == 72


def test_cells_of_the_grid_add_up_to_the_tensors():
    tensors = [tensor for tensor in bert() if ".layer." in tensor.name]
    grid = heatmap.grid(tensors)
    assert sum(zeros for zeros, _ in grid.cells.values()) == sum(t.zeros for t in tensors)
    assert sum(total for _, total in grid.cells.values()) == sum(t.total for t in tensors)


def test_experts_are_folded_into_their_layer():
    named = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight", (4, 4))
        for layer in range(3)
        for expert in range(64)
        for kind in ("up", "down")
    ]
    tensors = counted(named, 0.5)
    grid = heatmap.grid(tensors)
    assert sum(zeros for zeros, _ in grid.cells.values()) == sum(t.zeros for t in tensors)
    assert [row.rsplit(".", 1)[1] for row in grid.rows] == ["up", "down"]
    assert all(total == 64 * 16 for _, total in grid.cells.values())


def test_names_without_layers_make_no_grid():
    assert heatmap.grid(counted([("a.weight", (2, 2)), ("b.weight", (2, 2))], 0.5)) is None


@pytest.mark.parametrize("tensors", [bert(), llama()], ids=["74", "700"])
def test_each_tensor_has_its_column_inside_the_chart_apart_from_the_next(tensors):
    columns = shapes(charts.profile(tensors, 0.9), "rect", "column")
    assert len(columns) == len(tensors)
    edge = 0.0
    for column in columns:
        assert float(column.get("x")) >= edge - 0.02
        edge = float(column.get("x")) + float(column.get("width"))
    assert edge <= axes.WIDE


def test_nearly_equal_tensors_do_not_look_far_apart():
    tensors = [
        TensorRecord.counted(
            f"l.{layer}.{kind}", shape=(1000,), dtype="F32", zeros=zeros, total=1000
        )
        for layer, zeros in enumerate((900, 901))
        for kind in "ab"
    ]
    low, high = heatmap.shade_range(heatmap.grid(tensors))
    assert high - low == pytest.approx(0.1)
    assert low <= 0.9 <= 0.901 <= high


def test_the_histogram_draws_counts_to_scale():
    record = near_zero(1_000_000, 0.5)
    before, after = shapes(charts.histogram(record, "weight"), "path", "area")
    for path, counts in ((before, record.before), (after, record.after)):
        highest = min(float(y) for y in re.findall(r"V([\d.]+)", path.get("d")))
        base = float(path.get("d").split("V")[0].split()[1])
        share = max(counts) / record.total
        # the axis ends at 3 % in a frame of 248 units
        assert (base - highest) / 248 == pytest.approx(share / 0.03, abs=1e-3)


def test_a_histogram_whose_parts_do_not_fit_is_left_out():
    record = near_zero(1000, 0.5)
    assert charts.histogram(dataclasses.replace(record, after=(1,)), "weight") is None
    assert charts.histogram(dataclasses.replace(record, edges=(), before=(), after=()), "w") is None


def test_powers_of_ten_are_named_as_such():
    assert axes.power_of_ten(1e-5) == "10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FIVE}"
    assert axes.power_of_ten(10.0) == "10"
    assert axes.power_of_ten(math.pow(10, 12)) == "10\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}"


def test_a_relation_puts_decades_at_equal_distances_and_ends_at_the_last_point():
    data = charts.Points("error", [1.0, 10.0, 100.0], [1.0, 0.1, 0.01], "first", marked=True)
    drawn = charts.relation([data], label="x", x_label="a", log_x=True, log_y=True)
    (first, second, third) = [
        (float(one.get("cx")), float(one.get("cy"))) for one in shapes(drawn, "circle", "dot")
    ]
    assert third[0] - second[0] == pytest.approx(second[0] - first[0], abs=0.02)
    assert third[1] - second[1] == pytest.approx(second[1] - first[1], abs=0.02)
    assert third[0] == axes.NARROW - 18


def test_a_relation_leaves_out_what_its_axes_cannot_show():
    bad = [0.0, 1.0, math.nan, 10.0]
    data = charts.Points("error", bad, [1.0, 2.0, 3.0, math.inf], "first", marked=True)
    drawn = charts.relation([data], label="x", x_label="a", log_x=True)
    assert len(shapes(drawn, "circle", "dot")) == 1
    assert charts.relation([charts.Points("e", [], [], "first")], label="x", x_label="a") is None


def test_a_relation_marks_its_level_and_escapes_names():
    data = charts.Points("a<b", [0.0, 1.0], [0.0, 1.0], "second", hollow=True)
    drawn = charts.relation([data], label="x<y", x_label="t&u", level=(0.5, "limit<"))
    assert len(shapes(drawn, "circle", "ring")) == 2
    assert not shapes(drawn, "path")
    assert [one.text for one in shapes(drawn, "text", "reference-name")] == ["limit< 0.5"]


def test_error_bars_reach_as_far_as_they_say_and_widen_the_axis():
    data = charts.Points(
        "m", [90.0, 95.0], [0.5, 0.6], "m0", marked=True, spread=[0.1, 0.0], shift=6.0
    )
    plain = charts.Points("p", [90.0, 95.0], [0.5, 0.6], "m1", marked=True)
    drawn = charts.relation([data, plain], label="x", x_label="s", margin=0.1)
    (bar,) = shapes(drawn, "path", "spread")  # a spread of 0 has none
    middle, top, bottom = re.match(r"M(\S+) (\S+)V(\S+)M", bar.get("d")).groups()
    dots = [(float(one.get("cx")), float(one.get("cy"))) for one in shapes(drawn, "circle")]
    assert float(middle) == dots[0][0]
    assert dots[0][0] - dots[2][0] == pytest.approx(6.0, abs=0.02)
    height = dots[0][1] - dots[1][1]  # of 0.1
    assert dots[0][1] - float(top) == pytest.approx(height, abs=0.03)
    assert float(bottom) - dots[0][1] == pytest.approx(height, abs=0.03)
    inner = axes.NARROW - 18 - 56
    assert dots[2][0] == pytest.approx(56 + inner / 12, abs=0.02)  # a tenth of the range beside it


def test_a_relation_of_one_x_stands_in_the_middle_and_names_it():
    data = charts.Points("m", [98.0, 98.0], [0.5, 0.6], "m0", marked=True)
    drawn = charts.relation([data], label="x", x_label="s")
    (dot, _) = shapes(drawn, "circle", "dot")
    middle = (56 + axes.NARROW - 18) / 2
    assert float(dot.get("cx")) == pytest.approx(middle, abs=0.02)
    (tick,) = [one for one in shapes(drawn, "text", "tick") if "middle" in one.get("class")]
    assert tick.text == "98"
    assert float(tick.get("x")) == pytest.approx(middle, abs=0.02)


@pytest.mark.parametrize("clamp", [0.0999, 0.05, 0.012])
def test_the_words_of_a_limit_stand_above_it_and_within_the_picture(clamp):
    line = charts.Line("largest", [clamp, clamp, 1e-6], "first")
    drawn = charts.curve([0, 1, 2], [line], label="exponents", log=True, reference=(clamp, "clamp"))
    (words,) = shapes(drawn, "text", "reference-name")
    (limit,) = shapes(drawn, "line", "reference")
    assert 10 < float(words.get("y")) < float(limit.get("y1"))

"""The pictures: what is drawn for which data, and that odd data never breaks a drawing."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from report_fixtures import DROP, SEGMENTS, plan_json
from sglp_bench.report import charts, charts_speed
from sglp_bench.report import wording as fmt


def parsed(svg: str) -> list[ElementTree.Element]:
    """All elements; fails unless the markup is well formed and every number in it is finite."""
    root = ElementTree.fromstring(svg)
    assert not re.search(r"\b(nan|inf|None)\b", svg)
    assert [child.tag for child in root][:2] == ["title", "desc"]
    assert all(child.text for child in list(root)[:2])
    return list(root.iter())


def of_class(elements: list[ElementTree.Element], name: str) -> list[ElementTree.Element]:
    return [element for element in elements if name in (element.get("class") or "").split()]


def texts(elements: list[ElementTree.Element]) -> list[str]:
    return ["".join(element.itertext()).replace("\u00a0", " ") for element in elements if element.tag == "text"]


def hatched(elements: list[ElementTree.Element]) -> list[ElementTree.Element]:
    return [element for element in elements if (element.get("fill") or "").startswith("url(#")]


def test_the_heat_map_has_a_cell_per_pair_and_marks_what_was_removed_on_both_axes() -> None:
    plan = plan_json()
    elements = parsed(charts.heat_map(plan["similarity"], SEGMENTS, DROP, key="k"))
    cells = [element for element in elements if (element.findtext("title") or "").startswith("layers ")]
    assert len(cells) == 30 * 30
    assert cells[31].findtext("title") == f"layers 1 and 1: {plan['similarity'][1][1]:.3f}"
    assert len(hatched(elements)) == 2 * len(DROP) + 1  # and the legend
    assert len(of_class(elements, "segment-line")) == len(SEGMENTS)
    assert {"removed", "segment", "CKA"} <= set(texts(elements))


def test_the_brightest_cells_are_the_most_alike() -> None:
    def light(colour: str) -> int:
        return sum(int(colour[i : i + 2], 16) * weight for i, weight in ((1, 3), (3, 6), (5, 1)))

    steps = [light(charts.ramp(position / 50)) for position in range(51)]
    assert steps == sorted(steps)
    assert charts.ramp(-1) == charts.ramp(0) == "#440154"
    assert charts.ramp(2) == charts.ramp(1) == "#fde725"


def test_a_deep_model_is_drawn_with_one_path_per_colour() -> None:
    n = 80
    values = [[1 - abs(i - j) / n for j in range(n)] for i in range(n)]
    svg = charts.heat_map(values, [[0, 40], [40, 80]], [5], key="k")
    elements = parsed(svg)
    assert sum(path.get("d", "").count("z") for path in elements if path.tag == "path" and path.get("fill")) == n * n
    assert len(svg) < 400_000


@pytest.mark.parametrize("values", [[[1.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, -0.2], [-0.2, 1.0]]])
def test_a_heat_map_of_few_or_equal_values_is_drawn(values: list[list[float]]) -> None:
    parsed(charts.heat_map(values, [[0, len(values)]], [], key="k"))


def test_the_importance_axis_is_logarithmic_only_when_the_range_asks_for_it() -> None:
    wide = charts.importance_bars([0.01, 1.0], [0], [[0, 2]], "grad-norm", 500, key="k")
    flat = charts.importance_bars([0.5, 1.0], [0], [[0, 2]], "grad-norm", 500, key="k")
    assert "on a logarithmic axis" in wide
    assert "on a linear axis" in flat

    def heights(svg: str) -> list[float]:
        bars = [bar for bar in parsed(svg) if bar.tag == "rect" and bar.find("title") is not None]
        return [float(bar.get("height", "")) for bar in bars]

    low, high = heights(flat)
    assert high / low == pytest.approx(2, rel=1e-2)
    low, high = heights(wide)
    assert high / low < 12  # a hundredth would be a line of two pixels


def test_removed_bars_are_hatched_crossed_and_named() -> None:
    plan = plan_json()
    svg = charts.importance_bars(plan["scores"]["grad-norm"], DROP, SEGMENTS, "grad-norm", 1000, key="k")
    elements = parsed(svg)
    assert len(hatched(elements)) == len(DROP)
    assert texts(elements).count("×") == len(DROP)
    assert [name for name in texts(elements) if name.startswith("S")] == ["S1", "S2", "S3", "S4", "S5", "S6"]
    named = [element for element in of_class(elements, "gone-text") if element.tag == "text"]
    assert [int(element.text or "") for element in named] == DROP


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [-1.0, 2.0], [-2.0, -1.0], [None, None], [1.0, None], [5.0], [1e-12, 1e9], [0.0, 1e-300]]
)
def test_odd_importances_are_drawn(values: list[float | None]) -> None:
    parsed(charts.importance_bars(values, [0], [], "criterion", 330, key="k"))


def test_a_score_that_is_missing_gets_a_question_mark() -> None:
    assert "?" in texts(parsed(charts.importance_bars([1.0, None], [], [], "criterion", 330, key="k")))


@pytest.mark.parametrize(("losses", "chosen"), [([0.0], 1), ([3.0, 0.0], 2), ([5.0, 2.0, 0.0], 0), ([0.0, 0.0], 1)])
def test_any_loss_curve_is_drawn(losses: list[float], chosen: int) -> None:
    elements = parsed(charts.loss_curve(losses, chosen, 330, key="k"))
    assert len(of_class(elements, "dot")) == len(losses)
    assert len(of_class(elements, "ring")) == (1 if chosen else 0)


def test_the_stack_brackets_segments_and_says_which_layers_went() -> None:
    svg = charts.layer_strip(30, DROP, SEGMENTS, 1000, key="k")
    elements = parsed(svg)
    assert (len(of_class(elements, "kept")), len(of_class(elements, "gone"))) == (24, 6)
    assert len(of_class(elements, "bracket")) == 6
    assert "removed: 6, 11, 13, 18, 24 and 25." in svg
    ends = [float(e.get("x", "")) + float(e.get("width", "")) for e in elements if e.tag == "rect" and e.get("x")]
    assert max(ends) <= 1000


def arm(blocks: list[list[float]], role: str = "baseline") -> dict[str, Any]:
    return {"label": role, "role": role, "blocks": blocks}


def test_one_stalled_call_does_not_squeeze_the_others_and_is_counted() -> None:
    usual = [0.010 + 0.0001 * (index % 10) for index in range(200)]
    svg = charts_speed.latency_strips([arm([usual, [*usual, 3.0]])], 500, key="k", metric="decode step")
    elements = parsed(svg)
    assert "1 sample beyond, up to 3.00 s →" in texts(elements)
    spread = [float(dot.get("cx", "")) for dot in of_class(elements, "sample")]
    assert sorted(spread)[-2] - min(spread) > 200


def test_a_lane_per_block_has_its_median() -> None:
    svg = charts_speed.latency_strips([arm([[1.0, 2.0, 9.0], [4.0, 5.0]])], 500, key="k", metric="prefill")
    ticks = [tick.findtext("title") or "" for tick in of_class(parsed(svg), "block-median")]
    assert [tick.replace("\u00a0", " ") for tick in ticks] == [
        "block 1: median 2.00 s of 3",
        "block 2: median 4.50 s of 2",
    ]


def test_many_samples_are_thinned_in_the_picture_only() -> None:
    svg = charts_speed.latency_strips([arm([[0.01 + 1e-6 * i for i in range(5000)]])], 500, key="k", metric="decode")
    assert 300 <= len(of_class(parsed(svg), "sample")) <= 360
    assert "over 5000 samples" in svg


@pytest.mark.parametrize("blocks", [[[1.0]], [[2e-7, 2e-7]], [[1e-9], [5000.0]], [[0.5] * 4]])
def test_few_or_equal_samples_are_drawn(blocks: list[list[float]]) -> None:
    parsed(charts_speed.latency_strips([arm(blocks), arm(blocks, "candidate")], 330, key="k", metric="decode"))


def row(**changes: Any) -> dict[str, Any]:
    known = {"label": "Decode step", "sub": "latency", "ratio": 1.2, "low": 1.1, "high": 1.3, "note": "faster"}
    return {**known, "resolved": True, **changes}


def x_of(element: ElementTree.Element) -> float:
    return float(re.findall(r"-?[\d.]+", element.get("d") or element.get("cx") or element.get("x1") or "")[0])


@pytest.mark.parametrize("width", [330.0, 1060.0])
def test_the_forest_plot_puts_everything_on_one_scale(width: float) -> None:
    rows = [row(control_low=0.98, control_high=1.02, ceiling=1.25)]
    elements = parsed(charts_speed.forest(rows, width, key="k"))
    one = x_of(of_class(elements, "one")[0])
    point, ceiling = x_of(of_class(elements, "point")[0]), x_of(of_class(elements, "ceiling")[0])
    band = of_class(elements, "control")[0]
    left, right = float(band.get("x", "")), float(band.get("x", "")) + float(band.get("width", ""))
    assert left < one < right < point < ceiling
    assert texts(elements).count("1.200×  [1.100 to 1.300]") == 1


def test_a_ratio_that_is_not_resolved_is_an_open_circle() -> None:
    elements = parsed(charts_speed.forest([row(resolved=False)], 1060, key="k"))
    assert len(of_class(elements, "point-open")) == 1
    assert not of_class(elements, "point")
    assert not of_class(elements, "control")
    assert not of_class(elements, "ceiling")


def test_a_hundredfold_interval_still_has_a_readable_scale() -> None:
    elements = parsed(charts_speed.forest([row(ratio=6.5, low=0.48, high=89.0)], 330, key="k"))
    assert {"1×", "10×"} <= set(texts(elements))


def test_bars_start_at_zero_so_their_lengths_compare() -> None:
    rows = [{"label": "a", "sub": "p", "note": "", "bars": [("baseline", "x", 200.0), ("candidate", "y", 50.0)]}]
    elements = parsed(charts_speed.paired_bars(rows, 500, key="k", title="t", kind="bytes"))
    lengths = [float(bar.get("width", "")) for bar in of_class(elements, "flat")]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.97, 1.22, [1.0, 1.05, 1.1, 1.15, 1.2]), (3, 3, [3])],
)
def test_linear_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert charts.linear_ticks(low, high) == pytest.approx(ticks)


def test_log_ticks_are_round_and_inside() -> None:
    assert charts.log_ticks(0.4, 3) == pytest.approx([0.5, 1, 2])
    assert charts.log_ticks(1e-6, 1e6) == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (fmt.seconds(0.0214), "21.4 ms"),
        (fmt.seconds(3.2e-7), "0.320 µs"),
        (fmt.seconds(75), "75.0 s"),
        (fmt.size_bytes(903_000_000), "861 MiB"),
        (fmt.size_bytes(12), "12 B"),
        (fmt.count(134_515_008), "134.5 M"),
        (fmt.count(999), "999"),
        (fmt.ratio(1.23456), "1.235×"),
        (fmt.percent(0.9412), "94 %"),
        (fmt.percent(0.0123), "1.2 %"),
        (fmt.change(100, 80), "−20.0 %"),
        (fmt.change(100, 100.01), "no change"),
        (fmt.change(0, 5), "no base to compare with"),
        (fmt.significant(3.14159), "3.14"),
        (fmt.significant(2.4e-11), "2.40e-11"),
        (fmt.significant(0), "0"),
        (fmt.words(["1"]), "1"),
        (fmt.words(["1", "2", "3"]), "1, 2 and 3"),
        (fmt.words([]), ""),
    ],
)
def test_numbers_are_written_with_their_unit(written: str, expected: str) -> None:
    assert written.replace("\u00a0", " ") == expected


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), [1]])
def test_what_is_not_a_finite_number_is_none(value: Any) -> None:
    assert fmt.number(value) is None

"""The pictures of the plan: what is drawn for which data, and that odd data never breaks a drawing."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from report_fixtures import DROP, SEGMENTS, plan_json
from sglp_bench.report.charts import plan_pictures
from svg_elements import of_class, parsed, texts


def hatched(elements: list[ElementTree.Element]) -> list[ElementTree.Element]:
    return [element for element in elements if (element.get("fill") or "").startswith("url(#")]


def test_the_heat_map_has_a_cell_per_pair_and_marks_what_was_removed_on_both_axes() -> None:
    plan = plan_json()
    elements = parsed(plan_pictures.heat_map(plan["similarity"], SEGMENTS, DROP, key="k"))
    cells = [element for element in elements if (element.findtext("title") or "").startswith("layers ")]
    assert len(cells) == 30 * 30
    assert cells[31].findtext("title") == f"layers 1 and 1: {plan['similarity'][1][1]:.3f}"
    assert len(hatched(elements)) == 2 * len(DROP) + 1  # and the legend
    assert len(of_class(elements, "segment-line")) == len(SEGMENTS)
    assert {"removed", "segment", "CKA"} <= set(texts(elements))


def test_the_brightest_cells_are_the_most_alike() -> None:
    def light(colour: str) -> int:
        return sum(int(colour[i : i + 2], 16) * weight for i, weight in ((1, 3), (3, 6), (5, 1)))

    steps = [light(plan_pictures.ramp(position / 50)) for position in range(51)]
    assert steps == sorted(steps)
    assert plan_pictures.ramp(-1) == plan_pictures.ramp(0) == "#440154"
    assert plan_pictures.ramp(2) == plan_pictures.ramp(1) == "#fde725"


def test_a_deep_model_is_drawn_with_one_path_per_colour() -> None:
    n = 80
    values = [[1 - abs(i - j) / n for j in range(n)] for i in range(n)]
    svg = plan_pictures.heat_map(values, [[0, 40], [40, 80]], [5], key="k")
    elements = parsed(svg)
    assert sum(path.get("d", "").count("z") for path in elements if path.tag == "path" and path.get("fill")) == n * n
    assert len(svg) < 400_000


@pytest.mark.parametrize("values", [[[1.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, -0.2], [-0.2, 1.0]]])
def test_a_heat_map_of_few_or_equal_values_is_drawn(values: list[list[float]]) -> None:
    parsed(plan_pictures.heat_map(values, [[0, len(values)]], [], key="k"))


def test_the_importance_axis_is_logarithmic_only_when_the_range_asks_for_it() -> None:
    wide = plan_pictures.importance_bars([0.01, 1.0], [0], [[0, 2]], "grad-norm", 500, key="k")
    flat = plan_pictures.importance_bars([0.5, 1.0], [0], [[0, 2]], "grad-norm", 500, key="k")
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
    svg = plan_pictures.importance_bars(plan["scores"]["grad-norm"], DROP, SEGMENTS, "grad-norm", 1000, key="k")
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
    parsed(plan_pictures.importance_bars(values, [0], [], "criterion", 330, key="k"))


def test_a_score_that_is_missing_gets_a_question_mark() -> None:
    assert "?" in texts(parsed(plan_pictures.importance_bars([1.0, None], [], [], "criterion", 330, key="k")))


@pytest.mark.parametrize(("losses", "chosen"), [([0.0], 1), ([3.0, 0.0], 2), ([5.0, 2.0, 0.0], 0), ([0.0, 0.0], 1)])
def test_any_loss_curve_is_drawn(losses: list[float], chosen: int) -> None:
    elements = parsed(plan_pictures.loss_curve(losses, chosen, 330, key="k"))
    assert len(of_class(elements, "dot")) == len(losses)
    assert len(of_class(elements, "ring")) == (1 if chosen else 0)


def test_the_stack_brackets_segments_and_says_which_layers_went() -> None:
    svg = plan_pictures.layer_strip(30, DROP, SEGMENTS, 1000, key="k")
    elements = parsed(svg)
    assert (len(of_class(elements, "kept")), len(of_class(elements, "gone"))) == (24, 6)
    assert len(of_class(elements, "bracket")) == 6
    assert "removed: 6, 11, 13, 18, 24 and 25." in svg
    ends = [float(e.get("x", "")) + float(e.get("width", "")) for e in elements if e.tag == "rect" and e.get("x")]
    assert max(ends) <= 1000

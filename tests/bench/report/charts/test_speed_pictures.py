"""The pictures of the measurements: what is drawn for which data, and that odd data never breaks a drawing."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from sglp_bench.report.charts import speed_pictures
from svg_elements import of_class, parsed, texts


def arm(blocks: list[list[float]], role: str = "baseline") -> dict[str, Any]:
    return {"label": role, "role": role, "blocks": blocks}


def test_one_stalled_call_does_not_squeeze_the_others_and_is_counted() -> None:
    usual = [0.010 + 0.0001 * (index % 10) for index in range(200)]
    svg = speed_pictures.latency_strips([arm([usual, [*usual, 3.0]])], 500, key="k", metric="decode step")
    elements = parsed(svg)
    assert "1 sample beyond, up to 3.00 s →" in texts(elements)
    spread = [float(dot.get("cx", "")) for dot in of_class(elements, "sample")]
    assert sorted(spread)[-2] - min(spread) > 200


def test_a_lane_per_block_has_its_median() -> None:
    svg = speed_pictures.latency_strips([arm([[1.0, 2.0, 9.0], [4.0, 5.0]])], 500, key="k", metric="prefill")
    ticks = [tick.findtext("title") or "" for tick in of_class(parsed(svg), "block-median")]
    assert [tick.replace("\u00a0", " ") for tick in ticks] == [
        "block 1: median 2.00 s of 3",
        "block 2: median 4.50 s of 2",
    ]


def test_many_samples_are_thinned_in_the_picture_only() -> None:
    svg = speed_pictures.latency_strips([arm([[0.01 + 1e-6 * i for i in range(5000)]])], 500, key="k", metric="decode")
    assert 300 <= len(of_class(parsed(svg), "sample")) <= 360
    assert "over 5000 samples" in svg


@pytest.mark.parametrize("blocks", [[[1.0]], [[2e-7, 2e-7]], [[1e-9], [5000.0]], [[0.5] * 4]])
def test_few_or_equal_samples_are_drawn(blocks: list[list[float]]) -> None:
    parsed(speed_pictures.latency_strips([arm(blocks), arm(blocks, "candidate")], 330, key="k", metric="decode"))


def row(**changes: Any) -> dict[str, Any]:
    known = {"label": "Decode step", "sub": "latency", "ratio": 1.2, "low": 1.1, "high": 1.3, "note": "faster"}
    return {**known, "resolved": True, **changes}


def x_of(element: ElementTree.Element) -> float:
    return float(re.findall(r"-?[\d.]+", element.get("d") or element.get("cx") or element.get("x1") or "")[0])


@pytest.mark.parametrize("width", [330.0, 1060.0])
def test_the_forest_plot_puts_everything_on_one_scale(width: float) -> None:
    rows = [row(control_low=0.98, control_high=1.02, ceiling=1.25)]
    elements = parsed(speed_pictures.forest(rows, width, key="k"))
    one = x_of(of_class(elements, "one")[0])
    point, ceiling = x_of(of_class(elements, "point")[0]), x_of(of_class(elements, "ceiling")[0])
    band = of_class(elements, "control")[0]
    left, right = float(band.get("x", "")), float(band.get("x", "")) + float(band.get("width", ""))
    assert left < one < right < point < ceiling
    assert texts(elements).count("1.200×  [1.100 to 1.300]") == 1


def test_a_ratio_that_is_not_resolved_is_an_open_circle() -> None:
    elements = parsed(speed_pictures.forest([row(resolved=False)], 1060, key="k"))
    assert len(of_class(elements, "point-open")) == 1
    assert not of_class(elements, "point")
    assert not of_class(elements, "control")
    assert not of_class(elements, "ceiling")


def test_a_hundredfold_interval_still_has_a_readable_scale() -> None:
    elements = parsed(speed_pictures.forest([row(ratio=6.5, low=0.48, high=89.0)], 330, key="k"))
    assert {"1×", "10×"} <= set(texts(elements))


def test_bars_start_at_zero_so_their_lengths_compare() -> None:
    rows = [{"label": "a", "sub": "p", "note": "", "bars": [("baseline", "x", 200.0), ("candidate", "y", 50.0)]}]
    elements = parsed(speed_pictures.paired_bars(rows, 500, key="k", title="t", kind="bytes"))
    lengths = [float(bar.get("width", "")) for bar in of_class(elements, "flat")]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=1e-3)

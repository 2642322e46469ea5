"""Axes: their numbers are round and lie inside."""

from __future__ import annotations

import pytest

from sglp_bench.report.charts import axes


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.97, 1.22, [1.0, 1.05, 1.1, 1.15, 1.2]), (3, 3, [3])],
)
def test_linear_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert axes.linear_ticks(low, high) == pytest.approx(ticks)


def test_log_ticks_are_round_and_inside() -> None:
    assert axes.log_ticks(0.4, 3) == pytest.approx([0.5, 1, 2])
    assert axes.log_ticks(1e-6, 1e6) == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])


def test_a_scale_puts_its_ends_where_they_belong_and_the_middle_between() -> None:
    falling = axes.Scale(10, 30, 200, 100)
    assert [falling(value) for value in (10, 20, 30)] == [200, 150, 100]
    ratios = axes.Scale(1, 100, 0, 50, log=True)
    assert [ratios(value) for value in (1, 10, 100)] == pytest.approx([0, 25, 50])


def test_a_value_beyond_the_axis_lies_at_its_end() -> None:
    assert axes.Scale(0, 1, 5, 9)(1000) == 9
    assert axes.Scale(1, 2, 5, 9, log=True)(1000) == 9

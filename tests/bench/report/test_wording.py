"""Numbers in the report: one way to write each kind."""

from __future__ import annotations

from typing import Any

import pytest

from sglp_bench.report import wording as fmt


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

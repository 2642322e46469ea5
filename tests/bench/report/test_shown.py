"""Values as the templates show them: text for anything, and tables that are whole."""

from __future__ import annotations

from typing import Any

import pytest

from sglp_bench.report.shown import Code, Table, code, in_words, picture


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        ("", "–"),
        ({}, "–"),
        ([], "–"),
        ({"threads": None}, "–"),
        ({"batch": 1, "device": "cpu", "threads": None}, "batch 1, device cpu"),
        (["a", 2], "a, 2"),
        (0, "0"),
        (False, "False"),
        ("as it is", "as it is"),
    ],
)
def test_every_value_has_words(value: Any, expected: str) -> None:
    assert in_words(value) == expected


def test_a_digest_is_cut_and_an_absent_one_is_nothing() -> None:
    assert code("0123456789", 4) == Code("0123")
    assert code("sglp-deploy run") == Code("sglp-deploy run")
    assert code(None) is code("") is None


def test_a_cell_has_the_class_of_its_column() -> None:
    made = Table(["layer", "value", "note"], [[1, 2.5, "long"]], numeric=[1], wrap=[2])
    assert made.columns == [("layer", None), ("value", "num"), ("note", "wrap")]
    assert made.body == [[(1, None), (2.5, "num"), ("long", "wrap")]]


def test_a_row_that_lacks_a_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        _ = Table(["layer", "value"], [[1]]).body


def test_a_picture_is_drawn_for_a_desk_and_for_a_hand_with_keys_of_their_own() -> None:
    drawn: list[tuple[float, str]] = []
    made = picture(lambda width, key: drawn.append((width, key)) or f"<svg id='{key}'/>", "loss", wide=500)
    assert drawn == [(500, "loss-w"), (330, "loss-n")]
    assert (made.wide, made.narrow) == ("<svg id='loss-w'/>", "<svg id='loss-n'/>")

"""Values in the shape the templates show: cells, tables, and pictures in two widths.

All markup is the templates' own.  Their engine escapes every value.  A picture alone is markup already, because a
drawing escapes its own texts.  Each is drawn twice, for a desk and for a hand.  An SVG that is only scaled down has
letters nobody can read.  The style sheet shows one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sglp_bench.report import wording as fmt

WIDE, HALF, NARROW = 1060.0, 500.0, 330.0


@dataclass(frozen=True)
class Code:
    """A digest or a command, shown in a fixed-width face."""

    text: str


@dataclass(frozen=True)
class Badge:
    """A verdict, shown with a glyph and not by colour alone."""

    passed: bool
    words: str


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells; ``numeric`` columns are set flush right, ``wrap`` columns may break lines."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numeric: Sequence[int] = ()
    wrap: Sequence[int] = ()

    @property
    def kinds(self) -> list[str | None]:
        """The CSS class of each column; None where it has none."""
        named = {**dict.fromkeys(self.numeric, "num"), **dict.fromkeys(self.wrap, "wrap")}
        return [named.get(index) for index in range(len(self.head))]

    @property
    def columns(self) -> list[tuple[str, str | None]]:
        """Name and class of each column."""
        return list(zip(self.head, self.kinds, strict=True))

    @property
    def body(self) -> list[list[tuple[Any, str | None]]]:
        """Each row's cells with the class of their column."""
        return [list(zip(row, self.kinds, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Picture:
    """One picture in both widths."""

    wide: Markup
    narrow: Markup


def picture(draw: Callable[[float, str], str], key: str, *, wide: float = WIDE) -> Picture:
    """What ``draw`` makes of each width and of a key that is unique in the page."""
    return Picture(Markup(draw(wide, f"{key}-w")), Markup(draw(NARROW, f"{key}-n")))


def code(value: Any, length: int | None = None) -> Code | None:
    """A digest or a command, cut to ``length``; None when there is none."""
    return Code(str(value)[:length]) if value else None


def digits(value: Any) -> str | None:
    """A number in three significant digits; None for anything else."""
    found = fmt.number(value)
    return None if found is None else fmt.significant(found)


def in_words(value: Any) -> str:
    """A value as text: an absent one is a dash, an object or a list is one line."""
    if value is None or value == "":
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "–"
    return str(value)

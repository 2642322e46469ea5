"""The pieces of the page: tables, fact lists, folded parts and pictures, all of which escape what they show.

Each picture is drawn twice, for a desk and for a hand, because an SVG that is only scaled down has letters nobody can
read; the style sheet shows one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from sglp_bench.report import wording as fmt

WIDE, HALF, NARROW = 1060.0, 500.0, 330.0


class Html(str):
    """Text that is markup already; everything else is escaped where it is shown."""


def show(value: Any) -> str:
    """``value`` as markup: escaped unless it is :class:`Html`; an absent value is a dash."""
    if isinstance(value, Html):
        return value
    if value is None or value == "":
        return "–"
    if isinstance(value, Mapping):
        return escape(", ".join(f"{key} {item}" for key, item in value.items() if item is not None)) or "–"
    if isinstance(value, list | tuple):
        return escape(", ".join(str(item) for item in value)) or "–"
    return escape(str(value))


def table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], *, numeric: Sequence[int] = (), wrap: Sequence[int] = ()
) -> str:
    """A table in a box of its own, so that a wide one scrolls without moving the page."""
    kinds = {**dict.fromkeys(numeric, "num"), **dict.fromkeys(wrap, "wrap")}
    attribute = [f' class="{kinds[index]}"' if index in kinds else "" for index in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, attribute, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{show(cell)}</td>" for cell, kind in zip(row, attribute, strict=True)) + "</tr>"
        for row in rows
    )
    label = escape(f"table: {', '.join(head)}")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, content: str) -> str:
    """A folded part for long tables."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def facts(pairs: Sequence[tuple[str, Any]]) -> str:
    """A list of name and value."""
    return '<dl class="facts">' + "".join(f"<dt>{escape(k)}</dt><dd>{show(v)}</dd>" for k, v in pairs) + "</dl>"


def absent(sentence: str) -> str:
    """A visible note in place of something that was not measured."""
    return f'<p class="absent-note">not measured: {escape(sentence)}</p>'


def picture(
    title: str, words: str, draw: Callable[[float, str], str], key: str, *, wide: float = WIDE, legend: str = ""
) -> str:
    """A panel with a heading, a sentence on how to read it, and the drawing in both widths."""
    return (
        f'<figure class="panel"><figcaption><h3>{escape(title)}</h3><p>{escape(words)}</p></figcaption>'
        f'<div class="wide">{draw(wide, f"{key}-w")}</div><div class="narrow">{draw(NARROW, f"{key}-n")}</div>'
        f"{legend}</figure>"
    )


def badge(passed: bool, good: str = "passed", bad: str = "failed") -> Html:
    """A verdict with a glyph, not by colour alone."""
    return Html(
        f'<span class="badge {"good" if passed else "bad"}">{"✓" if passed else "✗"} {good if passed else bad}</span>'
    )


def code(value: Any, length: int | None = None) -> Html:
    """A digest or a command in a fixed-width face; ``length`` shortens a digest."""
    text = str(value) if value else ""
    return Html(f"<code>{escape(text[:length])}</code>" if text else "–")


def digits(value: Any) -> str | None:
    """A number in three significant digits; None for anything else."""
    found = fmt.number(value)
    return None if found is None else fmt.significant(found)

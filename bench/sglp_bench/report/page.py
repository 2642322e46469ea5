"""The page of a report: the values of its sections, put into the templates.

This is loaded only when a page is made.  Neither the harness nor the command line's help waits for the template engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sglp_bench.report import answers, measured, sections
from sglp_bench.report.shown import Badge, Code, in_words


def render_html(report_json: Mapping[str, Any]) -> str:
    """The page for the content of a ``report.json``: one file, no script, nothing fetched; equal input, equal page."""
    report = report_json
    return (
        _templates()
        .get_template("page.html.jinja")
        .render(
            title=str(report["title"]),
            subtitle=sections.subtitle(report),
            accept=answers.accept_values(report),
            price=sections.price_values(report),
            stack=sections.stack_values(report),
            claims=report["claims"],
            cards=report["cards"],
            missing=report["missing"],
            plan=sections.plan_values(report),
            certificates=sections.parity_values(report),
            measurements=measured.speed_values(report),
            memory=measured.memory_values(report),
            quality=measured.quality_values(report),
            tasks=answers.task_values(report),
            samples=answers.sample_values(report),
            provenance=sections.provenance_values(report),
        )
    )


@cache
def _templates() -> Environment:
    """The engine; it escapes every value, and a name that a template misspells is an error."""
    engine = Environment(
        loader=PackageLoader("sglp_bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    engine.filters["in_words"] = in_words
    engine.tests["code"] = lambda value: isinstance(value, Code)
    engine.tests["badge"] = lambda value: isinstance(value, Badge)
    return engine

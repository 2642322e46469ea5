"""The values of the page about the verdict, and about what both models answer and write: tasks and samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglp_bench.judge.accept import missed
from sglp_bench.report import wording as fmt
from sglp_bench.report.facts import Json, section
from sglp_bench.report.shown import Badge, Table


def accept_values(report: Mapping[str, Any]) -> Json | None:
    """The verdict over the user's limits, the missed ones in sentences; None where no limit was stated."""
    verdict = section(report, "accept")
    if not verdict:
        return None
    findings = verdict["findings"]
    count = len(findings)
    lost = missed(verdict)
    rows = [
        [
            found["name"], found["limit"], None if found["value"] is None else fmt.significant(found["value"], 4),
            fmt.interval(*found["interval"]) if found["interval"] else None,
            Badge(found["met"], "met" if found["met"] else "missed"),
        ]
        for found in findings
    ]  # fmt: skip
    heading = f"{len(lost)} of {count} limits missed" if lost else f"All {count} limits are met"
    head = ["limit on", "asked", "found", "95 % interval", "verdict"]
    return {
        "accepted": not lost,
        "heading": f"{'✗ Not accepted' if lost else '✓ Accepted'}: {heading}",
        "missed": lost,
        "table": Table(head, rows, numeric=[2, 3]),
    }


def task_values(report: Mapping[str, Any]) -> Json | None:
    """The table of tasks and where each came from; None where no task was asked."""
    tasks = section(section(report, "quality"), "tasks")
    rows, sources = [], []
    for name, task in tasks.items():
        chance = fmt.number(section(tasks, name).get("chance"))
        for metric in section(tasks, name).get("metrics", {}).values():
            arms = [_figure(section(metric, arm)) for arm in ("dense", "pruned")]
            rows.append(
                [
                    name, metric.get("label"), task.get("n_items"), *arms, _signed(metric.get("difference")),
                    _span(metric.get("difference_interval"), signed=True),
                    None if chance is None else f"{chance:.3f}",
                ]
            )  # fmt: skip
        limit = f", {task.get('n_items')} items"
        sources.append((name, f"{task.get('kind')} from {task.get('source')}{limit}"))
    if not rows:
        return None
    head = ["task", "metric", "items", "dense", "pruned", "difference", "95 % interval", "by guessing"]
    return {"table": Table(head, rows, numeric=range(2, 8)), "sources": sources}


def sample_values(report: Mapping[str, Any]) -> Json | None:
    """What both models wrote, and how much they repeated themselves; None where nothing was written."""
    found = section(section(report, "quality"), "generation")
    if not found:
        return None
    if "not_made" in found:
        return {"not_made": found["not_made"], "table": None, "repetition": []}
    rows = []
    given = found.get("rows")
    for row in given if isinstance(given, list) else ():
        left, right = section(row, "dense"), section(row, "pruned")
        rows.append(
            [
                row.get("prompt"), left.get("text"), _share(left.get("repetition")), right.get("text"),
                _share(right.get("repetition")),
            ]
        )  # fmt: skip
    shares = section(found, "repetition")
    repetition = [(arm, _share(shares.get(arm)) or "too short to tell") for arm in ("dense", "pruned")]
    head = ["prompt", "dense", "repeated", "pruned", "repeated"]
    return {
        "not_made": None,
        "decoding": found.get("decoding"),
        "run": shares.get("n"),
        "table": Table(head, rows, numeric=[2, 4], wrap=[0, 1, 3]),
        "repetition": repetition,
    }


def _figure(figure: Json) -> str | None:
    value, span = fmt.number(figure.get("value")), _span(figure.get("interval"))
    return None if value is None else f"{value:.3f}" + (f" ({span})" if span else "")


def _signed(value: Any) -> str | None:
    found = fmt.number(value)
    return None if found is None else f"{found:+.3f}".replace("-", "−")


def _span(value: Any, *, signed: bool = False) -> str | None:
    if not isinstance(value, list) or len(value) != 2 or None in value:
        return None
    return " to ".join(f"{end:+.3f}".replace("-", "−") if signed else f"{end:.3f}" for end in value)


def _share(value: Any) -> str | None:
    found = fmt.number(value)
    return None if found is None else fmt.percent(found)

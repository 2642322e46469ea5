"""Tasks and samples in a report: the figures of the file, escaped, and nothing where nothing was judged."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import numpy as np

import report_fixtures
from sglp_bench.report.page import render_html
from sglp_bench.report.run_report import RunReport
from sglp_deploy.tasks.generation import beside
from sglp_deploy.tasks.scores import Scores, paired

MARK = "<script>alert('&')</script>"


def scores(right: int, count: int = 20) -> Scores:
    values = np.array([1.0] * right + [0.0] * (count - right))
    facts = {"kind": "choice", "source": "files/piqa.jsonl", "digest": "d", "chance": 0.5}
    return Scores({"acc_norm": values, "acc": 1 - values}, {"acc_norm": "by length", "acc": "plain"}, facts)


def row(prompt: str, text: str, repetition: float | None) -> dict[str, Any]:
    return {"prompt": prompt, "text": text, "n_tokens": 9, "repetition": repetition, "distinct_1": 1, "distinct_2": 1}


def made(**more: Any) -> dict[str, Any]:
    inputs = report_fixtures.run_inputs()
    return RunReport(**{**inputs, "quality": {**inputs["quality"], **more}}).to_json()


def cells(page: str, head: str) -> list[list[str]]:
    """The rows of the table whose label starts with ``head``."""
    found = re.search(rf'aria-label="table: {head}.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert found
    rows = re.findall(r"<tr>(.*?)</tr>", found[1], re.DOTALL)
    return [[unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", each, re.DOTALL)] for each in rows]


def test_a_task_is_a_row_for_each_metric_and_a_card_for_the_one_that_is_quoted() -> None:
    record = paired(scores(15), scores(12))
    report = made(tasks={"piqa": record})
    found = record["metrics"]["acc_norm"]
    first, second = cells(render_html(report), "task, metric")
    assert first[:3] == ["piqa", "by length", "20"]
    low, high = found["dense"]["interval"]
    assert first[3] == f"0.750 ({low:.3f} to {high:.3f})"
    assert first[4].startswith("0.600 (")
    low, high = found["difference_interval"]
    assert low < 0
    assert first[5:] == ["−0.150", f"−{-low:.3f} to {high:+.3f}".replace("-", "−"), "0.500"]
    assert second[1:6:4] == ["plain", "+0.150"]
    (card,) = (card for card in report["cards"] if card["key"] == "task_piqa")
    assert card["label"] == "piqa"
    assert card["value"] == "0.750 → 0.600"
    assert card["detail"].startswith("by length; difference −0.150, 95\u00a0% CI −")
    assert "choice from files/piqa.jsonl, 20 items" in render_html(report)


def test_samples_stand_side_by_side_with_their_repetition() -> None:
    dense = [row("Once", "there was a cat", 0.0), row("Tea", "is hot", None)]
    pruned = [row("Once", "the the the the the", 0.75), row("Tea", "tea tea", None)]
    page = render_html(made(generation=beside(dense, pruned, 48)))
    first, second = cells(page, "prompt, dense")
    assert first == ["Once", "there was a cat", "0.0\u00a0%", "the the the the the", "75\u00a0%"]
    assert second == ["Tea", "is hot", "–", "tea tea", "–"]
    assert "Always the most probable token (greedy, up to 48 tokens)" in page
    assert re.search(r"<dt>pruned</dt><dd>75.%</dd>", page)


def test_what_a_model_and_a_file_say_is_escaped() -> None:
    record = {**paired(scores(15), scores(12)), "source": MARK}
    record["metrics"]["acc"]["label"] = MARK
    page = render_html(made(tasks={MARK: record}, generation=beside([row(MARK, MARK, 0.0)], [row("", MARK, 1.0)], 4)))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;") >= 7


def test_a_report_without_tasks_says_nothing_of_them_and_one_without_a_sample_says_why() -> None:
    page = render_html(made())
    assert "Right answers" not in page
    assert "What both models write" not in page
    page = render_html(made(generation={"not_made": "ValueError: no cache"}))
    assert "not measured: a sample of what both models write; ValueError: no cache" in page
    assert "task_" not in str(made()["cards"])


def test_a_quality_file_of_another_version_with_other_fields_still_gives_a_page() -> None:
    odd = {"piqa": {"metrics": {"acc": {"label": "x", "difference": None}}, "metric": "acc"}}
    first = cells(render_html(made(tasks=odd, generation={"rows": [{"prompt": "p"}]})), "task, metric")
    assert first == [["piqa", "x", "–", "–", "–", "–", "–", "–"]]


def test_the_verdict_stands_at_the_top_with_what_was_missed_and_every_limit_in_a_table() -> None:
    inputs = report_fixtures.run_inputs()
    page = render_html(RunReport(**inputs, limits={"decode": "1.1x", "perplexity": "1.5x"}).to_json())
    assert page.index("✗ Not accepted: 1 of 2 limits missed") < page.index('class="cards"')
    first, second = cells(page, "limit on")
    assert first[:2] == ["decode (onnx)", "at least 1.1x"]
    assert "✓ met" in first[4]
    assert second[:4] == ["perplexity", "at most 1.5x", "2.496", "–"]
    assert "✗ missed" in second[4]
    assert "<p>perplexity: at most 1.5x is asked; it is 2.496x.</p>" in page
    assert "limits" not in words(render_html(RunReport(**inputs).to_json()))


def test_a_report_of_before_there_were_verdicts_is_still_rendered() -> None:
    report = made()
    del report["accept"]
    assert render_html(report) == render_html(made())


def words(page: str) -> str:
    return re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower()

"""What was paid in quality: the first sentence of a report, its warning, and the three models side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import report_fixtures
from sglp_bench.report.page import render_html
from sglp_bench.report.run_report import RunReport

WARNING = "✗ More than twice the dense model's perplexity"


def quality(pruned: float, unrepaired: float | None = None) -> dict[str, Any]:
    """quality/2 of a dense model of perplexity 20."""
    found: dict[str, Any] = {
        "schema": "quality/2",
        "dense": {"perplexity": 20.0, "nats_per_token": 2.9957},
        "pruned": {"perplexity": pruned, "nats_per_token": 3.5},
        "ratio": pruned / 20,
        "ratio_interval": [0.9 * pruned / 20, 1.1 * pruned / 20],
    }
    if unrepaired is not None:
        ratio = {"ratio": unrepaired / 20, "ratio_interval": [4.1, 4.3]}
        found["unrepaired"] = {"perplexity": unrepaired, "nats_per_token": 4.4, **ratio}
    return found


def report(value: dict[str, Any], **plan: Any) -> dict[str, Any]:
    inputs = report_fixtures.run_inputs()
    return RunReport(**{**inputs, "quality": value, "plan": {**inputs["plan"], **plan}}).to_json()


def words_of(page: str) -> str:
    """The text of the page, without the style sheet."""
    text = re.sub(r"<(style|title)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)).replace("&#39;", "'")


REFIT: dict[str, Any] = {
    "overlay": {"digest": "d", "n_tensors": 1, "bytes": 4, "made_by": [{"repair": "refit", "loss_after": 3.5}]}
}


def test_the_first_sentence_says_what_was_paid_before_and_after_the_repair() -> None:
    text = words_of(render_html(report(quality(30.0, 84.0), **REFIT)))
    sentence = (
        "Removing 6 of 30 layers takes perplexity on held-out text from 20.0 to 84.0 before repair and 30.0 after it "
        "(refit), 1.50 times the dense model's."
    )
    assert text.index(sentence) < text.index("The stack, first layer on the left")
    assert WARNING not in text


def test_without_a_repair_the_sentence_has_two_figures_and_says_which_repair_was_refused() -> None:
    refused = {"compensation": {"refused": [{"repair": "refit", "why": "the loss does not become lower"}]}}
    text = words_of(render_html(report(quality(30.0), **refused)))
    assert (
        "takes perplexity on held-out text from 20.0 to 30.0, 1.50 times the dense model's. The repair refit was not "
        "used: the loss does not become lower."
    ) in text


@pytest.mark.parametrize(("pruned", "dear"), [(40.0, False), (40.1, True)])
def test_more_than_twice_the_dense_perplexity_is_red(pruned: float, dear: bool) -> None:
    value = report(quality(pruned, 84.0), **REFIT)
    page = render_html(value)
    marked = page.count(f'<div class="claim unverified"><strong>{WARNING}</strong>')
    assert marked == (2 if dear else 0)  # at the top, and in the section
    card = next(card for card in value["cards"] if card["key"] == "perplexity")
    assert card["state"] == ("bad" if dear else "plain")
    assert "84.0 before repair" in card["detail"]


def test_a_bad_model_that_a_repair_made_good_is_not_red() -> None:
    assert WARNING not in words_of(render_html(report(quality(39.0, 400.0), **REFIT)))


def test_the_section_shows_the_three_models_side_by_side() -> None:
    page = render_html(report(quality(30.0, 84.0), **REFIT))
    section = page[page.index('<section id="quality">') : page.index('<section id="provenance">')]
    text = words_of(section)
    assert "model perplexity times dense 95 % interval" in text
    assert "dense 20.0 – –" in text
    assert "pruned, before repair 84.0 4.20 4.10 to 4.30" in text
    assert "pruned, repaired 30.0 1.50 1.35 to 1.65" in text
    assert "dense 20.0, unrepaired 84.0, repaired 30.0" in section  # the picture's description


HEALED = {"overlay": {**REFIT["overlay"], "made_by": [{"repair": "refit"}, {"repair": "heal"}]}}


def healed_quality(repaired: float | None) -> dict[str, Any]:
    """quality/3 of a pruned model that was healed to 22."""
    found = quality(22.0, 84.0) | {"schema": "quality/3", "repairs": ["refit", "heal"] if repaired else ["heal"]}
    if repaired is not None:
        ratio = {"ratio": repaired / 20, "ratio_interval": [1.4, 1.6]}
        found["repaired"] = {"perplexity": repaired, "nats_per_token": 3.4, **ratio}
    return found


def test_healing_has_a_figure_of_its_own_beside_the_repair_s() -> None:
    value = report(healed_quality(30.0), **HEALED)
    page = render_html(value)
    assert (
        "from 20.0 to 84.0 before repair, 30.0 after it (refit) and 22.0 after healing, 1.10 times the dense model's."
    ) in words_of(page)
    section = page[page.index('<section id="quality">') : page.index('<section id="provenance">')]
    text = words_of(section)
    assert "Before repair, repaired, healed" in text
    assert "pruned, before repair 84.0 4.20 4.10 to 4.30" in text
    assert "pruned, repaired 30.0 1.50 1.40 to 1.60" in text
    assert "pruned, healed 22.0 1.10 0.990 to 1.21" in text
    assert "dense 20.0, unrepaired 84.0, repaired 30.0, healed 22.0" in section  # the picture's description
    card = next(card for card in value["cards"] if card["key"] == "perplexity")
    assert card["detail"] == "1.10× the dense model's; 84.0 before repair; 30.0 repaired; lower is better"


def test_healing_alone_is_not_called_a_repair_and_a_refused_one_is_said() -> None:
    only = {"overlay": {**REFIT["overlay"], "made_by": [{"repair": "heal"}]}}
    page = words_of(render_html(report(healed_quality(None), **only)))
    assert "from 20.0 to 84.0 before healing and 22.0 after it, 1.10 times the dense model's." in page
    assert "Before and after healing" in page
    assert "pruned, before healing 84.0" in page
    refused = {"compensation": {"refused": [{"repair": "heal", "why": "the loss does not become lower"}]}}
    text = words_of(render_html(report(quality(30.0), **refused)))
    assert "Healing was not used: the loss does not become lower." in text


def test_quality_of_before_there_were_repairs_is_still_read(tmp_path: Path) -> None:
    report_fixtures.write_run_folder(tmp_path)
    assert report_fixtures.quality_json()["schema"] == "quality/1"
    page = render_html(RunReport.from_run_folder(tmp_path).to_json())
    assert "Before and after the repair" not in page
    assert "from 23.6 to 58.9, 2.50 times" in words_of(page)


def test_a_report_without_quality_has_no_price() -> None:
    inputs = report_fixtures.run_inputs()
    text = words_of(render_html(RunReport(**{**inputs, "quality": None}).to_json()))
    assert "takes perplexity" not in text

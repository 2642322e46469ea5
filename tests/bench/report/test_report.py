"""The report: what it may claim, what it says when something is absent, and that the page only renders the file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from report_fixtures import (
    Json,
    comparison_json,
    digest,
    parity_json,
    plan_json,
    result_json,
    run_inputs,
)
from sglp_bench.report.page import render_html
from sglp_bench.report.run_report import RunReport

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
_VOID = {"meta", "br", "wbr", "path", "rect", "line", "circle"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)
        elif tag in ("path", "rect", "line", "circle"):
            self.open.append(tag)  # with a tooltip inside

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words).replace("\u00a0", " ")


def claims_of(report: RunReport) -> dict[str, Json]:
    return {claim["metric"].partition("_")[0]: claim for claim in report.to_json()["claims"]}


def card(report: RunReport, key: str) -> Json:
    return next(item for item in report.to_json()["cards"] if item["key"] == key)


def strings_replaced(value: Any, replacement: str) -> Any:
    if isinstance(value, dict):
        return {key: strings_replaced(item, replacement) for key, item in value.items()}
    if isinstance(value, list):
        return [strings_replaced(item, replacement) for item in value]
    return replacement if isinstance(value, str) else value


def test_a_whole_run_gives_a_claim_by_the_template() -> None:
    report = RunReport(**run_inputs())
    row = report.to_json()["measurements"][0]["rows"][0]
    low, high = row["interval"]
    expected = (
        f"Removing 6 of 30 layers (20 %) makes batch-1 decode {row['ratio']:.3f}× (95 % CI {low:.3f} to {high:.3f}) "
        f"faster on Intel(R) Xeon(R) Platinum 8481C, onnx, fp32, 2 threads, which is {100 * row['ratio'] / 1.19:.0f} % "
        "of the physical ceiling of 1.190× for this model. Noise floor from A/A: "
    )
    claim = claims_of(report)["decode"]
    assert claim["allowed"] is True
    assert claim["sentence"].replace("\u00a0", " ").startswith(expected)
    assert expected in Page(render_html(report.to_json())).text
    assert report.to_json()["missing"] == []


def test_the_headline_cards_hold_the_numbers_of_the_inputs() -> None:
    report = RunReport(**run_inputs())
    values = {item["key"]: item["value"].replace("\u00a0", " ") for item in report.to_json()["cards"]}
    decode = report.to_json()["measurements"][0]["rows"][0]["ratio"]
    assert values == {
        "layers": "30 → 24",
        "parameters": "134.5 M → 113.3 M",
        "decode": f"{decode:.3f}×",
        "prefill": values["prefill"],
        "peak_memory": "1.01 GiB → 861 MiB",
        "weights": "513 MiB → 432 MiB",
        "perplexity": "23.6 → 58.9",
        "parity": "passed",
    }


def test_failing_parity_withholds_every_speed() -> None:
    report = RunReport(**run_inputs(parity_passed=False))
    claims = claims_of(report)
    assert [claim["allowed"] for claim in claims.values()] == [False, False]
    assert "no claim, because parity failed" in claims["decode"]["sentence"]
    for key in ("decode", "prefill"):
        assert card(report, key)["value"] == "no claim"
        assert "×" not in card(report, key)["detail"]
    text = Page(render_html(report.to_json())).text
    assert "What may be claimed" not in text
    assert "KL of 0.92 nats at position 91 is above the threshold" in text
    assert "these are times of something else" in text
    assert "✗ Unverified: parity failed" in text


def test_a_certificate_of_another_artifact_allows_nothing() -> None:
    inputs = run_inputs()
    inputs["parity"] = {"onnx": parity_json(artifact_digest=digest("another"))}
    claim = claims_of(RunReport(**inputs))["decode"]
    assert not claim["allowed"]
    assert "parity was not measured for this artifact" in claim["sentence"]


def test_a_baseline_that_fails_parity_withholds_the_claim() -> None:
    inputs = run_inputs()
    inputs["parity"]["onnx-baseline"] = parity_json(passed=False, artifact_digest=digest("baseline"))
    assert "parity failed for the baseline" in claims_of(RunReport(**inputs))["decode"]["sentence"]


@pytest.mark.parametrize("arm", ["baseline", "pruned"])
def test_an_arm_that_was_measured_unverified_is_shown_in_red_and_in_words(arm: str) -> None:
    inputs = run_inputs()
    certified = RunReport(**inputs).to_json()
    assert "Unverified" not in Page(render_html(certified)).text
    inputs["comparisons"]["onnx"]["arms"][arm]["artifact"]["certificate"] = {
        "state": "missing", "reason": "it has no certificate", "runner": "",
    }  # fmt: skip
    report = RunReport(**inputs)
    reason = f"{arm} was measured although it has no certificate"
    for claim in claims_of(report).values():
        assert not claim["allowed"]
        assert reason in claim["sentence"]
    for key in ("decode", "prefill"):
        shown = card(report, key)
        assert (shown["value"], shown["state"], shown["detail"]) == ("no claim", "bad", f"unverified: {reason}")
    page = Page(render_html(report.to_json()))
    assert "✗ Unverified: no certificate" in page.text
    assert reason in page.text
    assert ("class", "claim unverified") in page.attributes
    # Every ratio says it where it stands, in a red badge with a cross.
    rows = report.to_json()["measurements"][0]["rows"]
    assert page.text.count("✗ unverified: ") == len(rows)
    style = resources.files("sglp_bench.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    assert ".claim.unverified { border-color: var(--bad);" in style


def test_a_verdict_without_true_is_not_a_pass() -> None:
    inputs = run_inputs()
    inputs["parity"]["onnx"]["passed"] = "no"
    report = RunReport(**inputs)
    assert not claims_of(report)["decode"]["allowed"]
    assert card(report, "parity")["value"] == "failed"


def test_an_interval_that_includes_one_is_no_claim() -> None:
    report = RunReport(**run_inputs(decode_gain=1.0, spread=0.05))
    claim = claims_of(report)["decode"]
    low, high = report.to_json()["measurements"][0]["rows"][0]["interval"]
    assert low < 1 < high
    assert not claim["allowed"]
    assert claim["sentence"].replace("\u00a0", " ").endswith(f"the 95 % interval {low:.3f} to {high:.3f} includes 1.")


def test_a_difference_below_the_noise_floor_is_no_claim() -> None:
    inputs = run_inputs()
    metric = inputs["comparisons"]["onnx"]["metrics"]["decode_latency_s_per_token"]
    metric.update(resolved=False, verdict="inconclusive")
    metric["control"]["noise_floor"] = 0.3
    sentence = claims_of(RunReport(**inputs))["decode"]["sentence"]
    assert sentence.replace("\u00a0", " ").endswith("the difference is within the noise floor of ±30 %.")


def test_a_missing_interval_is_no_claim() -> None:
    inputs = run_inputs()
    inputs["comparisons"]["onnx"]["metrics"]["decode_latency_s_per_token"]["interval"] = None
    assert claims_of(RunReport(**inputs))["decode"]["reasons"] == ["no 95 % interval was computed"]


def test_a_slower_model_is_called_slower() -> None:
    report = RunReport(**run_inputs(decode_gain=0.8))
    ratio = report.to_json()["measurements"][0]["rows"][0]["ratio"]
    sentence = claims_of(report)["decode"]["sentence"]
    assert f"makes batch-1 decode {1 / ratio:.3f}×" in sentence
    assert " slower on " in sentence
    assert "ceiling" not in sentence
    assert card(report, "decode")["state"] == "bad"


def test_two_runtimes_of_equal_depth_never_claim_that_removing_layers_helped() -> None:
    result = result_json()
    for arm in result["arms"].values():
        arm["artifact"]["n_layers"] = 24
    inputs = run_inputs() | {"comparisons": {"onnx-against-torch": comparison_json(result)}, "results": None}
    report = RunReport(**inputs)
    sentence = claims_of(report)["decode"]["sentence"]
    assert sentence.startswith("At the same 24 layers, pruned makes batch-1 decode ")
    assert " faster than baseline on " in sentence
    assert card(report, "decode")["value"] == "not measured"  # the headline speaks of pruning


def test_pruning_comes_before_comparisons_of_runtimes() -> None:
    result = result_json()
    for arm in result["arms"].values():
        arm["artifact"]["n_layers"] = 24
    inputs = run_inputs()
    inputs["comparisons"] = {"against-torch": comparison_json(result)} | inputs["comparisons"]
    assert [item["name"] for item in RunReport(**inputs).to_json()["measurements"]] == ["onnx", "against-torch"]


def test_report_json_round_trips_and_the_page_is_a_pure_function_of_it(tmp_path: Path) -> None:
    report = RunReport(**run_inputs())
    page = report.save(tmp_path / "report")
    assert page == tmp_path / "report" / "report.html"
    loaded = RunReport.load(tmp_path / "report" / "report.json")
    assert loaded.to_json() == report.to_json()
    assert render_html(loaded.to_json()) == page.read_text(encoding="utf-8") == render_html(report.to_json())
    assert sorted(file.name for file in page.parent.iterdir()) == ["report.html", "report.json"]


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    page = render_html(RunReport(**run_inputs()).to_json())
    assert not re.search(r"https?:|@import|<script|<link|javascript:|\bsrc\s*=", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))


def test_every_picture_is_named_for_screen_readers_and_every_id_is_unique() -> None:
    page = render_html(RunReport(**run_inputs()).to_json())
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    pictures = re.findall(r'<svg [^>]*role="img" aria-labelledby="(\S+) (\S+)"', page)
    assert len(pictures) >= 13  # six drawn in two widths, and the heat map
    assert {name for pair in pictures for name in pair} <= set(ids)
    assert len(re.findall(r"<svg ", page)) == len(pictures) + len(re.findall(r'<svg [^>]*aria-hidden="true"', page))


def test_hostile_strings_are_shown_and_not_obeyed() -> None:
    inputs = run_inputs()
    for name in ("plan", "artifacts", "quality", "provenance"):
        inputs[name] = strings_replaced(inputs[name], HOSTILE)
    inputs["plan"]["criterion"] = HOSTILE
    inputs["plan"]["scores"] = {HOSTILE: inputs["plan"]["scores"]["grad-norm"]}
    certificate = strings_replaced(parity_json(passed=False), HOSTILE)
    comparison = json.loads(json.dumps(inputs["comparisons"]["onnx"]).replace('"pruned"', json.dumps(HOSTILE)))
    comparison["notes"] = [HOSTILE]
    comparison["environment"] = {"cpu_model": HOSTILE}
    result = json.loads(json.dumps(inputs["results"]["onnx"]).replace('"pruned"', json.dumps(HOSTILE)))
    inputs |= {"parity": {HOSTILE: certificate}, "comparisons": {HOSTILE: comparison}, "results": {HOSTILE: result}}
    page = Page(render_html(RunReport(**inputs, title=HOSTILE).to_json()))
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert page.text.count("<script>alert(1)</script>") > 40


def test_an_empty_report_says_what_was_not_measured() -> None:
    report = RunReport(None)
    text = Page(render_html(report.to_json())).text
    assert [sentence.partition(":")[0] for sentence in report.to_json()["missing"]] == [
        "plan", "artifacts", "parity", "speed", "memory", "raw samples", "quality", "provenance",
    ]  # fmt: skip
    assert text.count("not measured:") == 6
    assert {item["state"] for item in report.to_json()["cards"]} == {"absent"}
    assert "None" not in text


@pytest.mark.parametrize(
    "absent", ["plan", "artifacts", "parity", "comparisons", "quality", "results", "provenance", "checkpoint"]
)
def test_each_section_may_be_absent(absent: str) -> None:
    page = Page(render_html(RunReport(**run_inputs() | {absent: None}).to_json()))
    assert not re.search(r"\b(None|nan|NaN|undefined|inf)\b", page.text)
    assert "not measured" in page.text or absent in ("artifacts", "checkpoint")


def test_a_plan_without_matrix_losses_or_scores_is_still_reported() -> None:
    plan = plan_json() | {
        "similarity": None,
        "segment_losses": [],
        "scores": {},
        "criterion": None,
        "segments": [[0, 30]],
    }
    report = RunReport(plan)
    text = Page(render_html(report.to_json())).text
    assert "not measured: similarity between layers" in text
    assert "not measured: segmentation loss" in text
    assert "not measured: layer importance" in text
    assert "similarity: the plan was saved without its matrix" in report.to_json()["missing"]


def test_numbers_json_cannot_hold_become_null_and_are_not_drawn(tmp_path: Path) -> None:
    inputs = run_inputs()
    inputs["plan"]["similarity"][3][4] = float("nan")
    inputs["plan"]["scores"]["grad-norm"][7] = float("inf")
    report = RunReport(**inputs)
    report.save(tmp_path)
    assert report.to_json()["plan"]["similarity"][3][4] is None
    text = Page((tmp_path / "report.html").read_text()).text
    assert "not measured: similarity between layers" in text
    assert not re.search(r"\b(nan|inf|none)\b", text.lower())


def test_logits_that_are_not_finite_are_named_in_the_parity_table() -> None:
    certificate = parity_json()
    certificate["passed"] = False
    certificate["cases"][1] |= {
        "passed": False,
        "statistics": None,
        "worst": {"row": 2, "phase": "decode", "position": 5, "not_finite": "artifact"},
    }
    text = Page(render_html(RunReport(None, parity=[certificate]).to_json())).text
    assert "NaN or infinity in the artifact at row 2, decode position 5" in text
    assert "✗ failed: past-the-window" in text


def test_objects_with_to_json_are_accepted_and_a_comparison_brings_its_samples() -> None:
    from sglp_bench.judge.compare import compare_results
    from sglp_bench.result import BenchmarkResult

    comparison = compare_results(BenchmarkResult.from_json(result_json()), candidate="pruned", resamples=200)
    found = RunReport(None, comparisons=[comparison]).to_json()["measurements"][0]
    assert found["name"] == "onnx"  # the format of the candidate
    assert [(arm["label"], arm["role"], len(arm["blocks"])) for arm in found["samples"][0]["arms"]] == [
        ("baseline", "baseline", 8),
        ("control (A/A)", "control", 8),
        ("pruned", "candidate", 8),
    ]
    assert [len(block) for block in found["samples"][0]["arms"][0]["blocks"]] == [5 * 32] * 8


def test_the_control_of_another_baseline_is_not_shown_as_this_ones() -> None:
    result = result_json() | {"baseline": "torch"}
    found = RunReport(None, comparisons={"onnx": comparison_json(result_json())}, results={"onnx": result}).to_json()
    assert [arm["role"] for arm in found["measurements"][0]["samples"][0]["arms"]] == ["baseline", "candidate"]


def test_a_memory_rung_without_answer_gives_its_reason() -> None:
    inputs = run_inputs()
    for arm in inputs["comparisons"]["onnx"]["arms"].values():
        arm["memory"]["device_process_used"] = {"probe": "NVML", "bytes": None, "note": "needs sglp-deploy[gpu]"}
    report = RunReport(**inputs)
    rung = report.to_json()["measurements"][0]["memory"][-1]
    assert rung == {
        "rung": "device_process_used", "label": "Device memory of the process", "probe": "NVML", "arms": [],
        "reason": "needs sglp-deploy[gpu]",
    }  # fmt: skip
    assert "needs sglp-deploy[gpu]" in Page(render_html(report.to_json())).text


def test_the_style_sheet_ships_with_the_package() -> None:
    style = resources.files("sglp_bench.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    used = set(re.findall(r"var\((--[a-z-]+)\)", style))
    assert used <= set(re.findall(r"(--[a-z-]+):", style))

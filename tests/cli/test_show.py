"""``show`` on every kind of file a run makes: the numbers a person looks for are those in the file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli_runs
from sglp_bench.judge.compare import Comparison
from sglp_bench.result import BenchmarkResult
from sglp_deploy.cli import show
from sglp_deploy.errors import ArtifactError
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.similarity import SimilarityMatrix


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.finished_run(tmp_path_factory)


def shown(path: Path) -> tuple[dict[str, Any], str]:
    value = show.read(path)
    return value, show.describe(value)


def test_a_plan_shows_its_segments_scores_and_removed_layers(run: Path) -> None:
    value, text = shown(run / "plan.json")
    lines = text.splitlines()
    assert lines[0] == f"sglp: keep 4 of 6 layers of {value['model']['id']}"
    assert lines[1] == f"removed: {value['drop'][0]}, {value['drop'][1]}"
    rows = [line.split() for line in lines if line.startswith("S")]
    assert [int(row[1]) for row in rows] == list(range(6))
    assert [int(row[1]) for row in rows if row[-1] == "removed"] == value["drop"]
    for row in rows:
        assert float(row[2]) == pytest.approx(value["scores"]["grad-norm"][int(row[1])], rel=1e-3)


def test_a_plan_that_ranked_nothing_is_shown_without_scores(run: Path) -> None:
    value, text = shown(run / "artifacts" / "onnx-baseline" / "sglp_plan.json")
    assert text == f"keep-all: keep 6 of 6 layers of {value['model']['id']}\nremoved: none"


def test_an_artifact_shows_its_files(run: Path) -> None:
    value, text = shown(run / "artifacts" / "onnx")
    assert value["schema"] == "artifact/1"
    for name, record in value["files"].items():
        assert any(line.startswith(name) and record["sha256"][:16] in line for line in text.splitlines())
    assert f"{value['weight_bytes'] / 2**20:.1f} MiB" in text


def test_a_certificate_shows_every_case(run: Path) -> None:
    value, text = shown(run / "parity" / "onnx.json")
    assert text.startswith("parity PASSED: onnx on ")
    for case in value["cases"]:
        line = next(line for line in text.splitlines() if line.startswith(case["name"] + " "))
        assert " pass " in line
        assert f"{case['statistics']['max_abs']:.3g}" in line
        assert line.endswith(f"{case['greedy']['equal_tokens']}/{case['greedy']['tokens']}")
    assert f"KL p99 {value['noise_floor']['kl_p99']:.3g}" in text


def test_a_failed_certificate_shows_its_reasons_and_what_was_not_finite(run: Path) -> None:
    good = ParityReport.load(run / "parity" / "onnx.json")
    cases = ({**good.cases[0], "passed": False, "statistics": None}, *good.cases[1:])
    value = replace(good, cases=cases, reasons=("prompt 1: NaN or Inf in the logits",)).to_json()
    text = show.describe(value)
    assert text.startswith("parity FAILED")
    assert "FAIL" in next(line for line in text.splitlines() if line.startswith(value["cases"][0]["name"]))
    assert text.endswith("reason: prompt 1: NaN or Inf in the logits")


def test_a_comparison_shows_ratio_interval_ceiling_and_verdict(run: Path) -> None:
    value, text = shown(run / "bench" / "onnx")
    comparison = Comparison.from_json(value)
    assert text.startswith(f"onnx against onnx-baseline, {comparison.n_pairs} pairs, workload smoke")
    found = comparison.metrics["decode_latency_s_per_token"]
    line = next(line for line in text.splitlines() if line.startswith("decode_latency"))
    assert found.interval is not None
    assert line.split()[-1] == found.verdict
    assert f"{found.ratio:.3f}  {found.interval[0]:.3f} - {found.interval[1]:.3f}  {found.ceiling:.3f}" in line
    peak = next(line for line in text.splitlines() if line.startswith("peak_host_bytes"))
    assert f"{comparison.metrics['peak_host_bytes'].baseline / 2**20:.1f} MiB" in peak
    for note in comparison.notes:
        assert f"\nnote: {note}" in text


def test_a_result_shows_the_medians_of_every_arm(run: Path) -> None:
    value, text = shown(run / "bench" / "onnx" / "result.json")
    result = BenchmarkResult.from_json(value)
    lines = text.splitlines()
    assert lines[0] == "workload smoke"
    rows = {line.split()[0]: line for line in lines[4:]}
    assert rows.keys() == result.arms.keys()
    for label, arm in result.arms.items():
        times = sorted(second for block in arm.blocks for second in block.samples.prefill_s)
        middle = (times[len(times) // 2] + times[(len(times) - 1) // 2]) / 2
        assert f"{1e3 * middle:.3f} ms" in rows[label]
        assert f"  {len(arm.blocks)}  " in rows[label]


def test_quality_shows_both_perplexities_and_the_protocol(run: Path) -> None:
    value, text = shown(run / "quality.json")
    assert f"{value['dense']['perplexity']:.3f}" in text
    assert f"{value['pruned']['perplexity']:.3f}" in text
    assert f"ratio {value['ratio']:.3f}" in text
    assert "builtin:held-out, chunks of 32" in text


def test_a_run_shows_its_stages(run: Path) -> None:
    value, text = shown(run)
    assert text.startswith("llama: 6 to 4 layers")
    for name, stage in value["stages"].items():
        line = next(line for line in text.splitlines() if line.startswith(name + " "))
        assert f"{stage['elapsed_s']:.1f} s" in line
        assert " done " in line


def test_a_report_shows_its_cards(run: Path) -> None:
    value, text = shown(run / "report")
    assert value["schema"] == "report/1"
    assert value["cards"]
    for card in value["cards"]:
        assert any(line.startswith(card["label"]) and card["value"] in line for line in text.splitlines())
        assert card["detail"] in text


def test_a_perplexity_file_is_shown() -> None:
    value = {"schema": "perplexity/1", "perplexity": 12.3456, "n_tokens": 99, "text": "own.txt"}
    value |= {"nats_per_token": 2.5133, "chunk_tokens": 32}
    assert show.describe(value) == "perplexity 12.346 (2.5133 nats a token) on 99 tokens of own.txt, chunks of 32"


def test_a_similarity_matrix_shows_each_layer_against_the_next() -> None:
    matrix = SimilarityMatrix(np.array([[1.0, 0.5, 0.25], [0.5, 1.0, 0.75], [0.25, 0.75, 1.0]]), "unbiased")
    lines = show.describe(matrix.to_json()).splitlines()
    assert lines[0] == "similarity of 3 layers, unbiased linear CKA"
    assert [line.split() for line in lines[4:]] == [["0", "0.5000"], ["1", "0.7500"]]


def test_every_schema_the_project_writes_has_a_view() -> None:
    written = set()
    for package in ("sglp_deploy", "bench/sglp_bench", "exporters/sglp_exporters"):
        for file in (cli_runs.ROOT / package).rglob("*.py"):
            written |= set(re.findall(r'^SCHEMA(?:: Final)? = "([a-z-]+/\d+)"', file.read_text(), re.MULTILINE))
    assert len(written) >= 8
    assert written <= show._VIEWS.keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "cannot be read"),
        ("[1, 2]", "carries no schema"),
        ('{"schema": 3}', "carries no schema"),
        ("\x80", "cannot be read"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=words) as error:
        show.read(file)
    assert str(error.value).count(";") >= 2


def test_a_folder_that_is_not_ours_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds none of run\.json, manifest\.json"):
        show.read(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist; one of our files was expected; check the path"):
        show.read(tmp_path / "no.json")


@pytest.mark.parametrize("kind", sorted(show._VIEWS))
def test_an_incomplete_file_of_any_kind_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ArtifactError, match=r"the .*( is incomplete; .*| is missing.*); (make|verify|measure) .*again"):
        show.describe({"schema": kind})


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ArtifactError, match=r"schema 'plan/7' is unknown to this version; .*plan/1, plan/2"):
        show.describe(json.loads('{"schema": "plan/7"}'))

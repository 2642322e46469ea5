"""The report's files: made from a run folder alone, and refused by name when they are not what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from report_fixtures import DROP, write_run_folder
from sglp_bench.report.run_report import RunReport
from sglp_deploy.errors import ArtifactError


def test_a_run_folder_is_reported_from_its_files_alone(tmp_path: Path) -> None:
    write_run_folder(tmp_path)
    report = RunReport.from_run_folder(tmp_path).to_json()
    assert report["title"] == "demo: 30 to 24 layers"
    assert [item["name"] for item in report["artifacts"]] == ["checkpoint", "onnx", "onnx-baseline"]
    assert [item["name"] for item in report["parity"]] == ["onnx"]
    assert report["plan"]["drop"] == DROP
    assert report["provenance"]["stages"] == [{"name": "plan", "key": "k", "state": "done", "elapsed_s": 41.0}]
    assert [claim["allowed"] for claim in report["claims"]] == [True, True]
    assert report["missing"] == []


def test_an_unfinished_run_folder_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    write_run_folder(tmp_path)
    for name in (
        "quality.json",
        "bench/onnx/result.json",
        "bench/onnx/comparison.json",
        "parity/onnx.json",
        "run.json",
    ):
        (tmp_path / name).unlink()
    report = RunReport.from_run_folder(tmp_path)
    assert [sentence.partition(":")[0] for sentence in report.to_json()["missing"]] == [
        "parity", "speed", "memory", "raw samples", "quality", "provenance",
    ]  # fmt: skip
    report.save(tmp_path / "report")
    assert "not measured: perplexity" in (tmp_path / "report" / "report.html").read_text()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent is not a folder; a run folder was expected; check the path"):
        RunReport.from_run_folder(tmp_path / "absent")


def test_a_damaged_run_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"run\.json cannot be read as JSON; .*; run the stage that makes it again"):
        RunReport.from_run_folder(tmp_path)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": "plan/1"}')
    with pytest.raises(ArtifactError, match=r"report\.json has schema 'plan/1'; this version reads 'report/1'"):
        RunReport.load(tmp_path / "report.json")


def test_half_a_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": "report/1", "cards": [], "claims": [], "missing": []}')
    message = r"has no list under artifacts, parity and measurements; it is not a whole report; make the report again"
    with pytest.raises(ArtifactError, match=message):
        RunReport.load(tmp_path / "report.json")

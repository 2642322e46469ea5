"""The report's files: made from a run folder alone, and refused by name when they are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from report_fixtures import DROP, write_run_folder
from sglp_bench.report.run_report import RunReport
from sglp_deploy import _io
from sglp_deploy.artifact import MANIFEST
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


def test_a_certificate_s_own_word_for_it_is_not_believed(tmp_path: Path) -> None:
    write_run_folder(tmp_path)
    file = tmp_path / "parity" / "onnx.json"
    value = json.loads(file.read_text())
    value["reasons"] = ["KL of 0.92 nats at position 91 is above the threshold"]
    file.write_text(json.dumps(value | {"passed": True}))
    report = RunReport.from_run_folder(tmp_path).to_json()
    assert [item["passed"] for item in report["parity"]] == [False]
    assert not any(claim["allowed"] for claim in report["claims"])


@pytest.mark.parametrize("name", ["quality.json", "bench/onnx/comparison.json", "artifacts/onnx/manifest.json"])
def test_a_file_changed_since_its_stage_wrote_it_is_refused(tmp_path: Path, name: str) -> None:
    write_run_folder(tmp_path)
    file, run = tmp_path / name, tmp_path / "run.json"
    facts = json.loads(run.read_text())
    output, digest = name, _io.sha256_file(file)
    if name.endswith(MANIFEST):
        output, digest = "artifacts/onnx", _io.sha256_json(json.loads(file.read_text()))
    facts["stages"]["some"] = {"key": "k", "state": "done", "elapsed_s": 1.0, "outputs": {output: digest}}
    run.write_text(json.dumps(facts))
    RunReport.from_run_folder(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"remark": "edited"}))
    with pytest.raises(ArtifactError, match=r"is not what the stage 'some' of this run wrote; .*restore it, or run"):
        RunReport.from_run_folder(tmp_path)


def test_files_of_other_programs_are_passed_over(tmp_path: Path) -> None:
    write_run_folder(tmp_path)
    (tmp_path / "artifacts" / "site").mkdir()
    (tmp_path / "artifacts" / "site" / "manifest.json").write_text('{"name": "an application"}')
    (tmp_path / "parity" / "mine.json").write_text('{"bits": "odd"}')
    report = RunReport.from_run_folder(tmp_path).to_json()
    assert [item["name"] for item in report["artifacts"]] == ["checkpoint", "onnx", "onnx-baseline"]
    assert [item["name"] for item in report["parity"]] == ["onnx"]


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
    with pytest.raises(ArtifactError, match=r"run\.json cannot be read as a run file; .*; make it again"):
        RunReport.from_run_folder(tmp_path)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": "plan/1"}')
    with pytest.raises(ArtifactError, match=r"report\.json has schema 'plan/1'; this version reads 'report/1'"):
        RunReport.load(tmp_path / "report.json")


def test_half_a_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": "report/1", "cards": [], "claims": [], "missing": []}')
    message = r"report\.json lacks or mistypes a field; title is missing; make the report again"
    with pytest.raises(ArtifactError, match=message):
        RunReport.load(tmp_path / "report.json")

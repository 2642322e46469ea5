"""``run --option``: options reach their export alone, and one format can be made several times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cli_runs
from sglp_bench.report.run_report import RunReport
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli import pipeline
from sglp_deploy.cli.main import main
from sglp_deploy.parity.certificate import ParityReport

TO = "onnx,half"
HALF = ("--option", "half.format=onnx", "--option", "half.precision=fp16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


@pytest.fixture(autouse=True)
def _planted_times(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_runs.quick(monkeypatch)


def stages(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text())["stages"])


def run_again(model: Path, out: Path, *flags: str, code: int = 0) -> list[str]:
    """Run into ``out``; returns the stages that were not kept, in order."""
    assert main(cli_runs.run_arguments(model, out, *flags, to=TO)) == code
    return [name for name, stage in stages(out).items() if stage["note"] != "kept"]


def test_one_format_is_made_twice_with_options_of_its_own(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_again(model, out, *HALF)
    made = {path.name: ExportArtifact.load(path) for path in (out / "artifacts").iterdir()}
    assert {name: (artifact.format, artifact.precision) for name, artifact in made.items()} == {
        "onnx": ("onnx", "fp32"),
        "onnx-baseline": ("onnx", "fp32"),
        "half": ("onnx", "fp16"),
        "half-baseline": ("onnx", "fp16"),
    }
    assert made["half"].n_layers < made["half-baseline"].n_layers
    for name in ("half", "half-baseline"):
        certificate = ParityReport.load(out / "parity" / f"{name}.json")
        assert certificate.passed
        assert certificate.artifact_digest == made[name].digest
    assert sorted(path.name for path in (out / "bench").iterdir()) == [
        "half", "half-against-torch", "onnx", "onnx-against-torch",
    ]  # fmt: skip
    report = RunReport.load(out / "report" / "report.json").to_json()
    assert {item["name"] for item in report["artifacts"]} == {*made, "checkpoint"}
    page = (out / "report" / "report.html").read_text()
    assert "half" in page


def test_another_option_runs_only_what_depends_on_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_again(model, out, *HALF)
    assert run_again(model, out, *HALF) == []
    assert run_again(model, out, *HALF, "--option", "half.opset=21") == [
        "export half",
        "export half-baseline",
        "parity half",
        "parity half-baseline",
        "bench",
        "report",
    ]


def test_an_environment_that_was_made_meanwhile_is_asked_for_the_certificate(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = cli_runs.run_arguments(model, out, to="vllm")
    assert main(arguments) == 0
    found = ParityReport.load(out / "parity" / "vllm.json")
    assert "in place of vLLM" in found.runner
    assert found.stands_in_for == "vllm"
    monkeypatch.setattr(pipeline.environments, "state", lambda name: f"ready: {name}")
    assert main(arguments) == 0
    again = [name for name, stage in stages(out).items() if stage["note"] != "kept"]
    assert again == ["parity vllm"]  # it came out the same, so the report stays


def test_an_option_the_format_does_not_have_stops_that_export_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_again(model, out, *HALF, "--option", "half.precison=int8", "--json", code=1)
    failures = json.loads(capsys.readouterr().out.splitlines()[-1])["failures"]
    assert list(failures) == ["export half"]
    assert "precison" in failures["export half"]
    assert stages(out)["export onnx"]["state"] == "done"


def test_a_name_without_a_format_behind_it_is_refused_before_any_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(cli_runs.run_arguments(model, out, to=TO)) == 1
    assert "half" in capsys.readouterr().err
    assert not out.exists()


def test_an_option_of_the_planner_reaches_it_and_runs_the_plan_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = cli_runs.run_arguments(model, out, to="vllm")
    assert main([*arguments, "--option", "plan.criterion=block-influence", "--option", "plan.n_segments=2"]) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["criterion"], len(plan["segments"])) == ("block-influence", 2)
    assert main([*arguments, "--option", "plan.criterion=block-influence", "--option", "plan.n_segments=3"]) == 0
    assert len(json.loads((out / "plan.json").read_text())["segments"]) == 3
    assert stages(out)["plan"]["note"] != "kept"


def test_plan_takes_the_option_of_a_planner(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    flags = ["--option", "criterion=taylor", "--option", "n_segments=2", "--option", "quota=global"]
    assert main(["plan", str(model), "--drop", "1", *cli_runs.SMALL, *flags, "-q", "-o", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert (plan["criterion"], len(plan["segments"]), plan["quota"]) == ("taylor", 2, "global")

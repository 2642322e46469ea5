"""Several formats in one run: each fails alone, and the run says what worked, what did not and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cli_runs
from sglp_bench.report.run_report import RunReport
from sglp_deploy.cli import pipeline
from sglp_deploy.cli.main import main
from sglp_deploy.errors import BackendError, MissingDependencyError, StorageError
from sglp_exporters.onnx.exporter import OnnxExporter
from sglp_exporters.vllm.exporter import VllmExporter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


@pytest.fixture(autouse=True)
def _no_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_runs.quick(monkeypatch)


def _break(monkeypatch: pytest.MonkeyPatch, method: str, error: Exception) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(OnnxExporter, method, fail)


def test_a_format_that_fails_does_not_stop_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as broken:
        _break(broken, "export", BackendError("the tracer tripped; over a log; mend it"))
        assert main([*cli_runs.run_arguments(model, out), "--json", "-q"]) == 1
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["failures"] == {"export onnx": "the tracer tripped; over a log; mend it"}
    assert answer["rows"]["parity vllm"].startswith("passed")
    assert not (out / "artifacts" / "onnx").exists()
    assert (out / "artifacts" / "vllm" / "manifest.json").is_file()
    stages = json.loads((out / "run.json").read_text())["stages"]
    assert stages["export onnx"]["state"] == "failed"
    assert "the tracer tripped" in stages["export onnx"]["note"]
    report = RunReport.load(out / "report" / "report.json").to_json()
    assert "export onnx failed: the tracer tripped; over a log; mend it" in report["missing"]
    assert "the tracer tripped" in (out / "report" / "report.html").read_text()
    # Mended, the same command makes what is missing and keeps the rest.
    assert main([*cli_runs.run_arguments(model, out), "-q"]) == 0
    stages = json.loads((out / "run.json").read_text())["stages"]
    assert stages["export onnx"]["state"] == "done"
    assert stages["export vllm"]["note"] == "kept"


def test_an_artifact_whose_verification_fails_is_not_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    _break(monkeypatch, "open", BackendError("the runtime choked"))
    assert main([*cli_runs.run_arguments(model, out), "-q"]) == 1
    assert not (out / "parity" / "onnx.json").exists()
    assert not (out / "bench").exists()
    assert (out / "parity" / "vllm.json").is_file()


def test_a_format_whose_runtime_is_missing_fails_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = pipeline.registry.exporter

    def exporter(name: str) -> Any:
        if name == "onnx":
            raise MissingDependencyError("exporter 'onnx' needs onnxruntime; not installed here; install it")
        return real(name)

    monkeypatch.setattr(pipeline.registry, "exporter", exporter)
    out = tmp_path / "run"
    assert main([*cli_runs.run_arguments(model, out), "-q"]) == 1
    assert "onnxruntime" in capsys.readouterr().out
    assert (out / "artifacts" / "vllm").is_dir()
    # The only format asked for: nothing could come of the run, so it does not begin.
    alone = tmp_path / "alone"
    assert main([*cli_runs.run_arguments(model, alone, to="onnx"), "-q"]) == 1
    assert not alone.exists()


def test_a_full_disk_concerns_every_format(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "export", StorageError("cannot write; no space left on the device; free some space"))
    calls = []
    monkeypatch.setattr(VllmExporter, "export", lambda *_a, **_o: calls.append(1))
    assert main([*cli_runs.run_arguments(model, tmp_path / "run"), "-q"]) == 1
    assert not calls

"""``run`` with formats of a third party: what their runners can do decides whether they are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cli_runs
from sglp_deploy.cli import pipeline
from sglp_deploy.cli.main import main

PLUGIN = """
from sglp_deploy.protocols import FormatFacts
from sglp_exporters.checkpoint.exporter import TorchExporter


class Decodes(TorchExporter):
    name = "decodes"
    facts = FormatFacts(packages=("toyruntime",))


class ForwardOnly:
    def __init__(self, runner):
        self._runner = runner

    def __enter__(self):
        self._runner.__enter__()
        return self

    def __exit__(self, *error):
        self._runner.__exit__(*error)

    def forward(self, inputs):
        return self._runner.forward(inputs)

    def synchronize(self):
        self._runner.synchronize()


class Forwards(TorchExporter):
    name = "forwards"

    def export(self, model, out_dir, **options):
        from sglp_exporters.runners.checkpoint import export_checkpoint

        return export_checkpoint(model, out_dir, self.name, {"interface": "forward"})

    def open(self, artifact, **options):
        return ForwardOnly(super().open(artifact, **options))


class StandIn(TorchExporter):
    name = "stand-in"

    def open(self, artifact, **options):
        runner = super().open(artifact, **options)
        runner.description, runner.stands_in_for = "PyTorch in place of a chip", self.name
        return runner
"""
TO = "decodes,forwards,stand-in"
REASONS = {
    "forwards": "the runner of format 'forwards' has no prefill and decode; this workload times those; benchmark a "
    "format whose runner generates",
    "stand-in": "what runs on cpu is PyTorch in place of a chip; a time of it would be filed under stand-in; benchmark "
    "on the device the artifact is for",
}


def _distribution(site: Path, name: str, version: str, entry_points: str = "") -> None:
    folder = site / f"{name}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    entries = "[sglp_deploy.exporters]\ndecodes = toyformats:Decodes\nforwards = toyformats:Forwards\n"
    _distribution(folder, "toyformats", "1.0", entries + "stand-in = toyformats:StandIn\n")
    _distribution(folder, "toyruntime", "1.0")
    (folder / "toyformats.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(folder))
    cli_runs.quick(monkeypatch)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Formats whose runner was asked whether it can be timed."""
    formats: list[str] = []
    real = pipeline.reason_not_timed

    def reason(artifact: Any, workload: Any) -> str | None:
        formats.append(artifact.format)
        return real(artifact, workload)

    monkeypatch.setattr(pipeline, "reason_not_timed", reason)
    return formats


def _again(model: Path, out: Path, *more: str) -> list[str]:
    """Run into ``out``; returns the stages that were not kept, in order."""
    arguments = [item for item in cli_runs.run_arguments(model, out, *more, to=TO) if item != "-q"]
    assert main(arguments) == 0
    return [name for name, stage in _run_file(out)["stages"].items() if stage["note"] != "kept"]


def _run_file(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text()))


def test_a_third_party_s_format_is_measured_as_its_runner_allows(
    site: Path, asked: list[str], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, out = cli_runs.tiny_model(tmp_path_factory), tmp_path / "run"
    assert _again(model, out) == [
        "plan", "checkpoint", "export decodes", "export decodes-baseline", "export forwards", "export stand-in",
        "parity torch", "parity decodes", "parity decodes-baseline", "parity forwards", "parity stand-in",
        "quality", "bench", "report",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "bench").iterdir()) == ["decodes", "decodes-against-torch"]
    assert sorted(path.name for path in (out / "artifacts").iterdir()) == [
        "decodes", "decodes-baseline", "forwards", "stand-in",
    ]  # fmt: skip
    err = capsys.readouterr().err
    for name, reason in REASONS.items():
        assert err.count(f"{name}: not measured; {reason}\n") == 1
    assert "decodes: not measured" not in err
    saved = _run_file(out)
    assert {name: saved["stages"][f"export {name}"]["answer"]["text"] for name in TO.split(",")} == {
        "decodes": None,
        **REASONS,
    }
    assert saved["versions"]["toyruntime"] == "1.0"
    assert asked == ["decodes", "forwards", "stand-in"]

    # A run with nothing to do asks no runner, for that would load a runtime.
    assert _again(model, out) == []
    assert asked == ["decodes", "forwards", "stand-in"]
    assert "not measured" not in capsys.readouterr().err

    # Another workload may find another answer; the artifacts stay as they are.
    assert _again(model, out, "--workload", "demo") == ["bench", "report"]
    assert asked == ["decodes", "forwards", "stand-in"] * 2
    asked.clear()

    # The version of a package that a format names decides that format alone.
    _distribution(site, "toyruntime", "2.0")
    assert _again(model, out, "--workload", "demo") == [
        "export decodes", "export decodes-baseline", "parity decodes", "parity decodes-baseline", "bench",
    ]  # fmt: skip
    assert asked == ["decodes"]
    assert _run_file(out)["versions"]["toyruntime"] == "2.0"

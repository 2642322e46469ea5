"""``bench`` and ``verify`` together: what is certified is measured, what is not is refused or marked."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import cli_runs
from bench_fakes import certificate, fake_artifact
from bench_simulated import simulated_worker
from sglp_bench.devices import here
from sglp_bench.judge.certificates import CERTIFICATE, certification
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli.console import Console
from sglp_deploy.cli.main import main
from sglp_deploy.errors import StorageError

BENCH = ("--workload", "smoke", "--threads", "1", "-q")


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "run_worker", simulated_worker([]))


def bench(*arguments: Any) -> int:
    return main(["bench", *map(str, arguments), *BENCH])


def test_bench_of_an_artifact_nobody_verified_is_one_error_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = fake_artifact(tmp_path / "one")
    (tmp_path / "one" / CERTIFICATE).unlink()
    assert bench(artifact.path, "-o", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"error: {artifact.path} (arm 'artifact') is not certified, it has no certificate; the speed of an artifact "
        f"that may compute something else is no speed; run 'sglp-deploy verify {artifact.path}', or pass --unverified "
        "(unverified=True in Python) to measure it all the same\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_baseline_follows_the_same_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = fake_artifact(tmp_path / "one"), fake_artifact(tmp_path / "two", weight_bytes=800)
    certificate(one, "prompt: KL is 3 nats").save(one.path / CERTIFICATE)
    assert bench(two.path, "--against", one.path, "-o", tmp_path / "out") == 1
    assert "(arm 'baseline') is not certified, its certificate failed: prompt: KL is 3" in capsys.readouterr().err


def test_unverified_is_measured_and_every_output_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = fake_artifact(tmp_path / "one"), fake_artifact(tmp_path / "two", weight_bytes=800)
    (two.path / CERTIFICATE).unlink()
    assert bench(two.path, "--against", one.path, "-o", tmp_path / "out", "--unverified") == 0
    said = capsys.readouterr()
    words = "UNVERIFIED: candidate was measured although it has no certificate"
    assert said.err == f"{words}; these are times of something that may not be the model\n"
    assert f"note: {words}" in said.out
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["notes"][0] == words
    assert main(["show", str(tmp_path / "out" / "result.json")]) == 0
    assert f"note: {words}" in capsys.readouterr().out
    assert bench(one.path, "-o", tmp_path / "good", "--unverified") == 0  # the flag alone accuses nobody
    assert "UNVERIFIED" not in "".join(capsys.readouterr())


def test_a_certificate_that_lies_elsewhere_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = fake_artifact(tmp_path / "one")
    (artifact.path / CERTIFICATE).rename(tmp_path / "mine.json")
    assert bench(artifact.path, "--certificate", tmp_path / "mine.json", "-o", tmp_path / "out") == 0
    (tmp_path / "mine.json").write_text("{}")
    assert bench(artifact.path, "--certificate", tmp_path / "mine.json", "-o", tmp_path / "out") == 1
    assert "has schema None" in capsys.readouterr().err


def test_what_verify_leaves_is_what_bench_asks_for(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cli_runs.finished_run(tmp_path_factory) / "artifacts" / "onnx", tmp_path / "graph")
    options = ("--against", tmp_path / "graph", "-o", tmp_path / "out", "--no-control")
    assert bench(tmp_path / "graph", *options) == 1
    before = ExportArtifact.load(tmp_path / "graph").digest
    assert main(["verify", str(tmp_path / "graph"), "--threads", "1", "-q"]) == 0
    assert ExportArtifact.load(tmp_path / "graph").digest == before
    assert certification(ExportArtifact.load(tmp_path / "graph")).runner
    assert bench(tmp_path / "graph", *options) == 0


def test_the_artifacts_of_a_run_are_certified_by_the_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(cli_runs.finished_run(tmp_path_factory), tmp_path / "demo"))
    options = ("--against", run / "artifacts" / "onnx-baseline", "-o", tmp_path / "out", "--no-control")
    assert bench(run / "artifacts" / "onnx", *options) == 0
    (run / "parity" / "onnx-baseline.json").unlink()
    assert bench(run / "artifacts" / "onnx", *options) == 1
    assert "artifacts/onnx-baseline (arm 'baseline') is not certified" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_keeps_no_certificate_and_says_where_to_put_it(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(cli_runs.finished_run(tmp_path_factory) / "artifacts" / "onnx", tmp_path / "graph"))
    from sglp_deploy.parity.certificate import ParityReport

    real = ParityReport.save

    def save(self: ParityReport, path: str | Path) -> None:
        if Path(path).parent == folder:
            raise StorageError(f"cannot write {path}; read-only; check the folder's permissions")
        real(self, path)

    monkeypatch.setattr(ParityReport, "save", save)
    assert main(["verify", str(folder), "--threads", "1", "-q"]) == 0
    assert "to benchmark it, verify again with -o FILE" in capsys.readouterr().err
    assert main(["verify", str(folder), "--threads", "1", "-q", "-o", str(tmp_path / "mine.json")]) == 0
    assert f"to benchmark it, give bench --certificate {tmp_path / 'mine.json'}" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_alarm_is_red_on_a_terminal_and_words_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream, shown in ((Terminal(), "\033[1;31mUNVERIFIED\033[0m\n"), (io.StringIO(), "UNVERIFIED\n")):
        monkeypatch.setattr("sys.stderr", stream)
        Console(quiet=True).alarm("UNVERIFIED")
        assert stream.getvalue() == shown
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    Console().alarm("UNVERIFIED")
    assert terminal.getvalue() == "UNVERIFIED\n"

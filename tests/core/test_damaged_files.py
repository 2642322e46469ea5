"""Whatever is wrong in a file of ours, ``show`` and ``report`` answer in words, and never call it our fault."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import cli_runs
from fuzz import damaged
from sglp_deploy.cli.main import main

_FILES = (
    *("plan.json", "run.json", "quality.json", "checkpoint/manifest.json", "artifacts/onnx/manifest.json"),
    *("parity/onnx.json", "bench/onnx/comparison.json", "bench/onnx/result.json", "report/report.json"),
)
_PIECE = 100  # a piece of the slow test


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "run"
    return Path(shutil.copytree(cli_runs.finished_run(tmp_path_factory), folder))


@pytest.fixture(autouse=True)
def _planted_times(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_runs.quick(monkeypatch)


def _answers(run: Path, name: str, seeds: range, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, record = run / name, run / "run.json"
    sound, recorded = file.read_text(), record.read_text()
    try:
        for seed in seeds:
            if name != record.name and record.is_file():
                record.unlink()  # it has the digests of the others, by which a report refuses every change
            file.write_bytes(damaged(seed, sound).encode(errors="surrogatepass"))
            for arguments in (["show", str(file)], ["report", str(run), "-o", str(out)]):
                status = main(arguments)
                said = capsys.readouterr().err
                assert status in (0, 1), (seed, arguments)
                assert "fault of sglp-deploy" not in said, (seed, arguments, said)
                assert status == 0 or said.startswith("error: "), (seed, arguments, said)
    finally:
        record.write_text(recorded)
        file.write_text(sound)


@pytest.mark.parametrize("name", _FILES)
def test_a_damaged_file_is_answered_in_words(
    run: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _answers(run, name, range(12), tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(6))
@pytest.mark.parametrize("name", _FILES)
def test_many_damaged_files_are_answered_in_words(
    run: Path, name: str, piece: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _answers(run, name, range(1000 + piece * _PIECE, 1000 + (piece + 1) * _PIECE), tmp_path, capsys)

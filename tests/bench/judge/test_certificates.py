"""No certificate, no speed number: what counts as one, what is refused, and how an exception to it is marked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench_fakes import certificate, fake_artifact
from bench_simulated import TINY, simulated_worker
from sglp_bench.devices import here
from sglp_bench.judge.certificates import CERTIFICATE, certification, unverified_note
from sglp_bench.measure.harness import benchmark_pair, run_arms
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import BenchmarkError
from sglp_deploy.parity.certificate import ParityReport


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(here, "run_worker", simulated_worker(names))
    return names


def uncertified(folder: Path, **details: Any) -> ExportArtifact:
    artifact = fake_artifact(folder, **details)
    (folder / CERTIFICATE).unlink()
    return artifact


def spoil_missing(artifact: ExportArtifact) -> None:
    (artifact.path / CERTIFICATE).unlink()


def spoil_failed(artifact: ExportArtifact) -> None:
    certificate(artifact, "prompt: KL is 3 nats").save(artifact.path / CERTIFICATE)


def spoil_other(artifact: ExportArtifact) -> None:
    other = fake_artifact(artifact.path.parent / "other", weight_bytes=7)
    certificate(other).save(artifact.path / CERTIFICATE)


def spoil_unreadable(artifact: ExportArtifact) -> None:
    (artifact.path / CERTIFICATE).write_text("{")


def spoil_believed(artifact: ExportArtifact) -> None:
    """A failed certificate somebody has written "passed" into; the verdict is worked out from its cases."""
    value = certificate(artifact, "planted").to_json() | {"passed": True, "schema": "parity/1"}
    del value["digest"]
    (artifact.path / CERTIFICATE).write_text(json.dumps(value))


SPOILT = [
    (spoil_missing, "it has no certificate"),
    (spoil_failed, "its certificate failed: prompt: KL is 3 nats"),
    (spoil_other, "its certificate is of another artifact: digest "),
    (spoil_unreadable, "its certificate cannot be read: "),
    (spoil_believed, "its certificate failed: planted"),
]


@pytest.mark.parametrize("arm", ["base", "pruned"])
@pytest.mark.parametrize(("spoil", "words"), SPOILT)
def test_an_arm_without_a_good_certificate_is_refused_before_anything_runs(
    spoil: Any, words: str, arm: str, tmp_path: Path, started: list[str]
) -> None:
    arms = {name: fake_artifact(tmp_path / name) for name in ("base", "pruned")}
    spoil(arms[arm])
    with pytest.raises(BenchmarkError) as refused:
        benchmark_pair(arms["base"], arms["pruned"], TINY, out_dir=tmp_path / "out")
    assert words in str(refused.value)
    assert f"{tmp_path / arm} (arm " in str(refused.value)
    assert f"run 'sglp-deploy verify {tmp_path / arm}'" in str(refused.value)
    assert started == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("spoil", "words"), SPOILT)
def test_unverified_measures_and_marks_result_and_comparison(
    spoil: Any, words: str, tmp_path: Path, started: list[str]
) -> None:
    base, pruned = fake_artifact(tmp_path / "base"), fake_artifact(tmp_path / "pruned")
    spoil(pruned)
    comparison = benchmark_pair(base, pruned, TINY, out_dir=tmp_path / "out", unverified=True)
    assert started
    assert comparison.notes[0].startswith(f"UNVERIFIED: candidate was measured although {words}")
    saved = json.loads((tmp_path / "out" / "result.json").read_text())["arms"]
    assert saved["candidate"]["artifact"]["certificate"]["state"] != "passed"
    # The control is the baseline once more, so its certificate is the baseline's.
    for arm in ("baseline", "control"):
        assert saved[arm]["artifact"]["certificate"] == {"state": "passed", "reason": "", "runner": "fake"}


def test_certificates_that_are_given_count_by_digest_and_not_by_order(tmp_path: Path, started: list[str]) -> None:
    arms = {name: uncertified(tmp_path / name, number=name) for name in ("a", "b")}
    reports = [certificate(arms["b"]), certificate(arms["a"])]
    result = run_arms(arms, TINY, certificates=reports)
    assert [unverified_note(label, arm.artifact) for label, arm in result.arms.items()] == [None] * 3


def test_a_certificate_that_failed_is_not_outvoted_by_one_that_passed(tmp_path: Path) -> None:
    artifact = fake_artifact(tmp_path / "a")
    assert certification(artifact).passed
    assert certification(artifact, [certificate(artifact, "planted")]).state == "failed"


def test_a_certificate_of_a_stand_in_certifies_no_time_of_the_engine(tmp_path: Path) -> None:
    artifact = fake_artifact(tmp_path / "a", executed=False, runner="fake")  # as the planted certificate says
    state = certification(artifact)
    assert (state.state, state.runner) == ("missing", "fake")
    assert state.reason == "its certificate is of a stand-in (fake); verify with --device cuda"
    on_the_device = replace(certificate(artifact), runner="TensorRT on a GPU")
    assert certification(artifact, [on_the_device]).passed
    assert certification(artifact, [replace(on_the_device, reasons=("planted",))]).state == "failed"


def test_a_certificate_by_another_runtime_certifies_no_time_of_the_real_one(tmp_path: Path) -> None:
    artifact = fake_artifact(tmp_path / "a")
    stood_in = replace(certificate(artifact), runner="transformers in place of it", stands_in_for="fake")
    stood_in.save(artifact.path / "parity.json")
    state = certification(artifact)
    assert state.state == "missing"
    assert state.reason == (
        "its certificate is of a stand-in (transformers in place of it); verify again where fake itself runs"
    )
    assert certification(artifact, [certificate(artifact)]).passed


def test_a_certificate_written_before_stand_ins_were_marked_is_still_read(tmp_path: Path) -> None:
    value = certificate(fake_artifact(tmp_path / "a")).to_json() | {"schema": "parity/1"}
    del value["stands_in_for"], value["digest"]
    assert ParityReport.from_json(value).stands_in_for == ""


@pytest.mark.parametrize(("place", "file"), [("artifacts/onnx", "onnx"), ("checkpoint", "torch")])
def test_the_certificates_of_a_run_folder_are_found(place: str, file: str, tmp_path: Path) -> None:
    artifact = uncertified(tmp_path / place)
    assert certification(artifact).state == "missing"
    certificate(artifact).save(tmp_path / "parity" / f"{file}.json")
    assert certification(artifact).passed


def test_a_certificate_does_not_change_the_artifact(tmp_path: Path) -> None:
    artifact = uncertified(tmp_path / "a")
    before = ExportArtifact.load(artifact.path).digest
    certificate(artifact).save(artifact.path / CERTIFICATE)
    assert ExportArtifact.load(artifact.path).digest == before


def test_results_of_before_there_were_certificates_of_arms_are_still_read() -> None:
    assert unverified_note("old", {"digest": "d"}) is None

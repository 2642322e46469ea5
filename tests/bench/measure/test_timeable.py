from pathlib import Path
from typing import Any

import pytest

import bench_fakes
from bench_fakes import FakeExporter, fake_artifact
from sglp_bench.measure.timeable import reason_not_timed
from sglp_bench.workloads.generate import Workload
from sglp_deploy import registry
from sglp_deploy.errors import ArtifactError, BackendError, ConfigError, ExporterNotFoundError, MissingDependencyError

TINY = Workload("tiny", prompt_tokens=3, decode_tokens=2, threads=3)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the registry was asked for; each gets the fake exporter, as a third party's format would."""
    names: list[str] = []

    def exporter(name: str) -> Any:
        names.append(name)
        return FakeExporter()

    monkeypatch.setattr(registry, "exporter", exporter)
    return names


def test_a_runner_that_prefills_and_decodes_is_timed_whatever_its_format_and_is_never_entered(
    tmp_path: Path, asked: list[str]
) -> None:
    log = tmp_path / "log"
    assert reason_not_timed(fake_artifact(tmp_path / "a", log=str(log)), TINY) is None
    assert asked == ["fake"]
    assert not log.exists()  # the fake writes it when it is entered


def test_the_runner_is_opened_for_the_device_and_threads_of_the_workload(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def open_(self: FakeExporter, artifact: Any, **options: Any) -> Any:
        seen.update(options)
        return bench_fakes.FakeRunner(artifact)

    monkeypatch.setattr(FakeExporter, "open", open_)
    assert reason_not_timed(fake_artifact(tmp_path / "a"), TINY) is None
    assert seen == {"device": "cpu", "threads": 3}


def test_a_runner_without_a_cache_is_not_timed(tmp_path: Path, asked: list[str]) -> None:
    artifact = fake_artifact(tmp_path / "a", behaviour="forward only")
    assert reason_not_timed(artifact, TINY) == (
        "the runner of format 'fake' has no prefill and decode; this workload times those; "
        "benchmark a format whose runner generates"
    )


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"not_timed": "its steps are no steps; time something else"}, "the runner of format 'fake' is not timed; its"),
        (
            {"stands_in_for": "engine", "description": "the graph"},
            "what runs on cpu is the graph; a time of it would be filed under engine; benchmark on the device",
        ),
        ({"stands_in_for": "engine"}, "what runs on cpu is FakeRunner; a time of it"),
        ({"stands_in_for": "", "not_timed": ""}, None),
    ],
)
def test_what_a_runner_says_of_itself_decides(
    tmp_path: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    attributes: dict[str, str],
    reason: str | None,
) -> None:
    for name, value in attributes.items():
        monkeypatch.setattr(bench_fakes.FakeRunner, name, value, raising=False)
    found = reason_not_timed(fake_artifact(tmp_path / "a"), TINY)
    assert found is None if reason is None else str(found).startswith(reason)


@pytest.mark.parametrize("error", [ConfigError("no cuda"), MissingDependencyError("x"), ArtifactError("none built")])
def test_a_refusal_to_open_is_the_reason(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    artifact = fake_artifact(tmp_path / "a")
    monkeypatch.setattr(FakeExporter, "open", refuse)
    assert reason_not_timed(artifact, TINY) == str(error)
    error = BackendError("the runtime broke")  # not a statement about what can be measured
    with pytest.raises(BackendError, match="the runtime broke"):
        reason_not_timed(artifact, TINY)


def test_a_format_without_an_exporter_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExporterNotFoundError, match="there is no exporter 'fake'"):
        reason_not_timed(fake_artifact(tmp_path / "a"), TINY)

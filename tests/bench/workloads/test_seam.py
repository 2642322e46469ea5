"""A kind of workload that this package does not have goes through the worker, a result and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench_fakes import OPENER, FakeClock, FakeExporter, ForwardOnlyRunner, fake_artifact
from bench_results import planted_result
from sglp_bench.devices import here
from sglp_bench.judge import compare
from sglp_bench.measure.harness import run_arms
from sglp_bench.measure.timeable import refusal
from sglp_bench.measure.worker import run_block
from sglp_bench.metrics.metric import TimeMetric
from sglp_bench.result import BenchmarkResult
from sglp_bench.workloads import kinds
from sglp_bench.workloads.generate import Workload
from sglp_bench.workloads.protocol import BenchmarkWorkload
from sglp_deploy.errors import BenchmarkError, ConfigError


@dataclass(frozen=True)
class Passes:
    passes_s: tuple[float, ...]
    settled: bool = True

    def to_json(self) -> dict[str, Any]:
        return {"passes_s": list(self.passes_s), "warm_up": {"settled": self.settled}}


@dataclass(frozen=True)
class ForwardWork:
    name: str = "passes"
    repeats: int = 3
    device: str = "cpu"
    threads: int | None = None
    cycles: int = 2
    kind: str = "passes"
    series: tuple[str, ...] = ("passes_s",)
    draws_tokens: bool = False

    @property
    def digest(self) -> str:
        return str(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "series": list(self.series)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ForwardWork:
        return cls(**{**value, "series": tuple(value["series"])})

    def unmet_by(self, runner: Any) -> str | None:
        return None if hasattr(runner, "forward") else "cannot run"

    def inputs(self, artifact: Any, vocab_size: int | None) -> dict[str, Any]:
        assert vocab_size is None
        return {"x": np.zeros(artifact.n_layers)}

    def run_timed(self, runner: Any, inputs: Any, *, clock: Any = None) -> Passes:
        clock = clock or FakeClock()
        times = []
        for _ in range(self.repeats):
            start = clock()
            runner.forward(inputs)
            clock.now_s += 0.2 / inputs["x"].size
            times.append(clock() - start)
        return Passes(tuple(times))

    def run_untimed(self, runner: Any, inputs: Any) -> None:
        runner.forward(inputs)

    def read_samples(self, value: Mapping[str, Any]) -> Passes:
        return Passes(tuple(value["passes_s"]), value["warm_up"]["settled"])

    def check_samples(self, where: str, samples: Any) -> None:
        if len(samples.passes_s) != self.repeats:
            raise BenchmarkError(f"{where}: passes are missing")


PASS_LATENCY = TimeMetric(
    name="pass_latency_s",
    label="Pass",
    unit="latency",
    formula="time of one pass",
    higher_is_better=False,
    series="passes_s",
    iterations=lambda samples, _: np.asarray(samples.passes_s),
)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> BenchmarkWorkload:
    """The kind is registered with its metric, and its blocks run in this process."""
    monkeypatch.setitem(kinds._READERS, "passes", ForwardWork.from_json)
    monkeypatch.setitem(compare.TIME_METRICS, PASS_LATENCY.name, PASS_LATENCY)
    monkeypatch.setattr(ForwardOnlyRunner, "forward", lambda self, inputs: {})
    monkeypatch.setattr(here, "run_worker", lambda spec, **_: run_block(spec))
    return ForwardWork()


def test_a_workload_of_another_kind_is_measured_compared_and_read_back(
    tmp_path: Path, passes: BenchmarkWorkload
) -> None:
    arms = {name: fake_artifact(tmp_path / name, behaviour="forward only", vocab_size=None) for name in ("a", "b")}
    openers = dict.fromkeys(arms, OPENER)
    result = run_arms(arms, passes, openers=openers, out_dir=tmp_path / "out")
    assert result.vocab_size is None
    assert BenchmarkResult.load(tmp_path / "out" / "result.json") == result
    found = compare.compare_results(result, resamples=20)
    assert list(found.metrics) == ["pass_latency_s", "peak_host_bytes", "weight_bytes"]
    assert found.metrics["pass_latency_s"].ratio == pytest.approx(1)
    assert compare.Comparison.from_json(found.to_json()).workload == passes


def test_its_samples_are_checked_by_itself(tmp_path: Path, passes: BenchmarkWorkload) -> None:
    artifact = fake_artifact(tmp_path / "a", behaviour="forward only")
    result = run_arms({"a": artifact}, passes, openers={"a": OPENER})
    value = result.to_json()
    value["arms"]["a"]["blocks"][0]["samples"]["passes_s"].pop()
    with pytest.raises(BenchmarkError, match="arm 'a', block 0: passes are missing"):
        BenchmarkResult.from_json(value)


def test_each_kind_asks_the_runner_for_what_it_needs(tmp_path: Path, passes: BenchmarkWorkload) -> None:
    runner = FakeExporter().open(fake_artifact(tmp_path / "a", behaviour="forward only"), device="cpu", threads=None)
    assert refusal(runner, "fake", passes) is None
    assert "has no prefill and decode" in str(refusal(runner, "fake", Workload("mine")))


def test_results_of_two_kinds_are_not_compared(tmp_path: Path, passes: BenchmarkWorkload) -> None:
    artifact = fake_artifact(tmp_path / "a", behaviour="forward only")
    result = run_arms({"a": artifact}, passes, openers={"a": OPENER})
    with pytest.raises(compare.IncomparableResultsError, match=r"workload\.kind"):
        compare.compare_results(planted_result(), result, candidate="a")


def test_the_kind_is_in_the_file_and_one_without_it_generates() -> None:
    work = Workload.named("smoke")
    value = work.to_json()
    assert value["kind"] == "generate"
    assert kinds.workload_from_json(value) == work
    del value["kind"]  # as result/1 had it
    assert kinds.workload_from_json(value) == work


def test_a_kind_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"workload kind 'swim' is unknown; this version knows generate; read the"):
        kinds.workload_from_json({"kind": "swim", "name": "x"})
    with pytest.raises(ConfigError, match=r"workload kind 'swim' is not 'generate'; its fields mean something else"):
        Workload.from_json({"kind": "swim", "name": "x"})


def test_token_ids_need_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the vocabulary size is unknown; token ids are drawn from it; pass vocab"):
        Workload.named("smoke").inputs(fake_artifact(tmp_path / "a"), None)

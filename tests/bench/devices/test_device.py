"""The harness runs blocks wherever a device says, and knows no more of the place than its name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench_fakes import fake_artifact
from bench_simulated import TINY, simulated_worker
from sglp_bench.devices import here
from sglp_bench.devices.here import HERE
from sglp_bench.measure.harness import benchmark_pair, run_arms


class Elsewhere:
    def __init__(self, name: str = "board") -> None:
        self.name = name
        self.started: list[str] = []
        self.asked: list[tuple[str, int | None]] = []
        self.specs: list[Mapping[str, Any]] = []
        self._run = simulated_worker(self.started)

    def environment(self, *, device: str, threads: int | None, packages: Iterable[str] = ()) -> dict[str, Any]:
        self.asked.append((device, threads))
        return {"cpu_model": "a board's"}

    def run(self, spec: Mapping[str, Any], *, label: str, threads: int | None, timeout_s: float) -> dict[str, Any]:
        self.specs.append(spec)
        answer: dict[str, Any] = self._run(spec, label=label, threads=threads, timeout_s=timeout_s)
        return answer


@pytest.fixture(autouse=True)
def _nothing_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a block was started on this machine")

    monkeypatch.setattr(here, "run_worker", refuse)
    monkeypatch.setattr(here, "collect_environment", refuse)


def test_every_block_and_every_fact_comes_from_the_device(tmp_path: Path) -> None:
    device = Elsewhere()
    result = run_arms({"a": fake_artifact(tmp_path / "a")}, TINY, device=device)
    assert device.started == ["memory:a", "memory:control", *["time:a", "time:control"], *["time:control", "time:a"]]
    assert device.asked == [("cpu", None)]
    assert result.device == "board"
    assert result.environment == {"cpu_model": "a board's"}
    # Nothing of this machine but the folder of the artifact, which the device takes there.
    assert {tuple(sorted(spec)) for spec in device.specs} == {
        ("artifact", "artifact_digest", "mode", "opener", "schema", "vocab_size", "workload")
    }


def test_blocks_of_one_place_are_not_reused_in_another(tmp_path: Path) -> None:
    pair = fake_artifact(tmp_path / "a"), fake_artifact(tmp_path / "b")

    def stop(done: int, total: int, text: str) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    board, other = Elsewhere(), Elsewhere("another board")
    with pytest.raises(KeyboardInterrupt):
        benchmark_pair(*pair, TINY, out_dir=tmp_path / "out", control=False, progress=stop, device=board)
    benchmark_pair(*pair, TINY, out_dir=tmp_path / "out", control=False, device=other)
    assert len(other.started) == 2 + 4


def test_this_machine_tells_a_worker_the_search_path_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def worker(spec: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        told.update(spec, **options)
        return {"answer": 1}

    monkeypatch.setattr(here, "run_worker", worker)
    monkeypatch.setattr(here, "collect_environment", lambda **options: options)
    monkeypatch.setenv("PYTHONPATH", "/before")
    assert HERE.run({"mode": "time"}, label="a", threads=2, timeout_s=3.0) == {"answer": 1}
    assert told == {"mode": "time", "pythonpath_before": "/before", "label": "a", "threads": 2, "timeout_s": 3.0}
    wanted = {"device": "cuda", "threads": 4, "packages": ("vllm",)}
    assert HERE.environment(device="cuda", threads=4, packages=("vllm",)) == wanted

"""Worker processes of the benchmark without processes: the same blocks, on a clock that a fake runner advances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench_fakes import FakeClock, FakeRunner
from sglp_bench.devices.memory import MemoryReading
from sglp_bench.workloads.generate import Workload, time_block
from sglp_deploy.artifact import ExportArtifact

TINY = Workload("tiny", prompt_tokens=3, decode_tokens=2, warmup_max=4, prefill_repeats=2, decode_repeats=2, cycles=1)


def simulated_worker(started: list[str], *, noise: float = 0.01) -> Any:
    """In place of :func:`sglp_bench.devices.here.run_worker`; ``started`` gets "mode:label" of each call."""
    rng = np.random.default_rng(0)

    def run(spec: Mapping[str, Any], *, label: str, threads: int | None, timeout_s: float) -> dict[str, Any]:
        started.append(f"{spec['mode']}:{label}")
        artifact, work = ExportArtifact.load(spec["artifact"]), Workload.from_json(spec["workload"])
        if spec["mode"] == "memory":
            return {"memory": {"host_peak": MemoryReading("VmHWM", artifact.weight_bytes * 10).to_json()}}
        clock = FakeClock()
        runner = FakeRunner(artifact, clock, factor=float(np.exp(rng.normal(0, noise))))
        samples = time_block(runner, work.input_ids(spec["vocab_size"]), work, clock=clock)
        return {"load_s": 0.1, "samples": samples.to_json(), "conditions": {"start": {}, "end": {}}}

    return run

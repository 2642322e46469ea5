"""Benchmark results with a planted ratio, drawn from a seeded model of noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglp_bench.devices.environment import COMPARABLE_KEYS
from sglp_bench.devices.memory import MemoryReading
from sglp_bench.measure.harness import CONTROL, schedule
from sglp_bench.result import ArmResult, BenchmarkResult, Block
from sglp_bench.workloads.generate import Workload
from sglp_bench.workloads.generate_samples import BlockSamples, WarmUp

WORK = Workload("planted", prompt_tokens=10, decode_tokens=8, prefill_repeats=5, decode_repeats=3, cycles=4)
ENVIRONMENT: dict[str, Any] = {key: f"some {key}" for key in COMPARABLE_KEYS} | {"cpus_usable": 2, "gpus": ["some gpu"]}


def planted_result(
    speedups: dict[str, float] | None = None,
    *,
    work: Workload = WORK,
    noise: float = 0.01,
    drift: float = 0.0,
    control: bool = True,
    seed: int = 0,
    load: float = 0.5,
    settled: bool = True,
    precisions: dict[str, str] | None = None,
) -> BenchmarkResult:
    """Arms "baseline" (0.3 s prefill, 0.05 s a step) and one per entry of ``speedups`` (label to true ratio).

    Args:
        speedups: Label to how many times faster than the baseline.
        work: Shapes and cycles.
        noise: Relative spread of a process and of a sample.
        drift: Relative slowing from one block to the next.
        control: Whether a second instance of the baseline takes part.
        seed: Seed of the noise.
        load: Load average at the start of each block.
        settled: What every warm-up says.
        precisions: Label to precision, "fp32" otherwise.
    """
    true = {"baseline": 1.0, **({"candidate": 1.2} if speedups is None else speedups)}
    if control:
        true[CONTROL] = 1.0
    rng = np.random.default_rng(seed)
    blocks: dict[str, list[Block]] = {label: [] for label in true}
    for slot in schedule(list(true), work.cycles):
        factor = (1 + drift * slot.index) * float(np.exp(rng.normal(0, noise))) / true[slot.label]
        prefill = 0.3 * factor * np.exp(rng.normal(0, noise, work.prefill_repeats))
        decode = 0.05 * factor * np.exp(rng.normal(0, noise, (work.decode_repeats, work.decode_tokens)))
        samples = BlockSamples(
            tuple(prefill.tolist()), tuple(tuple(row) for row in decode.tolist()), WarmUp((0.4,), ((0.1,),), settled)
        )
        conditions = {"start": {"load_average_1min": load}, "end": {"load_average_1min": load}}
        blocks[slot.label].append(Block(slot.index, slot.cycle, slot.half, 0.1, samples, conditions))
    return BenchmarkResult(
        workload=work,
        baseline="baseline",
        control=CONTROL if control else None,
        arms={
            label: ArmResult(
                artifact={
                    "digest": label,
                    "format": "fake",
                    "precision": (precisions or {}).get(label, "fp32"),
                    "n_layers": 4,
                    "weight_bytes": round(1200 / ratio),
                    "artifact_bytes": round(1300 / ratio),
                    "plan_digest": "p",
                    "model_id": "m",
                    "model_fingerprint": "f",
                },
                blocks=tuple(blocks[label]),
                memory={
                    "host_idle": MemoryReading("VmRSS", 100),
                    "host_peak": MemoryReading("VmHWM", 10_000 + 5 * len(label) if ratio == 1 else 8_000),
                },
            )
            for label, ratio in true.items()
        },
        vocab_size=11,
        environment=ENVIRONMENT,
    )

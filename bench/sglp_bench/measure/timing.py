"""The clock: one block of warm-ups and timed iterations of a runner that does not time itself."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglp_bench.workloads.generate import Workload, WorkloadTokens
from sglp_deploy.errors import BenchmarkError
from sglp_deploy.protocols import GeneratingRunner

WARM_UP_WINDOW = 4
WARM_UP_TOLERANCE = 0.05  # the rule TensorRT Model Connect uses: halves of the window within 5 %


@dataclass(frozen=True)
class WarmUp:
    """Samples taken before the runner was steady; kept, never mixed with the measured ones.

    Attributes:
        prefill_s: One sample per warm-up iteration.
        decode_s: The decode steps of each warm-up iteration.
        settled: False when ``warmup_max`` iterations passed before prefill and decode were both flat.
    """

    prefill_s: tuple[float, ...]
    decode_s: tuple[tuple[float, ...], ...]
    settled: bool


@dataclass(frozen=True)
class BlockSamples:
    """Raw times of one block, in seconds.

    Attributes:
        prefill_s: Length ``prefill_repeats``.
        decode_s: ``decode_repeats`` rows of ``decode_tokens`` steps.
        warm_up: What came before.
    """

    prefill_s: tuple[float, ...]
    decode_s: tuple[tuple[float, ...], ...]
    warm_up: WarmUp

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for the worker's file and ``result.json``."""
        return {
            "prefill_s": list(self.prefill_s),
            "decode_s": [list(steps) for steps in self.decode_s],
            "warm_up": {
                "prefill_s": list(self.warm_up.prefill_s),
                "decode_s": [list(steps) for steps in self.warm_up.decode_s],
                "settled": self.warm_up.settled,
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BlockSamples:
        """Inverse of :meth:`to_json`."""
        warm_up = value["warm_up"]
        return cls(
            prefill_s=tuple(value["prefill_s"]),
            decode_s=tuple(tuple(steps) for steps in value["decode_s"]),
            warm_up=WarmUp(
                prefill_s=tuple(warm_up["prefill_s"]),
                decode_s=tuple(tuple(steps) for steps in warm_up["decode_s"]),
                settled=warm_up["settled"],
            ),
        )


def is_flat(samples: Sequence[float], *, window: int = WARM_UP_WINDOW, tolerance: float = WARM_UP_TOLERANCE) -> bool:
    """Whether the medians of the two halves of the last ``window`` samples differ by at most ``tolerance``."""
    if len(samples) < window:
        return False
    recent = np.asarray(samples[-window:])
    first, second = float(np.median(recent[: window // 2])), float(np.median(recent[window // 2 :]))
    return abs(second - first) <= tolerance * first


def time_block(
    runner: GeneratingRunner,
    tokens: WorkloadTokens,
    workload: Workload,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> BlockSamples:
    """Warm ``runner`` up until it is flat, then time its prefills and its decode steps.

    A sample runs from ``synchronize(); clock()`` to ``synchronize(); clock()``, so it holds all the work of the call
    and the copy of the logits to the host, but no sampling and no tokenizer.  The garbage collector is off inside the
    block and runs between iterations: a collection would land in one arm by chance.

    Args:
        runner: Already entered.
        tokens: From :meth:`Workload.input_ids`.
        workload: Repeats and the warm-up cap.
        clock: Seconds, monotonic; tests inject one that they advance.

    Raises:
        BenchmarkError: If the logits have the wrong batch size or are not finite (checked on the first iteration).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # the loaded model is not walked again by the collections between iterations
    try:
        _check_logits(runner, tokens)
        warm_up = _warm_up(runner, tokens, workload.warmup_max, clock)
        prefill_s = []
        for _ in range(workload.prefill_repeats):
            gc.collect()
            prefill_s.append(_time_prefill(runner, tokens, clock))
        decode_s = []
        for _ in range(workload.decode_repeats):
            gc.collect()
            runner.prefill(tokens.prompt)  # untimed: empties the cache, so every repeat decodes at the same positions
            decode_s.append(_time_decode(runner, tokens, clock))
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return BlockSamples(tuple(prefill_s), tuple(decode_s), warm_up)


def run_untimed(runner: GeneratingRunner, tokens: WorkloadTokens) -> None:
    """One whole iteration without a clock, for the memory pass."""
    runner.prefill(tokens.prompt)
    for step in tokens.continuation:
        runner.decode(step)
    runner.synchronize()


def _warm_up(runner: GeneratingRunner, tokens: WorkloadTokens, cap: int, clock: Callable[[], float]) -> WarmUp:
    # An iteration is a prefill and every decode step: all shapes that will be measured are seen.
    prefill_s: list[float] = []
    decode_s: list[tuple[float, ...]] = []
    settled = False
    while not settled and len(prefill_s) < cap:
        gc.collect()
        prefill_s.append(_time_prefill(runner, tokens, clock))
        decode_s.append(_time_decode(runner, tokens, clock))
        settled = is_flat(prefill_s) and is_flat([float(np.median(steps)) for steps in decode_s])
    return WarmUp(tuple(prefill_s), tuple(decode_s), settled)


def _time_prefill(runner: GeneratingRunner, tokens: WorkloadTokens, clock: Callable[[], float]) -> float:
    runner.synchronize()
    start = clock()
    runner.prefill(tokens.prompt)
    runner.synchronize()
    return clock() - start


def _time_decode(runner: GeneratingRunner, tokens: WorkloadTokens, clock: Callable[[], float]) -> tuple[float, ...]:
    samples = []
    runner.synchronize()
    for step in tokens.continuation:
        start = clock()
        runner.decode(step)
        runner.synchronize()
        samples.append(clock() - start)
    return tuple(samples)


def _check_logits(runner: GeneratingRunner, tokens: WorkloadTokens) -> None:
    # A runner that answers nothing, or NaN, is often fast; its times must not reach a table.
    batch = tokens.prompt.shape[0]
    for name, logits in (
        ("prefill", runner.prefill(tokens.prompt)),
        ("decode", runner.decode(tokens.continuation[0])),
    ):
        if logits.ndim != 2 or logits.shape[0] != batch:
            raise BenchmarkError(
                f"{name} gave logits of shape {tuple(logits.shape)} for a batch of {batch}; (batch, vocab) was "
                "expected, so the work is not what the workload asks for; check the exporter's runner"
            )
        if not np.isfinite(logits).all():
            raise BenchmarkError(
                f"{name} gave logits that are not finite; the speed of a broken model means nothing; "
                "run the parity check on this artifact first"
            )

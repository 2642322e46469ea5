"""Prefill and decode at a fixed batch: one description of the work that every arm gets, token for token."""

from __future__ import annotations

import difflib
import gc
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglp_bench.workloads.generate_samples import SERIES, BlockSamples, WarmUp
from sglp_bench.workloads.protocol import Clock
from sglp_bench.workloads.timing import is_flat, quiet_collector, seconds
from sglp_deploy import _io
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import BenchmarkError, ConfigError
from sglp_deploy.protocols import GeneratingRunner, Runner

_POSITIVE = (
    "batch_size",
    "prompt_tokens",
    "decode_tokens",
    "warmup_max",
    "prefill_repeats",
    "decode_repeats",
    "cycles",
)

_NAMED: dict[str, dict[str, int]] = {
    # Proves that the pipeline works; its numbers say nothing about speed.
    "smoke": {
        "prompt_tokens": 8,
        "decode_tokens": 4,
        "warmup_max": 4,
        "prefill_repeats": 3,
        "decode_repeats": 2,
        "cycles": 2,
    },
    # A few minutes for a 135M model on two cores.
    "demo": {
        "prompt_tokens": 128,
        "decode_tokens": 32,
        "warmup_max": 5,
        "prefill_repeats": 5,
        "decode_repeats": 3,
        "cycles": 5,
    },
    "decode-small": {
        "prompt_tokens": 64,
        "decode_tokens": 64,
        "warmup_max": 10,
        "prefill_repeats": 6,
        "decode_repeats": 5,
        "cycles": 4,
    },
    "prefill-small": {
        "prompt_tokens": 512,
        "decode_tokens": 8,
        "warmup_max": 10,
        "prefill_repeats": 12,
        "decode_repeats": 3,
        "cycles": 4,
    },
}


class WorkloadTokens(NamedTuple):
    """Token ids of one workload: ``prompt`` (batch, prompt_tokens), ``continuation`` (decode_tokens, batch), int64."""

    prompt: NDArray[np.int64]
    continuation: NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """The work of one block, and how many blocks there are (:class:`~sglp_bench.workloads.protocol.BenchmarkWorkload`).

    Attributes:
        kind: "generate".
        series: Times of prefills and of decode steps.
        draws_tokens: True.
        name: For people; part of the digest all the same.
        batch_size: Sequences per call.
        prompt_tokens: Tokens of each prompt.
        decode_tokens: Decode steps after each prefill; each step appends one given token per sequence.
        warmup_max: Most warm-up iterations a block may spend before it is marked "never settled".
        prefill_repeats: Timed prefills in a block.
        decode_repeats: Timed decodes in a block, each after a fresh, untimed prefill.
        cycles: Mirrored cycles over all arms; each cycle gives two pairs.
        seed: Seed of the token ids.
        threads: CPU threads of the runtime; None leaves the choice to it.
        device: "cpu", "cuda" or "cuda:N".
    """

    kind: ClassVar[str] = "generate"
    series: ClassVar[tuple[str, ...]] = SERIES
    draws_tokens: ClassVar[bool] = True

    name: str
    batch_size: int = 1
    prompt_tokens: int = 64
    decode_tokens: int = 32
    warmup_max: int = 8
    prefill_repeats: int = 5
    decode_repeats: int = 3
    cycles: int = 3
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        faults = [
            f"workload {self.name!r}: {key}={value!r} is not a positive whole number; there would be no work to time; "
            f"pass 1 or more"
            for key in (*_POSITIVE, *(("threads",) if self.threads is not None else ()))
            if not _is_whole(value := getattr(self, key)) or value < 1
        ]
        if not _is_whole(self.seed) or self.seed < 0:
            faults.append(
                f"workload {self.name!r}: seed={self.seed!r} is not a whole number from 0; numpy refuses such seeds; "
                "pass 0 or more"
            )
        if self.device != "cpu" and self.device.split(":")[0] != "cuda":
            faults.append(
                f"workload {self.name!r}: device={self.device!r} is unknown; runners know cpu and cuda; "
                "pass 'cpu', 'cuda' or 'cuda:N'"
            )
        if faults:
            raise ConfigError(faults)

    @classmethod
    def named(cls, name: str, **changes: Any) -> Workload:
        """One of the workloads this package names, with fields replaced by ``changes``.

        Raises:
            ConfigError: If the name is unknown, or a changed field is unknown or out of range.
        """
        if name not in _NAMED:
            near = difflib.get_close_matches(name, _NAMED, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"no workload is named {name!r}; the named ones are {', '.join(sorted(_NAMED))}; "
                f"{hint}pass one of them, or build Workload(...) yourself"
            )
        return cls.from_json({"name": name, **_NAMED[name], **changes})

    def require_positions(self, most: int | None) -> None:
        """Refuse a model that has learned too few positions for this workload.

        Args:
            most: How many it has; None where it can take any number.

        Raises:
            ConfigError: Naming the workloads that fit.
        """
        if most is None or self.prompt_tokens + self.decode_tokens <= most:
            return
        fit = [name for name, sizes in _NAMED.items() if sizes["prompt_tokens"] + sizes["decode_tokens"] <= most]
        advice = f"choose {' or '.join(fit)}" if fit else "build a shorter Workload(...) yourself"
        raise ConfigError(
            f"the workload {self.name!r} runs {self.prompt_tokens} tokens and {self.decode_tokens} more, and the model "
            f"has learned positions for {most}; beyond them it cannot run; {advice}"
        )

    @property
    def digest(self) -> str:
        """SHA-256 over every field and the kind; results with different digests are not compared."""
        return _io.sha256_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The kind and every field."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Workload:
        """Inverse of :meth:`to_json`; missing fields take their defaults, and so does the kind.

        Raises:
            ConfigError: If a field is unknown or out of range, or the kind is another; all faults are listed.
        """
        value = dict(value)
        if (kind := value.pop("kind", cls.kind)) != cls.kind:
            raise ConfigError(
                f"workload kind {kind!r} is not {cls.kind!r}; its fields mean something else; "
                "read it with sglp_bench.workloads.kinds.workload_from_json"
            )
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise ConfigError(
                [
                    f"workload field {key!r} is unknown; the fields are {', '.join(sorted(known))}; correct the name"
                    for key in unknown
                ]
            )
        if "name" not in value:
            raise ConfigError("the workload has no name; results are labelled by it; add one")
        return cls(**value)

    def unmet_by(self, runner: Runner) -> str | None:
        """What ``runner`` cannot do of this work, as the rest of a sentence about it; None when it can do all."""
        if isinstance(runner, GeneratingRunner):
            return None
        return "has no prefill and decode; this workload times those; benchmark a format whose runner generates"

    def input_ids(self, vocab_size: int) -> WorkloadTokens:
        """The token ids every arm is fed; equal for equal workloads, whatever the model answers.

        The continuation is given and not sampled: a pruned model would soon choose other tokens than its baseline, and
        the two arms would no longer do the same work.

        Args:
            vocab_size: Ids are uniform in [0, vocab_size).
        """
        rng = np.random.default_rng(self.seed)
        prompt = rng.integers(0, vocab_size, (self.batch_size, self.prompt_tokens), dtype=np.int64)
        continuation = rng.integers(0, vocab_size, (self.decode_tokens, self.batch_size), dtype=np.int64)
        return WorkloadTokens(prompt, continuation)

    def inputs(self, artifact: ExportArtifact, vocab_size: int | None) -> WorkloadTokens:
        """The token ids, which are the same for every artifact.

        Raises:
            ConfigError: If the vocabulary is unknown.
        """
        del artifact
        if vocab_size is None:
            raise ConfigError("the vocabulary size is unknown; token ids are drawn from it; pass vocab_size")
        return self.input_ids(vocab_size)

    def run_timed(
        self, runner: GeneratingRunner, inputs: WorkloadTokens, *, clock: Clock = time.perf_counter
    ) -> BlockSamples:
        """See :func:`time_block`."""
        return time_block(runner, inputs, self, clock=clock)

    def run_untimed(self, runner: GeneratingRunner, inputs: WorkloadTokens) -> None:
        """A prefill and every decode step, without a clock."""
        runner.prefill(inputs.prompt)
        for step in inputs.continuation:
            runner.decode(step)
        runner.synchronize()

    def read_samples(self, value: Mapping[str, Any]) -> BlockSamples:
        """Inverse of :meth:`BlockSamples.to_json`."""
        return BlockSamples.from_json(value)

    def check_samples(self, where: str, samples: BlockSamples) -> None:
        """See :meth:`BlockSamples.check`."""
        samples.check(where, prefills=self.prefill_repeats, decodes=self.decode_repeats, steps=self.decode_tokens)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def time_block(
    runner: GeneratingRunner,
    tokens: WorkloadTokens,
    workload: Workload,
    *,
    clock: Clock = time.perf_counter,
) -> BlockSamples:
    """Warm ``runner`` up until it is flat, then time its prefills and its decode steps.

    A sample runs from ``synchronize(); clock()`` to ``synchronize(); clock()``, so it holds all the work of the call
    and the copy of the logits to the host, but no sampling and no tokenizer.  The garbage collector runs between
    iterations only.

    Args:
        runner: Already entered.
        tokens: From :meth:`Workload.input_ids`.
        workload: Repeats and the warm-up cap.
        clock: Seconds, monotonic; tests inject one that they advance.

    Raises:
        BenchmarkError: If the logits have the wrong batch size or are not finite (checked on the first iteration).
    """
    with quiet_collector():
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
    return BlockSamples(tuple(prefill_s), tuple(decode_s), warm_up)


def _warm_up(runner: GeneratingRunner, tokens: WorkloadTokens, cap: int, clock: Clock) -> WarmUp:
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


def _time_prefill(runner: GeneratingRunner, tokens: WorkloadTokens, clock: Clock) -> float:
    runner.synchronize()
    return seconds(runner, lambda: runner.prefill(tokens.prompt), clock)


def _time_decode(runner: GeneratingRunner, tokens: WorkloadTokens, clock: Clock) -> tuple[float, ...]:
    runner.synchronize()
    return tuple(seconds(runner, partial(runner.decode, step), clock) for step in tokens.continuation)


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

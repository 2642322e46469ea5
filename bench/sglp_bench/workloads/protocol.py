"""What a benchmark asks of any kind of work; the harness, the worker, results and verdicts know no kind by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.protocols import Runner

Clock = Callable[[], float]  # seconds, monotonic


class Samples(Protocol):
    """The raw times of one block, in seconds."""

    @property
    def settled(self) -> bool:
        """Whether the warm-up ended because the runner was steady."""
        ...

    def to_json(self) -> dict[str, Any]:
        """One entry for each series, and ``warm_up``: what came before, never mixed with the others."""
        ...


class BenchmarkWorkload(Protocol):
    """One description of the work that every arm gets, and how a runner does it.

    ``name`` is for readers, ``kind`` for files (:mod:`sglp_bench.workloads.kinds`).  ``device`` ("cpu", "cuda:1") and
    ``threads`` open the runner; ``cycles`` is how often all arms are measured.
    """

    @property
    def kind(self) -> str:
        """Which class reads this workload from a file."""
        ...

    @property
    def name(self) -> str:
        """What a reader calls it."""
        ...

    @property
    def device(self) -> str:
        """Where runners are opened: "cpu", "cuda" or "cuda:N"."""
        ...

    @property
    def threads(self) -> int | None:
        """CPU threads of the runtime; None leaves the choice to it."""
        ...

    @property
    def cycles(self) -> int:
        """Mirrored cycles over all arms."""
        ...

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the raw samples a block records; the metrics over them are what this workload yields."""
        ...

    @property
    def draws_tokens(self) -> bool:
        """Whether its inputs are token ids, so that the arms must share one vocabulary."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 over every field and the kind."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The kind and every field."""
        ...

    def unmet_by(self, runner: Runner) -> str | None:
        """What ``runner`` cannot do of this work, as the rest of a sentence about it; None when it can do all.

        The runner is opened and not entered.
        """
        ...

    def inputs(self, artifact: ExportArtifact, vocab_size: int | None) -> Any:
        """What the runner is fed; equal for equal workloads.  Made before the idle memory is read.

        Args:
            artifact: Its manifest names the inputs of a graph.
            vocab_size: Token ids are below it; None where :attr:`draws_tokens` is false.
        """
        ...

    def run_timed(self, runner: Any, inputs: Any, *, clock: Clock = time.perf_counter) -> Samples:
        """One timed block on an entered runner that :meth:`unmet_by` found able: warm up, then measure.

        Raises:
            BenchmarkError: If the runner's answers show that it does not do the work.
        """
        ...

    def run_untimed(self, runner: Any, inputs: Any) -> None:
        """One whole iteration without a clock, for the memory pass."""
        ...

    def read_samples(self, value: Mapping[str, Any]) -> Samples:
        """Inverse of the ``to_json`` of its samples."""
        ...

    def check_samples(self, where: str, samples: Any) -> None:
        """Refuse a block whose times cannot be true.

        Args:
            where: Begins the message, "arm 'a', block 3" for example.
            samples: From :meth:`run_timed` or :meth:`read_samples`.

        Raises:
            BenchmarkError: If a time is not a finite number above zero, or samples are missing.
        """
        ...

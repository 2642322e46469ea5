"""What the harness asks of a place where blocks run, without knowing which place it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class Device(Protocol):
    """A place where artifacts are measured, such as this machine (:data:`sglp_bench.devices.here.HERE`)."""

    @property
    def name(self) -> str:
        """What a result calls the place."""
        ...

    def environment(self, *, device: str, threads: int | None, packages: Iterable[str] = ()) -> dict[str, Any]:
        """Facts of the place, as :func:`sglp_bench.devices.environment.collect_environment` gives them there.

        Args:
            device: The workload's device.
            threads: The workload's threads.
            packages: Distributions whose versions decide the times.
        """
        ...

    def run(self, spec: Mapping[str, Any], *, label: str, threads: int | None, timeout_s: float) -> dict[str, Any]:
        """Run one block there, in a process of its own, and return its answer.

        The answer holds ``memory``, or ``load_s`` and ``samples``; and ``conditions``, the state of the place at the
        start and the end of the block (:func:`sglp_bench.devices.environment.block_conditions`).

        Args:
            spec: See :func:`sglp_bench.measure.worker.run_block`; ``artifact`` is a folder on this machine.
            label: The arm, for messages.
            threads: CPU threads that every common library is held to before it is loaded; None for their own choice.
            timeout_s: The block is ended after this long.

        Raises:
            BenchmarkError: If there is no readable answer; the message says what the place said last.
        """
        ...

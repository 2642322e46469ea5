"""The raw times of one block of prefills and decodes, and when they cannot be true."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglp_bench.metrics import decode, prefill
from sglp_deploy.errors import BenchmarkError

SERIES = (prefill.SERIES, decode.SERIES)


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

    @property
    def settled(self) -> bool:
        """Whether the warm-up ended because prefill and decode were both flat."""
        return self.warm_up.settled

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

    def check(self, where: str, *, prefills: int, decodes: int, steps: int) -> None:
        """Refuse what the workload did not ask for and times that no clock can have read.

        Args:
            where: Begins the message.
            prefills: How many were asked for.
            decodes: How many were asked for.
            steps: Of each decode.

        Raises:
            BenchmarkError: If samples are missing, or a time is not a finite number above zero.
        """
        wanted = (prefills, [steps] * decodes)
        found = (len(self.prefill_s), [len(row) for row in self.decode_s])
        if found != wanted:
            raise BenchmarkError(
                f"{where}: {found[0]} prefills and decodes of {found[1]} steps were recorded, the workload asks for "
                f"{wanted[0]} and {wanted[1]}; samples are missing; measure it again"
            )
        times = [("prefill_s", value) for value in self.prefill_s]
        times += [("decode_s", value) for row in self.decode_s for value in row]
        for name, value in times:
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise BenchmarkError(
                    f"{where}: {name} holds {value!r}; a time is finite and above zero; "
                    "the clock or the runner is broken, so measure it again"
                )

"""What is measured: one description of the work that every arm of a benchmark gets, token for token."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.errors import ConfigError
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
    """The work of one block, and how many blocks there are.

    Attributes:
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

    @property
    def digest(self) -> str:
        """SHA-256 over every field; results with different digests are not compared."""
        return _io.sha256_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Workload:
        """Inverse of :meth:`to_json`; missing fields take their defaults.

        Raises:
            ConfigError: If a field is unknown or out of range; all faults are listed.
        """
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


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

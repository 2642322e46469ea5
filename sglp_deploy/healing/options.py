"""What a caller may ask of healing; read without torch, so that a run with nothing to do does not load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from sglp_deploy._names import precision_faults
from sglp_deploy.errors import ConfigError
from sglp_deploy.planners.registry import options_from


@dataclass(frozen=True)
class HealOptions:
    """How a pruned model is healed.

    Attributes:
        tokens: Training tokens, repetitions counted; None bounds by time alone.
        minutes: Of training, over all resumes; None bounds by tokens alone.
        learning_rate: Of AdamW, at its highest; 0.17 / hidden size for all weights (3e-4 at 576), 0.6 / hidden size for
            LoRA when None.
        ce: Share of the cross entropy in the loss; the rest is KL from the teacher.
        temperature: Of both distributions in the KL.
        sequence_length: Tokens in a row.
        batch_size: Rows that go through the model together, on each process.
        accumulation: Such batches before a step.
        lora: Rank of LoRA matrices, merged in the end; 0 trains all weights of the layers.
        embeddings: Whether the embeddings and the head are trained too.
        precision: What matrices are multiplied in: "fp32", "bf16" (weights stay float32), or "auto": bf16 where the
            processor multiplies it.
        evaluations: How often the held-out loss is taken on the way; the best state is kept.
        held_out: Held-out tokens, in all.
        written: Tokens the unpruned model writes itself, where the mix has them.
        weight_decay: Of AdamW.
        seed: Order of the rows, what is written, LoRA's first matrices.
    """

    tokens: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    ce: float = 0.3
    temperature: float = 1.0
    sequence_length: int = 256
    batch_size: int = 4
    accumulation: int = 1
    lora: int = 0
    embeddings: bool = False
    precision: str = "auto"
    evaluations: int = 4
    held_out: int = 8_192
    written: int = 32_768
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if self.tokens is None and self.minutes is None:
            faults.append(
                "healing has no budget; nothing says when to stop; give tokens (1_000_000), minutes (15) or both"
            )
        if self.tokens is not None and self.tokens < 1:
            faults.append(f"tokens={self.tokens} is no budget; nothing would be trained; give 1_000_000, or none")
        if self.minutes is not None and not self.minutes > 0:
            faults.append(f"minutes={self.minutes} is no budget; nothing would be trained; give 15, or leave it out")
        least = {"batch_size": 1, "accumulation": 1, "evaluations": 1, "lora": 0, "seed": 0, "written": 0}
        least |= {"sequence_length": 8, "held_out": 8}
        faults += [
            f"{name}={getattr(self, name)} must be at least {number}; healing cannot work with less; leave it out for "
            "the default"
            for name, number in least.items()
            if getattr(self, name) < number
        ]
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            faults.append(
                f"learning_rate={self.learning_rate} must lie between 0 and 1; another one diverges; leave it out for "
                "the default"
            )
        if not 0 <= self.ce <= 1:
            faults.append(f"ce={self.ce} is a share; the loss would make no sense; give 0 to 1")
        if not self.temperature > 0:
            faults.append(f"temperature={self.temperature} must be above 0; it divides the logits; leave it out for 1")
        if self.weight_decay < 0:
            faults.append(f"weight_decay={self.weight_decay} is negative; weights would grow; give 0 or more")
        if self.lora and self.embeddings:
            faults.append("lora and embeddings exclude each other; LoRA changes layers only; leave one of them out")
        faults += precision_faults(self.precision)
        if faults:
            raise ConfigError(faults)

    def rate(self, width: int) -> float:
        """The highest learning rate for a model of this hidden size; the best one falls with it (arXiv:2203.03466)."""
        return self.learning_rate or (0.6 if self.lora else 0.17) / width


def read_heal_options(given: Mapping[str, Any]) -> HealOptions:
    """The options, checked; texts are read as the field's type, and what is not given has its default.

    Raises:
        ConfigError: If a key is unknown, with the nearest match and the list, or a value does not fit.
    """
    return cast(HealOptions, options_from(HealOptions, given, "healing"))

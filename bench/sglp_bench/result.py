"""What a benchmark leaves behind: raw samples by block, from which :mod:`sglp_bench.metrics` reads its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglp_bench.devices.memory import MemoryReading
from sglp_bench.judge.certificates import Certification
from sglp_bench.workloads.kinds import workload_from_json
from sglp_bench.workloads.protocol import BenchmarkWorkload, Samples
from sglp_deploy import _io
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, BenchmarkError

SCHEMA = "result/2"  # history: 1 = first; 2 = the workload's kind, the device, power
VERSIONS = (1, 2)  # those that are read; result/1 was always measured on the machine that wrote it


@dataclass(frozen=True)
class Block:
    """One fresh process of one arm.

    Attributes:
        index: Place in the whole schedule, from 0.
        cycle: Mirrored cycle it belongs to.
        half: 0 or 1; blocks of the same cycle and half are paired.
        load_s: Time to open the artifact; not part of any metric.
        samples: Raw times, in the shape of the workload.
        conditions: ``{"start", "end"}``, see :func:`sglp_bench.devices.environment.block_conditions`.
    """

    index: int
    cycle: int
    half: int
    load_s: float
    samples: Samples
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pair(self) -> tuple[int, int]:
        """(cycle, half): blocks of two arms with the same value were measured next to each other."""
        return self.cycle, self.half

    def to_json(self) -> dict[str, Any]:
        """All fields; the warm-up stands apart from the samples."""
        samples = self.samples.to_json()
        return {
            "index": self.index,
            "cycle": self.cycle,
            "half": self.half,
            "load_s": self.load_s,
            "warm_up": samples.pop("warm_up"),
            "samples": samples,
            "conditions": dict(self.conditions),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], workload: BenchmarkWorkload) -> Block:
        """Inverse of :meth:`to_json`; the samples are those of ``workload``."""
        return cls(
            value["index"],
            value["cycle"],
            value["half"],
            value["load_s"],
            workload.read_samples({**value["samples"], "warm_up": value["warm_up"]}),
            value["conditions"],
        )


@dataclass(frozen=True)
class ArmResult:
    """Everything measured on one artifact.

    Attributes:
        artifact: ``digest``, ``format``, ``precision``, ``n_layers``, ``weight_bytes``, ``artifact_bytes``,
            ``plan_digest`` and ``model_id`` of the artifact, and ``certificate``
            (:class:`sglp_bench.judge.certificates.Certification`; results of before there was one lack it).
        blocks: In the order they ran.
        memory: Rung to reading: ``host_idle``, ``host_peak`` and, on a graphics card, the device rungs.
    """

    artifact: Mapping[str, Any]
    blocks: tuple[Block, ...]
    memory: Mapping[str, MemoryReading]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "artifact": dict(self.artifact),
            "blocks": [block.to_json() for block in self.blocks],
            "memory": {rung: reading.to_json() for rung, reading in self.memory.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], workload: BenchmarkWorkload) -> ArmResult:
        """Inverse of :meth:`to_json`."""
        return cls(
            artifact=value["artifact"],
            blocks=tuple(Block.from_json(block, workload) for block in value["blocks"]),
            memory={rung: MemoryReading.from_json(reading) for rung, reading in value["memory"].items()},
        )


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark run: several arms, one workload, one environment.

    Attributes:
        workload: What every arm did.
        baseline: Label of the arm the others are judged by.
        control: Label of the second instance of the baseline (the A/A control), or None.
        arms: Label to measurements.
        vocab_size: Range of the token ids; None when the workload draws none.
        environment: See :func:`sglp_bench.devices.environment.collect_environment`.
        device: Name of the place that ran the blocks (:class:`sglp_bench.devices.device.Device`).
        power: None: not measured yet.

    Raises:
        BenchmarkError: If a time is not finite or not above zero, a block has the wrong number of samples, or a label
            is unknown.
    """

    workload: BenchmarkWorkload
    baseline: str
    control: str | None
    arms: Mapping[str, ArmResult]
    vocab_size: int | None
    environment: Mapping[str, Any]
    device: str = "here"
    power: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for label in (self.baseline, *((self.control,) if self.control else ())):
            self.arm(label)
        for label, arm in self.arms.items():
            if not arm.blocks:
                raise BenchmarkError(f"arm {label!r} has no blocks; there is nothing to compare; measure it again")
            for block in arm.blocks:
                check_samples(label, block, self.workload)

    @property
    def candidates(self) -> list[str]:
        """Labels of the arms that are neither the baseline nor its control."""
        return [label for label in self.arms if label not in (self.baseline, self.control)]

    def arm(self, label: str) -> ArmResult:
        """The measurements of one arm.

        Raises:
            BenchmarkError: If no arm has that label.
        """
        if label not in self.arms:
            raise BenchmarkError(f"no arm is labelled {label!r}; this result has {', '.join(self.arms)}; pass one")
        return self.arms[label]

    def to_json(self) -> dict[str, Any]:
        """The content of ``result.json``."""
        return {
            "schema": SCHEMA,
            "workload": self.workload.to_json(),
            "workload_digest": self.workload.digest,
            "device": self.device,
            "power": None if self.power is None else dict(self.power),
            "baseline": self.baseline,
            "control": self.control,
            "vocab_size": self.vocab_size,
            "environment": dict(self.environment),
            "arms": {label: arm.to_json() for label, arm in self.arms.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BenchmarkResult:
        """Inverse of :meth:`to_json`; ``result/1`` is read too.

        Raises:
            ArtifactError: If a field is missing or mistyped.
        """
        from sglp_bench import shapes  # what checks types loads only where a file is read

        shapes.refuse_mistyped(shapes.Result, value, "the result", "measure it again")
        try:
            first = value["schema"] == "result/1"
            workload = workload_from_json(value["workload"])
            return cls(
                workload=workload,
                baseline=value["baseline"],
                control=value["control"],
                arms={label: ArmResult.from_json(arm, workload) for label, arm in value["arms"].items()},
                vocab_size=value["vocab_size"],
                environment=value["environment"],
                device="here" if first else value["device"],
                power=None if first else value["power"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the result lacks or mistypes a field; {error!r}; measure it again") from error

    def save(self, path: str | Path) -> None:
        """Write ``result.json`` atomically."""
        _io.write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> BenchmarkResult:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: If the file is missing, incomplete, or of an unknown schema.
        """
        return cls.from_json(_io.read_json(Path(path), "result", VERSIONS))


def check_samples(label: str, block: Block, workload: BenchmarkWorkload) -> None:
    """Refuse a block whose times cannot be true.

    Raises:
        BenchmarkError: If a time is not a finite number above zero, or samples are missing.
    """
    workload.check_samples(f"arm {label!r}, block {block.index}", block.samples)


def artifact_facts(artifact: ExportArtifact, certificate: Certification) -> dict[str, Any]:
    """What a result keeps about an artifact (see :class:`ArmResult`)."""
    return {
        "digest": artifact.digest,
        "format": artifact.format,
        "precision": artifact.precision,
        "n_layers": artifact.n_layers,
        "weight_bytes": artifact.weight_bytes,
        "artifact_bytes": artifact.total_bytes,
        "plan_digest": artifact.plan_digest,
        "model_id": artifact.model.get("id"),
        "model_fingerprint": artifact.model.get("fingerprint"),
        "certificate": certificate.to_json(),
    }


def summarise_arm(arm: ArmResult) -> dict[str, Any]:
    """Facts of one arm without its raw samples, for a comparison or a report."""
    return {
        "artifact": dict(arm.artifact),
        "memory": {rung: asdict(reading) for rung, reading in arm.memory.items()},
        "n_blocks": len(arm.blocks),
        "blocks_never_settled": [block.index for block in arm.blocks if not block.samples.settled],
        "load_s": [block.load_s for block in arm.blocks],
    }

"""The protocol: which arm runs when, each block in a fresh process, so that drift hits every arm alike.

The order is the ABBA of paired experiments, for any number of arms.  A cycle runs all arms once and then once more
mirrored (baseline, candidate, control, control, candidate, baseline).  So each arm has the same mean position, and a
steady drift cancels within the cycle.  The next cycle starts one arm further on.  So no arm always stands at the edges.
Each half of a cycle pairs every arm with the baseline measured next to it: two pairs a cycle.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglp_bench.devices.device import Device
from sglp_bench.devices.environment import COMPARABLE_KEYS
from sglp_bench.devices.here import HERE
from sglp_bench.devices.memory import MemoryReading
from sglp_bench.judge.certificates import require_certificates
from sglp_bench.judge.compare import Comparison, compare_results
from sglp_bench.result import ArmResult, BenchmarkResult, Block, artifact_facts, check_samples
from sglp_bench.workloads.protocol import BenchmarkWorkload
from sglp_deploy import _io, registry
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, BenchmarkError, ConfigError, IncomparableResultsError, SGLPError
from sglp_deploy.parity.certificate import ParityReport

CONTROL = "control"
DEFAULT_TIMEOUT_S = 1800.0

Progress = Callable[[int, int, str], None]  # worker processes done, all of them, what runs now


@dataclass(frozen=True)
class Slot:
    """One place of the schedule; ``half`` 1 is the mirrored half of its cycle."""

    index: int
    cycle: int
    half: int
    label: str


def schedule(labels: Sequence[str], cycles: int) -> list[Slot]:
    """The order of blocks: mirrored cycles, each rotated by one arm against the one before."""
    slots: list[Slot] = []
    for cycle in range(cycles):
        turn = cycle % len(labels)
        order = [*labels[turn:], *labels[:turn]]
        for half, row in enumerate((order, order[::-1])):
            slots += [Slot(len(slots) + place, cycle, half, label) for place, label in enumerate(row)]
    return slots


def benchmark_pair(
    baseline: ExportArtifact,
    candidate: ExportArtifact,
    workload: BenchmarkWorkload,
    *,
    out_dir: str | Path | None = None,
    control: bool = True,
    labels: tuple[str, str] = ("baseline", "candidate"),
    openers: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    progress: Progress | None = None,
    certificates: Iterable[ParityReport] = (),
    unverified: bool = False,
    device: Device = HERE,
) -> Comparison:
    """Measure two artifacts of one format against each other.

    Args:
        baseline: The plan that keeps every layer, exported by the same exporter.
        candidate: The pruned artifact.
        workload: What both do.
        out_dir: Gets ``result.json`` and ``comparison.json``; blocks already measured there are reused when an
            earlier call with the same arguments was interrupted.  None keeps nothing on disk.
        control: Also measure a second instance of the baseline (the A/A control that gives the noise floor).
        labels: Names of the two arms.
        openers: Label to ``"module:attr"`` of an exporter that is not registered.
        vocab_size: Range of the token ids; read from the artifacts when omitted.
        timeout_s: Longest a block may take.
        progress: Called before each worker process and once at the end; see :func:`tqdm_progress`.
        certificates: Parity reports of the two, beside those on disk (:mod:`sglp_bench.judge.certificates`).
        unverified: Measure although a certificate is missing or failed; result and comparison then say so.
        device: The place that runs the blocks.

    Returns:
        The comparison; its ``result`` holds the raw samples.

    Raises:
        IncomparableResultsError: If the two have weights of different precision; nothing is measured then.
        BenchmarkError: If an artifact is not certified, or a worker process dies, hangs or answers rubbish.
    """
    if baseline.precision != candidate.precision:
        raise IncomparableResultsError(["precision"])
    result = run_arms(
        {labels[0]: baseline, labels[1]: candidate},
        workload,
        out_dir=out_dir,
        control=control,
        openers=openers,
        vocab_size=vocab_size,
        timeout_s=timeout_s,
        progress=progress,
        certificates=certificates,
        unverified=unverified,
        device=device,
    )
    comparison = compare_results(result, baseline=labels[0], candidate=labels[1])
    if out_dir is not None:
        comparison.save(Path(out_dir) / "comparison.json")
    return comparison


def run_arms(
    arms: Mapping[str, ExportArtifact],
    workload: BenchmarkWorkload,
    *,
    baseline: str | None = None,
    control: bool = True,
    out_dir: str | Path | None = None,
    openers: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    progress: Progress | None = None,
    certificates: Iterable[ParityReport] = (),
    unverified: bool = False,
    device: Device = HERE,
) -> BenchmarkResult:
    """Measure any number of artifacts in one interleaved run; compare any two with :func:`compare_results`.

    Args:
        arms: Label to artifact; the formats may differ (ONNX against a PyTorch checkpoint).
        workload: What each does.
        baseline: Label of the arm that the control repeats; the first one when omitted.
        control: As in :func:`benchmark_pair`, as are the remaining arguments.
        out_dir: Gets ``result.json``.
        openers: Label to ``"module:attr"``.
        vocab_size: Range of the token ids.
        timeout_s: Longest a block may take.
        progress: Progress callback.
        certificates: As in :func:`benchmark_pair`.
        unverified: As in :func:`benchmark_pair`.
        device: As in :func:`benchmark_pair`.

    Raises:
        ConfigError: If a label is unusable, or the vocabulary is unknown or differs between arms.
        ArtifactError: If an artifact on disk is not what its manifest says.
        BenchmarkError: If an artifact is not certified, or a worker process dies, hangs or answers rubbish.
    """
    baseline = next(iter(arms), "") if baseline is None else baseline
    _check_labels(arms, baseline, openers or {})
    for label, artifact in arms.items():
        if ExportArtifact.load(artifact.path).digest != artifact.digest:
            raise ArtifactError(
                f"{artifact.path} is no longer the artifact of arm {label!r}; its manifest changed since it was read; "
                "load it again"
            )
    if vocab_size is None and workload.draws_tokens:
        vocab_size = _common_vocabulary(arms)
    states = require_certificates(arms, certificates, unverified=unverified)
    packages = [package for artifact in arms.values() for package in registry.facts(artifact.format).packages]
    environment = device.environment(device=workload.device, threads=workload.threads, packages=packages)
    named_openers: dict[str, str | None] = {label: (openers or {}).get(label) for label in arms}
    artifacts = dict(arms)
    if control:
        artifacts[CONTROL], states[CONTROL] = arms[baseline], states[baseline]
        named_openers[CONTROL] = named_openers[baseline]
    specs = {
        label: {
            "schema": "block-spec/1",
            "artifact": str(artifact.path.resolve()),
            "artifact_digest": artifact.digest,
            "opener": named_openers[label],
            "workload": workload.to_json(),
            "vocab_size": vocab_size,
        }
        for label, artifact in artifacts.items()
    }
    with _io.scratch("bench") as scratch:
        folder = scratch if out_dir is None else Path(out_dir)
        run = _Run(device, folder / "blocks", specs, environment, workload, timeout_s, progress)
        memory, blocks = run.measure()
        result = BenchmarkResult(
            workload=workload,
            baseline=baseline,
            control=CONTROL if control else None,
            arms={
                label: ArmResult(artifact_facts(artifact, states[label]), tuple(blocks[label]), memory[label])
                for label, artifact in artifacts.items()
            },
            vocab_size=vocab_size,
            environment=environment,
            device=device.name,
        )
        if out_dir is not None:
            result.save(folder / "result.json")
            shutil.rmtree(folder / "blocks", ignore_errors=True)  # result.json holds them all
    return result


class _Run:
    """The blocks of one benchmark: reads the ones an interrupted run left, starts workers for the others."""

    def __init__(
        self,
        device: Device,
        folder: Path,
        specs: Mapping[str, dict[str, Any]],
        environment: Mapping[str, Any],
        workload: BenchmarkWorkload,
        timeout_s: float,
        progress: Progress | None,
    ) -> None:
        self._device = device
        self._folder = folder
        self._specs = specs
        # A block of another machine or another library version is not a block of this run.
        self._place = {"name": device.name, **{key: environment.get(key) for key in COMPARABLE_KEYS}}
        self._workload = workload
        self._timeout_s = timeout_s
        self._progress: Progress = progress or _silent

    def measure(self) -> tuple[dict[str, dict[str, MemoryReading]], dict[str, list[Block]]]:
        """Every memory pass, then every timed block, in schedule order."""
        slots = schedule(list(self._specs), self._workload.cycles)
        total = len(self._specs) + len(slots)
        done = 0
        # Memory first: it also finds an arm that cannot run at all before an hour is spent on the others.
        memory = {}
        for label in self._specs:
            self._progress(done, total, f"{label}: memory")
            answer = self._reuse(label, "memory", 0) or self._start(label, "memory", 0)
            memory[label] = {rung: MemoryReading.from_json(reading) for rung, reading in answer["memory"].items()}
            done += 1
        saved = {slot: self._reuse(slot.label, "time", slot.index) for slot in slots}
        # A pair means "measured next to each other": half a cycle is reused whole or not at all.
        whole = {slot.index // len(self._specs) for slot in slots}
        whole -= {slot.index // len(self._specs) for slot, answer in saved.items() if answer is None}
        blocks: dict[str, list[Block]] = {label: [] for label in self._specs}
        for slot in slots:
            self._progress(done, total, f"{slot.label}: cycle {slot.cycle + 1} of {self._workload.cycles}")
            found = saved[slot] if slot.index // len(self._specs) in whole else None
            blocks[slot.label].append(self._block(slot, found or self._start(slot.label, "time", slot.index)))
            done += 1
        self._progress(done, total, "done")
        return memory, blocks

    def _block(self, slot: Slot, answer: Mapping[str, Any]) -> Block:
        samples = self._workload.read_samples(answer["samples"])
        return Block(slot.index, slot.cycle, slot.half, answer["load_s"], samples, answer["conditions"])

    def _file(self, label: str, mode: str, index: int) -> Path:
        return self._folder / (f"{index:04d}-{label}.json" if mode == "time" else f"memory-{label}.json")

    def _key(self, label: str, mode: str, index: int) -> str:
        spec = {key: value for key, value in self._specs[label].items() if key != "artifact"}
        return _io.sha256_json([spec, self._place, label, mode, index])

    def _reuse(self, label: str, mode: str, index: int) -> dict[str, Any] | None:
        file = self._file(label, mode, index)
        if not file.exists():
            return None
        try:
            saved = _io.read_json(file, "saved-block")
            answer, key = dict(saved["answer"]), saved["key"]
            if key == self._key(label, mode, index):
                self._check(label, mode, index, answer)
        except (SGLPError, KeyError, TypeError, ValueError, AttributeError):  # damaged, or of another version
            aside = file.with_suffix(".unreadable")
            file.replace(aside)
            self._progress(0, 1, f"{file.name} cannot be read; set aside as {aside.name} and measured again")
            return None
        return answer if key == self._key(label, mode, index) else None

    def _check(self, label: str, mode: str, index: int, answer: Mapping[str, Any]) -> None:
        """Read everything in an answer that is used later.

        Raises:
            BenchmarkError: If the samples are not those of the workload.
            KeyError, TypeError, AttributeError: If a field is missing or of another kind.
        """
        if mode == "time":
            check_samples(label, self._block(Slot(index, 0, 0, label), answer), self._workload)
        else:
            for reading in answer["memory"].values():
                MemoryReading.from_json(reading)

    def _start(self, label: str, mode: str, index: int) -> dict[str, Any]:
        spec = {**self._specs[label], "mode": mode}
        answer = self._device.run(spec, label=label, threads=self._workload.threads, timeout_s=self._timeout_s)
        try:  # before it is saved: an unusable answer must not be found by a resumed run
            self._check(label, mode, index, answer)
        except (KeyError, TypeError, AttributeError) as error:
            raise BenchmarkError(
                f"the worker of arm {label!r} gave an answer without a usable field; {error!r}; "
                "it is of another version of this package, so check the installation"
            ) from error
        saved = {"schema": "saved-block/1", "key": self._key(label, mode, index), "answer": answer}
        _io.write_json(self._file(label, mode, index), saved)
        return answer


def tqdm_progress() -> Progress:
    """A progress callback that draws a bar on standard error."""
    from tqdm import tqdm

    bar: tqdm[Any] = tqdm(total=0, unit="block", file=sys.stderr)

    def show(done: int, total: int, text: str) -> None:
        bar.total, bar.n = total, done
        bar.set_description(text)
        if done == total:
            bar.close()

    return show


def _silent(done: int, total: int, text: str) -> None:
    """Progress for callers that want none."""


def _check_labels(arms: Mapping[str, ExportArtifact], baseline: str, openers: Mapping[str, str]) -> None:
    faults = [
        f"arm label {label!r} is unusable; it names files and {CONTROL!r} is taken; use letters, digits, '.', '_', '-'"
        for label in arms
        if label == CONTROL or not re.fullmatch(r"[A-Za-z0-9_.-]+", label)
    ]
    if not arms:
        faults.append("there are no arms; nothing can be measured; pass at least one artifact")
    elif baseline not in arms:
        faults.append(f"baseline {baseline!r} is not an arm; the arms are {', '.join(arms)}; pass one of them")
    faults += [
        f"an opener is given for {label!r}, which is not an arm; the arms are {', '.join(arms)}; correct the label"
        for label in openers
        if label not in arms
    ]
    if faults:
        raise ConfigError(faults)


def _common_vocabulary(arms: Mapping[str, ExportArtifact]) -> int:
    sizes = {label: vocabulary_size(artifact) for label, artifact in arms.items()}
    unknown = [label for label, size in sizes.items() if size is None]
    if unknown:
        raise ConfigError(
            f"the vocabulary size of {', '.join(unknown)} is unknown; token ids are drawn from it; pass vocab_size"
        )
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"the arms have vocabularies of different size ({sizes}); they are not versions of one model; "
            "compare artifacts of the same model, or pass vocab_size"
        )
    return next(size for size in sizes.values() if size is not None)


def vocabulary_size(artifact: ExportArtifact) -> int | None:
    """Vocabulary of an artifact, from its details, its logits output or the ``config.json`` in its folder."""
    if isinstance(size := artifact.details.get("vocab_size"), int):
        return size
    for spec in artifact.outputs:
        if spec.name == "logits" and spec.shape and isinstance(size := spec.shape[-1], int):
            return size
    if "config.json" in artifact.files:
        config = _io.parse_json((artifact.path / "config.json").read_text(encoding="utf-8"), ours=False)
        for place in (config, config.get("text_config") or {}):  # multimodal models nest their language model
            if isinstance(size := place.get("vocab_size"), int):
                return size
    return None

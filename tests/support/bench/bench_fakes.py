"""An exporter whose runners have a known speed, for the harness tests and for the worker processes they start."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_bench.judge.certificates import CERTIFICATE
from sglp_deploy.artifact import ExportArtifact, write_manifest
from sglp_deploy.parity.bounds import thresholds_for
from sglp_deploy.parity.certificate import ParityReport

VOCABULARY = 11
OPENER = "bench_fakes:FakeExporter"


class FakeClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class FakeRunner:
    """Takes a given time for each call, and misbehaves in the way its artifact's details name."""

    def __init__(self, artifact: ExportArtifact, clock: FakeClock | None = None, factor: float = 1.0) -> None:
        self.details = artifact.details
        self.clock = clock or FakeClock()
        self.factor = factor
        self.calls: list[str] = []

    def __enter__(self) -> FakeRunner:
        behaviour = self.details.get("behaviour")
        if log := self.details.get("log"):
            seen = {
                "pid": os.getpid(),
                "omp": os.environ.get("OMP_NUM_THREADS"),
                "pythonpath": os.environ.get("PYTHONPATH"),
                "torch": "torch" in sys.modules,
            }
            with Path(log).open("a") as stream:
                stream.write(json.dumps(seen) + "\n")
        if behaviour == "crash":
            raise RuntimeError("the fake runtime fell over")
        if behaviour == "vanish":
            os._exit(0)
        if behaviour == "rubbish":
            Path("answer.json").write_text("not json at all")
            os._exit(0)
        if behaviour == "killed":
            os.kill(os.getpid(), 9)
        if behaviour == "hang":
            time.sleep(600)
        return self

    def __exit__(self, *exc: object) -> None:
        self.calls.append("exit")

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        raise NotImplementedError

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        all_positions: bool = False,
    ) -> NDArray[np.float32]:
        self.calls.append("prefill")
        self.clock.now_s += self.details.get("prefill_s", 0.3) * self.factor
        return self._logits(len(input_ids))

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.calls.append("decode")
        self.clock.now_s += self.details.get("decode_s", 0.05) * self.factor
        return self._logits(len(token_ids))

    def _logits(self, batch: int) -> NDArray[np.float32]:
        value = np.nan if self.details.get("behaviour") == "nan" else 0.0
        rows = batch + 1 if self.details.get("behaviour") == "wrong batch" else batch
        return np.full((rows, VOCABULARY), value, dtype=np.float32)


class ForwardOnlyRunner:
    """A runner without a cache."""

    def __enter__(self) -> ForwardOnlyRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        raise NotImplementedError

    def synchronize(self) -> None:
        return None


class FakeExporter:
    """Opens what :func:`fake_artifact` writes."""

    name = "fake"
    requires = ()

    def open(self, artifact: ExportArtifact, **options: Any) -> FakeRunner | ForwardOnlyRunner:
        assert set(options) == {"device", "threads"}
        if artifact.details.get("behaviour") == "forward only":
            return ForwardOnlyRunner()
        return FakeRunner(artifact)


def fake_artifact(folder: Path, *, precision: str = "fp32", weight_bytes: int = 1000, **details: Any) -> ExportArtifact:
    """A complete artifact folder of format "fake" with these details, and its certificate."""
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"w" * 10)
    artifact = write_manifest(
        folder,
        format="fake",
        inputs=(),
        outputs=(),
        precision=precision,
        weight_bytes=weight_bytes,
        n_layers=4,
        plan_digest="p",
        model={"id": "fake", "fingerprint": "f", "config_digest": "c", "gguf_file": None},
        details={"vocab_size": VOCABULARY, **details},
    )
    certificate(artifact).save(folder / CERTIFICATE)
    return artifact


def certificate(artifact: ExportArtifact, *reasons: str) -> ParityReport:
    """A certificate of ``artifact``, failed where reasons are given; its one case was measured by nobody."""
    facts = {"format": "fake", "runner": "fake", "reference": "none", "precision": artifact.precision}
    bounds = thresholds_for("fp32")
    statistics = {"kl_p99": 0.0, "kl_max": 0.0, "max_abs": 0.0, "cosine_min": 1.0, "top1_stable": 1.0, "n_stable": 4}
    case = {
        "name": "planted",
        "passed": not reasons,
        "positions": 4,
        "statistics": statistics,
        "worst": {"row": 0, "phase": "prefill", "position": 0, "token": 0},
        "last_position_max_abs": 0.0,
        "greedy": {"tokens": 4, "equal_tokens": 4, "departures": []},
    }
    noise = dict.fromkeys(("max_abs", "kl_p99", "kl_max"), 0.0)
    return ParityReport(
        artifact.digest, **facts, thresholds=asdict(bounds), noise_floor=noise, cases=(case,), reasons=reasons
    )

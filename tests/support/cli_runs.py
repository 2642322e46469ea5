"""One finished run of the whole line on a tiny model, made once and copied by the tests that damage it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bench_results
import tiny
from exports import share_traces
from once import once
from sglp_bench.judge.certificates import require_certificates
from sglp_bench.result import BenchmarkResult, artifact_facts
from sglp_bench.workloads.generate import Workload
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli import pipeline
from sglp_deploy.cli.main import main
from short_certificates import fewer_steps

ROOT = Path(__file__).parents[2]
# Small enough for a test, large enough for six layers to be told apart.
SMALL = ("--calibration-tokens", "256", "--sequence-length", "32", "--threads", "1")
SMALL_RUN = (*SMALL, "--evaluation-tokens", "256", "--evaluation-chunk", "32", "--workload", "smoke")
SMALL_RUN = (*SMALL_RUN, "--sample-tokens", "6")
SMALL_RUN = (*SMALL_RUN, "--repair", "none")  # what is about repairs asks for one, and the last flag wins


def fake_run_arms(arms: Mapping[str, ExportArtifact], workload: Workload, **options: Any) -> BenchmarkResult:
    """In place of :func:`sglp_bench.measure.harness.run_arms`: real result objects with planted times, at once."""
    base = options["baseline"]
    planted = bench_results.planted_result({name: 1.25 for name in arms if name != base}, work=workload)
    labels = {"baseline": base} | {name: name for name in planted.arms if name != "baseline"}
    artifacts = dict(arms) | {"control": arms[base]}
    states = require_certificates(artifacts, options["certificates"])
    made = {
        labels[name]: replace(arm, artifact=artifact_facts(artifacts[labels[name]], states[labels[name]]))
        for name, arm in planted.arms.items()
    }
    Path(options["out_dir"]).mkdir(parents=True, exist_ok=True)
    options["progress"](1, 1, "done")
    return replace(planted, baseline=base, arms=made)


def quick(patch: pytest.MonkeyPatch) -> None:
    """Runs of the whole line take planted times, certificates of few steps, and traces that are there."""
    share_traces(patch)
    patch.setattr(pipeline, "run_arms", fake_run_arms)
    fewer_steps(patch)


def _finish(model: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        assert main(run_arguments(model, folder)) == 0


def tiny_model(factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of six layers; not to be changed."""
    return once(factory, "cli-model/llama", tiny.save_tiny)


def finished_run(factory: pytest.TempPathFactory) -> Path:
    """The finished run; not to be changed, so copy it first."""
    model = tiny_model(factory)
    return once(factory, "cli-run/demo", lambda folder: _finish(model, folder))


def run_arguments(model: Path, folder: Path, *more: str, to: str = "onnx,vllm", drop: str = "2") -> list[str]:
    """``run`` on the tiny model."""
    return ["run", str(model), "--drop", drop, "--to", to, *SMALL_RUN, "-q", "-o", str(folder), *more]


def environment(*paths: Path, **changes: str) -> dict[str, str]:
    """Variables of a process that imports this checkout and what lies in ``paths``."""
    own = [ROOT, ROOT / "exporters", ROOT / "bench", ROOT / "tests/support", ROOT / "tests/support/zoo"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, *own])), "OMP_NUM_THREADS": "1"} | changes


def command(arguments: Sequence[str], *paths: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sglp_deploy", *arguments],
        env=environment(*paths, **changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# The state of a training is written after every step.
_ALWAYS = (
    "import sys\n"
    "from sglp_deploy.healing.state import Keeper\n"
    "Keeper.due = property(lambda keeper: keeper._file is not None)\n"
    "from sglp_deploy.cli.main import main\n"
    "sys.exit(main(sys.argv[1:]))"
)


def killed_and_resumed(arguments: Sequence[str], folder: Path, after_s: Sequence[float]) -> int:
    """Run the command until it ends, with kill -9 after each of these seconds; returns how often it was killed.

    Args:
        arguments: Of the command line.
        folder: Where it writes; the seconds count from the first thing in there.
        after_s: When.
    """
    kills = 0
    for delay in [*after_s, None]:
        process = subprocess.Popen(
            [sys.executable, "-c", _ALWAYS, *arguments], env=environment(), stdout=subprocess.DEVNULL
        )
        if delay is None:
            assert process.wait(300) == 0
            return kills
        waited = time.monotonic() + 120
        while process.poll() is None and not folder.exists() and time.monotonic() < waited:
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        if process.wait(60) == 0:
            return kills
    raise AssertionError("it never ended")

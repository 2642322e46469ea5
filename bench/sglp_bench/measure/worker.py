"""One block in one fresh process: ``python -m sglp_bench.measure.worker SPEC.json OUT.json``.

A process of its own gives every block the same start: no warm allocator, no cache of another arm, no memory peak left
by an earlier one.  This module loads no runtime itself.  What the exporter's runner imports is what gets measured.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglp_bench.devices.environment import block_conditions
from sglp_bench.devices.memory import device_readings, idle_host, peak_host
from sglp_bench.measure.timeable import refusal
from sglp_bench.workloads.kinds import workload_from_json
from sglp_deploy import _io, registry
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import BenchmarkError, ConfigError, SGLPError
from sglp_deploy.isolation.worker_side.parent_watch import end_with_parent
from sglp_deploy.protocols import Exporter

_MEMORY_ITERATIONS = 2  # the second call is where a runtime's workspace has reached its size


def resolve_opener(opener: str) -> Exporter:
    """The exporter named by ``"module:attr"``; a class is instantiated.

    Raises:
        ConfigError: If the string has another form, or the module or the attribute does not exist.
    """
    module, colon, attribute = opener.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"opener {opener!r} is not 'module:attr'; nothing can be imported from it; correct it")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"opener {opener!r} cannot be loaded; {error}; check the name and the path") from error
    exporter: Exporter = found() if isinstance(found, type) else found
    return exporter


def run_block(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Do what ``spec`` asks and return the content of the answer file.

    Args:
        spec: ``mode`` ("time" or "memory"), ``artifact`` (folder), ``artifact_digest``, ``opener`` ("module:attr" or
            None for the registry), ``workload``, ``vocab_size``.

    Raises:
        SGLPError: If the artifact is not the one the parent saw, or a time of its runner would mean nothing.
    """
    workload = workload_from_json(spec["workload"])
    artifact = ExportArtifact.load(spec["artifact"], check_files=False)  # the parent has checked them
    if artifact.digest != spec["artifact_digest"]:
        raise BenchmarkError(f"{artifact.path} changed during the benchmark; its manifest differs; start again")
    exporter = resolve_opener(spec["opener"]) if spec["opener"] else _registered(artifact.format)
    inputs = workload.inputs(artifact, spec["vocab_size"])
    idle = idle_host()
    start = block_conditions(workload.device)
    loading = time.perf_counter()
    opened = exporter.open(artifact, device=workload.device, threads=workload.threads)
    if why := refusal(opened, artifact.format, workload):
        raise BenchmarkError(why)
    with opened as runner:
        runner.synchronize()
        load_s = time.perf_counter() - loading
        answer: dict[str, Any]
        if spec["mode"] == "memory":
            for _ in range(_MEMORY_ITERATIONS):
                workload.run_untimed(runner, inputs)
            through_torch = bool(getattr(runner, "allocates_through_torch", False))
            device_memory = device_readings(workload.device, through_torch=through_torch)
            readings = {"host_idle": idle, "host_peak": peak_host(), **device_memory}
            answer = {"memory": {rung: reading.to_json() for rung, reading in readings.items()}}
        else:
            answer = {"load_s": load_s, "samples": workload.run_timed(runner, inputs).to_json()}
    conditions = {"start": start, "end": block_conditions(workload.device)}
    return {"schema": "block/1", "mode": spec["mode"], **answer, "conditions": conditions}


def main(arguments: list[str]) -> int:
    """Command line of the worker; expected failures print one line and give exit status 1."""
    if len(arguments) != 2:
        print("usage: python -m sglp_bench.measure.worker SPEC.json OUT.json", file=sys.stderr)
        return 2
    end_with_parent()
    try:
        spec = _io.read_json(Path(arguments[0]), "block-spec")
        _restore_pythonpath(spec)
        _io.write_json(Path(arguments[1]), run_block(spec))
    except SGLPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _restore_pythonpath(spec: Mapping[str, Any]) -> None:
    # The parent set PYTHONPATH to its own sys.path.  A runner that starts another interpreter (an isolated
    # environment) must not hand these folders on: they hold other versions of the same packages.
    before = spec["pythonpath_before"]
    os.environ.pop("PYTHONPATH", None)
    if before is not None:
        os.environ["PYTHONPATH"] = before


def _registered(name: str) -> Exporter:
    exporter: Exporter = registry.exporter(name)
    return exporter


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

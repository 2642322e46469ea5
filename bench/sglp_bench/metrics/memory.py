"""How many bytes an artifact needs, each number from one rung of the memory ladder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglp_bench.devices.memory import MemoryReading
from sglp_bench.metrics.metric import MemoryMetric


def _rung(name: str) -> Callable[[Mapping[str, Any], Mapping[str, MemoryReading]], MemoryReading]:
    def read(artifact: Mapping[str, Any], memory: Mapping[str, MemoryReading]) -> MemoryReading:
        del artifact
        return memory.get(name, MemoryReading("none", None, "not read on this device"))

    return read


def _from_manifest(artifact: Mapping[str, Any], memory: Mapping[str, MemoryReading]) -> MemoryReading:
    del memory
    return MemoryReading("manifest", int(artifact["weight_bytes"]))


PEAK_HOST = MemoryMetric(
    name="peak_host_bytes",
    label="Peak host memory",
    unit="",
    formula="highest resident bytes of the process, in a pass of its own",
    read=_rung("host_peak"),
    place=50,
)

PEAK_DEVICE = MemoryMetric(
    name="peak_device_bytes",
    label="Peak device memory",
    unit="",
    formula="highest bytes of live tensors on the device, in a pass of its own",
    read=_rung("device_allocated_peak"),
    device_only=True,
    place=60,
)

WEIGHTS = MemoryMetric(
    name="weight_bytes",
    label="Weights",
    unit="",
    formula="bytes of weights in the artifact, from its manifest",
    read=_from_manifest,
    measured=False,
    place=70,
)

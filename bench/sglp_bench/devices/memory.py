"""How much memory an artifact needs, each number under the name of the probe that read it.

"Memory" is a ladder of different quantities (bytes on disk, live tensors, what an allocator reserved, what the process
ever touched).  Numbers from two rungs must never meet in one ratio.  So no reading here travels without its probe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglp_bench.devices.environment import nvml_handle

_PROC = Path("/proc")


@dataclass(frozen=True)
class MemoryReading:
    """One probe's answer.

    Attributes:
        probe: What was asked, for example "VmHWM" or "torch.cuda.max_memory_allocated".
        bytes: The answer, or None when the probe is not available here.
        note: Why there is no answer, or what the number includes.
    """

    probe: str
    bytes: int | None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MemoryReading:
        """Inverse of :meth:`to_json`."""
        return cls(value["probe"], value["bytes"], value["note"])


def idle_host(proc: Path = _PROC) -> MemoryReading:
    """Resident bytes of this process now; read before a model is loaded, it is the baseline of the peak."""
    value = _status_bytes(proc / "self" / "status", "VmRSS")
    return MemoryReading("VmRSS", value, None if value is not None else "no /proc on this system")


def peak_host(proc: Path = _PROC) -> MemoryReading:
    """Most resident bytes this process ever had, with those of its living child processes added.

    ``VmHWM`` starts at zero with each ``exec``.  ``ru_maxrss`` does not on Linux: a new process inherits the peak of
    the one that started it, so it is only the fallback where /proc is missing.
    """
    own = _status_bytes(proc / "self" / "status", "VmHWM")
    if own is None:
        return _ru_maxrss()
    children = [
        size for pid in _descendants() if (size := _status_bytes(proc / str(pid) / "status", "VmHWM")) is not None
    ]
    note = (
        f"sum of the peaks of this process and {len(children)} child processes; shared pages count more than once"
        if children
        else None
    )
    return MemoryReading("VmHWM", own + sum(children), note)


def device_readings(device: str, *, through_torch: bool) -> dict[str, MemoryReading]:
    """Device memory by rung: torch's live tensors, torch's reserve, and what NVML says of this process.

    Args:
        device: The workload's device; nothing is read for "cpu".
        through_torch: Whether torch allocates all that the runner needs.  One that only keeps its inputs and outputs
            in tensors (TensorRT) would look far smaller than it is.
    """
    if device.split(":")[0] != "cuda":
        return {}
    index = int(device.partition(":")[2] or 0)
    readings = {}
    torch = sys.modules.get("torch")
    live = through_torch and torch is not None and torch.cuda.is_initialized()
    for rung, function in (
        ("device_allocated_peak", "max_memory_allocated"),
        ("device_reserved_peak", "max_memory_reserved"),
    ):
        probe = f"torch.cuda.{function}"
        readings[rung] = (
            MemoryReading(probe, int(getattr(sys.modules["torch"].cuda, function)(index)))
            if live
            else MemoryReading(probe, None, "this runtime does not allocate all of its memory through torch")
        )
    readings["device_process_used"] = _nvml_process_used(index)
    return readings


def _status_bytes(status: Path, key: str) -> int | None:
    try:
        lines = status.read_text().splitlines()
    except OSError:  # no /proc, or a child that has just ended
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _descendants() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children(recursive=True)]


def _ru_maxrss() -> MemoryReading:
    try:
        import resource
    except ImportError:
        return MemoryReading("none", None, "neither /proc nor getrusage on this system")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryReading("ru_maxrss", peak, "may include the peak of the process that started this one")


def _nvml_process_used(index: int) -> MemoryReading:
    import os

    probe = "nvmlDeviceGetComputeRunningProcesses (now, not a peak)"
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = nvml_handle(pynvml, index)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except ImportError:
        return MemoryReading(probe, None, "needs nvidia-ml-py")
    except Exception as error:  # noqa: BLE001 - NVML's own exception type exists only once it is imported
        return MemoryReading(probe, None, f"NVML refused: {error}")
    ours = {os.getpid(), *_descendants()}
    used = [process.usedGpuMemory for process in processes if process.pid in ours]
    if not used or any(value is None for value in used):
        return MemoryReading(probe, None, "NVML does not attribute memory to processes here (container or MIG)")
    return MemoryReading(probe, int(sum(used)))

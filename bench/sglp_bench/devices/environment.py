"""Where a number was measured: the facts without which a time means nothing, and the few that must agree."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

# Two results are compared only when these agree.  Load, clocks and temperatures vary within a run and are recorded per
# block instead.
COMPARABLE_KEYS = (
    "machine",
    "system",
    "cpu_model",
    "cpus_usable",
    "cpu_quota",
    "python",
    "packages",
    "thread_variables",
    "gpus",
    "gpu_driver",
)

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

# What every run computes with; what a format depends on beside it, its exporter declares.
_PACKAGES = ("numpy", "sglp-deploy", "torch", "transformers")


def thread_variables(threads: int | None) -> dict[str, str]:
    """The environment variables that give every common CPU library ``threads`` threads; empty for None."""
    return {} if threads is None else dict.fromkeys(THREAD_VARIABLES, str(threads))


def collect_environment(
    *, device: str = "cpu", threads: int | None = None, packages: Iterable[str] = ()
) -> dict[str, Any]:
    """Facts about this machine and this interpreter, as JSON; what cannot be read is None, never guessed.

    Args:
        device: The workload's device; the graphics card is asked about only for "cuda".
        threads: The workload's threads; decides the thread variables the blocks will see.
        packages: Distributions the measured formats depend on (:attr:`sglp_deploy.protocols.FormatFacts.packages`).
    """
    import psutil

    inherited = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    gpus, driver = _gpus() if device.startswith("cuda") else (None, None)
    return {
        "collected_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "system": platform.system(),
        "os_release": platform.release(),
        "cpu_model": _cpu_model(),
        "cpus_logical": psutil.cpu_count(logical=True),
        "cpus_physical": psutil.cpu_count(logical=False),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_quota": _read(Path("/sys/fs/cgroup/cpu.max")),
        "cpu_governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "ram_bytes": psutil.virtual_memory().total,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": _package_versions({*_PACKAGES, *packages}),
        "thread_variables": {**inherited, **thread_variables(threads)},
        "gpus": gpus,
        "gpu_driver": driver,
        "power_limit_w": None,
        "energy_j": None,
        "power_note": "not measured: no power counter is read by this harness",
    }


def block_conditions(device: str = "cpu") -> dict[str, Any]:
    """The state of the machine at one moment, read at the start and the end of a block.

    Returns:
        ``load_average_1min``, ``cpu_mhz`` (mean over cores) and, for "cuda", clocks in MHz, temperature in degrees
        Celsius, power in watts and the throttle reasons as NVML's bit mask; None where unreadable.
    """
    conditions: dict[str, Any] = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cpu_mhz": _cpu_mhz(),
    }
    if device.startswith("cuda"):
        conditions["gpu"] = _gpu_conditions(int(device.partition(":")[2] or 0))
    return conditions


def differing_keys(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """The comparable keys on which two environments disagree, in the order of :data:`COMPARABLE_KEYS`.

    Of packages those count that both have recorded: a run records what its own formats depend on.
    """
    return [key for key in COMPARABLE_KEYS if _differ(key, left.get(key), right.get(key))]


def _differ(key: str, left: Any, right: Any) -> bool:
    if key == "packages" and isinstance(left, Mapping) and isinstance(right, Mapping):
        return any(left[name] != right[name] for name in left.keys() & right.keys())
    return bool(left != right)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _cpu_model() -> str | None:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or None


def _cpu_mhz() -> float | None:
    values = [
        float(line.partition(":")[2])
        for line in (_read(Path("/proc/cpuinfo")) or "").splitlines()
        if line.startswith("cpu MHz")
    ]
    return round(sum(values) / len(values), 1) if values else None


def _package_versions(names: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in sorted(names):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _gpus() -> tuple[list[str] | None, str | None]:
    try:
        import pynvml

        pynvml.nvmlInit()
        names = [
            str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index)))
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
        return names, str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001 - not installed, no driver, or refused: the fact stays unknown
        return None, None


def nvml_handle(pynvml: Any, index: int) -> Any:
    """NVML's handle for the CUDA device ``index``: NVML ignores ``CUDA_VISIBLE_DEVICES``, which renumbers them."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if not visible:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    entry = visible[index]
    return pynvml.nvmlDeviceGetHandleByIndex(int(entry)) if entry.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(entry)


def _gpu_conditions(index: int) -> dict[str, Any] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = nvml_handle(pynvml, index)
        return {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        }
    except Exception:  # noqa: BLE001 - not installed, no driver, or refused: the fact stays unknown
        return None

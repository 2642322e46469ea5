"""What works on this machine: interpreter, packages against what we ask for, devices, memory and disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from sglp_deploy import registry
from sglp_deploy.isolation import environments
from sglp_deploy.isolation.environments import ENVIRONMENTS

_GIB = 1 << 30


def examine() -> list[dict[str, str]]:
    """Findings in reading order: ``state`` ("ok", "missing", "conflict", "note"), ``what``, ``detail``."""
    findings = [_finding("ok", "python", f"{platform.python_version()} at {sys.executable}")]
    findings += _packages()
    findings += _runtimes()
    findings += _machine()
    for plugin in registry.plugins():
        findings.append(
            _finding("ok" if plugin.reason is None else "missing", f"exporter {plugin.name}", plugin.reason or "usable")
        )
    return findings


def _finding(state: str, what: str, detail: str) -> dict[str, str]:
    return {"state": state, "what": what, "detail": detail}


def _packages() -> list[dict[str, str]]:
    try:
        declared = metadata.requires("sglp-deploy") or []
    except metadata.PackageNotFoundError:
        return [_finding("note", "sglp-deploy", "not installed (running from a checkout); versions are not checked")]
    findings = []
    for line in declared:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if requirement.name == "onnxruntime" and (gpu := _version("onnxruntime-gpu")):
                # The GPU build is the same package under another name, and must not have the CPU build beside it.
                findings.append(_finding("ok", "onnxruntime-gpu", f"{gpu}, in place of onnxruntime"))
                continue
            findings.append(_finding("missing", requirement.name, f"pip install '{requirement}'"))
            continue
        # A local version such as 2.13.0+cpu satisfies 2.13.
        fits = requirement.specifier.contains(version, prereleases=True)
        detail = version if fits else f"{version} is outside {requirement.specifier}; pip install '{requirement}'"
        findings.append(_finding("ok" if fits else "conflict", requirement.name, detail))
    return findings


def _runtimes() -> list[dict[str, str]]:
    findings = []
    installed = {name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)}
    if len(installed) == 2:
        findings.append(
            _finding(
                "conflict",
                "onnxruntime",
                "onnxruntime and onnxruntime-gpu overwrite each other's folder; uninstall both, then install one",
            )
        )
    for look in (_onnx_runtime, _cuda):
        try:
            findings.append(look())
        except ImportError as error:
            findings.append(_finding("missing", str(error.name or look.__name__.strip("_")), str(error)))
        except Exception as error:  # noqa: BLE001  # a broken installation fails in its own way; report it and go on
            findings.append(
                _finding("conflict", look.__name__.strip("_"), f"{type(error).__name__}: {error}; reinstall it")
            )
    return findings + [_finding("note", f"environment {name}", environments.state(name)) for name in ENVIRONMENTS]


def _onnx_runtime() -> dict[str, str]:
    import onnxruntime

    return _finding("note", "ONNX Runtime offers", ", ".join(onnxruntime.get_available_providers()))


def _cuda() -> dict[str, str]:
    import torch

    build = torch.version.cuda
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return _finding("ok", "CUDA", f"{build}: {names}")
    detail = f"torch was built for CUDA {build} but sees no device" if build else "torch is a CPU build"
    return _finding("note", "CUDA", f"{detail}; --device cpu works, --device cuda does not")


def _machine() -> list[dict[str, str]]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    return [
        _finding("note", "processors", f"{os.cpu_count()} of {platform.machine()}"),
        _finding("note", "memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"),
        _finding("note", "disk", f"{disk.free / _GIB:.1f} GiB free in {Path.cwd()}"),
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

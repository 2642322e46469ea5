"""Names of exporters to classes: strings for ours, entry points for theirs, nothing imported before it is asked for.

A third party registers under the entry-point group ``sglp_deploy.exporters``.  It may not take the name of a built-in
one.  One that cannot be imported is listed as broken.  It never breaks the command line.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata

from sglp_deploy.errors import ExporterNotFoundError, MissingDependencyError
from sglp_deploy.protocols import EnvironmentSpec, Exporter, FormatFacts

GROUP = "sglp_deploy.exporters"

BUILTIN = {
    "executorch": "sglp_exporters.executorch.exporter:ExecuTorchExporter",
    "gguf": "sglp_exporters.gguf.exporter:GgufExporter",
    "onnx": "sglp_exporters.onnx.exporter:OnnxExporter",
    "openvino": "sglp_exporters.openvino.exporter:OpenVinoExporter",
    "optimum": "sglp_exporters.optimum.exporter:OptimumExporter",
    "ort-genai": "sglp_exporters.genai.exporter:OrtGenaiExporter",
    "tensorrt": "sglp_exporters.tensorrt.exporter:TensorRTExporter",
    "tensorrt-kit": "sglp_exporters.tensorrt.exporter:TensorRTKitExporter",
    "torch": "sglp_exporters.checkpoint.exporter:TorchExporter",
    "vllm": "sglp_exporters.vllm.exporter:VllmExporter",
}


@dataclass(frozen=True)
class PluginInfo:
    """One line of ``sglp-deploy plugins``; ``reason`` says why it cannot be used, or is None."""

    name: str
    origin: str
    version: str
    reason: str | None


def exporter(name: str) -> Exporter:
    """The exporter called ``name``.

    Raises:
        ExporterNotFoundError: If there is none; the message has the nearest match and the list.
        MissingDependencyError: If what it needs is not installed.
    """
    targets = _targets()
    if name not in targets:
        close = difflib.get_close_matches(name, targets, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ExporterNotFoundError(
            f"there is no exporter {name!r}; {hint}known: {', '.join(sorted(targets))}; 'sglp-deploy plugins' says more"
        )
    try:
        made = _load(targets[name])
        missing = _missing(made)
    except Exception as error:
        raise MissingDependencyError(
            f"exporter {name!r} ({targets[name]}) cannot be loaded; {type(error).__name__}: {error}; reinstall the "
            "package it comes from"
        ) from error
    if missing:
        raise MissingDependencyError(
            f"exporter {name!r} needs {', '.join(missing)}; not installed here; pip install {_source(name, missing)}"
        )
    return made


def facts(name: str) -> FormatFacts:
    """What the format ``name`` declares of itself; the defaults for one that declares nothing.

    Those too for one that is unknown or cannot be loaded: whoever needs it is told so by :func:`exporter`.
    """
    target = _targets().get(name)
    return FormatFacts() if target is None else _facts_at(target)


def environments() -> dict[str, EnvironmentSpec]:
    """Every isolated environment that a format brings, by name; a built-in format's name is not taken by another's."""
    found: dict[str, EnvironmentSpec] = {}
    for _name, target in sorted(_targets().items(), key=lambda item: (item[0] not in BUILTIN, item[0])):
        for spec in _facts_at(target).environments:
            found.setdefault(spec.name, spec)
    return found


def plugins() -> list[PluginInfo]:
    """Every exporter there is, usable or not, by name."""
    lines = []
    for name, target in sorted(_targets().items()):
        reason = None
        try:
            missing = _missing(_load(target))
            if missing:
                reason = f"needs {', '.join(missing)}"
        except Exception as error:  # noqa: BLE001  # a plugin may fail in any way; it is reported, not hidden
            reason = f"broken: {type(error).__name__}: {error}"
        package = target.partition(":")[0].partition(".")[0]
        lines.append(PluginInfo(name, target, _version(package), reason))
    return lines


def shadowed() -> list[str]:
    """Entry points that tried to take a built-in's name and were left out."""
    return [f"{entry.name} ({entry.value})" for entry in metadata.entry_points(group=GROUP) if entry.name in BUILTIN]


def _targets() -> dict[str, str]:
    theirs = {entry.name: entry.value for entry in metadata.entry_points(group=GROUP)}
    return theirs | BUILTIN


def _load(target: str) -> Exporter:
    module, _, attribute = target.partition(":")
    made = getattr(importlib.import_module(module), attribute)()
    if not isinstance(made, Exporter):
        raise TypeError(f"{attribute} lacks one of name, requires, export, open")
    _facts(made)
    return made


def _facts_at(target: str) -> FormatFacts:
    try:
        return _facts(_load(target))
    except Exception:  # noqa: BLE001  # a plugin may fail in any way, and exporter() and plugins() say in which
        return FormatFacts()


def _facts(made: Exporter) -> FormatFacts:
    declared = getattr(made, "facts", FormatFacts())
    if not isinstance(declared, FormatFacts):
        raise TypeError(f"facts of {type(made).__name__} is a {type(declared).__name__}, not FormatFacts")
    return declared


def _missing(made: Exporter) -> list[str]:
    return [package for package in made.requires if not _importable(package)]


def _importable(package: str) -> bool:
    try:
        found = importlib.util.find_spec(package)
        # A folder of that name in the working directory ("-o onnx") looks like a package without code of its own; so
        # do a few real ones, which somebody has installed.
        return found is not None and (found.origin is not None or package in metadata.packages_distributions())
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def _source(name: str, missing: list[str]) -> str:
    """What to give pip: the extra of ours that brings the exporter's needs, or the packages by their import names."""
    try:
        extras = metadata.metadata("sglp-deploy").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        extras = []
    return f"'sglp-deploy[{name}]'" if name in BUILTIN and name in extras else " ".join(missing)


def _version(package: str) -> str:
    ours = package in ("sglp_exporters", "sglp_deploy")
    distributions = ["sglp-deploy"] if ours else metadata.packages_distributions().get(package, [package])
    try:
        return metadata.version(distributions[0])
    except metadata.PackageNotFoundError:
        return "unknown"

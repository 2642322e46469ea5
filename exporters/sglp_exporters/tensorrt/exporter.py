"""TensorRT: engines built ahead of time by TensorRT 10, 11 or TensorRT for RTX, and build kits for other machines.

The artifact keeps the ONNX its engine was built from.  TensorRT for RTX builds on a machine without a GPU but cannot
run there.  So such a machine certifies that ONNX, and everything it writes says so.  The engine itself is executed, and
certified, by the same command on a machine that has the device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_deploy import _io, registry
from sglp_deploy._names import unknown_name
from sglp_deploy.artifact import (
    BEYOND_WINDOW,
    DECODE_STEPS,
    MANIFEST,
    ExportArtifact,
    producer_versions,
    write_manifest,
)
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.isolation import children
from sglp_deploy.protocols import FormatFacts, Runner, check_open_options
from sglp_exporters.onnx.runner import ONNX_PACKAGES
from sglp_exporters.runners import stored_weights
from sglp_exporters.tensorrt import build
from sglp_exporters.tensorrt.build import ENGINE_FILE, KIT_FILE, REPORT_FILE, SCRIPT_FILE, Refused
from sglp_exporters.tensorrt.built import built_here, stand_in
from sglp_exporters.tensorrt.environment import MODELOPT

# Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
if TYPE_CHECKING:
    from torch import nn

    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.diagnosis import StoredTensor

_STAND_IN = "ONNX Runtime on the ONNX this engine was built from; engine not executed"
_KIT_STAND_IN = "ONNX Runtime on the ONNX this kit builds from; no engine was built"
_FACTS = FormatFacts(
    environments=(MODELOPT,),
    packages=(*ONNX_PACKAGES, "tensorrt", "tensorrt-rtx"),
)
_LAST_WORDS = 600  # characters of a crashed builder that are repeated


@dataclass(frozen=True)
class _Options:
    """Options of an export; see docs/tensorrt.md."""

    target: str | Sequence[str] = build.PORTABLE
    precision: str | None = None
    max_batch: int | None = None
    max_prompt: int | None = None
    max_total: int | None = None
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    timing_cache: str | Path | None = None
    kit: bool = False
    activations: str | None = None
    calibration: str | Path | None = None


class TensorRTExporter:
    """Builds engines with the TensorRT that is installed, the classic one before TensorRT for RTX."""

    name = "tensorrt"
    facts = _FACTS

    def __init__(self) -> None:
        self.requires: tuple[str, ...] = (*_ONNX_NEEDS, build.package_here() or build.CLASSIC)

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """None: the graph is traced from layers that were built by ``layer_types``."""
        del model_type
        return None

    def check_precision(self, precision: str) -> None:
        """Refuse what the ONNX exporter refuses, before any work."""
        check = getattr(registry.exporter("onnx"), "check_precision", None)
        if check is not None:
            check(precision)

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write the ONNX, the build kit, the engine and the manifest.

        Args:
            model: What to export.
            out_dir: Complete or untouched.
            options: ``target`` ("portable", "sm_86", "rtx-4090", several after commas), ``precision`` ("fp32", "fp16"
                or "int8"; the model's own when omitted), ``max_batch``, ``max_prompt``, ``max_total``, ``sizes``
                (ranges by name), ``timing_cache`` (a file), ``kit`` (stop before the engine: see
                :class:`TensorRTKitExporter`); with "int8" also ``activations`` and ``calibration`` (see
                :mod:`sglp_exporters.tensorrt.int8`).

        Raises:
            ConfigError: If an option is wrong, or this TensorRT cannot build for the target.
            MissingDependencyError: If int8 is asked for and ModelOpt's environment is not there.
            BackendError: If the model cannot be traced, or TensorRT refuses the graph; the node is named.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        chosen = _options(self.name, options)
        if chosen.kit:
            return TensorRTKitExporter().export(model, out_dir, **{k: v for k, v in options.items() if k != "kit"})
        targets = _targets(chosen.target)
        package = build.package_here()
        try:
            build.check_targets(targets, package or build.CLASSIC, build.device_capability())
        except Refused as error:
            raise ConfigError(str(error)) from error
        with _io.staged_directory(Path(out_dir)) as folder:
            inner = _write_kit(model, folder, chosen, targets)
            report = _run_builder(folder, chosen.timing_cache)
            _write_manifest(
                self.name,
                model,
                folder,
                inner,
                {
                    "runner": _STAND_IN,
                    "executed": False,
                    "execution": report["execution"],
                    "targets": report["targets"],
                    "build": {key: report[key] for key in ("engine", "network", "runtime", "build_s", "audit")},
                },
                {report["runtime"]["package"]: report["runtime"]["version"]},
            )
        return ExportArtifact.load(out_dir, check_files=False)

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights of the ONNX in the folder, by name; an engine's own cannot be read."""
        return stored_weights.of_onnx(artifact)

    def open(self, artifact: ExportArtifact, **options: Any) -> Runner:
        """The engine's runner on "cuda"; on "cpu" a runner of the very ONNX it was built from.

        Raises:
            ArtifactError: If the ONNX in the folder is not the one the engine was built from.
        """
        checked = check_open_options(self.name, options)
        if str(checked.get("device", "cpu")).partition(":")[0] != "cuda":
            return stand_in(artifact, artifact.details["build"]["network"]["sha256"], checked)
        from sglp_exporters.tensorrt.runner import runner_for

        build = artifact.details["build"]
        return runner_for(
            artifact, artifact.path / ENGINE_FILE, str(build["runtime"]["package"]), str(checked["device"])
        )


class TensorRTKitExporter:
    """Writes what a target device needs to build its engine itself: the graph, the profiles, the script, digests."""

    name = "tensorrt-kit"
    facts = _FACTS

    def __init__(self) -> None:
        self.requires: tuple[str, ...] = _ONNX_NEEDS

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """None: the graph is traced from layers that were built by ``layer_types``."""
        del model_type
        return None

    def check_precision(self, precision: str) -> None:
        """Refuse what the ONNX exporter refuses, before any work."""
        TensorRTExporter().check_precision(precision)

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write the kit; the options are those of :meth:`TensorRTExporter.export`.

        The target may be any device: nothing is built here.  ``python build.py`` in the folder, on the device, needs
        TensorRT and nothing else.

        Raises:
            ConfigError: If an option is wrong.
            BackendError: If the model cannot be traced.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        chosen = _options(self.name, options)
        # On the device, "current" is what classic TensorRT builds for anyway.
        targets = _targets(options.get("target", build.CURRENT))
        with _io.staged_directory(Path(out_dir)) as folder:
            inner = _write_kit(model, folder, chosen, targets)
            details = {
                "runner": _KIT_STAND_IN,
                "executed": False,
                "execution": "no engine was built; run build.py on the target device",
                "targets": list(targets),
            }
            _write_manifest(self.name, model, folder, inner, details, {})
        return ExportArtifact.load(out_dir, check_files=False)

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights of the ONNX in the folder, by name; an engine's own cannot be read."""
        return stored_weights.of_onnx(artifact)

    def open(self, artifact: ExportArtifact, **options: Any) -> Runner:
        """On "cuda" the engine that ``build.py`` made in this folder; on "cpu" a runner of the ONNX.

        Raises:
            ArtifactError: If no engine was built here, or it is not of this kit.
        """
        checked = check_open_options(self.name, options)
        network = _io.read_json(artifact.path / KIT_FILE, "tensorrt-kit")["network"]
        digest = artifact.files[network].sha256
        if str(checked.get("device", "cpu")).partition(":")[0] != "cuda":
            return stand_in(artifact, digest, checked)
        from sglp_exporters.tensorrt.runner import runner_for

        engine, report = built_here(artifact.path, digest)
        return runner_for(artifact, engine, str(report["runtime"]["package"]), str(checked["device"]))


_ONNX_NEEDS = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


def _options(exporter: str, options: Mapping[str, Any]) -> _Options:
    known = tuple(_Options.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise unknown_name(f"option of exporter {exporter!r}", name, known)
    chosen = _Options(**options)
    if chosen.precision not in (None, "fp32", "fp16", "int8"):
        raise ConfigError(
            f"precision={chosen.precision!r} is not offered; engines are made of fp32, fp16 or int8 graphs; pass one"
        )
    for option in ("activations", "calibration"):
        if getattr(chosen, option) is not None and chosen.precision != "int8":
            raise ConfigError(
                f"{option} is an option of int8; nothing else is calibrated; pass precision='int8' as well"
            )
    return chosen


def _targets(target: str | Sequence[str]) -> tuple[str, ...]:
    try:
        return build.target_names(target)
    except Refused as error:
        raise ConfigError(str(error)) from error


def _write_kit(model: CompressedModel, folder: Path, chosen: _Options, targets: Sequence[str]) -> ExportArtifact:
    """The ONNX artifact's files and the kit's in ``folder``; returns the ONNX artifact as it lies there."""
    from sglp_exporters.onnx.precision import in_precision
    from sglp_exporters.tensorrt import kit

    limits = _limits(model.module, chosen)
    quantised = chosen.precision == "int8"
    if quantised:
        from sglp_deploy.models import precision as precision_of
        from sglp_exporters.tensorrt import int8

        int8.check_request(chosen.activations, precision_of(model.module))
    cast = model if quantised else in_precision(model, chosen.precision)
    # TensorRT finds attention by patterns of its own; what it makes of the rewritten form was never seen on a GPU.
    exported = registry.exporter("onnx").export(cast, folder / "onnx", attention="traced")
    if quantised:
        exported = int8.quantise(model, exported, activations=chosen.activations, calibration=chosen.calibration)
    for name in exported.files:
        os.replace(exported.path / name, folder / name)
    (exported.path / MANIFEST).unlink()
    exported.path.rmdir()
    ranges = kit.size_ranges(exported, **limits, sizes=chosen.sizes)
    inner = replace(exported, path=folder)
    kit.write_kit(inner, folder, targets=targets, ranges=ranges)
    return inner


def _limits(module: nn.Module, chosen: _Options) -> dict[str, int]:
    """Greatest sizes: those asked for, else ours, within the positions the model has."""
    from sglp_exporters.tensorrt import kit

    longest = _positions(module)
    given = {"max_prompt": chosen.max_prompt, "max_total": chosen.max_total}
    for name, value in given.items():
        if value is not None and value > longest:
            raise ConfigError(
                f"{name}={value} is more than the {longest} tokens the model has positions for; beyond them it "
                f"computes nothing sensible; pass at most {longest}"
            )
    max_total, max_prompt = chosen.max_total, chosen.max_prompt
    prompt, total = _certified_sizes(module)
    if max_prompt is None:
        prompt = max(kit.MAX_PROMPT, prompt)
        max_prompt = min(prompt, longest, longest if max_total is None else max_total)
    if max_total is None:
        max_total = max(max_prompt, min(max(kit.MAX_TOTAL, total), longest))
    max_batch = kit.MAX_BATCH if chosen.max_batch is None else chosen.max_batch
    kit.check_limits(max_batch, max_prompt, max_total)
    return {"max_batch": max_batch, "max_prompt": max_prompt, "max_total": max_total}


def _certified_sizes(module: nn.Module) -> tuple[int, int]:
    """Tokens of the longest prompt of a certificate beyond a sliding window, and with its answer; (0, 0) without."""
    from sglp_deploy.models.samples import attention_window, generates
    from sglp_deploy.parity.verify import LONGEST_WINDOW_CHECKED

    window = (attention_window(module.config) or 0) if generates(module) else 0
    if not 0 < window <= LONGEST_WINDOW_CHECKED:
        return 0, 0
    return window + BEYOND_WINDOW, window + BEYOND_WINDOW + DECODE_STEPS


def _positions(module: nn.Module) -> int:
    """Most tokens the model has positions for; no limit where it names none."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else sys.maxsize


def _run_builder(folder: Path, timing_cache: str | Path | None) -> dict[str, Any]:
    """Run the kit's own script in a process of its own and read its report."""
    command = [sys.executable, str(folder / SCRIPT_FILE), "--out", str(folder)]
    if timing_cache is not None:
        command += ["--timing-cache", str(Path(timing_cache).resolve())]
    done = children.run(command)
    if done.returncode == 1 and "error: " in done.stderr:
        raise BackendError(done.stderr.rpartition("error: ")[2].strip())
    if done.returncode != 0:
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        words = " ".join((done.stderr or done.stdout).split())[-_LAST_WORDS:] or "it said nothing"
        raise BackendError(
            f"TensorRT's builder {how}; {words}; try another target or precision, or a machine with more memory"
        )
    return _io.read_json(folder / REPORT_FILE, "tensorrt-build")


def _write_manifest(
    name: str,
    model: CompressedModel,
    folder: Path,
    inner: ExportArtifact,
    details: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    write_manifest(
        folder,
        format=name,
        inputs=inner.inputs,
        outputs=inner.outputs,
        precision=inner.precision,
        weight_bytes=inner.weight_bytes,
        n_layers=model.n_layers,
        plan_digest=model.plan.digest(),
        model=model.source.to_json(),
        derived_from=inner.derived_from,
        producer={**producer_versions("torch", "transformers", "onnx", "onnx-ir", "onnxscript"), **versions},
        details={
            **details,
            **({"model_precision": "fp32"} if inner.precision == "int8" else {}),  # what it is compared with
            "interface": inner.details["interface"],
            "onnx": dict(inner.details),
        },
    )

"""int8 weights for TensorRT: ModelOpt quantises the graph the ONNX exporter made, in an environment of its own.

TensorRT takes precision from the graph.  So an int8 engine is an engine of a graph with QuantizeLinear and
DequantizeLinear.  A convolutional or encoder graph is quantised as a whole, by the ranges that calibration data show.
Of a decoder only the weights are.  A few activations of language models are far larger than the rest.  One static range
for all of them leaves nothing of the others (figures in docs/tensorrt.md).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.artifact import ExportArtifact, FileRecord
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.isolation import environments
from sglp_deploy.isolation.workers import Worker
from sglp_exporters.onnx.runner import MODEL_FILE, OPTIONAL_INPUT
from sglp_exporters.tensorrt.environment import MODELOPT

if TYPE_CHECKING:
    from sglp_deploy.materialize import CompressedModel

_WORKER = Path(__file__).with_name("modelopt_worker.py")
_TIMEOUT_S = 3600.0
_TOKENS, _ROW, _CACHED = 4096, 128, 64
_SAMPLE_BATCHES, _SAMPLE_ROWS = 8, 4


def check_request(activations: str | None, own: str) -> None:
    """Refuse, before any work, what cannot be quantised here.

    Args:
        activations: "int8", "fp32" or None.
        own: Precision of the model.

    Raises:
        ConfigError: If the option is wrong or the model's weights are rounded already.
        MissingDependencyError: If the environment is not there; the message says how to make it.
    """
    if activations not in (None, "int8", "fp32"):
        raise ConfigError(f"activations={activations!r} is not offered; they are int8 or fp32 here; pass one of them")
    if own != "fp32":
        raise ConfigError(
            f"precision='int8' was asked for a model whose weights are {own}; they would be rounded twice; load the "
            "model with --dtype fp32"
        )
    environments.interpreter(MODELOPT)


def quantise(
    model: CompressedModel,
    exported: ExportArtifact,
    *,
    activations: str | None = None,
    calibration: str | Path | None = None,
) -> ExportArtifact:
    """Put a quantised graph in the place of the one in ``exported``; returns the artifact as it then lies there.

    Args:
        model: What was exported; its tokenizer turns calibration text into tokens.
        exported: A float32 ``onnx`` artifact, whose files are replaced.
        activations: "int8" or "fp32"; by the kind of graph when omitted.
        calibration: For a decoder a text (as ``--calibration`` takes it), for another graph an ``.npz`` file of its
            inputs by name; the built-in text, or random inputs, when omitted.

    Raises:
        ConfigError: If the calibration data do not fit the model.
        BackendError: If ModelOpt fails; the message has its last words.
    """
    from sglp_exporters.onnx.passes import required_inputs

    decoder = exported.details["interface"] == "decoder"
    kept = activations or ("fp32" if decoder else "int8")
    folder, source = exported.path, "none: weights are rounded by their own ranges"
    # Within the artifact's folder, so that it is on a disk with room and goes when the export fails.
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        # An input with a default would be folded away.
        network = folder / "required.onnx"
        network.write_bytes(required_inputs(folder / MODEL_FILE))
        if kept == "int8":
            feeds, source = _calibration(model, exported, calibration)
        else:  # ModelOpt runs the graph whatever is asked of it
            feeds = [next(iter(_sample_feeds(model, exported, 1)))]
        files = []
        for number, feed in enumerate(feeds):
            files.append(str(scratch / f"feed-{number}.npz"))
            np.savez(files[-1], **cast("dict[str, Any]", feed))
        with Worker(environments.interpreter(MODELOPT), _WORKER, name="ModelOpt", timeout_s=_TIMEOUT_S) as worker:
            said = worker.ask(
                "quantise",
                network=str(network.resolve()),
                output=str((scratch / MODEL_FILE).resolve()),
                feeds=[str(Path(file).resolve()) for file in files],
                cached=_CACHED if decoder and kept == "int8" else 0,
                activations=kept == "int8",
            )
        network.unlink()
        for file in exported.files:
            if file.startswith(MODEL_FILE):
                (folder / file).unlink()
        for made in sorted(scratch.glob(f"{MODEL_FILE}*")):
            os.replace(made, folder / made.name)
    amounts = _restore(folder / MODEL_FILE, exported)
    files_now = {
        file: FileRecord(_io.sha256_file(folder / file), (folder / file).stat().st_size)
        for file in (MODEL_FILE, f"{MODEL_FILE}.data", *(each for each in exported.files if MODEL_FILE not in each))
        if (folder / file).is_file()
    }
    facts = {
        "by": f"nvidia-modelopt {said['modelopt']}",
        "weights": "int8, symmetric, one scale for each output channel",
        "activations": kept,
        "calibration": source,
        "elements": amounts,
    }
    return replace(
        exported,
        files=files_now,
        precision="int8",
        weight_bytes=_bytes(amounts),
        details={**exported.details, "nodes": sum(said["operators"].values()), "quantised": facts},
    )


def _calibration(
    model: CompressedModel, exported: ExportArtifact, given: str | Path | None
) -> tuple[list[Mapping[str, NDArray[Any]]], str]:
    """Feeds, and in words where they come from."""
    if exported.details["interface"] == "decoder":
        options = {"max_tokens": _TOKENS, "sequence_length": _ROW}
        text = CalibrationSet.parse(str(given), **options) if given else CalibrationSet.builtin(**options)
        if model.tokenizer is None:
            raise ConfigError("the model has no tokenizer; calibration text needs one; pass activations='fp32'")
        rows = np.asarray(text.encode(model.tokenizer).input_ids, dtype=np.int64)
        feeds = [{"input_ids": rows[start : start + 2]} for start in range(0, len(rows) - 1, 2)]
        return list(feeds), f"{rows.size} tokens of {text.source}, half of each row on a cache"
    if given is None:
        made = _sample_feeds(model, exported, _SAMPLE_BATCHES)
        return made, f"{_SAMPLE_BATCHES * _SAMPLE_ROWS} random inputs; give data of your own for a trained model"
    with np.load(given, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    wanted = {spec.name for spec in exported.inputs}
    if set(arrays) != wanted or len({len(value) for value in arrays.values()}) != 1:
        raise ConfigError(
            f"{given} holds {', '.join(sorted(arrays)) or 'nothing'}; the graph takes {', '.join(sorted(wanted))}, all "
            "with the same number of rows; write them with numpy.savez"
        )
    rows_given = len(next(iter(arrays.values())))
    return [{name: value[i : i + 1] for name, value in arrays.items()} for i in range(rows_given)], str(given)


def _sample_feeds(model: CompressedModel, exported: ExportArtifact, batches: int) -> list[Mapping[str, NDArray[Any]]]:
    from sglp_deploy.models.samples import sample_inputs

    names = {spec.name for spec in exported.inputs}
    feeds = []
    for seed in range(batches):
        inputs = sample_inputs(model.module, rows=_SAMPLE_ROWS, padded=False, seed=seed)
        feeds.append({name: value.cpu().numpy() for name, value in inputs.items() if name in names})
    return list(feeds)


def _restore(file: Path, exported: ExportArtifact) -> dict[str, int]:
    """Give the optional input its default back and check what the graph promises; elements of weights by type.

    Raises:
        BackendError: If inputs or outputs are not those of the graph that was quantised, or no weight became int8.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    for kind, values, specs in (
        ("inputs", model.graph.input, exported.inputs),
        ("outputs", model.graph.output, exported.outputs),
    ):
        found, wanted = {value.name for value in values}, {spec.name for spec in specs}
        if found != wanted:
            raise BackendError(
                f"ModelOpt changed the {kind}: {', '.join(sorted(found ^ wanted))} came or went; the graph could not "
                "be run as its manifest says; report this"
            )
    if OPTIONAL_INPUT in exported.details.get("optional_inputs", ()):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], dtype=np.int64), OPTIONAL_INPUT))
    onnx.save(model, str(file))
    amounts: dict[str, int] = {}
    for tensor in model.graph.initializer:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        amounts[kind] = amounts.get(kind, 0) + int(np.prod(tensor.dims, dtype=np.int64))
    if not amounts.get("int8"):
        raise BackendError("ModelOpt quantised nothing; the graph has no weight it knows; export with precision='fp16'")
    return amounts


def _bytes(amounts: Mapping[str, int]) -> int:
    return sum(np.dtype(kind).itemsize * count for kind, count in amounts.items())

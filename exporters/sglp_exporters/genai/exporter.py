"""ONNX Runtime GenAI: the graph its own model builder makes of the pruned checkpoint, in fp32, int8 or int4.

The builder shares nothing with our tracing.  So its certificate checks another path from the same weights.  Quantised
weights are a compression of the pruned model.  They are compared with that model, unquantised.  The certificate then
says what quantisation costs, within the bounds for its type.

Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_deploy import _io
from sglp_deploy._names import unknown_name
from sglp_deploy.artifact import (
    PAST,
    PLAN_FILE,
    ExportArtifact,
    TensorSpec,
    producer_versions,
    write_manifest,
)
from sglp_deploy.errors import BackendError, ConfigError, UnsupportedModelError
from sglp_deploy.isolation import children
from sglp_deploy.protocols import FormatFacts, check_open_options
from sglp_exporters.genai.runner import CONFIG_FILE, OrtGenaiRunner, settings
from sglp_exporters.runners import stored_weights

if TYPE_CHECKING:
    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.diagnosis import StoredTensor

MODEL_FILE = "model.onnx"
_PRECISIONS = ("fp32", "int8", "int4")
_BUILDER = "onnxruntime_genai.models.builder"
_PLAIN_INPUTS = ("input_ids", "attention_mask", "position_ids")
_LAST_WORDS = 400  # characters of a builder's last words that are repeated


class OrtGenaiExporter:
    """Runs ONNX Runtime GenAI's model builder for the CPU, and its generator."""

    name = "ort-genai"
    requires = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai")
    facts = FormatFacts(packages=("onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai"))

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """The builder reads ``layer_types``, except for GPT-OSS, whose even layers it lets slide whatever they say.

        Source: ``self.is_local = lambda layer_id: bool(layer_id % 2 == 0)`` in onnxruntime_genai/models/builders/
        gptoss.py, 0.18; the others go by ``Model.is_local`` in base.py.
        """
        return _gpt_oss_layer_type if model_type == "gpt_oss" else None

    def check_precision(self, precision: str) -> None:
        """Refuse weights that are not float32; a caller may ask before it spends time on a plan.

        Raises:
            ConfigError: If ``precision`` is "fp16" or "bf16".
        """
        if precision != "fp32":
            raise ConfigError(
                f"the weights are {precision}; the builder's graphs for CPUs compute in float32, so a certificate "
                "would compare two arithmetics; load the model with --dtype fp32"
            )

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write the builder's graph, its configuration, the tokenizer, the plan and the manifest.

        Args:
            model: What to export; it needs a tokenizer.
            out_dir: Complete or untouched.
            options: ``precision``: of the weights in the file, "fp32" (default), "int8" or "int4".

        Raises:
            ConfigError: If an option is unknown or wrong, or the weights are not float32.
            UnsupportedModelError: If the builder does not know the model, or would leave out its attention window.
            BackendError: If the builder fails.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        from sglp_deploy.models import precision as precision_of
        from sglp_deploy.models.samples import generates

        for name in options:
            if name != "precision":
                raise unknown_name(f"option of exporter {self.name!r}", name, ("precision",))
        wanted = options.get("precision") or "fp32"
        if wanted not in _PRECISIONS:
            raise ConfigError(
                f"precision={wanted!r} is not offered; weights are {', '.join(_PRECISIONS)} here; pass one of them"
            )
        own = precision_of(model.module)
        self.check_precision(own)
        if not generates(model.module):
            raise UnsupportedModelError(
                f"{type(model.module).__name__} is no decoder language model; ONNX Runtime GenAI runs nothing else "
                "here; export it to onnx or openvino"
            )
        if model.tokenizer is None:
            raise ConfigError(
                "the model has no tokenizer; the builder copies it beside the graph and reads its special tokens; "
                "load a folder that holds one"
            )
        _check_window(model.module.config)
        with _io.staged_directory(Path(out_dir)) as folder:
            _build(model, folder, wanted)
            model.plan.save(folder / PLAN_FILE)
            graph = _graph(folder)
            write_manifest(
                folder,
                format=self.name,
                inputs=graph["inputs"],
                outputs=graph["outputs"],
                precision=wanted,
                weight_bytes=sum(file.stat().st_size for file in folder.glob(f"{MODEL_FILE}.data")),
                n_layers=model.n_layers,
                plan_digest=model.plan.digest(),
                model=model.source.to_json(),
                producer=producer_versions("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai"),
                details={"interface": "decoder", "model_precision": own, "operators": graph["operators"]},
            )
        return ExportArtifact.load(out_dir, check_files=False)

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights in the files, by name; for checks of their types and values."""
        return stored_weights.of_onnx(artifact)

    def open(self, artifact: ExportArtifact, **options: Any) -> OrtGenaiRunner:
        """A generating runner on "cpu" with ``threads``."""
        return OrtGenaiRunner(artifact, **check_open_options(self.name, options))


def _gpt_oss_layer_type(index: int) -> str:
    return "full_attention" if index % 2 else "sliding_attention"


def _check_window(config: Any) -> None:
    """Refuse a window the builder would not see: it goes by ``layer_types``, which some families do not have.

    Raises:
        UnsupportedModelError: If a layer has a window and no ``layer_types`` says so.
    """
    window = getattr(config, "sliding_window", None)
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if window and window < positions and getattr(config, "layer_types", None) is None:
        # Its graph then attends to everything while its runtime keeps a cache of the window's length, and stops.
        raise UnsupportedModelError(
            f"every layer of this {config.model_type} attends through a window of {window} tokens, which ONNX Runtime "
            "GenAI's builder sees only in layer_types; longer sequences would fail; export it to onnx or openvino"
        )


def _build(model: CompressedModel, folder: Path, precision: str) -> None:
    """Run the builder in a process of its own: it imports its modules by bare names and prints as it likes."""
    from sglp_deploy.materialize import write_checkpoint_files

    # Within the artifact's folder, so that it is on a disk with room and goes when the export fails.
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint_files(model, checkpoint)
        command = [sys.executable, "-m", _BUILDER, "-m", "none", "-i", str(checkpoint), "-o", str(folder)]
        command += ["-p", precision, "-e", "cpu", "-c", str(scratch / "cache")]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = children.run(command, environment=environment)
    if done.returncode == 0 and (folder / MODEL_FILE).is_file() and (folder / CONFIG_FILE).is_file():
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1][-_LAST_WORDS:] if lines else f"it ended with {done.returncode} and said nothing"
    if last.startswith("NotImplementedError") or "is not currently supported" in last:
        raise UnsupportedModelError(
            f"ONNX Runtime GenAI's builder does not know {type(model.module).__name__}; it knows chosen families "
            "only; export it to onnx or openvino"
        )
    raise BackendError(
        f"ONNX Runtime GenAI's builder failed on this {type(model.module).__name__}; {last}; export it to onnx or "
        "openvino, or try another release of onnxruntime-genai"
    )


def _graph(folder: Path) -> dict[str, Any]:
    """Inputs and outputs of the graph, as a manifest holds them, and how many of its operators there are."""
    import onnx

    graph = onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph
    # The builder leaves the width of a cached key open; the runtime allocates what its configuration says.
    sizes = {"kv_cache_dim": int(settings(folder)["decoder"]["head_size"])}

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(sizes.get(size.dim_param, size.dim_param) or int(size.dim_value) for size in tensor.shape.dim)
        return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)

    inputs = tuple(map(spec, graph.input))
    # The state of convolutions and recurrences has no place in the common interface, so none of it is declared; the
    # runtime keeps it, and parity is judged all the same.
    common = all(each.name in _PLAIN_INPUTS or each.name.startswith(PAST) for each in inputs)
    operators: dict[str, int] = {}
    for node in graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return {
        "inputs": inputs if common else (),
        "outputs": tuple(map(spec, graph.output)) if common else (),
        "operators": dict(sorted(operators.items())),
    }

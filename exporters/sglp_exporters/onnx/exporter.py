"""ONNX: one graph for prefill and decode where there is a key-value cache, one forward graph for every other model.

The decoder's interface is the one the ONNX ecosystem settled on (``input_ids``, ``attention_mask``, ``position_ids``,
``past_key_values.N.key``, ``present.N.key``, ``logits``).  One optional input is ours: ``logits_to_keep`` holds the
positions whose logits are wanted and defaults to the last.  So a prefill does not multiply the whole prompt with the
output head.  A forward graph takes the model's own inputs by name and gives its main output by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sglp_deploy import _io
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact, TensorSpec, producer_versions, write_manifest
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.protocols import FormatFacts, check_open_options
from sglp_exporters.onnx.options import OnnxOptions, read_options
from sglp_exporters.onnx.runner import MODEL_FILE, ONNX_PACKAGES, OPTIONAL_INPUT, OnnxForwardRunner, OnnxRuntimeRunner
from sglp_exporters.runners import stored_weights

# Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn
    from transformers import PreTrainedModel

    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.diagnosis import StoredTensor
    from sglp_exporters.onnx.layer_template import LayerTemplate

__all__ = ["OnnxExporter", "OnnxForwardRunner", "OnnxRuntimeRunner"]


@dataclass(frozen=True)
class _Traced:
    """A graph and how it came about, as the manifest tells it.

    Attributes:
        graph: Not yet optimised.
        interface: "decoder" (prefill and decode with a key-value cache) or "forward".
        why_forward: Why there is no cache; empty for a decoder.
        traced: "layer template" or "whole model".
        why_whole: Why the layers were not traced once and repeated; empty where they were.
        digest: SHA-256 of what was traced; equal for models that share one trace.
    """

    graph: ir.Model
    interface: str
    why_forward: str
    traced: str
    why_whole: str
    digest: str


class OnnxExporter:
    """Exports any model that can be traced and runs it on ONNX Runtime.

    The class keeps the template of the last decoder it traced, so the baseline and every pruned depth of that model
    share one trace.
    """

    name = "onnx"
    requires = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
    facts = FormatFacts(packages=ONNX_PACKAGES)

    # Of the class on purpose: the registry makes a new instance for each request, and the trace outlives them.
    _template: LayerTemplate | None = None

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """None: the graph is traced from layers that were built by ``layer_types``."""
        del model_type
        return None

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write ``model.onnx``, its external data, the plan and the manifest.

        Args:
            model: What to export.
            out_dir: Complete or untouched.
            options: ``precision`` ("fp32", "fp16", "int8" or "int4"; the model's own when omitted), ``opset`` (18 to
                25), ``block_size``, ``symmetric`` and ``mixed`` (of quantised weights), ``attention`` ("grouped" or
                "traced"); see docs/exporting.md.

        Raises:
            ConfigError: If an option is unknown or wrong, or the weights are bfloat16.
            BackendError: If the model cannot be traced, an operator does not exist in the opset, or the graph does not
                pass the ONNX checker.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        import onnx_ir as ir

        from sglp_deploy.models import precision as precision_of
        from sglp_exporters.onnx import attention, forward_trace, passes
        from sglp_exporters.onnx.precision import in_precision

        own = precision_of(model.module)
        self.check_precision(own)
        chosen = read_options(options, own)
        if chosen.bits is not None and forward_trace.forward_only_reason(model.module) is not None:
            raise ConfigError(
                f"precision={chosen.precision!r} is for decoders with a cache; no bounds are known by which to certify "
                f"a {type(model.module).__name__} in it; pass precision=fp16"
            )
        made = self._trace(in_precision(model, "fp16" if chosen.precision == "fp16" else None).module)
        graph = made.graph
        passes.store_weights_transposed(graph)
        passes.simplify(graph, rewrites=[attention.share_key_value_heads] if chosen.attention == "grouped" else [])
        if chosen.opset is not None:
            passes.convert_opset(graph, chosen.opset)
        details = _quantize(graph, chosen, own)
        takes_positions = any(value.name == OPTIONAL_INPUT for value in graph.graph.inputs)
        if takes_positions:
            passes.default_logits_to_last(graph)
        inputs, outputs = _specs(graph)
        weight_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
        _strip_trace_notes(graph)
        with _io.staged_directory(Path(out_dir)) as folder:
            ir.save(graph, folder / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
            _check(folder / MODEL_FILE)
            model.plan.save(folder / PLAN_FILE)
            write_manifest(
                folder,
                format=self.name,
                inputs=inputs,
                outputs=outputs,
                precision=chosen.precision,
                weight_bytes=weight_bytes,
                n_layers=model.n_layers,
                plan_digest=model.plan.digest(),
                model=model.source.to_json(),
                derived_from=f"trace:{made.digest}",
                producer=producer_versions("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
                details={
                    "opset": graph.opset_imports[""],
                    "nodes": len(graph.graph),
                    "optional_inputs": [OPTIONAL_INPUT] if takes_positions else [],
                    "interface": made.interface,
                    "why_forward": made.why_forward,
                    "traced": made.traced,
                    "why_whole": made.why_whole,
                    **details,
                },
            )
        return ExportArtifact.load(out_dir, check_files=False)

    def check_precision(self, precision: str) -> None:
        """Refuse weights of a type that could not be run; a caller may ask before it spends time on a plan.

        Raises:
            ConfigError: If ``precision`` is "bf16".
        """
        if precision == "bf16":
            raise ConfigError(
                "the weights are bfloat16; ONNX Runtime lacks kernels for that type, so the graph would not load; load "
                "the model with --dtype fp32 or --dtype fp16"
            )

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights in the files, by name; for checks of their types and values."""
        return stored_weights.of_onnx(artifact)

    def open(self, artifact: ExportArtifact, **options: Any) -> OnnxRuntimeRunner | OnnxForwardRunner:
        """A runner on ``device`` ("cpu" or "cuda") with ``threads``; it generates if the graph has a cache."""
        checked = check_open_options(self.name, options)
        if artifact.details.get("interface", "decoder") == "forward":
            return OnnxForwardRunner(artifact, **checked)
        return OnnxRuntimeRunner(artifact, **checked)

    def _trace(self, module: nn.Module) -> _Traced:
        from sglp_deploy.models import adapter_for
        from sglp_exporters.onnx import forward_trace, whole_model
        from sglp_exporters.onnx.layer_template import UncutError

        why_forward = forward_trace.forward_only_reason(module)
        if why_forward is None:
            model = cast("PreTrainedModel", module)
            try:
                template = self._template_for(model)
                return _Traced(template.assemble(model), "decoder", "", "layer template", "", template.digest)
            except UncutError as error:
                graph, why_whole = whole_model.trace_whole_decoder(model), str(error)
                interface = "decoder"
        else:
            graph, why_whole = forward_trace.trace_forward(module), "only decoders with a cache share a trace"
            interface = "forward"
        digest = _io.sha256_json([interface, adapter_for(module).facts(module)])
        return _Traced(graph, interface, why_forward or "", "whole model", why_whole, digest)

    def _template_for(self, module: PreTrainedModel) -> LayerTemplate:
        from sglp_exporters.onnx.layer_template import LayerTemplate

        owner = type(self)
        if owner._template is None or not owner._template.covers(module):
            owner._template = LayerTemplate.trace(module)
        return owner._template


def _quantize(graph: ir.Model, chosen: OnnxOptions, own: str) -> dict[str, Any]:
    """Round the weights as it was asked for; what the manifest says of it, nothing where they stay as they are."""
    if chosen.bits is None or chosen.block_size is None or chosen.symmetric is None:
        return {}
    from sglp_exporters.onnx.quantize import quantize_weights

    made = quantize_weights(
        graph, bits=chosen.bits, block_size=chosen.block_size, symmetric=chosen.symmetric, mixed=chosen.mixed
    )
    return {
        # Cache and arithmetic between the products stay in the model's own type, and it is what the certificate needs.
        "model_precision": own,
        "quantized": {"block_size": chosen.block_size, "symmetric": chosen.symmetric, **asdict(made)},
    }


def _check(file: Path) -> None:
    """Refuse a file that ONNX's checker refuses, with shapes and types inferred through the whole graph.

    Raises:
        BackendError: With the checker's first words.
    """
    import onnx

    try:
        # By its path: a graph whose weights are beyond 2 GB cannot be checked in memory.
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(
            f"the assembled graph is not valid ONNX; {str(error).splitlines()[0]}; report this as a bug"
        ) from error


def _specs(graph: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    def spec(value: ir.Value) -> TensorSpec:
        shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
        return TensorSpec(value.name or "", str(value.dtype.numpy()) if value.dtype else "unknown", shape)

    return tuple(map(spec, graph.graph.inputs)), tuple(map(spec, graph.graph.outputs))


def _strip_trace_notes(graph: ir.Model) -> None:
    """Drop the tracer's notes: they hold source lines and paths of the machine that exported, on every node."""
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()

"""ONNX: one graph for prefill and decode, with dynamic batch, sequence and cache length, and its ONNX Runtime runner.

The graph's interface is the one the ONNX ecosystem settled on (``input_ids``, ``attention_mask``, ``position_ids``,
``past_key_values.N.key``, ``present.N.key``, ``logits``).  One optional input is ours: ``logits_to_keep`` holds the
positions whose logits are wanted and defaults to the last, so a prefill does not multiply the whole prompt with the
output head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact, TensorSpec, producer_versions, write_manifest
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.protocols import check_open_options

# Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

    from sglp_deploy.materialize import CompressedModel
    from sglp_exporters._layer_template import LayerTemplate

MODEL_FILE = "model.onnx"
_OPTIONAL_INPUT = "logits_to_keep"


class OnnxExporter:
    """Exports decoder language models and runs them on ONNX Runtime.

    One instance keeps the template of the last model it traced, so the baseline and every pruned depth of that model
    share one trace.
    """

    name = "onnx"
    requires = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")

    # Of the class on purpose: the registry makes a new instance for each request, and the trace outlives them.
    _template: LayerTemplate | None = None

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write ``model.onnx``, its external data, the plan and the manifest.

        Raises:
            ConfigError: If an option is given (there are none yet), or the weights are bfloat16.
            BackendError: If the model cannot be traced, or the graph does not pass the ONNX checker.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        import onnx
        import onnx_ir as ir

        from sglp_deploy.adapters import precision
        from sglp_exporters import _onnx_passes

        if options:
            raise ConfigError(f"exporter 'onnx' does not know {', '.join(sorted(options))}; it has no options yet")
        self.check_precision(precision(model.module))
        template = self._template_for(model)
        graph = template.assemble(model.module)
        _onnx_passes.store_weights_transposed(graph)
        _onnx_passes.simplify(graph)
        _onnx_passes.default_logits_to_last(graph)
        inputs, outputs = _specs(graph)
        weight_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
        _strip_trace_notes(graph)
        with _io.staged_directory(Path(out_dir)) as folder:
            ir.save(graph, folder / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
            try:
                onnx.checker.check_model(str(folder / MODEL_FILE))
            except onnx.checker.ValidationError as error:
                raise BackendError(
                    f"the assembled graph is not valid ONNX; {str(error).splitlines()[0]}; report this as a bug"
                ) from error
            model.plan.save(folder / PLAN_FILE)
            write_manifest(
                folder,
                format=self.name,
                inputs=inputs,
                outputs=outputs,
                precision=precision(model.module),
                weight_bytes=weight_bytes,
                n_layers=model.n_layers,
                plan_digest=model.plan.digest(),
                model=model.source.to_json(),
                derived_from=f"trace:{template.digest}",
                producer=producer_versions("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
                details={
                    "opset": graph.opset_imports[""],
                    "nodes": len(graph.graph),
                    "optional_inputs": [_OPTIONAL_INPUT],
                    "cache": _cache_layout(graph),
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

    def open(self, artifact: ExportArtifact, **options: Any) -> OnnxRuntimeRunner:
        """A runner on ``device`` ("cpu" or "cuda") with ``threads``."""
        return OnnxRuntimeRunner(artifact, **check_open_options(self.name, options))

    def _template_for(self, model: CompressedModel) -> LayerTemplate:
        from sglp_exporters._layer_template import LayerTemplate

        owner = type(self)
        if owner._template is None or not owner._template.covers(model.module):
            owner._template = LayerTemplate.trace(model.module)
        return owner._template


class OnnxRuntimeRunner:
    """Runs a decoder graph on ONNX Runtime; the cache stays in ONNX Runtime's own memory between steps.

    Args:
        artifact: An ``onnx`` artifact.
        device: "cpu", "cuda" or "cuda:N".
        threads: Threads within one operator, or None for ONNX Runtime's choice.
    """

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        self._artifact = artifact
        self._device, _, index = device.partition(":")
        self._device_index = int(index or 0)
        if self._device not in ("cpu", "cuda"):
            raise ConfigError(f"ONNX Runtime runs on cpu or cuda here, not {device!r}; pass --device cpu or cuda")
        self._threads = threads
        self._session: onnxruntime.InferenceSession | None = None
        self._cache: list[onnxruntime.OrtValue] = []
        self._mask: NDArray[np.int64] | None = None

    def __enter__(self) -> OnnxRuntimeRunner:
        """Load the graph.

        Raises:
            BackendError: If ONNX Runtime refuses the graph or falls back from the device that was asked for.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that an optional input can be overridden, which is its purpose
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        wanted = "CUDAExecutionProvider" if self._device == "cuda" else "CPUExecutionProvider"
        # TF32 keeps 10 bits of a float32's mantissa; the parity bounds and PyTorch's default mean all 23.
        cuda = {"device_id": self._device_index, "use_tf32": "0"}
        provider = (wanted, cuda) if self._device == "cuda" else wanted
        if wanted not in onnxruntime.get_available_providers():
            raise BackendError(
                f"this ONNX Runtime has no {wanted}, only {', '.join(onnxruntime.get_available_providers())}; it was "
                "built for other devices; install onnxruntime-gpu in its place, or use --device cpu"
            )
        try:
            session = onnxruntime.InferenceSession(str(self._artifact.path / MODEL_FILE), options, providers=[provider])
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime cannot load {self._artifact.path / MODEL_FILE}; {str(error).splitlines()[0]}; "
                "export it again"
            ) from error
        # A provider that fails to load is dropped with a warning, so ask what is really there.
        if wanted not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime fell back from {wanted} to {session.get_providers()}; a number taken there would be "
                "mislabelled; install onnxruntime-gpu with its CUDA libraries, or use --device cpu"
            )
        self._session, self._cache, self._mask = session, [], None
        names = [value.name for value in session.get_outputs()]
        self._cache_outputs = [name for name in names if name != "logits"]
        self._cache_inputs = [name.replace("present.", "past_key_values.") for name in self._cache_outputs]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the graph and the cache."""
        self._session = None
        self._cache = []
        self._mask = None

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph on the named inputs; a cache that is left out is empty."""
        session = self._live()
        feed = dict(inputs)
        batch = int(feed["input_ids"].shape[0])
        for name, value in zip(self._cache_inputs, self._empty_cache(batch), strict=True):
            feed.setdefault(name, value)
        names = ["logits", *self._cache_outputs]
        try:
            return dict(zip(names, session.run(names, feed), strict=True))
        except Exception as error:
            raise self._failed(error) from error

    def synchronize(self) -> None:
        """Calls block until their outputs are on the host; nothing to wait for."""

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        all_positions: bool = False,
    ) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`."""
        import onnxruntime

        self._live()
        ids = np.ascontiguousarray(input_ids, dtype=np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.ascontiguousarray(attention_mask, dtype=np.int64)
        positions = np.maximum(mask.cumsum(axis=-1) - 1, 0)
        self._mask = mask
        if all_positions:
            # IOBinding cannot bind an optional input, so this path, which no benchmark takes, goes through arrays.
            feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            feed[_OPTIONAL_INPUT] = np.arange(ids.shape[1])
            outputs = self.forward(feed)
            self._cache = [onnxruntime.OrtValue.ortvalue_from_numpy(outputs[name]) for name in self._cache_outputs]
            logits: NDArray[np.float32] = outputs["logits"].astype(np.float32, copy=False)
            return logits
        self._cache = [
            onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in self._empty_cache(int(ids.shape[0]))
        ]
        return self._step(ids, positions)

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`."""
        if self._mask is None:
            raise BackendError("decode was called before prefill; there is no cache to continue; call prefill first")
        ids = np.ascontiguousarray(token_ids, dtype=np.int64).reshape(-1, 1)
        self._mask = np.concatenate([self._mask, np.ones_like(ids)], axis=1)
        return self._step(ids, self._mask.sum(axis=-1, keepdims=True) - 1)

    def _step(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        binding = self._live().io_binding()
        assert self._mask is not None
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", self._mask)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, value in zip(self._cache_inputs, self._cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name in self._cache_outputs:
            # The new cache stays where it was computed and is bound as the next step's input.
            binding.bind_output(name, self._device, self._device_index)
        try:
            self._live().run_with_iobinding(binding)
        except Exception as error:
            raise self._failed(error) from error
        logits, *self._cache = binding.get_outputs()
        values: NDArray[np.float32] = logits.numpy()[:, -1].astype(np.float32, copy=False)
        return values

    def _failed(self, error: Exception) -> BackendError:
        return BackendError(
            f"ONNX Runtime failed on {self._artifact.path / MODEL_FILE}; {str(error).splitlines()[0]}; check the "
            "inputs' names, shapes and types"
        )

    def _live(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise BackendError("the runner is not active; its graph is loaded by 'with'; use it as a context manager")
        return self._session

    def _empty_cache(self, batch: int) -> list[NDArray[Any]]:
        layout = self._artifact.details["cache"]
        return [
            np.zeros((batch, heads, 0, size), dtype=layout["dtype"])
            for heads, size in layout["heads_and_sizes"]
            for _ in ("key", "value")
        ]


def _cache_layout(graph: ir.Model) -> dict[str, Any]:
    """Element type of the cache, and heads and head size of every layer, read off the graph's own inputs."""
    keys = [value for value in graph.graph.inputs if (value.name or "").endswith(".key")]
    assert keys[0].dtype is not None
    return {
        "dtype": str(keys[0].dtype.numpy()),
        "heads_and_sizes": [[int(str(value.shape[1])), int(str(value.shape[3]))] for value in keys if value.shape],
    }


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

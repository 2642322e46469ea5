"""ONNX Runtime as a Runner: one for decoders with a key-value cache, one for graphs that run forward only.

Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.artifact import PAST, PRESENT, ExportArtifact
from sglp_deploy.errors import BackendError, ConfigError
from sglp_exporters.onnx.options import BITS

if TYPE_CHECKING:
    import onnxruntime


MODEL_FILE = "model.onnx"
OPTIONAL_INPUT = "logits_to_keep"
# What traces, rewrites and runs the graph; formats that are made of it depend on these too.
ONNX_PACKAGES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu")


class _Session:
    """A graph that is loaded while it is entered, on the device that was asked for and no other."""

    def __init__(self, artifact: ExportArtifact, device: str, threads: int | None) -> None:
        self.file = artifact.path / MODEL_FILE
        self.device, _, index = device.partition(":")
        self.device_index = int(index or 0)
        self._precision = artifact.precision
        self.description = ""
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"ONNX Runtime runs on cpu or cuda here, not {device!r}; pass --device cpu or cuda")
        self._threads = threads
        self._session: onnxruntime.InferenceSession | None = None

    def load(self) -> None:
        """Load the graph.

        Raises:
            BackendError: If ONNX Runtime refuses the graph or falls back from the device that was asked for.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that an optional input can be overridden, which is its purpose
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        wanted = "CUDAExecutionProvider" if self.device == "cuda" else "CPUExecutionProvider"
        # TF32 keeps 10 bits of a float32's mantissa; the parity bounds and PyTorch's default mean all 23.
        cuda = {"device_id": self.device_index, "use_tf32": "0"}
        provider = (wanted, cuda) if self.device == "cuda" else wanted
        if wanted not in onnxruntime.get_available_providers():
            raise BackendError(
                f"this ONNX Runtime has no {wanted}, only {', '.join(onnxruntime.get_available_providers())}; it was "
                "built for other devices; install onnxruntime-gpu in its place, or use --device cpu"
            )
        if self.device == "cuda":
            # It finds pip's CUDA libraries by itself only where torch was imported first, which a benchmark's worker
            # does not do.
            onnxruntime.preload_dlls(directory="")
        try:
            session = onnxruntime.InferenceSession(str(self.file), options, providers=[provider])
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime cannot load {self.file}; {str(error).splitlines()[0]}; export it again"
            ) from error
        # A provider that fails to load is dropped with a warning, so ask what is really there.  The first one is asked
        # first for every node; ONNX Runtime always puts its CPU kernels behind it.
        if session.get_providers()[:1] != [wanted]:
            raise BackendError(
                f"ONNX Runtime fell back from {wanted} to {session.get_providers()}; a number taken there would be "
                "mislabelled; install onnxruntime-gpu with its CUDA libraries, or use --device cpu"
            )
        compared = f"; weights are {self._precision}, the reference's are not" if self._precision in BITS else ""
        self.description = f"ONNX Runtime {onnxruntime.__version__} on {self.device}{compared}"
        self._session = session

    def unload(self) -> None:
        self._session = None

    @property
    def live(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise BackendError("the runner is not active; its graph is loaded by 'with'; use it as a context manager")
        return self._session

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self.live.get_outputs()]

    def run(self, names: Sequence[str], feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            return dict(zip(names, self.live.run(names, dict(feed)), strict=True))
        except Exception as error:
            raise self.failed(error) from error

    def failed(self, error: Exception) -> BackendError:
        return BackendError(
            f"ONNX Runtime failed on {self.file}; {str(error).splitlines()[0]}; check the inputs' names, shapes and "
            "types"
        )


class OnnxForwardRunner:
    """Runs a graph without a cache on ONNX Runtime.

    Args:
        artifact: An ``onnx`` artifact whose interface is "forward".
        device: "cpu", "cuda" or "cuda:N".
        threads: Threads within one operator, or None for ONNX Runtime's choice.
    """

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        self._session = _Session(artifact, device, threads)
        self._dtypes = {spec.name: np.dtype(spec.dtype) for spec in artifact.inputs}
        self.description = ""  # what ran, once it is known; the caller may say it first

    def __enter__(self) -> OnnxForwardRunner:
        """Load the graph.

        Raises:
            BackendError: If ONNX Runtime refuses the graph or falls back from the device that was asked for.
        """
        self._session.load()
        self.description = self.description or self._session.description
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the graph."""
        self._session.unload()

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once on the named inputs; real numbers are cast to the precision of the graph."""
        feed = {
            name: value.astype(self._dtypes.get(name, value.dtype)) if value.dtype.kind == "f" else value
            for name, value in inputs.items()
        }
        found = self._session.run(self._session.outputs, feed)
        return {name: value.astype(np.float32, copy=False) for name, value in found.items()}

    def synchronize(self) -> None:
        """Calls block until their outputs are on the host; nothing to wait for."""


class OnnxRuntimeRunner:
    """Runs a decoder graph on ONNX Runtime; the cache stays in ONNX Runtime's own memory between steps.

    Args:
        artifact: An ``onnx`` artifact whose interface is "decoder".
        device: "cpu", "cuda" or "cuda:N".
        threads: Threads within one operator, or None for ONNX Runtime's choice.
    """

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        self._artifact = artifact
        self._session = _Session(artifact, device, threads)
        # By the manifest: ONNX Runtime does not list an input that has a default.
        self._inputs = {spec.name for spec in artifact.inputs}
        self._cache_inputs: list[str] = []
        self._cache_outputs: list[str] = []
        self._cache: list[onnxruntime.OrtValue] = []
        self._mask: NDArray[np.int64] | None = None
        self.description = ""  # what ran, once it is known; the caller may say it first

    def __enter__(self) -> OnnxRuntimeRunner:
        """Load the graph.

        Raises:
            BackendError: If ONNX Runtime refuses the graph or falls back from the device that was asked for.
        """
        self._session.load()
        self.description = self.description or self._session.description
        self._cache, self._mask = [], None
        self._cache_outputs = [name for name in self._session.outputs if name.startswith(PRESENT)]
        self._cache_inputs = [name.replace(PRESENT, PAST) for name in self._cache_outputs]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the graph and the cache."""
        self._session.unload()
        self._cache = []
        self._mask = None

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph on the named inputs; a cache that is left out is empty."""
        feed = dict(inputs)
        for name, value in zip(self._cache_inputs, self._empty_cache(int(feed["input_ids"].shape[0])), strict=True):
            feed.setdefault(name, value)
        return self._session.run(["logits", *self._cache_outputs], feed)

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

        ids = np.ascontiguousarray(input_ids, dtype=np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.ascontiguousarray(attention_mask, dtype=np.int64)
        positions = np.maximum(mask.cumsum(axis=-1) - 1, 0)
        self._mask = mask
        if all_positions:
            # IOBinding cannot bind an optional input, so this path, which no benchmark takes, goes through arrays.
            feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            feed[OPTIONAL_INPUT] = np.arange(ids.shape[1])
            outputs = self.forward({name: value for name, value in feed.items() if name in self._inputs})
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
        import onnxruntime

        assert self._mask is not None
        arrays = {"input_ids": ids, "attention_mask": self._mask, "position_ids": np.ascontiguousarray(positions)}
        feed = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value)
            for name, value in arrays.items()
            if name in self._inputs
        }
        feed |= zip(self._cache_inputs, self._cache, strict=True)
        try:
            logits, *self._cache = self._run_where_it_lies(["logits", *self._cache_outputs], feed)
        except Exception as error:
            raise self._session.failed(error) from error
        values: NDArray[np.float32] = logits.numpy()[:, -1].astype(np.float32, copy=False)
        return values

    def _run_where_it_lies(
        self, outputs: list[str], feed: Mapping[str, onnxruntime.OrtValue]
    ) -> Sequence[onnxruntime.OrtValue]:
        """Run the graph; the new cache stays where it was computed and is the next step's input."""
        session = self._session
        if session.device == "cpu":
            # Binding 30 layers' cache by name costs 0.4 ms more a step than one call, which puts outputs on the host.
            values: Sequence[onnxruntime.OrtValue] = session.live.run_with_ort_values(outputs, feed)
            return values
        binding = session.live.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(outputs[0])
        for name in outputs[1:]:
            binding.bind_output(name, session.device, session.device_index)
        session.live.run_with_iobinding(binding)
        bound: Sequence[onnxruntime.OrtValue] = binding.get_outputs()
        return bound

    def _empty_cache(self, batch: int) -> list[NDArray[Any]]:
        specs = {spec.name: spec for spec in self._artifact.inputs}
        empty = []
        for name in self._cache_inputs:
            _, heads, _, size = specs[name].shape
            empty.append(np.zeros((batch, int(heads), 0, int(size)), dtype=specs[name].dtype))
        return empty

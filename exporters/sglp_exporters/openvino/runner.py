"""OpenVINO as a Runner: one for decoders with a key-value cache, one for graphs that run forward only.

Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.artifact import PAST, PRESENT, ExportArtifact
from sglp_deploy.errors import BackendError, ConfigError
from sglp_exporters.onnx.runner import OPTIONAL_INPUT
from sglp_exporters.runners.openvino_alone import load_openvino

if TYPE_CHECKING:
    import openvino


MODEL_FILE = "model.xml"
WEIGHTS_FILE = "model.bin"
_LAST = np.array([-1])  # the position whose logits are wanted, counted from the end
# Lines of OpenVINO's messages that only say where in its source they were raised.
_PLACES = ("Exception from ", "Check '", "FrontEnd API failed", "Summary:")


def reason(error: Exception) -> str:
    """What an exception of OpenVINO says, on one line and without the places in its source."""
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines() if line.strip()]
    said = [line.rstrip(".") for line in lines if not line.startswith(_PLACES)]
    return ": ".join(said or lines) or type(error).__name__


def version() -> str:
    """Version of the OpenVINO that is installed, without its build."""
    return metadata.version("openvino")


def _where(sizes: Mapping[str, int]) -> str:
    return " where " + ", ".join(f"{name} is {size}" for name, size in sizes.items()) if sizes else ""


class _Compiled:
    """A network that is compiled while it is entered, on the device that was asked for and no other."""

    def __init__(self, artifact: ExportArtifact, device: str, threads: int | None) -> None:
        if device.startswith("cuda"):
            raise ConfigError(
                f"OpenVINO runs on cpu or on Intel's gpu and npu, not on {device!r}; pass --device cpu, or export to "
                "onnx or tensorrt for that device"
            )
        self.file = artifact.path / MODEL_FILE
        self.inputs = {spec.name: spec for spec in artifact.inputs}
        self.outputs = [spec.name for spec in artifact.outputs]
        self.device = device.upper()
        self.description = "OpenVINO"
        self._threads = threads
        self._live: openvino.CompiledModel | None = None

    def load(self) -> None:
        """Compile the network.

        Raises:
            BackendError: If there is no such device, or OpenVINO refuses the network.
        """
        core = load_openvino().Core()
        # Its CPU plugin may otherwise compute in bf16 where the processor can; the bounds of parity mean float32.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if self._threads is not None and self.device == "CPU":
            settings["INFERENCE_NUM_THREADS"] = self._threads
        if self.device.partition(".")[0] not in {name.partition(".")[0] for name in core.available_devices}:
            raise BackendError(
                f"OpenVINO finds no {self.device} here, only {', '.join(core.available_devices)}; the device or its "
                "driver is missing; use --device cpu"
            )
        try:
            live = core.compile_model(self.file, self.device, settings)
        except Exception as error:
            raise BackendError(
                f"OpenVINO {version()} cannot load {self.file}; {reason(error)}; export it again"
            ) from error
        # What was compiled for says where it runs; OpenVINO's heterogeneous plugins place parts of a network elsewhere.
        ran = [str(name) for name in live.get_property("EXECUTION_DEVICES")]
        if any(name.partition(".")[0] != self.device.partition(".")[0] for name in ran) or not ran:
            raise BackendError(
                f"OpenVINO went to {', '.join(ran) or 'no device'} although {self.device} was asked for; a number "
                f"taken there would be mislabelled; check the devices with its benchmark_app, or use --device cpu"
            )
        arithmetic = live.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.description = f"OpenVINO {version()} on {self.device}, computing in {arithmetic}"
        self._live = live

    def unload(self) -> None:
        self._live = None

    def require_live(self) -> openvino.CompiledModel:
        if self._live is None:
            raise BackendError("the runner is not active; its network is loaded by 'with'; use it as a context manager")
        return self._live

    def request(self) -> openvino.InferRequest:
        return self.require_live().create_infer_request()

    def run(self, request: openvino.InferRequest, feed: Mapping[str, openvino.Tensor]) -> None:
        self._check({name: tuple(tensor.shape) for name, tensor in feed.items()})
        try:
            for name, tensor in feed.items():
                request.set_tensor(name, tensor)
            request.infer()
        except Exception as error:
            raise BackendError(
                f"OpenVINO failed on {self.file}; {reason(error)}; check the inputs' names, shapes and types"
            ) from error

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse what does not fit together: OpenVINO takes an input left out for an empty one, and gives numbers;
        sizes that contradict each other have ended the process.
        """
        sizes: dict[str, int] = {}
        for name, spec in self.inputs.items():
            if name not in shapes:
                raise BackendError(
                    f"{name} was not given to {self.file}; OpenVINO would run without it; give every input of the "
                    "manifest"
                )
            found = shapes[name]
            # Ranks may differ here; the next line compares them.
            wanted = [sizes.setdefault(s, n) if isinstance(s, str) else s for s, n in zip(spec.shape, found)]  # noqa: B905
            if wanted != list(found) or len(found) != len(spec.shape):
                raise BackendError(
                    f"{name} has shape {list(found)}, {self.file} takes {list(spec.shape)}"
                    f"{_where(sizes)}; OpenVINO itself does not check; give inputs that fit together"
                )
        past = sizes.get("past_sequence", 0) + sizes.get("sequence", 0)
        if sizes.get("total_sequence", past) != past:
            raise BackendError(
                f"attention_mask covers {sizes['total_sequence']} tokens, cache and input_ids hold {past}; OpenVINO "
                "itself does not check; give inputs that fit together"
            )

    def feed(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, openvino.Tensor]:
        """``inputs`` as tensors of the types the network takes; it reinterprets bytes of any other."""
        openvino = load_openvino()
        tensors = {}
        for name, value in inputs.items():
            dtype = self.inputs[name].dtype if name in self.inputs else value.dtype
            tensors[name] = openvino.Tensor(np.ascontiguousarray(value, dtype=dtype))
        return tensors


class OpenVinoForwardRunner:
    """Runs a graph without a cache on OpenVINO.

    Args:
        artifact: An ``openvino`` artifact whose interface is "forward".
        device: "cpu", or OpenVINO's own name for another.
        threads: Threads of the CPU, or None for OpenVINO's choice.
    """

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        self._compiled = _Compiled(artifact, device, threads)
        self._request: openvino.InferRequest | None = None

    def __enter__(self) -> OpenVinoForwardRunner:
        """Compile the network.

        Raises:
            BackendError: If there is no such device, or OpenVINO refuses the network.
        """
        self._compiled.load()
        self._request = self._compiled.request()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the network."""
        self._request = None
        self._compiled.unload()

    @property
    def description(self) -> str:
        """What runs, for certificates: version, device and arithmetic."""
        return self._compiled.description

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once on the named inputs, each cast to the type the graph takes."""
        request = self._request or self._compiled.request()
        self._compiled.run(request, self._compiled.feed(inputs))
        return {name: request.get_tensor(name).data.astype(np.float32) for name in self._compiled.outputs}

    def synchronize(self) -> None:
        """Calls block until their outputs are on the host; nothing to wait for."""


class OpenVinoRunner:
    """Runs a decoder graph on OpenVINO; what one step leaves in the cache is the next step's input, uncopied.

    Two requests take turns, because a request's outputs are overwritten when it runs again.

    Args:
        artifact: An ``openvino`` artifact whose interface is "decoder".
        device: "cpu", or OpenVINO's own name for another.
        threads: Threads of the CPU, or None for OpenVINO's choice.
    """

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        self._compiled = _Compiled(artifact, device, threads)
        self._cache_outputs = [name for name in self._compiled.outputs if name.startswith(PRESENT)]
        self._requests: list[openvino.InferRequest] = []
        self._cache: dict[str, openvino.Tensor] = {}
        self._mask: NDArray[np.int64] | None = None

    def __enter__(self) -> OpenVinoRunner:
        """Compile the network.

        Raises:
            BackendError: If there is no such device, or OpenVINO refuses the network.
        """
        self._compiled.load()
        self._requests = [self._compiled.request(), self._compiled.request()]
        self._cache, self._mask = {}, None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the network and the cache."""
        self._cache, self._requests, self._mask = {}, [], None
        self._compiled.unload()

    @property
    def description(self) -> str:
        """What runs, for certificates: version, device and arithmetic."""
        return self._compiled.description

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph on the named inputs; a cache that is left out is empty, logits are the last position's."""
        request = self._compiled.request()
        left_out = {**self._empty_cache(len(inputs["input_ids"])), OPTIONAL_INPUT: _LAST}
        feed = {name: value for name, value in left_out.items() if name in self._compiled.inputs} | dict(inputs)
        self._compiled.run(request, self._compiled.feed(feed))
        return {name: request.get_tensor(name).data.copy() for name in self._compiled.outputs}

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
        self._compiled.require_live()
        ids = np.ascontiguousarray(input_ids, dtype=np.int64)
        self._mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        self._cache = self._compiled.feed(self._empty_cache(len(ids)))
        kept = np.arange(ids.shape[1]) if all_positions else _LAST
        logits = self._step(ids, np.maximum(self._mask.cumsum(axis=-1) - 1, 0), kept)
        # A graph that was traced whole gives the logits of every position, whatever is wanted.
        return logits if all_positions else logits[:, -1]

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`."""
        if self._mask is None:
            raise BackendError("decode was called before prefill; there is no cache to continue; call prefill first")
        ids = np.ascontiguousarray(token_ids, dtype=np.int64).reshape(-1, 1)
        self._mask = np.concatenate([self._mask, np.ones_like(ids)], axis=1)
        return self._step(ids, self._mask.sum(axis=-1, keepdims=True) - 1, _LAST)[:, -1]

    def _step(
        self, ids: NDArray[np.int64], positions: NDArray[np.int64], kept: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        assert self._mask is not None
        arrays = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions, OPTIONAL_INPUT: kept}
        feed = self._compiled.feed({name: value for name, value in arrays.items() if name in self._compiled.inputs})
        request = self._requests[0]
        self._compiled.run(request, feed | self._cache)
        self._requests.reverse()
        self._cache = {name.replace(PRESENT, PAST): request.get_tensor(name) for name in self._cache_outputs}
        logits: NDArray[np.float32] = request.get_tensor("logits").data.astype(np.float32)
        return logits

    def _empty_cache(self, batch: int) -> dict[str, NDArray[Any]]:
        empty = {}
        for name, spec in self._compiled.inputs.items():
            if name.startswith(PAST):
                _, heads, _, size = spec.shape
                empty[name] = np.zeros((batch, int(heads), 0, int(size)), dtype=spec.dtype)
        return empty

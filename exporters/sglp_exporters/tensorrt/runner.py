"""Run an engine on its device: tensors of PyTorch as device memory, one stream, one context for each profile.

The graph appends to the cache by concatenation.  A step reads one set of buffers and writes another.  Then the two swap
places.  Nothing is copied between host and device but tokens and logits.  No memory is allocated while decoding.  No
CUDA graph is captured.  The cache's length is a size of every step's shapes, and a captured graph has fixed ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.artifact import PAST, PRESENT, ExportArtifact
from sglp_deploy.errors import BackendError
from sglp_exporters.tensorrt.build import KIT_FILE, RTX
from sglp_exporters.tensorrt.kit import DECODE, FORWARD, PREFILL

if TYPE_CHECKING:
    import torch


_KEPT = "logits_to_keep"


def runner_for(
    artifact: ExportArtifact, engine: Path, package: str, device: str
) -> TensorRTRunner | TensorRTForwardRunner:
    """A runner of ``engine``; it generates if the graph has a cache.

    Args:
        artifact: The folder that says what goes in and comes out.
        engine: The engine file.
        package: Import name of the TensorRT that built it; no other one loads it.
        device: "cuda" or "cuda:N".
    """
    if any(spec.name.startswith(PAST) for spec in artifact.inputs):
        return TensorRTRunner(artifact, engine, package, device)
    return TensorRTForwardRunner(artifact, engine, package, device)


class _Engine:
    """An engine while it is loaded, and the one way to run it: named tensors in, named buffers out."""

    def __init__(self, artifact: ExportArtifact, file: Path, package: str, device: str) -> None:
        self.artifact = artifact
        self.description = f"{package}, {file.name}"
        self._file, self._package, self._device_name = file, package, device
        self._profiles = {
            profile["name"]: profile["shapes"]
            for profile in _io.read_json(artifact.path / KIT_FILE, "tensorrt-kit")["profiles"]
        }
        self._contexts: dict[str, Any] = {}
        self._loaded: tuple[Any, ...] = ()
        self._stream: torch.cuda.Stream | None = None

    def load(self) -> None:
        """Read the engine and make a context for each profile.

        Raises:
            BackendError: If the package is missing or not the one it was built with, or TensorRT refuses the engine.
        """
        import torch

        try:
            trt = importlib.import_module(self._package)
        except ImportError as error:
            raise BackendError(
                f"the engine in {self._file} needs {self._package}, which is not here; an engine loads only in the "
                "TensorRT that built it; install it"
            ) from error
        self.device = torch.device(self._device_name)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise BackendError(
                    f"there is no CUDA device to run {self._file} on; an engine runs on the device it was built for; "
                    "use --device cpu for the ONNX it was built from, or another machine"
                )
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with self._on_device():
            log = trt.Logger(trt.Logger.ERROR)
            runtime = trt.Runtime(log)
            engine = runtime.deserialize_cuda_engine(self._file.read_bytes())
            if engine is None:
                raise BackendError(
                    f"{self._package} {trt.__version__} cannot load {self._file}; it was built by another version or "
                    "for another device; build it again here with build.py"
                )
            for index, name in enumerate(self._profiles):
                context = self._context(trt, engine, name)
                if context is None or not context.set_optimization_profile_async(index, self._stream_handle()):
                    raise BackendError(
                        f"TensorRT gives no context for profile {name!r} of {self._file}; the device's memory may be "
                        "full; free some, or export with smaller max_batch and max_total"
                    )
                self._contexts[name] = context
        # TensorRT's objects do not hold each other; all of them live until unload.
        self._loaded = (log, runtime, engine)
        self.description = f"{self._package} {trt.__version__} on {self._device_words()}"

    def _context(self, trt: Any, engine: Any, profile: str) -> Any:
        """A context whose scratch memory is that of its own profile, not of the largest one."""
        own = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self._package != RTX:
            return engine.create_execution_context(own)
        # TensorRT for RTX compiles kernels for each new shape in the background and swaps them in.  In decoding every
        # step has a new shape: times would be a mixture, so there the kernels that take any shape stay.
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(own)
        kernels = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kernels.NONE if profile == DECODE else kernels.EAGER
        return engine.create_execution_context(config)

    def unload(self) -> None:
        self.synchronize()
        self._contexts = {}
        self._loaded = ()
        self._stream = None

    def run(
        self,
        profile: str,
        inputs: Mapping[str, torch.Tensor],
        cache: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]],
        buffers: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Run once.

        Args:
            profile: Which one.
            inputs: Named tensors on the device.
            cache: Named buffers and the shapes their contents have, because an empty tensor has no address.
            buffers: Where outputs of those names go, flat and large enough; the others get new tensors.

        Returns:
            The outputs that have no buffer.
        """
        import torch

        if not self._loaded:
            raise BackendError("the runner is not active; its engine is loaded by 'with'; use it as a context manager")
        context = self._contexts[profile]
        given = {name: (tensor, tuple(tensor.shape)) for name, tensor in inputs.items()}
        outputs: dict[str, torch.Tensor] = {}
        with self._on_device():
            for name, (tensor, shape) in {**given, **cache}.items():
                self._check_range(profile, name, shape)
                context.set_input_shape(name, shape)
                context.set_tensor_address(name, tensor.data_ptr())
            if unset := context.infer_shapes():
                raise BackendError(f"the engine lacks {', '.join(unset)}; its shapes are not known; pass every input")
            for spec in self.artifact.outputs:
                shape = tuple(context.get_tensor_shape(spec.name))
                if spec.name in buffers:
                    buffer = buffers[spec.name]
                    if buffer.numel() < int(np.prod(shape)):
                        raise BackendError(
                            f"{spec.name} of shape {shape} does not fit a buffer of {buffer.numel()}; export with a "
                            "greater max_total"
                        )
                else:
                    buffer = outputs[spec.name] = torch.empty(
                        shape, dtype=getattr(torch, spec.dtype), device=self.device
                    )
                context.set_tensor_address(spec.name, buffer.data_ptr())
            if not context.execute_async_v3(self._stream_handle()):
                raise BackendError(f"TensorRT failed on {self._file}; it said why above; check the inputs' shapes")
        return outputs

    def tensor(self, name: str, value: NDArray[Any]) -> torch.Tensor:
        """``value`` on the device, of the type the engine takes."""
        import torch

        spec = next((spec for spec in self.artifact.inputs if spec.name == name), None)
        if spec is None:
            known = ", ".join(spec.name for spec in self.artifact.inputs)
            raise BackendError(f"the engine has no input {name!r}; it takes {known}; correct the name")
        with self._on_device():
            made = torch.as_tensor(np.ascontiguousarray(value, dtype=spec.dtype))
            return made.to(self.device)

    def flat(self, dtype: str, elements: int) -> torch.Tensor:
        """An uninitialised buffer on the device."""
        import torch

        with self._on_device():
            return torch.empty(elements, dtype=getattr(torch, dtype), device=self.device)

    def array(self, tensor: torch.Tensor) -> NDArray[Any]:
        """``tensor`` on the host, once it is computed."""
        with self._on_device():
            value: NDArray[Any] = tensor.cpu().numpy()
        return value

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _check_range(self, profile: str, name: str, shape: tuple[int, ...]) -> None:
        limits = self._profiles[profile].get(name)
        if limits is None:
            raise BackendError(f"the engine has no input {name!r}; it takes {', '.join(self._profiles[profile])}")
        least, most = tuple(limits["min"]), tuple(limits["max"])
        if len(shape) != len(most) or any(
            not low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ):
            raise BackendError(
                f"{name} has shape {shape}; the engine's {profile} profile takes {least} to {most}; export again with "
                "greater max_batch, max_prompt or max_total, or give it less at once"
            )

    def _on_device(self) -> AbstractContextManager[Any]:
        import torch

        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _stream_handle(self) -> int:
        return 0 if self._stream is None else int(self._stream.cuda_stream)

    def _device_words(self) -> str:
        import torch

        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)


class TensorRTForwardRunner:
    """Runs an engine without a cache.

    Args:
        artifact: The folder the engine belongs to.
        engine: The engine file.
        package: Import name of the TensorRT that built it.
        device: "cuda" or "cuda:N".
    """

    def __init__(self, artifact: ExportArtifact, engine: Path, package: str, device: str) -> None:
        self._engine = _Engine(artifact, engine, package, device)

    @property
    def description(self) -> str:
        """What executes the engine, for a certificate."""
        return self._engine.description

    def __enter__(self) -> TensorRTForwardRunner:
        """Load the engine."""
        self._engine.load()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the engine and the device's memory."""
        self._engine.unload()

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine once on the named inputs."""
        tensors = {name: self._engine.tensor(name, value) for name, value in inputs.items()}
        outputs = self._engine.run(FORWARD, tensors, {}, {})
        return {name: self._engine.array(tensor) for name, tensor in outputs.items()}

    def synchronize(self) -> None:
        """Wait for the engine's stream."""
        self._engine.synchronize()


class TensorRTRunner:
    """Runs a decoder's engine; the cache stays on the device between steps.

    Args:
        artifact: The folder the engine belongs to.
        engine: The engine file.
        package: Import name of the TensorRT that built it.
        device: "cuda" or "cuda:N".
    """

    def __init__(self, artifact: ExportArtifact, engine: Path, package: str, device: str) -> None:
        self._engine = _Engine(artifact, engine, package, device)
        self._inputs = {spec.name: spec for spec in artifact.inputs}
        self._cached = [name for name in self._inputs if name.startswith(PAST)]
        kit = _io.read_json(artifact.path / KIT_FILE, "tensorrt-kit")
        decode = next(profile["shapes"] for profile in kit["profiles"] if profile["name"] == DECODE)
        self._max_total = int(decode[self._cached[0]]["max"][2]) + 1
        self._read: dict[str, torch.Tensor] = {}
        self._write: dict[str, torch.Tensor] = {}
        self._mask: NDArray[np.int64] | None = None

    @property
    def description(self) -> str:
        """What executes the engine, for a certificate."""
        return self._engine.description

    def __enter__(self) -> TensorRTRunner:
        """Load the engine."""
        self._engine.load()
        self._forget()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the engine, the cache and the device's memory."""
        self._engine.unload()
        self._forget()

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine once on the named inputs; a cache that is left out is empty, ``logits_to_keep`` the last."""
        feed = dict(inputs)
        rows, tokens = feed["input_ids"].shape
        if _KEPT in self._inputs:
            kept = np.asarray(feed.get(_KEPT, [-1]))
            # TensorRT leaves negative positions undefined where the number of tokens varies.
            feed[_KEPT] = np.where(kept < 0, kept + tokens, kept)
        empty = {}
        for name in self._cached:
            if name not in feed:
                empty[name] = (self._engine.flat(self._inputs[name].dtype, 1), self._cache_shape(name, rows, 0))
        tensors = {name: self._engine.tensor(name, value) for name, value in feed.items()}
        outputs = self._engine.run(PREFILL, tensors, empty, {})
        return {name: self._engine.array(tensor) for name, tensor in outputs.items()}

    def synchronize(self) -> None:
        """Wait for the engine's stream."""
        self._engine.synchronize()

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        all_positions: bool = False,
    ) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`."""
        rows, tokens = input_ids.shape
        mask = np.ones((rows, tokens), dtype=np.int64) if attention_mask is None else attention_mask
        self._make_room(rows)
        self._mask = np.ascontiguousarray(mask, dtype=np.int64)
        positions = np.maximum(self._mask.cumsum(axis=-1) - 1, 0)
        kept = np.arange(tokens) if all_positions else np.array([tokens - 1])
        logits = self._step(PREFILL, input_ids, positions, kept, past=0)
        return logits if all_positions else logits[:, -1]

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`."""
        if self._mask is None:
            raise BackendError("decode was called before prefill; there is no cache to continue; call prefill first")
        ids = token_ids.reshape(-1, 1)
        past = self._mask.shape[1]
        self._mask = np.concatenate([self._mask, np.ones_like(ids, dtype=np.int64)], axis=1)
        positions = self._mask.sum(axis=-1, keepdims=True) - 1
        return self._step(DECODE, ids, positions, np.array([0]), past=past)[:, -1]

    def _step(
        self, profile: str, ids: NDArray[Any], positions: NDArray[Any], kept: NDArray[Any], past: int
    ) -> NDArray[np.float32]:
        assert self._mask is not None
        values = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions, _KEPT: kept}
        feed = {name: self._engine.tensor(name, value) for name, value in values.items() if name in self._inputs}
        cache = {name: (self._read[name], self._cache_shape(name, len(ids), past)) for name in self._cached}
        buffers = {name.replace(PAST, PRESENT): self._write[name] for name in self._cached}
        outputs = self._engine.run(profile, feed, cache, buffers)
        self._read, self._write = self._write, self._read
        logits: NDArray[np.float32] = self._engine.array(outputs["logits"]).astype(np.float32, copy=False)
        return logits

    def _make_room(self, rows: int) -> None:
        """Two sets of buffers for ``rows`` sequences of the greatest length; those of the last prompt if they fit."""
        for name in self._cached:
            elements = int(np.prod(self._cache_shape(name, rows, self._max_total)))
            if name not in self._read or self._read[name].numel() < elements:
                dtype = self._inputs[name].dtype
                self._read[name] = self._engine.flat(dtype, elements)
                self._write[name] = self._engine.flat(dtype, elements)

    def _cache_shape(self, name: str, rows: int, tokens: int) -> tuple[int, ...]:
        _, heads, _, size = self._inputs[name].shape
        return (rows, int(heads), tokens, int(size))

    def _forget(self) -> None:
        self._read, self._write, self._mask = {}, {}, None

"""A TensorRT that computes with ONNX Runtime: enough of the interface to test what is bound where, without a GPU.

It reads inputs from the addresses it was given and writes outputs to the addresses it was given, as the real one does,
and refuses what the real one refuses: a shape outside the profile, an address that is missing or empty.
"""

from __future__ import annotations

import ctypes
import enum
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

__version__ = "10.99-fake"
float32, float16, int64, int32, bool = "FLOAT", "HALF", "INT64", "INT32", "BOOL"
_TYPES = {"float32": float32, "float16": float16, "int64": int64, "int32": int32, "bool": bool}

NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
BuilderFlag = SimpleNamespace(TF32="tf32")
HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere+")
ExecutionContextAllocationStrategy = SimpleNamespace(STATIC="static", ON_PROFILE_CHANGE="on profile change")
DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager", NONE="none")
LayerInformationFormat = SimpleNamespace(JSON="json")
configs: list[Any] = []  # every builder configuration that was made


class ILogger:
    ERROR, INTERNAL_ERROR = "error", "internal error"


class Logger(ILogger):
    def __init__(self, severity: str) -> None:
        self.severity = severity


class DataType(enum.Enum):
    ANY = 0


class _Tensor:
    def __init__(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


def _tensors(values: Any) -> list[_Tensor]:
    made = []
    for value in values:
        kind = value.type.tensor_type
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
        shape = tuple(size.dim_param or size.dim_value for size in kind.shape.dim)
        made.append(_Tensor(value.name, _TYPES[dtype], shape))
    return made


class Network:
    def __init__(self) -> None:
        self.file = Path()
        self.inputs: list[_Tensor] = []
        self.outputs: list[_Tensor] = []
        self.nodes: list[Any] = []

    def read(self, file: str) -> None:
        graph = onnx.load(file, load_external_data=False).graph
        defaults = {tensor.name for tensor in graph.initializer}
        self.file = Path(file)
        # What has a default is a constant to TensorRT.
        self.inputs = [tensor for tensor in _tensors(graph.input) if tensor.name not in defaults]
        self.outputs, self.nodes = _tensors(graph.output), list(graph.node)

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.nodes))

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> _Tensor:
        return self.outputs[index]

    def get_layer(self, index: int) -> Any:
        node = self.nodes[index]
        return SimpleNamespace(
            name=node.name,
            metadata="",
            type=node.op_type.upper(),
            num_outputs=1,
            get_output=lambda output: SimpleNamespace(dtype=float32),
        )


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = network

    def parse_from_file(self, file: str) -> Any:
        self._network.read(file)
        return True


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = {}

    def set_shape(self, name: str, least: Sequence[int], typical: Sequence[int], most: Sequence[int]) -> None:
        assert all(a <= b <= c for a, b, c in zip(least, typical, most, strict=True)), name
        self.shapes[name] = (least, typical, most)


class TimingCache:
    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def serialize(self) -> bytes:
        return self.blob + b"measured"


class Config:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.cleared: list[str] = []
        self.cache: TimingCache | None = None
        configs.append(self)

    def clear_flag(self, flag: str) -> None:
        self.cleared.append(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, blob: bytes) -> TimingCache:
        return TimingCache(blob)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: Any) -> Any:
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class HostMemory(bytes):
    nbytes = property(len)


class Builder:
    def __init__(self, logger: ILogger) -> None:
        pass

    def create_network(self, flags: int) -> Network:
        assert flags == 2, "precision must come from the graph"
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> HostMemory:
        for profile in config.profiles:
            assert set(profile.shapes) == {tensor.name for tensor in network.inputs}
        _built[str(network.file)] = config.profiles
        return HostMemory(f"fake\n{network.file}\n".encode() + network.file.with_name("model.onnx.data").read_bytes())


_built: dict[str, list[Profile]] = {}


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        pass

    def deserialize_cuda_engine(self, engine: bytes) -> Engine | None:
        magic, file, _ = bytes(engine).split(b"\n", 2)
        return Engine(Path(file.decode())) if magic == b"fake" else None


class Engine:
    def __init__(self, file: Path) -> None:
        self.network = Network()
        self.network.read(str(file))
        self.profiles = _built[str(file)]
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def create_execution_context(self, how: Any = ExecutionContextAllocationStrategy.STATIC) -> Context:
        return Context(self, how)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: '{"Layers": []}')


class RuntimeConfig:
    """Of TensorRT for RTX, which takes it in place of the strategy alone."""

    allocation = ExecutionContextAllocationStrategy.STATIC
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation = strategy


contexts: list[Context] = []  # every context that was made


class Context:
    def __init__(self, engine: Engine, how: Any) -> None:
        self._engine = engine
        self.how = how
        contexts.append(self)
        self._profile: Profile | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> Any:
        self._profile = self._engine.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> Any:
        assert self._profile is not None
        least, _, most = self._profile.shapes[name]
        fits = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        assert fits, f"{name} {shape} is outside {least} to {most}"
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address, f"{name} has no address"
        self._addresses[name] = address

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in self._engine.network.inputs if tensor.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for tensor in self._engine.network.inputs:
            for symbol, size in zip(tensor.shape, self._shapes[tensor.name], strict=True):
                if isinstance(symbol, str):
                    assert sizes.setdefault(symbol, size) == size, f"{symbol} is both {sizes[symbol]} and {size}"
        output = next(tensor for tensor in self._engine.network.outputs if tensor.name == name)
        return tuple(eval(size, {}, sizes) if isinstance(size, str) else size for size in output.shape)

    def execute_async_v3(self, stream: int) -> Any:
        feed = {
            tensor.name: _view(self._addresses[tensor.name], tensor.dtype, self._shapes[tensor.name]).copy()
            for tensor in self._engine.network.inputs
        }
        # It leaves negative positions undefined where the axis varies; ONNX Runtime would count from the end.
        assert "logits_to_keep" not in feed or (feed["logits_to_keep"] >= 0).all()
        names = [tensor.name for tensor in self._engine.network.outputs]
        results: Mapping[str, np.ndarray] = dict(zip(names, self._engine.session.run(names, feed), strict=True))
        for tensor in self._engine.network.outputs:
            shape = self.get_tensor_shape(tensor.name)
            assert results[tensor.name].shape == shape
            _view(self._addresses[tensor.name], tensor.dtype, shape)[...] = results[tensor.name]
        return True


def _view(address: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = np.dtype({value: key for key, value in _TYPES.items()}[dtype])
    memory = (ctypes.c_byte * (math.prod(shape) * kind.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype=kind).reshape(shape)

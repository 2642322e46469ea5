"""The weights in an artifact's files, read one at a time: what a check of types or values needs of each format.

Nothing here may import torch at the top: a benchmark's worker imports the exporters, and its memory must be the
artifact's alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_exporters.runners.openvino_alone import load_openvino

if TYPE_CHECKING:
    from sglp_deploy.artifact import ExportArtifact
    from sglp_deploy.parity.diagnosis import StoredTensor

_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}
_OPENVINO = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i8": "int8",
    "u8": "uint8",
    "i4": "int4",
    "u4": "uint4",
}


def of_onnx(artifact: ExportArtifact) -> Iterator[StoredTensor]:
    """The initializers of every graph of the artifact, by their names."""
    import onnx

    from sglp_deploy.parity.diagnosis import StoredTensor

    def read(tensor: onnx.TensorProto, folder: Path) -> NDArray[Any]:
        return _plain(onnx.numpy_helper.to_array(tensor, base_dir=str(folder)))

    graph = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False).graph
    for tensor in graph.initializer:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        yield StoredTensor(tensor.name, kind, tuple(tensor.dims), partial(read, tensor, artifact.path))


def of_openvino(artifact: ExportArtifact) -> Iterator[StoredTensor]:
    """The constants of the network, by the names OpenVINO keeps."""
    from sglp_deploy.parity.diagnosis import StoredTensor

    network = load_openvino().Core().read_model(artifact.path / "model.xml")
    for node in network.get_ops():
        if node.get_type_name() == "Constant":
            kind = node.get_element_type().get_type_name()
            name = _OPENVINO.get(kind, kind)
            yield StoredTensor(node.get_friendly_name(), name, tuple(node.get_shape()), partial(_constant, node))


def of_safetensors(artifact: ExportArtifact) -> Iterator[StoredTensor]:
    """The tensors of the checkpoint, by their names."""
    from safetensors import safe_open

    from sglp_deploy.parity.diagnosis import StoredTensor

    def read(file: Path, name: str) -> NDArray[Any]:
        with safe_open(file, framework="pt") as opened:
            tensor = opened.get_tensor(name)
        return np.asarray(tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy())

    for file in sorted(artifact.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            facts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            shapes = {name: (tuple(each.get_shape()), str(each.get_dtype())) for name, each in facts.items()}
        for name, (shape, kind) in shapes.items():
            yield StoredTensor(name, _SAFETENSORS.get(kind, kind.lower()), shape, partial(read, file, name))


def _constant(node: Any) -> NDArray[Any]:
    return _plain(np.array(node.data))


def _plain(value: NDArray[Any]) -> NDArray[Any]:
    """Floating point values as float32; numpy itself has no name for bfloat16."""
    return value.astype(np.float32) if value.dtype.kind == "f" or "float" in value.dtype.name else value

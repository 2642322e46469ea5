"""Quantises an ONNX graph with NVIDIA ModelOpt, in ModelOpt's own environment.

Runs in another interpreter: nothing of ours may be imported but the loop, which is found by the variable below.
"""

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, os.environ["SGLP_WORKER_LOOP"])

import worker_loop

_PAST, _PRESENT = "past_key_values.", "present."
_CPU = ["CPUExecutionProvider"]


def quantise(network: str, output: str, feeds: list[str], cached: int, activations: bool) -> dict[str, Any]:
    """Write ``output``: the graph in ``network`` with int8 weights, symmetric, one scale for each output channel.

    Args:
        network: ONNX file; its inputs are all required.
        output: ONNX file to write, its weights beside it in ``NAME.data``.
        feeds: ``.npz`` files with inputs by name.  What a decoder's graph takes beside ``input_ids`` is made here.
        cached: Tokens of each row that are run first, so that the rest is calibrated on a cache; 0 for none.
        activations: Also quantise what flows into the matrices and convolutions, by the ranges the feeds show.
    """
    import onnx
    from modelopt.onnx.quantization import quantize
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # no type information there
        """The feeds, as often as they are asked for."""

        def __init__(self) -> None:
            self._feeds = list(_feeds(network, feeds, cached))
            self.rewind()

        def rewind(self) -> None:
            self._left = iter(self._feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

        def get_first(self) -> dict[str, Any]:
            return self._feeds[0]

        def __len__(self) -> int:
            return len(self._feeds)

    made = Path(output).with_name("modelopt.onnx")
    quantize(
        network,
        quantize_mode="int8",
        calibration_data_reader=Reader(),
        calibration_method="max",
        calibration_eps=["cpu"],
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        disable_mha_qdq=True,
        high_precision_dtype="fp32",
        mha_accumulation_dtype="fp32",
        dq_only=True,
        use_external_data_format=True,
        output_path=str(made),
        log_level="WARNING",
    )
    model = onnx.load(str(made))
    dropped = 0 if activations else _drop_activations(model.graph)
    operators: dict[str, int] = {}
    for node in model.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    onnx.save(model, output, save_as_external_data=True, location=f"{Path(output).name}.data", size_threshold=1024)
    for file in made.parent.glob("modelopt*"):
        file.unlink()
    return {"modelopt": metadata.version("nvidia-modelopt"), "operators": operators, "dropped": dropped}


def _feeds(network: str, files: list[str], cached: int) -> Iterator[dict[str, Any]]:
    import onnx
    import onnxruntime

    given = [dict(np.load(file)) for file in files]
    graph = onnx.load(network, load_external_data=False).graph
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    past = [name for name in shapes if name.startswith(_PAST)]
    if not past:
        yield from given
        return
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(network, options, providers=_CPU) if cached else None
    presents = [name.replace(_PAST, _PRESENT) for name in past]
    for feed in given:
        ids = feed["input_ids"]
        first = ids[:, :cached] if cached else ids
        empty = {name: np.zeros((len(ids), shapes[name][1], 0, shapes[name][3]), np.float32) for name in past}
        prompt = _decoder_feed(first, 0, shapes) | empty
        yield prompt
        if session is not None:
            cache = dict(zip(past, session.run(presents, prompt), strict=True))
            yield _decoder_feed(ids[:, cached:], cached, shapes) | cache


def _decoder_feed(ids: Any, before: int, shapes: dict[str, Any]) -> dict[str, Any]:
    rows, length = ids.shape
    positions = np.tile(np.arange(before, before + length), (rows, 1))
    made = {
        "input_ids": ids,
        "attention_mask": np.ones((rows, before + length), np.int64),
        "position_ids": positions,
        "logits_to_keep": np.arange(length),
    }
    return {name: value for name, value in made.items() if name in shapes}


def _drop_activations(graph: Any) -> int:
    """Take out every QuantizeLinear with its DequantizeLinear; the weights' own DequantizeLinear stay."""
    quantised = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    instead = {
        node.output[0]: quantised[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised
    }
    left = [node for node in graph.node if node.output[0] not in instead and node.output[0] not in quantised]
    dropped = len(graph.node) - len(left)
    for node in left:
        for index, name in enumerate(node.input):
            while name in instead:
                name = instead[name]
            node.input[index] = name
    del graph.node[:]
    graph.node.extend(left)
    used = {name for node in left for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return dropped


if __name__ == "__main__":
    worker_loop.serve({"quantise": quantise})

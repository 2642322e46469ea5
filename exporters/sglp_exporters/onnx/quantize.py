"""Weights as whole numbers with a scale for each block, by ONNX Runtime's own quantiser and for its own operators.

Source:
    Round to nearest in blocks along the inner axis, by ``onnxruntime.quantization.matmul_nbits_quantizer``.  Its own
    pass over a graph would leave an embedding tied to the output head in float32.  Here the table is quantised once and
    both read it.  Which matrices keep 8 bits in a mixture: much as in llama.cpp's mixed types, those that lose most, in
    the first and last eighth of the layers and every third between.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sglp_deploy.errors import BackendError
from sglp_exporters.onnx.passes import put_in_place

DOMAIN = "com.microsoft"
_TABLE_BITS = 8
# Activations are rounded to int8, block by block, as they are multiplied.  With float32 instead, one step of decoding
# SmolLM2-135M took 11.6 times as long as the unquantised graph (int8) or 5.6 times (int4), against 0.5 with this.
_ACCURACY_LEVEL = 4
_LEAST_SHARE = 0.5
_LAYER = re.compile(r"\.(\d+)\.")  # the first number in a name is the layer's


@dataclass(frozen=True)
class Quantised:
    """What came of it, as the manifest tells it.

    Attributes:
        weights: How many matrices were quantised.
        share: Of all floating point weights, by number of elements.
        table_bits: Bits of embedding tables; None where there is none in whole numbers.
        weights_of_8_bits: How many of the matrices have 8 bits, tables among them.
    """

    weights: int
    share: float
    table_bits: int | None
    weights_of_8_bits: int


@dataclass(frozen=True)
class _Blocks:
    """A matrix of ``rows`` outputs and ``width`` inputs in blocks along its width."""

    values: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    rows: int
    width: int
    bits: int


def quantize_weights(model: ir.Model, *, bits: int, block_size: int, symmetric: bool, mixed: bool = False) -> Quantised:
    """Replace products with constant matrices by ``MatMulNBits`` and look-ups in tables by ``GatherBlockQuantized``.

    Tables are of 8 bits whatever the rest is, and so is an output head that is tied to one.

    Args:
        model: Simplified, with weights as :func:`sglp_exporters.onnx.passes.store_weights_transposed` leaves them.
        bits: 8 or 4, of the matrices.
        block_size: Weights that share a scale.
        symmetric: Whether matrices have no zero points; tables never have.
        mixed: Whether matrices that most depends on keep 8 bits, whatever the rest has.

    Raises:
        BackendError: If less than half of the weights are multiplied or looked up in such a way.
    """
    graph = model.graph
    before = _float_elements(graph)
    tables = {
        node.inputs[0]
        for node in graph
        if node.op_type == "Gather" and _is_matrix(node.inputs[0]) and not node.attributes.get_int("axis", 0)
    }
    # Rows that do not end with a block would be read across their ends.
    tables = {table for table in tables if table is not None and _width(table) % block_size == 0}
    made: dict[tuple[str, bool], _Blocks] = {}
    finer = _finer(graph) if mixed else frozenset()

    def blocks(weight: ir.Value, *, turned: bool) -> _Blocks:
        key = (str(weight.name), turned)
        if key not in made:
            settings = (_TABLE_BITS, True) if weight in tables else (bits, symmetric)
            if weight.name in finer and weight not in tables:
                settings = (8, symmetric)
            made[key] = _quantised(graph, weight, turned, settings[0], block_size, settings[1])
        return made[key]

    for node in list(graph):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is not None and table in tables:
            _look_up(graph, node, blocks(table, turned=False), block_size)
        elif weight is not None and _is_matrix(weight) and (node.op_type == "MatMul" or _is_plain(node)):
            rows_first = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
            _multiply(graph, node, blocks(weight, turned=not rows_first), block_size)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        if not graph.initializers[name].is_graph_input():
            del graph.initializers[name]
    left = sum(each.rows * each.width for each in made.values())
    share = left / max(1, before)
    if share < _LEAST_SHARE:
        raise BackendError(
            f"{1 - share:.0%} of the weights are not in matrices that ONNX Runtime multiplies in whole numbers "
            "(convolutions, grouped experts); the file would be quantised in name only; export it with precision=fp16"
        )
    graph.opset_imports[DOMAIN] = 1
    of_8_bits = sum(each.bits == 8 for each in made.values())
    return Quantised(len(made), round(share, 4), _TABLE_BITS if tables else None, of_8_bits)


def _multiply(graph: ir.Graph, node: ir.Node, weight: _Blocks, block_size: int) -> None:
    x, output = node.inputs[0], node.outputs[0]
    tape = ir.tape.Tape(graph)
    product = tape.op(
        "MatMulNBits",
        [x, weight.values, weight.scales, *([weight.zero_points] if weight.zero_points else [])],
        attributes={
            "K": weight.width,
            "N": weight.rows,
            "bits": weight.bits,
            "block_size": block_size,
            "accuracy_level": _ACCURACY_LEVEL,
        },
        domain=DOMAIN,
    )
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        product.type = output.type
        product = tape.op("Add", [product, node.inputs[2]])
    put_in_place(graph, node, product, tape)


def _look_up(graph: ir.Graph, node: ir.Node, table: _Blocks, block_size: int) -> None:
    tape = ir.tape.Tape(graph)
    shape = ir.tensor(np.array([table.rows, table.width * table.bits // 8], dtype=np.int64))
    flat = tape.op(
        "Reshape", [table.values, tape.op("Constant", [], attributes={"value": ir.AttrTensor("value", shape)})]
    )
    found = tape.op(
        "GatherBlockQuantized",
        [flat, node.inputs[1], table.scales],
        attributes={"gather_axis": 0, "quantize_axis": 1, "block_size": block_size, "bits": table.bits},
        domain=DOMAIN,
    )
    put_in_place(graph, node, found, tape)


def _finer(graph: ir.Graph) -> frozenset[str | None]:
    """Names of the matrices that keep 8 bits in a mixture: of chosen layers, those with more inputs than outputs.

    These are the MLP's output projections, and keys and values that heads share.
    """
    inside = {
        name: int(found[1])
        for name, value in graph.initializers.items()
        if _is_matrix(value) and (found := _LAYER.search(str(name)))
    }
    n_layers = 1 + max(inside.values(), default=-1)
    few = n_layers // 8
    chosen = {layer for layer in range(n_layers) if layer < few or layer >= n_layers - few or (layer - few) % 3 == 2}
    return frozenset(
        name for name, layer in inside.items() if layer in chosen and _more_inputs(graph.initializers[name])
    )


def _more_inputs(weight: ir.Value) -> bool:
    """Whether a matrix of a product has more inputs than outputs."""
    assert weight.shape is not None
    first, second = weight.shape.numpy()
    for node, _ in weight.uses():
        rows_first = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        return first < second if rows_first else first > second
    return False


def _quantised(graph: ir.Graph, weight: ir.Value, turned: bool, bits: int, block_size: int, symmetric: bool) -> _Blocks:
    assert weight.const_value is not None
    matrix = weight.const_value.numpy()
    by_input = matrix if turned else matrix.T  # (width, rows), as the quantiser takes it
    values, scales, zero_points = _round(np.ascontiguousarray(by_input, dtype=np.float32), bits, block_size, symmetric)

    def stored(part: str, array: NDArray[Any]) -> ir.Value:
        name = f"{weight.name}.{part}"
        kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=kind, shape=ir.Shape(array.shape))
        graph.register_initializer(value)
        return value

    width, rows = by_input.shape
    return _Blocks(
        stored(f"int{bits}", values),
        stored("scales", scales),
        None if symmetric else stored("zero_points", zero_points),
        rows,
        width,
        bits,
    )


def _round(
    matrix: NDArray[np.float32], bits: int, block_size: int, symmetric: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    with _root_logger_as_it_is():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=symmetric, bits=bits)
    values, scales, zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    return values, scales, zero_points


@contextmanager
def _root_logger_as_it_is() -> Iterator[None]:
    """ONNX Runtime's quantiser sets up logging for the whole process when it is imported."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _is_matrix(value: ir.Value | None) -> bool:
    """Whether ``value`` is a constant float32 matrix."""
    return (
        value is not None
        and value.is_initializer()
        and value.dtype == ir.DataType.FLOAT
        and value.shape is not None
        and value.shape.rank() == 2
    )


def _is_plain(gemm: ir.Node) -> bool:
    """Whether a Gemm is a product with its second input and nothing more than a bias."""
    attributes = gemm.attributes
    scaled = attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0
    return not scaled and not attributes.get_int("transA", 0)


def _width(table: ir.Value) -> int:
    assert table.shape is not None
    return table.shape.numpy()[1]


def _float_elements(graph: ir.Graph) -> int:
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    tensors = [value.const_value for value in graph.initializers.values() if value.dtype in floats]
    return sum(int(tensor.size) for tensor in tensors if tensor is not None)

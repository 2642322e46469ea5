"""Rewrites of attention, so that a step no longer copies the whole cache several times.

For a layer with grouped key-value heads (Ainslie et al. 2023, arXiv 2305.13245) the trace slices keys and values from
their beginning to their end, repeats them for every query head, transposes the repeated keys and scales them.  Each of
these writes a copy that is as long as the context, for one new token as for many.  The same product needs none of them.
The query heads that share a key head are rows of one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sglp_exporters.onnx.passes import constant, put_in_place

_TO_THE_END = 1 << 31  # an end this far is "to the end" for any tensor; the tracer writes the greatest int64
_SWAP_LAST = [0, 1, 3, 2]


def share_key_value_heads(model: ir.Model) -> int:
    """Rewrite every product with keys or values that has the traced form; returns how many there were.

    What has another form stays as it is.  The mathematics stays, the order of additions does not: results differ from
    the traced graph's in the last bits.
    """
    graph = model.graph
    _drop_whole_slices(graph)
    _swap_in_one_step(graph)
    found = 0
    for node in [node for node in graph if node.op_type == "MatMul"]:
        product = _product(node)
        if product is not None:
            _rewrite(graph, node, product)
            found += 1
    common.RemoveUnusedNodesPass()(model)
    return found


@dataclass(frozen=True)
class _Product:
    """left @ right, where right is the cache of a layer, on the way repeated, transposed or scaled.

    Attributes:
        left: Queries or attention weights, (batch, heads, sequence, ...), before they are scaled.
        heads: Of ``left``.
        cache: Keys or values, (batch, key heads, total, size), as they lie in the cache.
        key_heads: Of ``cache``.
        swapped: Whether ``cache`` is transposed before it is multiplied.
        scale: Of the product, or None where right was not scaled; then ``left`` keeps its own scaling.
    """

    left: ir.Value
    heads: int
    cache: ir.Value
    key_heads: int
    swapped: bool
    scale: float | None


def _product(node: ir.Node) -> _Product | None:
    """What ``node`` multiplies, when something can be saved and each part is what it must be."""
    left, own_scale = _unscaled(node.inputs[0])
    right, scale = _unscaled(node.inputs[1])
    swap = _producer(right, "Transpose")
    swapped = swap is not None and list(swap.attributes.get_ints("perm", [])) == _SWAP_LAST
    cache = _unrepeated(swap.inputs[0] if swap is not None and swapped else right)
    if left is None or cache is None or (cache is right and scale is None):
        return None
    if left.shape is None or left.shape.rank() != 4 or cache.shape is None or cache.shape.rank() != 4:
        return None
    heads, key_heads = left.shape[1], cache.shape[1]
    if not (isinstance(heads, int) and isinstance(key_heads, int)) or heads % key_heads:
        return None
    if heads == key_heads and scale is None:
        return None
    if scale is None:
        left = node.inputs[0]
        assert left is not None
    else:
        scale *= 1.0 if own_scale is None else own_scale
    return _Product(left, heads, cache, key_heads, swapped, scale)


def _rewrite(graph: ir.Graph, node: ir.Node, product: _Product) -> None:
    tape = ir.tape.Tape(graph)
    left, right = product.left, product.cache
    if product.scale is not None:
        dtype = (left.dtype or ir.DataType.FLOAT).numpy()
        left = tape.op("Mul", [left, constant(tape, np.array(product.scale, dtype))])
    grouped = product.heads != product.key_heads
    if grouped:
        # 0 keeps the size at that place.  The query heads of one key head lie next to each other: rows of one matrix.
        left = tape.op("Reshape", [left, constant(tape, np.array([0, product.key_heads, -1, 0], np.int64))])
    if product.swapped:
        right = tape.op("Transpose", [right], attributes={"perm": _SWAP_LAST})
    result = tape.op("MatMul", [left, right])
    if grouped:
        result = tape.op("Reshape", [result, constant(tape, np.array([0, product.heads, -1, 0], np.int64))])
    put_in_place(graph, node, result, tape)


def _drop_whole_slices(graph: ir.Graph) -> None:
    """A slice from the first to the last element is its input."""
    for node in [node for node in graph if node.op_type == "Slice"]:
        source, output = node.inputs[0], node.outputs[0]
        starts, ends, steps = _ints(node.inputs[1]), _ints(node.inputs[2]), _ints(_input(node, 4))
        if source is None or starts is None or ends is None or (_input(node, 4) is not None and steps is None):
            continue
        whole = all(map(_first, starts)) and all(end >= _TO_THE_END for end in ends) and set(steps or [1]) == {1}
        if whole and not output.is_graph_output():
            output.replace_all_uses_with(source)
            graph.remove(node, safe=True)


def _swap_in_one_step(graph: ir.Graph) -> None:
    """Merging the leading axes, swapping the last two and splitting again is one Transpose."""
    for back in [node for node in graph if node.op_type == "Reshape"]:
        swap = _producer(back.inputs[0], "Transpose")
        flat = None if swap is None else _producer(swap.inputs[0], "Reshape")
        if swap is None or flat is None or list(swap.attributes.get_ints("perm", [])) != [0, 2, 1]:
            continue
        source = flat.inputs[0]
        if source is None or source.shape is None or source.shape.rank() != 4:
            continue
        rows, width = slice(-2, -1), slice(-1, None)
        if _parts(flat.inputs[1], source) != [-1, rows, width]:
            continue
        if _parts(back.inputs[1], source) != [slice(0, -2), width, rows]:
            continue
        tape = ir.tape.Tape(graph)
        swapped = tape.op("Transpose", [source], attributes={"perm": _SWAP_LAST})
        put_in_place(graph, back, swapped, tape)


def _parts(shape: ir.Value | None, source: ir.Value) -> list[int | slice] | None:
    """What a shape is put together from: numbers, and slices of the shape of ``source``."""
    concat = _producer(shape, "Concat")
    if concat is None:
        return None
    parts: list[int | slice] = []
    for value in concat.inputs:
        numbers = _ints(value)
        cut = _producer(value, "Slice")
        if numbers is not None and len(numbers) == 1:
            parts.append(numbers[0])
            continue
        origin = None if cut is None else _producer(cut.inputs[0], "Shape")
        if cut is None or origin is None or origin.inputs[0] is not source:
            return None
        if origin.attributes.get_int("start", 0) != 0:
            return None
        start, end = _ints(cut.inputs[1]), _ints(cut.inputs[2])
        if start is None or end is None or len(start) != 1:
            return None
        parts.append(slice(0 if _first(start[0]) else start[0], None if end[0] >= _TO_THE_END else end[0]))
    return parts


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """Keys or values before each head was repeated for its query heads; ``value`` itself where none was."""
    merged = _producer(value, "Reshape")
    expanded = None if merged is None else _producer(merged.inputs[0], "Expand")
    added = None if expanded is None else _producer(expanded.inputs[0], "Unsqueeze")
    if merged is None or expanded is None or added is None or _ints(added.inputs[1]) != [2]:
        return value
    source, wide, after = added.inputs[0], expanded.outputs[0].shape, merged.outputs[0].shape
    if source is None or source.shape is None or wide is None or after is None:
        return value
    if (source.shape.rank(), wide.rank(), after.rank()) != (4, 5, 4):
        return value
    heads, times = source.shape[1], wide[2]
    if not (isinstance(heads, int) and isinstance(times, int)) or wide[1] != heads or after[1] != heads * times:
        return value
    # A varying number of tokens has one symbol here and another there; what is a number must be the same number.
    tokens = {size for size in (source.shape[2], wide[3], after[2]) if isinstance(size, int)}
    same = len(tokens) < 2 and source.shape[2] != 1 and source.shape[3] == wide[4] == after[3]
    return source if same else value


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float | None]:
    """``value`` before it was multiplied with one number, and that number."""
    product = _producer(value, "Mul")
    if product is not None:
        for factor, other in (product.inputs, product.inputs[::-1]):
            constant = None if factor is None else ir.convenience.get_const_tensor(factor)
            if constant is not None and constant.size == 1 and len(constant.shape) <= 1:
                return other, float(constant.numpy().reshape(()))
    return value, None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if len(node.inputs) > place else None


def _first(start: int) -> bool:
    """Whether a slice starts at the first element whatever the size; the tracer writes 0 or the least int64."""
    return start == 0 or start <= -_TO_THE_END


def _ints(value: ir.Value | None) -> list[int] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]

"""Graph rewrites that make an assembled decoder graph smaller and faster without changing what it computes.

Those that know about attention are :mod:`sglp_exporters.onnx.attention`.  They are built with what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir import tensor_adapters
from onnx_ir.passes import common

from sglp_deploy.errors import BackendError

# Changes a graph in place; what it returns is for whoever asks it alone.
Rewrite = Callable[[ir.Model], object]


def put_in_place(graph: ir.Graph, old: ir.Node, new: ir.Value, tape: ir.tape.Tape) -> None:
    """Let ``new``, which ``tape`` computes, take the place of the only output of ``old``: name, type, shape, users."""
    output = old.outputs[0]
    new.type, new.shape = output.type, output.shape
    graph.insert_before(old, tape.nodes)
    name = output.name
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    new.name = name


def constant(tape: ir.tape.Tape, array: np.ndarray) -> ir.Value:
    """``array`` as a value of the graph that ``tape`` writes."""
    return tape.op("Constant", [], attributes={"value": ir.AttrTensor("value", ir.tensor(array))})


def store_weights_transposed(model: ir.Model) -> None:
    """Put weights into the file the way MatMul reads them, so no runtime has to transpose them when it loads.

    A linear layer traces to ``MatMul(x, Transpose(W))``.  Where only the Transpose reads ``W``, a transposed ``W``
    replaces both.  Where something else reads it too (an embedding tied to the output head), storing it twice would
    cost its size again; ``Gemm`` with ``transB`` reads it as it lies.
    """
    graph = model.graph
    for node in [node for node in graph if node.op_type == "Transpose"]:
        weight = node.inputs[0]
        if weight is None or not weight.is_initializer() or weight.shape is None or weight.shape.rank() != 2:
            continue
        if list(node.attributes.get_ints("perm", [1, 0])) != [1, 0]:
            continue
        readers = [user for user, _ in weight.uses()]
        if all(user.op_type == "Transpose" for user in readers):
            _replace_by_transposed_initializer(graph, node, weight)
        else:
            for user, position in list(node.outputs[0].uses()):
                if user.op_type == "MatMul" and position == 1:
                    _matmul_to_gemm(graph, user, weight)
            if not node.outputs[0].uses():
                graph.remove(node, safe=True)


def _replace_by_transposed_initializer(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    name = f"{weight.name}.T"
    if name not in graph.initializers:
        tensor = weight.const_value
        if isinstance(tensor, tensor_adapters.TorchTensor):
            # A view: the bytes are put in order only when the file is written.
            turned: ir.TensorProtocol = tensor_adapters.TorchTensor(tensor.raw.t(), name=name)
        else:
            assert tensor is not None
            turned = ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=name)
        value = ir.Value(name=name, const_value=turned, type=weight.type, shape=ir.Shape(turned.shape.numpy()))
        graph.register_initializer(value)
    node.outputs[0].replace_all_uses_with(graph.initializers[name])
    graph.remove(node, safe=True)
    if not weight.uses():
        assert weight.name is not None
        del graph.initializers[weight.name]


def _matmul_to_gemm(graph: ir.Graph, matmul: ir.Node, weight: ir.Value) -> None:
    """``MatMul(x, Wt)`` for x of shape (..., k) becomes Reshape, Gemm with transB, Reshape back."""
    x = matmul.inputs[0]
    assert x is not None
    assert weight.shape is not None
    rows, width = weight.shape.numpy()
    tape = ir.tape.Tape(graph)
    flat = tape.op("Reshape", [x, constant(tape, np.array([-1, width], np.int64))])
    product = tape.op("Gemm", [flat, weight], attributes={"transB": 1})
    leading = tape.op("Shape", [x], attributes={"start": 0, "end": -1})
    shape = tape.op("Concat", [leading, constant(tape, np.array([rows], np.int64))], attributes={"axis": 0})
    shaped = tape.op("Reshape", [product, shape])
    put_in_place(graph, matmul, shaped, tape)


def simplify(model: ir.Model, *, rewrites: Iterable[Rewrite] = ()) -> None:
    """Fold constants, compute equal values once and drop what nothing reads.

    ``rewrites`` see the graph between the two: constants are folded, so that a form can be recognised, and what they
    leave unread is dropped.

    Not ``onnxscript.optimizer.optimize_ir``: its pattern rewrites took 8.6 s of 30 layers' export (this takes 0.8 s),
    and ONNX Runtime, which rewrites the same patterns when it loads, ends up with as many nodes and as fast.
    """
    from onnxscript import optimizer

    optimizer.fold_constants(model, onnx_shape_inference=True)
    divide_by_roots(model.graph)
    for rewrite in rewrites:
        rewrite(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)


def convert_opset(model: ir.Model, opset: int) -> None:
    """Rewrite the graph for another version of ONNX's operators, with the least IR version that goes with it.

    Upwards by onnxscript's converter, downwards by ONNX's own.

    Raises:
        BackendError: If an operator of the graph does not exist in that version, or there is no converter for it.
    """
    import onnx
    from onnxscript.version_converter import ConvertVersionPass

    from sglp_deploy.models import quiet_libraries

    before = model.graph.opset_imports[""]
    used = {node.op_type for node in model.graph}
    oldest: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.name in used:
            oldest[schema.name] = min(schema.since_version, oldest.get(schema.name, schema.since_version))
    newer = sorted(name for name, version in oldest.items() if version > opset)
    if newer:
        raise BackendError(
            f"opset={opset} cannot be had; it lacks {', '.join(newer)}, which the traced graph of opset {before} uses; "
            f"pass opset={before} or more"
        )
    with quiet_libraries():
        ConvertVersionPass(opset, fallback=True)(model)
    # It does not raise where it fails; it leaves the graph as it was.
    if model.graph.opset_imports[""] != opset:
        raise BackendError(
            f"opset={opset} cannot be had; the converters of onnxscript and onnx both gave up on the graph of opset "
            f"{before}; pass opset={before} or more"
        )
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def divide_by_roots(graph: ir.Graph) -> None:
    """Write ``x * Reciprocal(Sqrt(v))`` as ``x / Sqrt(v)``: the tracer's form of a root mean square norm.

    ONNX Runtime runs the second form as one operator (SimplifiedLayerNormalization) and the first as seven.  Results
    differ in the last bit.
    """
    for inverse in [node for node in graph if node.op_type == "Reciprocal"]:
        root = inverse.inputs[0]
        producer = None if root is None else root.producer()
        if producer is None or producer.op_type != "Sqrt":
            continue
        for product, place in list(inverse.outputs[0].uses()):
            if product.op_type != "Mul" or product.inputs[0] is product.inputs[1]:
                continue
            output = product.outputs[0]
            quotient = ir.node("Div", [product.inputs[1 - place], root])
            quotient.outputs[0].type, quotient.outputs[0].shape = output.type, output.shape
            graph.insert_before(product, quotient)
            name = output.name
            output.replace_all_uses_with(quotient.outputs[0], replace_graph_outputs=True)
            graph.remove(product, safe=True)
            quotient.outputs[0].name = name
        if not inverse.outputs[0].uses() and not inverse.outputs[0].is_graph_output():
            graph.remove(inverse, safe=True)


def default_logits_to_last(model: ir.Model, name: str = "logits_to_keep") -> None:
    """Give the optional input ``name`` the default ``[-1]``: a caller that leaves it out gets the last position.

    An initializer of the same name as an input is ONNX's way of saying that the input may be omitted.
    """
    graph = model.graph
    value = next(value for value in graph.inputs if value.name == name)
    value.const_value = ir.tensor(np.array([-1], dtype=np.int64), name=name)
    graph.register_initializer(value)


def required_inputs(file: Path) -> bytes:
    """The graph in ``file`` with no default for any input; the weights stay in their own file beside it.

    TensorRT and OpenVINO take an input that has a default for a constant, and would give the last position's logits
    only.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    inputs = {value.name for value in model.graph.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    graph: bytes = model.SerializeToString(deterministic=True)
    return graph

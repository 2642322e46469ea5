from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir import tensor_adapters

from sglp_exporters.onnx.passes import default_logits_to_last, divide_by_roots, simplify, store_weights_transposed

RNG = np.random.default_rng(0)
FLOAT = ir.TensorType(ir.DataType.FLOAT)


def _weight(name: str, array: np.ndarray, torch_backed: bool = False) -> ir.Value:
    tensor = (
        tensor_adapters.TorchTensor(torch.from_numpy(array), name=name) if torch_backed else ir.tensor(array, name=name)
    )
    return ir.Value(name=name, const_value=tensor, type=FLOAT, shape=ir.Shape(array.shape))


def _model(
    nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], output: ir.Value, weights: Sequence[ir.Value], rank: int
) -> ir.Model:
    output.name, output.type, output.shape = "y", FLOAT, ir.Shape([None] * rank)
    graph = ir.Graph(inputs, [output], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def _input(name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _run(model: ir.Model, tmp_path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    ir.save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feed)[0]
    return result


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("torch_backed", [False, True])
def test_a_weight_only_a_transpose_reads_is_stored_transposed(tmp_path: Path, torch_backed: bool) -> None:
    array = RNG.normal(size=(5, 4)).astype(np.float32)
    x, weight = _input("x", ["n", 3, 4]), _weight("w", array, torch_backed)
    transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
    matmul = ir.node("MatMul", [x, transpose.outputs[0]])
    model = _model([transpose, matmul], [x], matmul.outputs[0], [weight], 3)
    store_weights_transposed(model)
    assert _operators(model) == ["MatMul"]
    assert list(model.graph.initializers) == ["w.T"]
    np.testing.assert_array_equal(model.graph.initializers["w.T"].const_value.numpy(), array.T)
    data = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(_run(model, tmp_path, {"x": data}), data @ array.T, atol=1e-5)


def test_two_transposes_of_one_weight_share_what_is_stored(tmp_path: Path) -> None:
    array = RNG.normal(size=(4, 4)).astype(np.float32)
    x, weight = _input("x", ["n", 4]), _weight("w", array)
    turns = [ir.node("Transpose", [weight], attributes={"perm": [1, 0]}) for _ in range(2)]
    first = ir.node("MatMul", [x, turns[0].outputs[0]])
    second = ir.node("MatMul", [first.outputs[0], turns[1].outputs[0]])
    model = _model([turns[0], first, turns[1], second], [x], second.outputs[0], [weight], 2)
    store_weights_transposed(model)
    assert _operators(model) == ["MatMul", "MatMul"]
    assert list(model.graph.initializers) == ["w.T"]
    data = RNG.normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_allclose(_run(model, tmp_path, {"x": data}), data @ array.T @ array.T, atol=1e-5)


@pytest.mark.parametrize("leading", [(2,), (2, 3), (2, 3, 2), (0, 3)])
def test_a_weight_tied_to_an_embedding_is_stored_once_and_read_by_gemm(
    tmp_path: Path, leading: tuple[int, ...]
) -> None:
    array = RNG.normal(size=(7, 4)).astype(np.float32)
    ids = _input("ids", [f"d{n}" for n in range(len(leading))], ir.DataType.INT64)
    weight = _weight("embedding", array)
    gather = ir.node("Gather", [weight, ids])
    gather.outputs[0].type, gather.outputs[0].shape = FLOAT, ir.Shape([*ids.shape, 4])
    transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
    matmul = ir.node("MatMul", [gather.outputs[0], transpose.outputs[0]])
    model = _model([gather, transpose, matmul], [ids], matmul.outputs[0], [weight], len(leading) + 1)
    store_weights_transposed(model)
    assert "Gemm" in _operators(model)
    assert not {"Transpose", "MatMul"} & set(_operators(model))
    assert list(model.graph.initializers) == ["embedding"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    data = RNG.integers(0, 7, leading)
    got = _run(model, tmp_path, {"ids": data})
    assert got.shape == (*leading, 7)
    np.testing.assert_allclose(got, array[data] @ array.T, atol=1e-5)


def test_a_tied_weight_transposed_for_something_else_stays(tmp_path: Path) -> None:
    array = RNG.normal(size=(7, 4)).astype(np.float32)
    ids, weight = _input("ids", ["n"], ir.DataType.INT64), _weight("embedding", array)
    gather = ir.node("Gather", [weight, ids])
    transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
    product = ir.node("MatMul", [gather.outputs[0], transpose.outputs[0]])
    total = ir.node("ReduceSum", [transpose.outputs[0]], attributes={"keepdims": 0})
    added = ir.node("Add", [product.outputs[0], total.outputs[0]])
    model = _model([gather, transpose, product, total, added], [ids], added.outputs[0], [weight], 2)
    store_weights_transposed(model)
    assert _operators(model).count("Transpose") == 1
    data = np.array([1, 5])
    np.testing.assert_allclose(_run(model, tmp_path, {"ids": data}), array[data] @ array.T + array.sum(), atol=1e-4)


def test_other_transposes_are_left_alone() -> None:
    cube = _weight("cube", RNG.normal(size=(2, 3, 4)).astype(np.float32))
    square = _weight("square", RNG.normal(size=(3, 3)).astype(np.float32))
    x = _input("x", [3, 3])
    nodes = [
        ir.node("Transpose", [cube]),
        ir.node("Transpose", [square], attributes={"perm": [0, 1]}),
        ir.node("Transpose", [x], attributes={"perm": [1, 0]}),
    ]
    model = _model(nodes, [x], nodes[2].outputs[0], [cube, square], 2)
    store_weights_transposed(model)
    assert _operators(model) == ["Transpose"] * 3
    assert sorted(model.graph.initializers) == ["cube", "square"]


def test_an_input_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    x, keep = _input("x", ["n"]), _input("logits_to_keep", ["k"], ir.DataType.INT64)
    gather = ir.node("Gather", [x, keep])
    model = _model([gather], [x, keep], gather.outputs[0], [], 1)
    default_logits_to_last(model)
    data = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    assert _run(model, tmp_path, {"x": data}).tolist() == [3.0]
    assert _run(model, tmp_path, {"x": data, "logits_to_keep": np.array([0, 1])}).tolist() == [1.0, 2.0]


def test_equal_values_are_computed_once_constants_folded_and_dead_ends_dropped(tmp_path: Path) -> None:
    x = _input("x", ["n", 2])
    two, three = (_weight(f"c{n}", np.full(2, n, dtype=np.float32)) for n in (2, 3))
    six = ir.node("Mul", [two, three])
    shifts = [ir.node("Add", [x, six.outputs[0]]) for _ in range(2)]
    square = ir.node("Mul", [shifts[0].outputs[0], shifts[1].outputs[0]])
    dead = ir.node("Exp", [x])
    model = _model([six, *shifts, square, dead], [x], square.outputs[0], [two, three], 2)
    simplify(model)
    assert _operators(model) == ["Add", "Mul"]
    assert [value.const_value.numpy().tolist() for value in model.graph.initializers.values()] == [[6.0, 6.0]]
    data = RNG.normal(size=(3, 2)).astype(np.float32)
    np.testing.assert_allclose(_run(model, tmp_path, {"x": data}), (data + 6) ** 2, rtol=1e-6)


def test_a_norm_is_written_as_a_division_which_onnx_runtime_runs_as_one_operator(tmp_path: Path) -> None:
    x = _input("x", ["n", 8])
    scale = _weight("scale", RNG.normal(size=8).astype(np.float32))
    two, axis = _weight("two", np.array(2.0, np.float32)), ir.tensor(np.array([-1], np.int64), name="axis")
    axes = ir.Value(name="axis", const_value=axis, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    eps = _weight("eps", np.array(1e-6, np.float32))
    square = ir.node("Pow", [x, two])
    mean = ir.node("ReduceMean", [square.outputs[0], axes])
    added = ir.node("Add", [mean.outputs[0], eps])
    root = ir.node("Sqrt", [added.outputs[0]])
    inverse = ir.node("Reciprocal", [root.outputs[0]])
    normed = ir.node("Mul", [x, inverse.outputs[0]])
    scaled = ir.node("Mul", [scale, normed.outputs[0]])
    nodes = [square, mean, added, root, inverse, normed, scaled]
    model = _model(nodes, [x], scaled.outputs[0], [scale, two, axes, eps], 2)
    array = RNG.normal(size=(3, 8)).astype(np.float32)
    before = _run(model, tmp_path, {"x": array})
    divide_by_roots(model.graph)
    assert _operators(model) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    np.testing.assert_allclose(_run(model, tmp_path, {"x": array}), before, rtol=1e-6)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    ran = [node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node]
    assert ran == ["SimplifiedLayerNormalization"]


def test_a_reciprocal_of_anything_else_stays() -> None:
    x = _input("x", ["n", 8])
    inverse = ir.node("Reciprocal", [x])
    product = ir.node("Mul", [x, inverse.outputs[0]])
    model = _model([inverse, product], [x], product.outputs[0], [], 2)
    divide_by_roots(model.graph)
    assert _operators(model) == ["Reciprocal", "Mul"]

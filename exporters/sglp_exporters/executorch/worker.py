"""ExecuTorch: lowers a traced program to XNNPACK and runs the result; speaks the protocol of ``worker_loop``."""

import gc
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

sys.path.insert(0, os.environ["SGLP_WORKER_LOOP"])

import numpy as np
import torch
from worker_loop import serve

_BACKEND = "XnnpackBackend"
# One entry for each row of the last prefill: the program loaded once more, because it holds one sequence.
_rows: list[Any] = []
_state: dict[str, Any] = {}
# Logits of so many positions go through shared memory: as a file of their own they would cost half a millisecond.
_SHARED_POSITIONS = 8


def lower(program: str, out: str) -> Mapping[str, Any]:
    """Lower the ``.pt2`` in ``program`` to ``out``; answers with what runs where, as the finished program says."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from executorch.backends.xnnpack.partition.graphs import sdpa
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    # Searching for scaled_dot_product_attention, of which our traces have none, takes seconds for each delegate.
    sdpa.get_graphs = list
    traced = torch.export.load(program)
    gc.collect()
    gc.freeze()
    gc.disable()  # a million nodes that stay: collecting would take longer than lowering
    edge = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()], transform_passes=[_inferred_views()])
    del traced
    delegated, weights = _delegated(edge.exported_program())
    left = _portable_weights(edge.exported_program())
    # In place: else each step would copy the whole cache, twice.
    made = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True, emit_mutable_buffer_names=True))
    (plan,) = made.executorch_program.execution_plan
    calls = [step.instr_args for chain in plan.chains for step in chain.instructions]
    kernels = Counter(
        plan.operators[call.op_index].name.removeprefix("aten::")
        for call in calls
        if type(call).__name__ == "KernelCall"
    )
    with open(out, "wb") as stream:
        made.write_to_file(stream)
    return {
        "delegates": len(plan.delegates),
        "backends": sorted({delegate.id for delegate in plan.delegates}),
        "delegated": dict(delegated),
        "delegated_weight_bytes": weights,
        "portable_weight_bytes": left,
        "portable": dict(kernels),
        "versions": _versions(),
    }


def _inferred_views() -> Any:
    """A pass that says -1 for the one size of a view that varies: XNNPACK takes a reshape so and not otherwise."""
    from executorch.exir.dialects._ops import ops
    from executorch.exir.pass_base import ExportPass, PassResult

    edge = ops.edge.aten
    views = (
        edge.view_copy.default,
        edge.unsqueeze_copy.default,
        edge.squeeze_copy.dim,
        edge.squeeze_copy.dims,
        edge.squeeze_copy.default,
    )

    class InferredViews(ExportPass):  # type: ignore[misc]  # no type information there
        """Only for real numbers; XNNPACK takes no others."""

        def call(self, graph_module: Any) -> Any:
            for node in graph_module.graph.nodes:
                if node.op != "call_function" or node.target not in views:
                    continue
                value = node.meta["val"]
                shape = [size if isinstance(size, int) else -1 for size in value.shape]
                if value.is_floating_point() and shape.count(-1) <= 1:
                    node.target, node.args, node.kwargs = edge.view_copy.default, (node.args[0], shape), {}
            graph_module.recompile()
            return PassResult(graph_module, True)

    return InferredViews()


def _delegated(program: Any) -> tuple[Counter[str], int]:
    """Operators inside the delegates, by name, and the bytes of weights that went with them."""
    operators: Counter[str] = Counter()
    weights = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is not torch.ops.higher_order.executorch_call_delegate:
            continue
        inner = getattr(program.graph_module, node.args[0].target).original_module
        for part in inner.graph.nodes:
            if part.op == "call_function" and hasattr(part.target, "_schema"):
                operators[part.target._schema.name.removeprefix("aten::")] += 1
        for name, value in {**inner.state_dict, **inner.constants}.items():
            if isinstance(value, torch.Tensor):
                weights[name] = value.numel() * value.element_size()
    return operators, sum(weights.values())


def _portable_weights(program: Any) -> int:
    """Bytes of weights that stay outside of the delegates; the cache is none."""
    signature = program.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    used = {names[node.name] for node in program.graph.nodes if node.name in names and node.users} - mutated
    values = [program.state_dict.get(name, program.constants.get(name)) for name in used]
    return sum(value.numel() * value.element_size() for value in values if value is not None)


def start(file: str, threads: int | None) -> Mapping[str, Any]:
    """Load the program; answers with what it takes, gives and keeps, as the runtime says."""
    from executorch.extension.pybindings import portable_lib

    registered = portable_lib._get_registered_backend_names()
    if _BACKEND not in registered:
        raise RuntimeError(f"this ExecuTorch has no {_BACKEND}; it has {', '.join(registered) or 'no backend'}")
    if threads is not None:
        portable_lib._unsafe_reset_threadpool(threads)
    _state["file"] = file
    _rows[:] = [_load()]
    meta = _rows[0][1].method_meta()
    shared = os.path.abspath("logits.bin")
    size = int(meta.output_tensor_meta(0).sizes()[-1]) * _SHARED_POSITIONS
    _state["shared"] = np.memmap(shared, dtype=np.float32, mode="w+", shape=(size,))
    return {
        "shared": shared,
        "versions": _versions(),
        "threads": int(portable_lib._threadpool_get_thread_count()),
        "backends": registered,
        "inputs": [_tensor(meta.input_tensor_meta(index)) for index in range(meta.num_inputs())],
        "outputs": [_tensor(meta.output_tensor_meta(index)) for index in range(meta.num_outputs())],
        "cache": [_tensor(meta.attribute_tensor_meta(index)) for index in range(meta.num_attributes())],
    }


def prefill(rows: list[list[int]], every_position: bool) -> Mapping[str, Any]:
    """Logits of every position (concatenated over rows), or of each row's last position only."""
    while len(_rows) < len(rows):
        _rows.append(_load())
    del _rows[len(rows) :]
    _state["lengths"] = [len(row) for row in rows]
    found = []
    for (_, method), row in zip(_rows, rows, strict=True):
        keep = torch.arange(len(row)) if every_position else torch.tensor([len(row) - 1])
        found.append(_step(method, row, 0, keep))
    return _answer(np.concatenate(found))


def decode(tokens: list[int]) -> Mapping[str, Any]:
    """Logits (rows, vocabulary) after one more token of each row."""
    found = []
    for index, ((_, method), token) in enumerate(zip(_rows, tokens, strict=True)):
        found.append(_step(method, [token], _state["lengths"][index], torch.tensor([0])))
        _state["lengths"][index] += 1
    return _answer(np.concatenate(found))


def forward(names: Sequence[str], **inputs: np.ndarray) -> Mapping[str, Any]:
    """The output for all rows, which run one after another."""
    ((_, method),) = _rows
    values = [torch.from_numpy(inputs[name]) for name in names]
    found = [method([value[row : row + 1].contiguous() for value in values])[0] for row in range(len(values[0]))]
    return {"output": torch.cat(found).numpy()}


def _answer(logits: np.ndarray) -> Mapping[str, Any]:
    """The logits, or their shape when they lie in the shared memory."""
    if logits.size > _state["shared"].size:
        return {"logits": logits}
    _state["shared"][: logits.size] = logits.reshape(-1)
    return {"shape": list(logits.shape)}


def _step(method: Any, tokens: list[int], start_at: int, keep: torch.Tensor) -> np.ndarray:
    positions = torch.arange(start_at, start_at + len(tokens))
    (logits,) = method([torch.tensor([tokens]), positions, keep])
    values: np.ndarray = logits[0].numpy()
    return values


def _load() -> tuple[Any, Any]:
    """The program, which must outlive its method, and the method."""
    from executorch.extension.pybindings import portable_lib

    program = portable_lib._load_program(_state["file"])
    return program, program.load_method("forward")


def _tensor(info: Any) -> dict[str, Any]:
    return {"sizes": list(info.sizes()), "scalar_type": int(info.dtype())}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("executorch", "torch")}


if __name__ == "__main__":
    serve({"lower": lower, "start": start, "prefill": prefill, "decode": decode, "forward": forward})

"""Editing an ONNX graph in place; shared by the rewrites."""

from __future__ import annotations

import onnx_ir as ir


def put_in_place(graph: ir.Graph, old: ir.Node, new: ir.Value, tape: ir.tape.Tape) -> None:
    """Let ``new``, which ``tape`` computes, take the place of the only output of ``old``: name, type, shape, users."""
    output = old.outputs[0]
    new.type, new.shape = output.type, output.shape
    graph.insert_before(old, tape.nodes)
    name = output.name
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    new.name = name

"""Trace a decoder layer by layer as it stands, for models whose layers are no copies of one another.

It costs seconds for every layer and gives one graph for one depth.  :mod:`sglp_exporters.onnx.layer_template` is the
way that is tried first.  Names and interface of the graph are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from sglp_deploy.artifact import PAST, PRESENT, cache_name
from sglp_exporters.onnx.decoder_trace import trace_decoder
from sglp_exporters.onnx.trace_names import PARTS, cache_part, named_shape, size_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trace_whole_decoder(module: PreTrainedModel) -> ir.Model:
    """The graph of ``module`` with the same inputs and outputs that an assembled one has.

    Raises:
        BackendError: If transformers, torch or ONNX cannot trace it.
    """
    program = trace_decoder(module)
    graph = program.graph
    sizes = size_names(graph)
    for values, prefix in ((graph.inputs, PAST), (graph.outputs, PRESENT)):
        for value in values:
            cached = cache_part(value)
            if cached is not None:
                value.name = cache_name(prefix, cached[0], PARTS[cached[1]])
            value.shape = named_shape(value.shape, sizes)
    graph.inputs[:] = sorted(graph.inputs, key=lambda value: (value.name or "").startswith(PAST))
    graph.outputs[:] = sorted(graph.outputs, key=lambda value: value.name != "logits")
    return program

"""Trace a decoder as one ONNX graph that serves prefill and decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from sglp_deploy.adapters import layer_stack, quiet_libraries
from sglp_deploy.errors import BackendError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _sample_inputs(module: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace with, and which of their axes vary.

    Two rows, one of them padded: a batch of one would be burnt into the graph, and without padding the mask would be
    dropped from it.  Several new tokens on a cache that holds some: such a graph also takes one token, and an empty
    cache, so it serves prefill and decode alike.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    batch, past, new = 2, 5, 3
    device, any_size = module.device, torch.export.Dim.AUTO
    mask = torch.ones(batch, past + new, dtype=torch.int64, device=device)
    mask[0, :2] = 0
    layers = layer_stack(module).layers
    cache = DynamicCache()
    # A cache layer of full length for every layer, sliding ones too: the mask applies the window, so one past length
    # serves all layers, and transformers' own sliding layer would burn its token counter into the graph.
    cache.layers = [DynamicLayer() for _ in layers]
    for index, layer in enumerate(layers):
        attention: Any = layer.self_attn
        heads = attention.k_proj.out_features // attention.head_dim
        empty = torch.zeros(batch, heads, past, attention.head_dim, dtype=module.dtype, device=device)
        cache.update(empty, empty.clone(), index)
    inputs = {
        "input_ids": torch.arange(batch * new, device=device).reshape(batch, new) % module.config.vocab_size,
        "attention_mask": mask,
        "position_ids": mask.cumsum(-1)[:, past:] - 1,
        "past_key_values": cache,
        "logits_to_keep": torch.tensor([0, -1], device=device),
        "use_cache": True,
    }
    both = {0: any_size, 1: any_size}
    varying = {
        "input_ids": both,
        "attention_mask": both,
        "position_ids": both,
        "past_key_values": [{0: any_size, 2: any_size} for _ in cache.layers for _ in ("keys", "values")],
        "logits_to_keep": {0: any_size},
    }
    return inputs, varying


def trace_decoder(module: PreTrainedModel) -> ir.Model:
    """Trace ``module`` as one graph for prefill and decode, unoptimised, with weights under their own names.

    Raises:
        BackendError: If transformers, torch or ONNX cannot trace it; their exception is chained.
    """
    from transformers.exporters import OnnxExporter
    from transformers.exporters.exporter_onnx import OnnxConfig

    try:
        inputs, varying = _sample_inputs(module)
        with quiet_libraries(), torch.no_grad():
            config = OnnxConfig(dynamic=True, dynamic_shapes=varying, optimize=False)
            exported = OnnxExporter().export(module, inputs, config=config)
    except Exception as error:
        raise BackendError(
            f"the model cannot be traced to ONNX; {type(error).__name__}: {str(error).splitlines()[0]}; "
            "run again with -v for the whole trace"
        ) from error
    program: ir.Model = exported.program
    # torch's graph remembers values it no longer has, and through them the weights; a clone does not.
    return program.clone()

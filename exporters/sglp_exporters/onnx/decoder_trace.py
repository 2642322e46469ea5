"""Trace a decoder as one ONNX graph that serves prefill and decode."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from sglp_deploy.errors import BackendError, UnsupportedModelError
from sglp_deploy.models import quiet_libraries
from sglp_deploy.parity.cache import key_value_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trace_decoder(module: PreTrainedModel) -> ir.Model:
    """Trace ``module`` as one graph for prefill and decode, unoptimised, with weights under their own names.

    Raises:
        BackendError: If transformers, torch or ONNX cannot trace it; their exception is chained.
        UnsupportedModelError: If it turns by another rotary base as a text grows.
    """
    _refuse_growing_base(module)
    from transformers.exporters import OnnxExporter
    from transformers.exporters.exporter_onnx import OnnxConfig

    try:
        inputs, varying = _sample_inputs(module)
        with quiet_libraries(), torch.no_grad(), traceable_experts(module):
            config = OnnxConfig(dynamic=True, dynamic_shapes=varying, optimize=False)
            exported = OnnxExporter().export(module, inputs, config=config)
    except BackendError:
        raise
    except Exception as error:
        raise not_traced(error) from error
    # torch's graph remembers values it no longer has, and through them the weights; a clone does not.
    return graph_of(exported).clone()


def _refuse_growing_base(module: PreTrainedModel) -> None:
    rope = getattr(module.config.get_text_config(), "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if any(part.get("rope_type") == "dynamic" for part in parts):
        raise UnsupportedModelError(
            f"{type(module).__name__} scales its rotary positions by the type 'dynamic', with a base that grows with "
            "the text; a graph has one base; export it to torch or vllm, or set another rope_type in its config.json"
        )


def graph_of(exported: Any) -> ir.Model:
    """The graph in what transformers' exporter returns: ``program`` from 5.23 on, torch's ``model`` before."""
    graph: ir.Model = exported.program if hasattr(exported, "program") else exported.model
    return graph


@contextmanager
def traceable_experts(module: PreTrainedModel) -> Iterator[None]:
    """Run experts as one grouped product while tracing; a Python loop over the experts that were hit cannot be traced.

    Every implementation computes the same sum; the model gets its own back, because it may be the user's.
    """
    if not module._can_set_experts_implementation():
        yield
        return
    before = module.get_experts_implementation()
    module.set_experts_implementation("grouped_mm")
    try:
        yield
    finally:
        module.set_experts_implementation(before)


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
    sizes = key_value_sizes(module)
    if isinstance(sizes, str):
        raise BackendError(f"the model cannot be traced with a key-value cache; {sizes}; export it without one")
    cache = DynamicCache()
    # A cache layer of full length for every layer, sliding ones too: the mask applies the window, so one past length
    # serves all layers, and transformers' own sliding layer would burn its token counter into the graph.
    cache.layers = [DynamicLayer() for _ in sizes]
    for index, size in enumerate(sizes):
        keys = torch.zeros(batch, size.heads, past, size.key_size, dtype=module.dtype, device=device)
        values = torch.zeros(batch, size.heads, past, size.value_size, dtype=module.dtype, device=device)
        cache.update(keys, values, index)
    vocabulary = module.config.get_text_config().vocab_size
    both = {0: any_size, 1: any_size}
    inputs = {
        "input_ids": torch.arange(batch * new, device=device).reshape(batch, new) % vocabulary,
        "attention_mask": mask,
        "position_ids": mask.cumsum(-1)[:, past:] - 1,
        "past_key_values": cache,
        "logits_to_keep": torch.tensor([0, -1], device=device),
        "use_cache": True,
    }
    varying = {
        "input_ids": both,
        "attention_mask": both,
        "position_ids": both,
        "past_key_values": [{0: any_size, 2: any_size} for _ in cache.layers for _ in ("keys", "values")],
        "logits_to_keep": {0: any_size},
    }
    taken = inspect.signature(module.forward).parameters
    for name in ("position_ids", "logits_to_keep"):
        if name not in taken:
            del inputs[name], varying[name]
    return inputs, varying


def not_traced(error: Exception) -> BackendError:
    """The failure of a trace in one line, by its first cause: torch wraps what went wrong in general advice."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).strip() or "no message").splitlines()[0]
    return BackendError(
        f"the model cannot be traced to ONNX; {type(cause).__name__}: {reason}; run again with -v for the whole trace"
    )

"""Trace one forward pass of any model as a graph: named inputs in, its main output out, no cache.

This is the way for encoders, vision and speech models and encoder-decoders.  It is also the way for decoders whose
layers keep other state than keys and values (a convolution's, a recurrence's).  No common ONNX interface has a place
for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import onnx_ir as ir
import torch

from sglp_deploy.errors import BackendError, UnsupportedModelError
from sglp_deploy.models import quiet_libraries
from sglp_deploy.models.samples import generates, is_encoder_decoder, sample_inputs
from sglp_deploy.parity.cache import key_value_sizes
from sglp_deploy.parity.reference import main_output
from sglp_exporters.onnx.decoder_trace import graph_of, not_traced, traceable_experts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Names of the axes that vary, in order; axes not named here (channels, height, width, mel bins) keep their traced size.
_AXES: Mapping[str, tuple[str, ...]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
    "decoder_input_ids": ("batch", "decoder_sequence"),
    "input_values": ("batch", "samples"),
    # A spectrogram's length is fixed: Whisper was trained on 30 seconds and refuses any other.
    "input_features": ("batch",),
    "pixel_values": ("batch",),
    "x": ("batch",),
}
_MAIN_OUTPUTS = ("logits", "last_hidden_state")


def forward_only_reason(module: nn.Module) -> str | None:
    """Why ``module`` is exported without a cache, in words; None for a decoder with a key-value cache."""
    if is_encoder_decoder(module):
        return "an encoder-decoder; the graph runs both sides at once and holds no cache between steps"
    if not generates(module):
        return "not a decoder; there is nothing to keep between two runs"
    sizes = key_value_sizes(cast("PreTrainedModel", module))
    return sizes if isinstance(sizes, str) else None


def trace_forward(module: nn.Module) -> ir.Model:
    """Trace one forward pass of ``module``, unoptimised: every input by its name, one output, batch dynamic.

    Sequence lengths are dynamic too; the size of an image and the length of a spectrogram are the model's own.

    Raises:
        BackendError: If it cannot be traced (the exception is chained), or a size that should vary was burnt in.
        UnsupportedModelError: If what it takes as input is unknown.
    """
    _refuse_chunks(module)
    _refuse_classifier_without_padding(module)
    inputs = sample_inputs(module)
    axes = {name: _axes(name, inputs) for name in inputs}
    varying = {name: dict.fromkeys(range(len(names)), torch.export.Dim.AUTO) for name, names in axes.items()}
    try:
        with quiet_libraries(), torch.no_grad():
            program = _export(module, inputs, varying)
    except Exception as error:
        raise not_traced(error) from error
    # torch's graph remembers values it no longer has, and through them the weights; a clone does not.
    program = program.clone()
    graph = program.graph
    _restore_input_names(graph, inputs)
    _keep_main_output(graph)
    _name_sizes(graph, axes)
    _refuse_burnt_output(module, graph)
    return program


def _refuse_classifier_without_padding(module: nn.Module) -> None:
    """A classifier on a decoder judges each row by its last token, which it finds by the padding behind it.

    Raises:
        UnsupportedModelError: If no token is named as padding: such a model refuses more than one row.
    """
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if type(module).__name__.endswith("ForSequenceClassification") and getattr(text, "pad_token_id", 0) is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no pad_token_id, so it takes one row at a time and cannot be exported with a "
            "batch; set pad_token_id in its config.json to the token its tokenizer pads with"
        )


def _refuse_chunks(module: nn.Module) -> None:
    """Linear attention loops over chunks of 64 tokens, and tracing writes down as many as its sample had.

    Such a graph has every axis dynamic and is right up to the first chunk's end: Qwen3-Next traced with 24 tokens
    differed from PyTorch by six times the size of its logits at token 71.
    """
    config: Any = getattr(module, "config", None)
    types = getattr(config.get_text_config(), "layer_types", None) if hasattr(config, "get_text_config") else None
    if "linear_attention" in (types or ()):
        raise BackendError(
            "the model has layers of linear attention, which run through the tokens in chunks; tracing would write "
            "down one chunk and the graph would be wrong after it; deploy the checkpoint instead (--to torch or "
            "--to vllm)"
        )


def _refuse_burnt_output(module: nn.Module, graph: ir.Graph) -> None:
    """Tracing unrolls a loop over the tokens: such a graph gives as many outputs as it was traced with tokens."""
    with quiet_libraries(), torch.no_grad():
        shapes = [
            main_output(module(**sample_inputs(module, rows=rows, tokens=tokens)))[1].shape
            for rows, tokens in ((2, 24), (3, 30))
        ]
    (output,) = graph.outputs
    for axis, (size, *sizes) in enumerate(zip(output.shape or (), *shapes, strict=True)):
        if isinstance(size, int) and len(set(sizes)) > 1:
            raise BackendError(
                f"tracing unrolled a loop: axis {axis} of {output.name} would be {size} whatever the "
                "graph is given; such a loop (over tokens, over rows) has no ONNX form here; deploy the checkpoint "
                "instead (--to torch or --to vllm)"
            )


def _axes(name: str, inputs: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    if name == "attention_mask" and "input_values" in inputs:
        return _AXES["input_values"]
    return _AXES[name]


def _export(module: nn.Module, inputs: dict[str, torch.Tensor], varying: dict[str, dict[int, Any]]) -> ir.Model:
    if not hasattr(module, "main_input_name"):  # not from transformers
        exported = torch.onnx.export(
            module,
            (),
            kwargs=inputs,
            dynamic_shapes=varying,
            output_names=["output"],
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert exported is not None
        return exported.model
    from transformers.exporters import OnnxExporter
    from transformers.exporters.exporter_onnx import OnnxConfig

    model = cast("PreTrainedModel", module)
    given: dict[str, Any] = dict(inputs)
    if hasattr(model.config, "use_cache"):
        given["use_cache"] = False
    with traceable_experts(model):
        config = OnnxConfig(dynamic=True, dynamic_shapes=varying, optimize=False)
        return graph_of(OnnxExporter().export(model, given, config=config))


def _restore_input_names(graph: ir.Graph, inputs: Mapping[str, torch.Tensor]) -> None:
    """transformers puts "input." before a name that an output has too."""
    for value in graph.inputs:
        name = (value.name or "").removeprefix("input.")
        if name in inputs:
            value.name = name
    found = {value.name for value in graph.inputs}
    if found != set(inputs):
        raise BackendError(
            f"the trace takes {', '.join(sorted(map(str, found)))} and not {', '.join(sorted(inputs))}; an input was "
            "dropped or added on the way, so the graph would not compute the same; report the model family"
        )


def _keep_main_output(graph: ir.Graph) -> None:
    names = {(value.name or "").removeprefix("output."): value for value in graph.outputs}
    main = next((names[name] for name in _MAIN_OUTPUTS if name in names), None)
    if main is None:
        if len(graph.outputs) != 1:
            raise BackendError(
                f"the model returns {', '.join(names)}, none of them {' or '.join(_MAIN_OUTPUTS)}; which one matters "
                "is not known; report the model family"
            )
        main = graph.outputs[0]
        main.name = "output"
    else:
        main.name = (main.name or "").removeprefix("output.")
    graph.outputs[:] = [main]


def _name_sizes(graph: ir.Graph, axes: Mapping[str, tuple[str, ...]]) -> None:
    """Give the tracer's symbols readable names on inputs and output; refuse a size that was burnt in."""
    words: dict[str, str] = {}
    for value in graph.inputs:
        for axis, (name, size) in enumerate(zip(axes[value.name or ""], value.shape or (), strict=False)):
            if isinstance(size, int):
                raise BackendError(
                    f"tracing burnt the size {size} of axis {axis} ({name}) of {value.name} into the graph; it would "
                    "compute something else, or nothing, at any other size; report the model family"
                )
            words.setdefault(str(size.value), name)
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else words.get(str(size.value), size.value) for size in value.shape]
            value.shape = ir.Shape(sizes)

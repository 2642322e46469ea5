"""Trace a few layers once, then write the graph of any depth.

Tracing costs seconds for every layer.  All layers of one kind trace to the same nodes.  So a model of one layer of each
kind (plus one in front, to see what a layer reads from its predecessor) is traced.  Its graph is cut into *what stands
before the layers*, *one region for each kind of layer* and *what stands after them*.  The graph of a model of any depth
is assembled by repeating regions with that model's weights.  The unpruned baseline and every pruned model therefore
share one trace and one graph, node for node.

The cut is made by data flow and checked.  A region may read shared values, its own weights, its own cache and exactly
one hidden state.  Anything else is refused, never guessed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from sglp_deploy import _io
from sglp_deploy.artifact import PAST, PRESENT, cache_name
from sglp_deploy.errors import BackendError, UnsupportedModelError
from sglp_deploy.materialize import select_layers
from sglp_deploy.models import layer_stack, pruned_config
from sglp_deploy.models.settings import layer_settings
from sglp_deploy.models.transformers.adapter import config_facts
from sglp_deploy.models.transformers.rules import INDEX_LISTS, PREFIX_COUNTS, SUPERSEDED
from sglp_exporters.onnx.decoder_trace import trace_decoder
from sglp_exporters.onnx.trace_names import PARTS, cache_part, cache_parts, named_shape, size_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Read only sizes of their input, so they do not make their output depend on its content.
_SIZE_OPS = {"Shape", "Size"}


class UncutError(BackendError):
    """The layers of this model do not follow one another as copies would; its graph must be traced whole."""


def _frame(module: PreTrainedModel) -> str:
    """What decides the graph around the layers: the configuration without depth, and the tensors outside them."""
    stack = layer_stack(module)
    config = config_facts(pruned_config(module.config, [0]))
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers", *PREFIX_COUNTS, *INDEX_LISTS, *SUPERSEDED):
        config.pop(name, None)  # about the layers, and those are compared themselves
    outside = [
        (name, tuple(tensor.shape), str(tensor.dtype))
        for name, tensor in module.state_dict().items()
        if not name.startswith(f"{stack.path}.")
    ]
    return _io.sha256_json([config, repr(outside)])


@dataclass(frozen=True)
class _Region:
    """The nodes of one layer; ``hidden_in`` and ``hidden_out`` are its place in the residual stream."""

    index: int
    nodes: tuple[ir.Node, ...]
    hidden_in: ir.Value
    hidden_out: ir.Value
    cache_out: Mapping[str, ir.Value]


class LayerTemplate:
    """A traced graph cut into prefix, one region per kind of layer, and suffix.

    Use :meth:`trace` to make one and :meth:`assemble` to get the graph of a model.
    """

    def __init__(
        self,
        model: ir.Model,
        kinds: Sequence[tuple[Any, ...]],
        stack_path: str,
        parameters: set[str],
        frame: str,
    ) -> None:
        self._frame = frame
        self._model = model
        self._stack_path = stack_path
        self._parameters = parameters
        self._prefix: list[ir.Node] = []
        self._suffix: list[ir.Node] = []
        regions = self._cut(len(kinds))
        # Region 0 only shows where the prefix hands over; region t >= 1 is the template of its kind.
        self._entry = regions[0].hidden_in
        self._regions = dict(zip(kinds[1:], regions[1:], strict=True))
        self._last_hidden = regions[-1].hidden_out
        # Weights come from the model that is assembled; holding those of the traced one would keep it in memory.
        for name in parameters & set(model.graph.initializers):
            model.graph.initializers[name].const_value = None

    @classmethod
    def trace(cls, module: PreTrainedModel) -> LayerTemplate:
        """Trace one layer of each kind of ``module``.

        Raises:
            BackendError: If torch or ONNX cannot trace the model.
            UncutError: If the trace cannot be cut into layers that repeat.
        """
        stack = layer_stack(module)
        first_of_kind: dict[tuple[Any, ...], int] = {}
        for index, layer in enumerate(stack.layers):
            first_of_kind.setdefault(layer_settings(layer), index)
        chosen = [0, *first_of_kind.values()]
        try:
            small = select_layers(module, chosen)
        except UnsupportedModelError as error:
            raise UncutError(f"its layers cannot stand in another order; {error}") from error
        # Layer 0 stands in the trace twice; with tensors of its own, or the tracer would name one after the other.
        traced_layers: Any = small.get_submodule(stack.path)
        traced_layers[0] = copy.deepcopy(traced_layers[0])
        kinds = [layer_settings(stack.layers[index]) for index in chosen]
        parameters = {name for name, _ in small.named_parameters(remove_duplicate=False)}
        return cls(trace_decoder(small), kinds, stack.path, parameters, _frame(module))

    @property
    def digest(self) -> str:
        """SHA-256 of what was traced: the settings of the frame and of each kind of layer."""
        return _io.sha256_json([self._frame, [repr(kind) for kind in self._regions]])

    def covers(self, module: PreTrainedModel) -> bool:
        """Whether :meth:`assemble` can write the graph of ``module``: same frame, no kind of layer left untraced."""
        kinds = {layer_settings(layer) for layer in layer_stack(module).layers}
        return self._frame == _frame(module) and kinds <= set(self._regions)

    # ------------------------------------------------------------------------------------------------ cutting

    def _cut(self, n_layers: int) -> list[_Region]:
        graph = self._model.graph
        self._share_cache_length(graph)
        nodes = list(graph)
        content = self._content_dependent(graph, nodes)
        layer_of = self._layers_of(nodes)
        place: dict[ir.Node, int | str] = {}

        def origin(value: ir.Value) -> int | str:
            producer = value.producer()
            return "prefix" if producer is None else place[producer]

        for node in nodes:
            if any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            ):
                raise UncutError(
                    f"node {node.name} ({node.op_type}) of the traced layer holds a subgraph; such layers cannot be "
                    "repeated; report the model family"
                )
            inputs = [value for value in node.inputs if value is not None]
            layer = layer_of[node]
            behind = {origin(value) for value in inputs} - {"prefix"}
            if layer is None:
                place[node] = "suffix" if behind else "prefix"
            elif not behind and not any(value in content for value in inputs):
                # The layer computes it from nothing of its own (a mask, a constant): once is enough for all layers.
                place[node] = "prefix"
            else:
                place[node] = layer
        for node in nodes:
            if place[node] == "prefix":
                self._prefix.append(node)
            elif place[node] == "suffix":
                self._suffix.append(node)
        outputs = set(graph.outputs)
        regions: list[_Region] = []
        for index in range(n_layers):
            inside = [node for node in nodes if place[node] == index]
            own = {value for node in inside for value in node.outputs}
            hidden_in: set[ir.Value] = set()
            for node in inside:
                for value in node.inputs:
                    if value is None or value in own or self._own_resource(value, index):
                        continue
                    if value in content:
                        hidden_in.add(value)
                    elif origin(value) != "prefix":
                        raise self._uncut(node, value, f"it comes from {origin(value)!r}")
            leaving = {
                value for value in own if any(place[user] != index for user, _ in value.uses()) and value not in outputs
            }
            if len(hidden_in) != 1 or len(leaving) != 1:
                raise UncutError(
                    f"layer {index} of the trace reads {len(hidden_in)} and writes {len(leaving)} hidden states; "
                    "exactly one of each can be repeated; report the model family"
                )
            cache = {part: value for (layer, part), value in cache_parts(outputs).items() if layer == index}
            regions.append(_Region(index, tuple(inside), hidden_in.pop(), leaving.pop(), cache))
        for before, after in pairwise(regions):
            if after.hidden_in is not before.hidden_out:
                raise UncutError(
                    f"layer {after.index} of the trace does not read what layer {before.index} wrote; the layers are "
                    "not a plain sequence; report the model family"
                )
        for node in self._suffix:
            for value in node.inputs:
                if value is not None and value is not regions[-1].hidden_out and isinstance(origin(value), int):
                    raise self._uncut(node, value, "only the last layer's output may be read after the layers")
        return regions

    def _uncut(self, node: ir.Node, value: ir.Value, why: str) -> UncutError:
        return UncutError(
            f"node {node.name} ({node.op_type}) reads {value.name}, which cannot be repeated: {why}; report the model "
            "family"
        )

    def _share_cache_length(self, graph: ir.Graph) -> None:
        """Read batch and cache length off the first layer's cache, whichever layer's the trace happened to use."""
        caches = cache_parts(graph.inputs)
        for node in graph:
            source = node.inputs[0] if node.op_type == "Shape" else None
            cached = cache_part(source) if source is not None and source in graph.inputs else None
            if cached is None:
                continue
            axes = range(node.attributes.get_int("start", 0), node.attributes.get_int("end", 4))
            if set(axes) <= {0, 2}:  # the sizes all caches share; heads and head size may differ between layers
                node.replace_input_with(0, caches[0, cached[1]])

    def _content_dependent(self, graph: ir.Graph, nodes: Iterable[ir.Node]) -> set[ir.Value]:
        """Values that depend on weights or cache content: the residual stream and all inside the layers."""
        content = set(cache_parts(graph.inputs).values())
        content |= {value for name, value in graph.initializers.items() if name in self._parameters}
        for node in nodes:
            if node.op_type not in _SIZE_OPS and any(value in content for value in node.inputs):
                content |= set(node.outputs)
        return content

    def _layers_of(self, nodes: Sequence[ir.Node]) -> dict[ir.Node, int | None]:
        """The layer whose code each node comes from, or None.

        Decomposing an operator (the scatter within a mixture of experts) can lose the note of where it stood.  Such a
        node belongs to the layer that is the only one to read it; a node read from elsewhere too stays outside.
        """
        found: dict[ir.Node, int | None] = {}
        for node in reversed(nodes):
            scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
            match = re.search(rf"'{re.escape(self._stack_path)}\.(\d+)'", scopes)
            if match or scopes.startswith("['',"):  # '' is the model itself, the start of every whole path
                found[node] = int(match.group(1)) if match else None
                continue
            readers = {found[user] for value in node.outputs for user, _ in value.uses()}
            outside = any(value.is_graph_output() for value in node.outputs)
            found[node] = readers.pop() if len(readers) == 1 and not outside else None
        return found

    def _own_resource(self, value: ir.Value, index: int) -> bool:
        name = value.name or ""
        cached = cache_part(value)
        if cached is not None:
            return cached[0] == index
        return value.is_initializer() and name.startswith(f"{self._stack_path}.{index}.")

    # ------------------------------------------------------------------------------------------------ assembling

    def assemble(self, module: PreTrainedModel) -> ir.Model:
        """The graph of ``module``: prefix, one region for each of its layers with its weights, suffix.

        Raises:
            BackendError: If ``module`` has a layer of a kind the template was not traced with.
        """
        return _Assembly(self, module).build()


class _Assembly:
    """One pass over a template that writes one model; holds the map from template values to new values."""

    def __init__(self, template: LayerTemplate, module: PreTrainedModel) -> None:
        self._template = template
        self._source = template._model.graph
        self._module = module
        self._tensors: dict[str, torch.Tensor] = dict(module.state_dict(keep_vars=True))
        self._initializers: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []

    def build(self) -> ir.Model:
        template, source = self._template, self._source
        stack = layer_stack(self._module)
        shared: dict[ir.Value, ir.Value] = {}
        inputs: list[ir.Value] = []
        sizes = size_names(source)
        self._sizes = sizes
        for value in source.inputs:
            if cache_part(value) is None:
                shared[value] = self._copy(value, value.name)
                inputs.append(shared[value])
        caches: list[dict[str, ir.Value]] = []
        template_caches = cache_parts(source.inputs)
        kinds = [layer_settings(layer) for layer in stack.layers]
        for index, kind in enumerate(kinds):
            if kind not in template._regions:
                raise BackendError(
                    f"layer {index} is of a kind that was not traced; the template belongs to another model; export "
                    "this model with a template of its own"
                )
            region = template._regions[kind]
            cache = {}
            for part, short in PARTS.items():
                old = template_caches[region.index, part]
                cache[part] = self._copy(old, cache_name(PAST, index, short))
                inputs.append(cache[part])
            caches.append(cache)
        # The prefix reads sizes only, and those off the first layer's cache.
        for part, value in caches[0].items():
            shared[template_caches[0, part]] = value
        self._emit(template._prefix, shared, "")
        hidden = shared[template._entry]
        outputs: list[ir.Value] = []
        for index, kind in enumerate(kinds):
            region = template._regions[kind]
            values = dict(shared)
            values[region.hidden_in] = hidden
            for part, value in caches[index].items():
                values[template_caches[region.index, part]] = value
            self._emit(region.nodes, values, f"layers.{index}.", region.index, index)
            hidden = values[region.hidden_out]
            for part, short in PARTS.items():
                value = values[region.cache_out[part]]
                value.name = cache_name(PRESENT, index, short)
                outputs.append(value)
        shared[template._last_hidden] = hidden
        self._emit(template._suffix, shared, "")
        logits = next(value for value in source.outputs if value.name == "logits")
        graph = ir.Graph(
            inputs,
            [shared[logits], *outputs],
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=dict(source.opset_imports),
            name="main",
        )
        return ir.Model(graph, ir_version=self._template._model.ir_version)

    def _emit(
        self,
        nodes: Iterable[ir.Node],
        values: dict[ir.Value, ir.Value],
        prefix: str,
        old_index: int | None = None,
        new_index: int | None = None,
    ) -> None:
        for node in nodes:
            inputs = [
                None if value is None else values.get(value) or self._initializer(value, old_index, new_index)
                for value in node.inputs
            ]
            copied = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                attributes=list(node.attributes.values()),
                num_outputs=len(node.outputs),
                version=node.version,
                name=f"{prefix}{node.name}",
            )
            for old, new in zip(node.outputs, copied.outputs, strict=True):
                new.name = f"{prefix}{old.name}" if old.name else None
                new.type, new.shape, new.const_value = old.type, self._shape(old.shape), old.const_value
                values[old] = new
            self._nodes.append(copied)

    def _initializer(self, value: ir.Value, old_index: int | None, new_index: int | None) -> ir.Value:
        name = value.name or ""
        if not value.is_initializer():
            raise BackendError(f"value {name} has no counterpart in the assembled graph; report this as a bug")
        path = self._template._stack_path
        own = f"{path}.{old_index}."
        if name.startswith(own):
            name = f"{path}.{new_index}.{name.removeprefix(own)}"
        elif name.startswith(f"{path}.") and name not in self._template._parameters and name not in self._tensors:
            # The tracer files a constant under the first layer that uses it.  A name of its own, because the layer
            # that gets that number here may have such a constant too.
            name = f"constant.{name}"
        elif name.startswith(f"{path}."):
            raise UncutError(f"a layer of the trace reads {name} of another layer; report the model family")
        if name not in self._initializers:
            if name in self._tensors:
                tensor: Any = tensor_adapters.TorchTensor(self._tensors[name].detach(), name=name)
            else:  # a buffer that is not saved, or a constant of the trace: the same in every depth
                tensor = value.const_value
            new = ir.Value(name=name, const_value=tensor, type=value.type, shape=self._shape(value.shape))
            self._initializers[name] = new
        return self._initializers[name]

    def _copy(self, value: ir.Value, name: str | None) -> ir.Value:
        return ir.Value(name=name, type=value.type, shape=self._shape(value.shape))

    def _shape(self, shape: ir.Shape | None) -> ir.Shape | None:
        return named_shape(shape, self._sizes)

"""What the tracer calls caches and sizes, and what a graph of ours calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from sglp_deploy.artifact import CACHE_PARTS

_CACHE = re.compile(r"^(?:input|output)\.past_key_values\.layers\.(\d+)\.(keys|values)$")
# Parts of a cache: the tracer's name, and the one in a graph of ours.
PARTS = {f"{part}s": part for part in CACHE_PARTS}


def cache_part(value: ir.Value) -> tuple[int, str] | None:
    """Layer and part ("keys" or "values") of a cache the tracer put among the inputs or outputs; None for others."""
    match = _CACHE.match(value.name or "")
    return (int(match.group(1)), match.group(2)) if match else None


def cache_parts(values: Iterable[ir.Value]) -> dict[tuple[int, str], ir.Value]:
    """The caches among ``values`` by layer and part."""
    return {part: value for value in values if (part := cache_part(value)) is not None}


def named_shape(shape: ir.Shape | None, names: Mapping[str, str]) -> ir.Shape | None:
    """``shape`` with the tracer's symbols replaced by ``names``."""

    def size(dim: ir.SymbolicDim) -> int | str | None:
        if dim.value is None:
            return None
        text = re.sub(r"\bs\d+\b", lambda match: names.get(match.group(0), match.group(0)), str(dim.value))
        return int(text) if text.isdigit() else text  # the tracer spells some fixed sizes as symbols

    return None if shape is None else ir.Shape([dim if isinstance(dim, int) else size(dim) for dim in shape])


def size_names(graph: ir.Graph) -> dict[str, str]:
    """Readable names for the tracer's symbols, read off the inputs whose layout is known."""
    layout = {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "total_sequence"),
        "logits_to_keep": ("kept_logits",),
    }
    names: dict[str, str] = {}
    for value in graph.inputs:
        axes: Sequence[str | None] = layout.get(value.name or "", ())
        if cache_part(value) is not None:
            axes = ("batch", None, "past_sequence", None)
        for dim, name in zip(value.shape or (), axes, strict=False):
            if not isinstance(dim, int) and dim.value is not None and name is not None:
                names.setdefault(str(dim.value), name)
    return names

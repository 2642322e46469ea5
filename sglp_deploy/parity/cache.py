"""What a decoder keeps of each token, and whether an artifact's cache inputs and outputs are laid out for it.

A graph whose cache lacks a layer, or holds one that was removed, loads and may even run.  Its prompt logits are right.
Only what it generates is wrong.  The layout is therefore read off the torch model and compared name by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sglp_deploy.artifact import CACHE_PARTS, ELEMENT_TYPES, PAST, PRESENT, ExportArtifact, TensorSpec, cache_name
from sglp_deploy.errors import ArtifactError, BackendError
from sglp_deploy.models.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CacheSizes:
    """Heads and head sizes of one layer's keys and values; latent attention has keys wider than its values."""

    heads: int
    key_size: int
    value_size: int


def key_value_sizes(module: PreTrainedModel) -> tuple[CacheSizes, ...] | str:
    """What every layer keeps of each token, read off a cache the model itself filled, or why that is no such thing.

    Returns:
        One entry for each layer that keeps keys and values (layers that use another layer's come last and keep none),
        or, for a model that keeps something else (a convolution's or a recurrence's state), the reason in words.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=module.config)
    # By name: a dummy, which stands for a layer that reads the keys and values of another one, is younger than the
    # oldest transformers supported.
    ordinary = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
    other = {type(layer).__name__ for layer in cache.layers} - ordinary
    if other:
        return f"its layers keep other state than keys and values ({', '.join(sorted(other))})"
    ids = torch.arange(3, device=module.device)[None] % module.config.get_text_config().vocab_size
    with quiet_libraries(), torch.no_grad():
        try:
            module(input_ids=ids, past_key_values=cache, use_cache=True)
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise BackendError(
                f"the model does not run with a key-value cache; {type(error).__name__}: {reason}; run again with -v "
                "for the whole trace"
            ) from error
    # getattr: a layer that was never written to has no tensors at all.
    filled: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    filled = [layer for layer in filled if layer.keys.numel()]
    if not filled:
        return "it leaves the key-value cache it is given empty"
    if filled != cache.layers[: len(filled)]:
        return "some of its layers keep keys and values and others before them do not"
    return tuple(CacheSizes(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in filled)


def check_cache_layout(artifact: ExportArtifact, module: PreTrainedModel) -> None:
    """Refuse a graph whose cache is not the one ``module`` keeps: two tensors for each layer, numbered from 0 on.

    An artifact without declared inputs (a checkpoint) has its cache made by its library, and passes.

    Args:
        artifact: A decoder with a cache.
        module: The pruned torch model.

    Raises:
        ArtifactError: Naming the first cache input or output that is missing, left over, or of another type or shape.
    """
    if not artifact.inputs:
        return
    sizes = key_value_sizes(module)
    if isinstance(sizes, str):
        raise ArtifactError(f"the artifact in {artifact.path} has a key-value cache, but {sizes}; export it again")
    # An exporter may cast: the cache has the type of the artifact's weights, which need not be the reference's.  One
    # that only stores weights in fewer bits names the type it computes in.
    computes_in = artifact.details.get("model_precision", artifact.precision)
    dtype = ELEMENT_TYPES.get(computes_in, str(module.dtype).removeprefix("torch."))
    for prefix, specs in ((PAST, artifact.inputs), (PRESENT, artifact.outputs)):
        found = {spec.name: spec for spec in specs if spec.name.startswith(prefix)}
        for index, size in enumerate(sizes):
            for part, width in zip(CACHE_PARTS, (size.key_size, size.value_size), strict=True):
                name = cache_name(prefix, index, part)
                _check_tensor(found.pop(name, None), name, dtype, size.heads, width)
        if found:
            raise ArtifactError(
                f"the artifact has a cache tensor {min(found)} that its model of {len(sizes)} caching layers does not "
                "keep; whoever runs it would feed state that belongs to no layer; export it again"
            )


def _check_tensor(spec: TensorSpec | None, name: str, dtype: str, heads: int, width: int) -> None:
    if spec is None:
        raise ArtifactError(
            f"the artifact lacks the cache tensor {name}, which its torch model keeps; generation would lose what that "
            "layer has seen; export it again"
        )
    fixed = (spec.shape[1], spec.shape[3]) if len(spec.shape) == 4 else None
    varying = len(spec.shape) == 4 and isinstance(spec.shape[0], str) and isinstance(spec.shape[2], str)
    if spec.dtype != dtype or fixed != (heads, width) or not varying:
        raise ArtifactError(
            f"the artifact's cache tensor {name} is {spec.dtype} of shape {list(spec.shape)}, its torch model keeps "
            f"{dtype} of shape [batch, {heads}, length, {width}]; export it again"
        )

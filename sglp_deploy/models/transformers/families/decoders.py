"""Decoder language models.

Almost every family needs nothing said.  Its layers differ by lists the configuration holds.  The rules of
:mod:`sglp_deploy.models.transformers.rules` rewrite those.  What is said here is what the code does beside the
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sglp_deploy.models.transformers.families.base import Config, Family


def _inverse_scale(config: Config, _side: str, position: int) -> int | None:
    # GPT2Attention divides its scaling by layer_idx + 1 when it is built; a copied layer keeps the old divisor in
    # memory, so only a reloaded model would be wrong.
    return position if config.scale_attn_by_inverse_layer_idx else None


def _gemma4_last_layer(config: Config, _side: str) -> Mapping[int, str]:
    last = config.num_hidden_layers - 1
    return {last: "transformers reads the last layer back as one of full_attention whatever layer_types says"}


def _follow_the_kept_layers(model: nn.Module, _side: str, keep: Sequence[int]) -> None:
    """Bring along what Gemma-3n and Gemma-4 hold outside their layers, or fill in once when they are built.

    Two tensors pack an embedding for every layer.  Not cut they do not load; cut at the front they load, and every
    layer gets the embedding of another one.  They are all a pruned model does not share with the one it came from.
    """
    decoder: Any = next(module for module in model.modules() if hasattr(module, "hidden_size_per_layer_input"))
    with torch.device("meta"):
        rebuilt: Any = type(decoder)(decoder.config)
    for layer, fresh in zip(decoder.layers, rebuilt.layers, strict=True):
        # Who lays out its keys and values for readers, and (before transformers 5.22) by which number they find them.
        # Whether a layer reads others' is not copied: it must come out the same, and that is checked.
        for name in ("store_full_length_kv", "kv_shared_layer_index"):
            if hasattr(fresh.self_attn, name):
                setattr(layer.self_attn, name, getattr(fresh.self_attn, name))
    if hasattr(decoder, "first_kv_shared_layer_idx"):
        # From here on, Gemma-4 does not compute positions nobody asked for.
        decoder.first_kv_shared_layer_idx = rebuilt.first_kv_shared_layer_idx
    size = decoder.hidden_size_per_layer_input
    if not size:
        return
    table, projection = decoder.embed_tokens_per_layer, decoder.per_layer_model_projection
    table.weight = _blocks(table.weight, 1, size, keep)
    table.embedding_dim = len(keep) * size
    projection.weight = _blocks(projection.weight, 0, size, keep)
    projection.out_features = len(keep) * size


def _blocks(packed: nn.Parameter, dim: int, size: int, keep: Sequence[int]) -> nn.Parameter:
    kept = torch.cat([packed.detach().narrow(dim, old * size, size) for old in keep], dim)
    return nn.Parameter(kept, requires_grad=packed.requires_grad)


_PACKED = frozenset({"hidden_size_per_layer_input", "vocab_size_per_layer_input"})  # widths, not lists of layers

FAMILIES: Mapping[str, Family] = {
    "cohere": Family(),
    "cohere2": Family(note="layers of full attention do not rotate"),
    "deepseek_v3": Family(note="leading dense layers are counted"),
    "falcon": Family(),
    "gemma2": Family(note="sliding and full attention alternate"),
    "gemma3_text": Family(),
    "gemma3n_text": Family(
        adjust=_follow_the_kept_layers,
        not_per_layer=_PACKED | {"altup_active_idx"},
        not_layers=("altup_projections", "altup_unembed_projections"),
        note="the last layers read the keys and values of earlier ones, which must stay while they are read",
    ),
    "gemma4_text": Family(
        pinned=_gemma4_last_layer,
        adjust=_follow_the_kept_layers,
        not_per_layer=_PACKED,
        note="the last layer stays; the last layers may read the keys and values of earlier ones, which then stay",
    ),
    "gpt2": Family(
        derived=_inverse_scale,
        derived_rule=(
            "with scale_attn_by_inverse_layer_idx attention is divided by the layer's number plus one, so only layers "
            "at the end can be removed"
        ),
        note="only from the end where attention is scaled by the layer's number",
    ),
    "gpt_neo": Family(),
    "gpt_neox": Family(),
    "gpt_oss": Family(note="sliding and full attention alternate"),
    "granite": Family(),
    "jamba": Family(note="what is kept must have a period and an offset; one layer of attention stays"),
    "lfm2": Family(
        not_per_layer=frozenset({"block_multiple_of"}), note="convolutions and attention; one layer of attention stays"
    ),
    "llama": Family(),
    "llama4_text": Family(note="experts, rotary position and chunks each by a list of their own"),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo2": Family(),
    "opt": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(note="layers without experts are listed by number"),
    "qwen3_next": Family(note="linear and full attention, experts by number; one layer of attention stays"),
    "smollm3": Family(note="which layers rotate is a list"),
    "stablelm": Family(),
}

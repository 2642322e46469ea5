"""What each per-layer entry of a configuration becomes when layers go.

The commonest way a depth-pruned checkpoint breaks is an entry that nobody changed.  It loads and computes something
else.  Three rules, in this order:

* an entry of the named tables below has a known meaning and is rewritten by it: to an explicit list where transformers
  has one, else to other numbers of the same formula, else pruning is refused;
* any other list or tuple as long as the old depth is per-layer and is sliced by surviving index, if the family's
  configuration declares it or its name speaks of layers;
* an entry that only sounds like layers, or is only as long, is left alone and reported, so a person can look at it.

Which part of a configuration describes the layers, and how it is rewritten, is said by
:mod:`sglp_deploy.models.transformers.config`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sglp_deploy.errors import UnsupportedModelError
from sglp_deploy.models.base import ConfigChange
from sglp_deploy.models.transformers.families import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Lists whose length may equal the depth by accident and that have nothing to do with layers.
NOT_PER_LAYER = frozenset(
    {
        "architectures",
        "bad_words_ids",
        "begin_suppress_tokens",
        "conv_dim",
        "conv_kernel",
        "conv_stride",
        "eos_token_id",
        "id2label",
        "image_size",
        "label2id",
        "language_to_id",
        "patch_size",
        "suppress_tokens",
        "tdnn_dilation",
        "tdnn_dim",
        "tdnn_kernel",
    }
)

# The first so-many layers are of one type, the rest of another: exact as the number of kept layers below it.
PREFIX_COUNTS = {
    "max_window_layers": "layers below it attend fully; it becomes the number of them that are kept",
    "first_k_dense_replace": "layers below it have a dense MLP; it becomes the number of them that are kept",
    "num_dense_layers": "layers below it have a dense MLP; it becomes the number of them that are kept",
    "num_hash_layers": "layers below it route by hash; it becomes the number of them that are kept",
}

# Lists of layer numbers: those of removed layers go, the others are renumbered.
INDEX_LISTS = frozenset(
    {
        "attn_layer_indices",
        "cross_attention_layers",
        "deepstack_visual_indexes",
        "full_attn_idxs",
        "fullatt_block_indexes",
        "global_attn_indexes",
        "mlp_only_layers",
        "moe_layers",
        "residual_block_indices",
        "window_block_indices",
    }
)

# Lists with one entry for each layer, or more: transformers checks no length and ignores what is left over.
AT_LEAST_PER_LAYER = frozenset({"no_rope_layers"})

# Every n-th layer is special: scalars that only fill a list, which transformers then keeps and reads instead.  Others
# still read the scalar (vLLM asks interleave_moe_layer_step of Llama-4), so a stale one must not stay beside the list.
SUPERSEDED = {
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
}
# What the list says of a special layer: it attends fully, or (0) it does not rotate.
_SPECIAL = ("full_attention", 0)

# Heads that predict further tokens; transformers reads none of their weights, so a saved model has none.
PREDICTION_HEADS = frozenset({"mtp_num_hidden_layers", "num_mtp_layers", "num_nextn_predict_layers"})

# Which hidden states a backbone hands out, by name and by number; the names are kept beside the depth they come from.
BACKBONE_STAGES = ("stage_names", "_out_features", "_out_indices")

# (period, offset): layer i is special when i % period == offset; there is no list to say so.
PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))

_SOUNDS_PER_LAYER = re.compile(
    r"(?:^|_)(?:layers?|blocks?|depths?|period|interval|offset|pattern|every|idxs?|indices|indexes)(?:_|$)"
)
# Sounds like layers, and is a property of the model or of each layer alike.
_HARMLESS = re.compile(
    r"norm|layerdrop|layer_head|layer_scale|layerscale|_scale_init|head_mask|block_size|layer_weights|pattern_matching|"
    r"^add_cross_attention$|^cross_attention_hidden_size$|^decoder_attention_heads$|num_adapter_layers|"
    r"^num_feat_extract_layers$|^max_source_positions$|^stem_|^hidden_act|dropout"
)


def own_entries(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """Name and value of every entry that a rule may speak of, as the configuration stores it, by name."""
    for name, value in sorted(vars(config).items()):
        internal = name.startswith("_") and name not in SUPERSEDED and name not in BACKBONE_STAGES
        if not internal and name not in config.attribute_map:
            yield name, value


def layer_facts(
    config: PretrainedConfig, depth: int, index: int, family: Family, side: str = "layers"
) -> Iterator[Hashable]:
    """What the entries say about layer ``index`` by its place; layers of equal facts may take each other's place."""
    for entry, value in own_entries(config):
        if entry in family.not_per_layer or entry in NOT_PER_LAYER or side != "layers":
            continue
        if _is_per_layer(config, entry, value, depth):
            yield str(value[index])
        elif entry in PREFIX_COUNTS and isinstance(value, int):
            yield index < value
        elif entry in INDEX_LISTS and isinstance(value, (list, tuple)):
            yield index in value
        elif entry == "decoder_sparse_step":
            yield (index + 1) % value == 0
    for period, offset in PERIODS:
        if hasattr(config, period):
            yield index % getattr(config, period) == getattr(config, offset)


def entry_change(
    config: PretrainedConfig, entry: str, value: Any, depth: int, keep: Sequence[int], family: Family, side: str
) -> ConfigChange | None:
    """The change of one entry; None when it has nothing to do with layers.

    Args:
        config: The part of the configuration that counts the layers.
        entry: A name from :func:`own_entries`.
        value: What stands there.
        depth: Layers before.
        keep: Old numbers of the layers that stay.
        family: Declared facts.
        side: "layers", or "encoder" or "decoder" of a model that has both.

    Raises:
        UnsupportedModelError: If no other value of the entry fits ``keep``.
    """
    if entry in family.not_per_layer or entry in NOT_PER_LAYER:
        return None
    if entry in BACKBONE_STAGES:
        return _backbone_stage(config, entry, value, depth, keep)
    for rule in _RULES:
        found = rule(config, entry, value, depth, keep)
        if found is not None:
            return found
    if _is_per_layer(config, entry, value, depth):
        if side != "layers":
            return None if not value else _unknown(entry, value, "as long as the depth, but it does not say whose")
        return ConfigChange(entry, value, [value[index] for index in keep], "one entry for each layer")
    if isinstance(value, str) and "pattern" in entry and len(value) == depth:
        return ConfigChange(entry, value, "".join(value[index] for index in keep), "one letter for each layer")
    if isinstance(value, (list, tuple)) and value and len(value) == depth and entry not in INDEX_LISTS:
        return _unknown(entry, value, "as long as the model is deep, but no entry of its family")
    sounds = _SOUNDS_PER_LAYER.search(entry) and not _HARMLESS.search(entry)
    if sounds and isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
        if entry in ("encoder_layers", "decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers"):
            return None  # the depth of the other side
        return _unknown(entry, value, "it sounds like layers")
    return None


def _is_per_layer(config: PretrainedConfig, entry: str, value: Any, depth: int) -> bool:
    if not isinstance(value, (list, tuple)) or entry in INDEX_LISTS:
        return False
    if len(value) != depth:
        return entry in AT_LEAST_PER_LAYER and len(value) > depth
    # A user's own list may be as long by accident (names of labels, weights of classes).
    return entry in _declared(type(config)) or _SOUNDS_PER_LAYER.search(entry) is not None


def _declared(kind: type) -> frozenset[str]:
    """The entries that a family's configuration takes."""
    return frozenset(inspect.signature(kind).parameters)


def _unknown(entry: str, value: Any, why: str) -> ConfigChange:
    return ConfigChange(entry, value, value, f"not known here, left as it is: {why}")


Rule = Callable[["PretrainedConfig", str, Any, int, Sequence[int]], "ConfigChange | None"]


def _prefix_count(
    _config: PretrainedConfig, entry: str, value: Any, _depth: int, keep: Sequence[int]
) -> ConfigChange | None:
    if entry not in PREFIX_COUNTS or not isinstance(value, int):
        return None
    # Exact because ``keep`` is rising: the kept layers below the old bound are the first ones of the new model.
    return ConfigChange(entry, value, sum(index < value for index in keep), PREFIX_COUNTS[entry])


def _shared_cache(
    config: PretrainedConfig, entry: str, value: Any, depth: int, keep: Sequence[int]
) -> ConfigChange | None:
    """Gemma-3n, Gemma-4: the last layers compute no keys and values and read those of an earlier one of their type."""
    if entry != "num_kv_shared_layers" or not isinstance(value, int):
        return None
    first = depth - value
    types: Sequence[str] = getattr(config, "layer_types", None) or ["full_attention"] * depth
    for reader in (index for index in keep if index >= first):
        source = max((index for index in range(first) if types[index] == types[reader]), default=None)
        if source is not None and source not in keep:
            raise UnsupportedModelError(
                f"layer {source} cannot be removed while layer {reader} is kept; layer {reader} has no keys and values "
                f"of its own and reads those of layer {source} (num_kv_shared_layers={value}); keep {source}"
            )
    after = sum(index >= first for index in keep)
    return ConfigChange(entry, value, after, "the last so-many layers share the cache of an earlier one; kept ones")


def _index_list(
    _config: PretrainedConfig, entry: str, value: Any, _depth: int, keep: Sequence[int]
) -> ConfigChange | None:
    if entry not in INDEX_LISTS or not isinstance(value, (list, tuple)) or entry == "mlp_only_layers":
        return None
    return ConfigChange(
        entry, value, [new for new, old in enumerate(keep) if old in value], "layer numbers, renumbered"
    )


def _sparse_step(
    config: PretrainedConfig, entry: str, value: Any, _depth: int, keep: Sequence[int]
) -> ConfigChange | None:
    """Qwen MoE: layer i has experts when (i + 1) % decoder_sparse_step == 0 and i is not in mlp_only_layers."""
    if entry not in ("decoder_sparse_step", "mlp_only_layers"):
        return None
    step = getattr(config, "decoder_sparse_step", 1)
    listed = getattr(config, "mlp_only_layers", None) or []
    dense = [new for new, old in enumerate(keep) if old in listed or (old + 1) % step != 0]
    if entry == "mlp_only_layers":
        return ConfigChange(entry, value, dense, "kept layers without experts, by their new numbers")
    if not hasattr(config, "mlp_only_layers"):
        raise UnsupportedModelError(
            f"decoder_sparse_step={step} derives which layers have experts from their numbers and there is no "
            "mlp_only_layers to say it explicitly; write an adapter for this family"
        )
    return ConfigChange(entry, value, 1, "1, because mlp_only_layers now names every layer without experts")


def _period(config: PretrainedConfig, entry: str, value: Any, _depth: int, keep: Sequence[int]) -> ConfigChange | None:
    for period_name, offset_name in PERIODS:
        if entry in (period_name, offset_name):
            period, offset = getattr(config, period_name), getattr(config, offset_name)
            special = [old % period == offset for old in keep]
            fit = fitting_period(special)
            if fit is None:
                where = [new for new, flag in enumerate(special) if flag]
                raise UnsupportedModelError(
                    f"{period_name}={period} and {offset_name}={offset} make every {period}th layer special; after "
                    f"pruning layers {where} of {len(keep)} would be, which no period and offset describes; keep "
                    "whole periods (--preserve-pattern)"
                )
            if special == [new % period == offset for new in range(len(keep))]:
                fit = (period, offset)
            return ConfigChange(entry, value, fit[entry == offset_name], "period and offset of the kept layers")
    return None


def fitting_period(special: Sequence[bool]) -> tuple[int, int] | None:
    """The smallest (period, offset) with ``i % period == offset`` exactly where ``special[i]``, or None."""
    for period in range(1, len(special) + 2):
        for offset in range(period):
            if all((index % period == offset) == flag for index, flag in enumerate(special)):
                return period, offset
    return None


def _superseded(
    config: PretrainedConfig, entry: str, value: Any, depth: int, keep: Sequence[int]
) -> ConfigChange | None:
    if entry not in SUPERSEDED or value is None:
        return None
    name = SUPERSEDED[entry]
    explicit = getattr(config, name, None)
    if isinstance(explicit, (list, tuple)) and name in INDEX_LISTS:
        special = [index in explicit for index in range(depth)]
    elif isinstance(explicit, (list, tuple)) and len(explicit) >= depth:
        special = [kind in _SPECIAL for kind in explicit[:depth]]
    else:
        raise UnsupportedModelError(
            f"{entry}={value!r} derives each layer's type from its number, and {name} is not there to say it "
            "explicitly; load the model with a transformers that fills it in, or write an adapter for this family"
        )
    wanted = [special[old] for old in keep]
    if wanted == special[: len(keep)]:
        return ConfigChange(entry, value, value, f"as before at every place; {name} says it for each layer")
    # Periods end with the special layer, or begin with it (ModernBERT); the same name stands for both.
    counted = [first for first in (1, 0) if isinstance(value, int) and _every(value, first, depth) == special]
    fits = (n for n in range(1, len(keep) + 2) for first in counted[:1] if _every(n, first, len(keep)) == wanted)
    after = next(fits, None)
    now = f"every {after}th of the kept layers" if after else "removed, because no number fits the kept layers"
    return ConfigChange(entry, value, after, f"{now}; {name} says it for each layer")


def _every(number: int, first: int, n_layers: int) -> list[bool]:
    return [number > 0 and (index + first) % number == 0 for index in range(n_layers)]


def _prediction_heads(
    _config: PretrainedConfig, entry: str, value: Any, depth: int, keep: Sequence[int]
) -> ConfigChange | None:
    if entry not in PREDICTION_HEADS or not isinstance(value, int):
        return None
    after = value if len(keep) == depth else 0
    return ConfigChange(entry, value, after, "the heads that predict further tokens are not part of what is saved")


def _repeated_types(
    config: PretrainedConfig, entry: str, value: Any, depth: int, keep: Sequence[int]
) -> ConfigChange | None:
    """GPT-Neo: ``[[["global", "local"], 12]]`` repeats the types 12 times, and attention_layers spells them out."""
    types = getattr(config, "attention_layers", None)
    if entry != "attention_types" or not isinstance(types, (list, tuple)) or len(types) != depth:
        return None
    after = value if len(keep) == depth else [[[types[old]], 1] for old in keep]
    return ConfigChange(entry, value, after, "the types of the kept layers, each said once")


_RULES: tuple[Rule, ...] = (
    _prefix_count,
    _shared_cache,
    _index_list,
    _sparse_step,
    _period,
    _superseded,
    _prediction_heads,
    _repeated_types,
)


def _backbone_stage(
    config: PretrainedConfig, entry: str, value: Any, depth: int, keep: Sequence[int]
) -> ConfigChange | None:
    """DINOv2 and others call each layer a stage: hidden state 0 is the embedding's, i is what layer i - 1 returns."""
    names: Sequence[str] = getattr(config, "stage_names", None) or ()
    if len(names) != depth + 1 or value is None:
        return None
    if entry == "stage_names":
        return ConfigChange(entry, value, list(names[: len(keep) + 1]), "one name for each layer, and the embedding's")
    # With a layer removed, the hidden state after it is the one after the last kept layer before it.
    asked = [names.index(item) if isinstance(item, str) else item % len(names) for item in value]
    after = [sum(layer < index for layer in keep) for index in asked]
    if len(set(after)) < len(after):
        raise UnsupportedModelError(
            f"the model hands out the hidden states {list(value)}, and with these layers removed two of them would be "
            "the same; keep a layer between each two of them"
        )
    new = [names[index] for index in after] if entry == "_out_features" else after
    return ConfigChange(entry.removeprefix("_"), value, new, "stages, renumbered")

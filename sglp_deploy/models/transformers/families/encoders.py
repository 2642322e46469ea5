"""Encoders, encoder-decoders and speech models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglp_deploy.models.base import ConfigChange
from sglp_deploy.models.transformers.families.base import Config, Family, keep_first


def _convolution(config: Config, _side: str) -> Mapping[int, str]:
    """DeBERTa-v2: ``if i == 0 and self.conv is not None`` in the encoder; the weights would fit any first layer."""
    if getattr(config, "conv_kernel_size", 0) <= 0:
        return {}
    return {0: "the encoder's convolution follows whichever layer comes first, and was trained behind this one"}


def _several_groups(config: Config) -> str | None:
    """ALBERT: pass i runs group int(i / (passes / groups)), so with fewer passes others change their weights."""
    if config.num_hidden_groups == 1:
        return None
    return (
        f"num_hidden_groups={config.num_hidden_groups} makes its code choose each pass's weights by the number of "
        "passes, so removing one changes what others run; only models of one group, as all published ones are, "
        "can lose passes"
    )


def _weighted_sum(config: Config) -> str | None:
    """A head that reads every layer: a removed layer handing its input on would still be weighed, twice."""
    if not getattr(config, "use_weighted_layer_sum", False):
        return None
    return (
        "use_weighted_layer_sum makes its head weigh the outputs of all layers, and a smaller set was not what the "
        "weights were trained for; train a head without it first"
    )


def _cache_depth(model: Any, side: str, keep: Sequence[int]) -> Sequence[ConfigChange]:
    """T5: ``generate`` sizes the decoder's cache by ``num_layers``, the encoder's depth, and runs past its end.

    ``PretrainedConfig.get_text_config(decoder=True)`` knows ``decoder_layers`` of BART and Whisper but not
    ``num_decoder_layers`` (transformers 5.23), so the decoder's depth is said under that name too.
    """
    config = model.config
    if not config.is_encoder_decoder:
        return ()
    depths = {"encoder": config.num_layers, "decoder": config.num_decoder_layers} | {side: len(keep)}
    before: int | None = getattr(config, "decoder_layers", None)
    if before is None and depths["decoder"] <= depths["encoder"]:
        return ()
    rule = "depth of the decoder by the name transformers looks for when it sizes the cache of generate()"
    return (ConfigChange("decoder_layers", before, depths["decoder"], rule),)


def _alignment_heads(model: Any, side: str, keep: Sequence[int]) -> Sequence[ConfigChange]:
    """Whisper: [decoder layer, head] pairs whose cross-attention gives the time of each word."""
    # A class that does not generate (WhisperModel) has no generation configuration.
    before = getattr(getattr(model, "generation_config", None), "alignment_heads", None)
    if side != "decoder" or not before:
        return ()
    places = {old: new for new, old in enumerate(keep)}
    after = [[places[layer], head] for layer, head in before if layer in places]
    rule = "decoder layers whose attention times each word; kept ones, renumbered"
    if not after:
        # An empty list fails inside generate(); without the entry transformers says what is missing.
        rule = "every decoder layer that times words is removed; the entry goes, and word timestamps with it"
    return (ConfigChange("generation_config.alignment_heads", before, after or None, rule),)


_PLAIN = Family()
_T5 = Family(
    pinned=keep_first("its self-attention holds the table of relative positions that all layers of its side share"),
    more_changes=_cache_depth,
    note="layer 0 of each side stays",
)
_SPEECH = Family(
    # Their lengths are free, so each may equal the depth before pruning or after it.
    not_layers=("feature_extractor.conv_layers", "conv.parametrizations.weight", "adapter.layers", "tdnn"),
    refuse=_weighted_sum,
)

FAMILIES: Mapping[str, Family] = {
    "albert": Family(
        loop="encoder.albert_layer_groups.0",
        refuse=_several_groups,
        note="one layer run in a loop: fewer passes, no fewer weights",
    ),
    "bart": _PLAIN,
    "bert": _PLAIN,
    "deberta-v2": Family(pinned=_convolution, note="layer 0 stays where a convolution follows it"),
    "distilbert": _PLAIN,
    "hubert": _SPEECH,
    "modernbert": Family(
        pinned=keep_first("it has no norm before its attention, and the code gives one to any other layer"),
        note="layer 0 stays",
    ),
    "mt5": _T5,
    "roberta": _PLAIN,
    "t5": _T5,
    "wav2vec2": _SPEECH,
    "wav2vec2-conformer": _SPEECH,
    "whisper": Family(
        refuse=_weighted_sum,
        more_changes=_alignment_heads,
        note="alignment heads of the generation config are renumbered",
    ),
}

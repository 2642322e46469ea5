"""Rotary settings and tokenizers under the names that transformers 4 reads, beside those that transformers 5 writes.

transformers 5 gathers base, scaling and share of a head in ``rope_parameters``.  Its predecessor does not know the name
and silently turns by the family's default base.  So do tools that read ``config.json`` themselves and follow the old
names.  transformers 5 reads the old ones too, where the new one does not say otherwise.  A tokenizer that it writes
names a class, and lists special tokens, in a way that ends its predecessor with an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

# Other names of base and of the share of a head that is turned, by model_type.
_BASES: Final[Mapping[str, str]] = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_SHARES: Final[Mapping[str, str]] = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
# Names of the bases of layers that attend to everything and of those that slide, where a family has two.
_PAIRS: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(("modernbert", "modernbert-decoder"), ("global_rope_theta", "local_rope_theta")),
    **dict.fromkeys(("gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), ("rope_theta", "rope_local_base_freq")),
    "olmo3": ("rope_theta", "rope_theta"),
}
TOKENIZER_SETTINGS: Final = "tokenizer_config.json"
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def add_earlier_names(file: Path) -> None:
    """Add to a ``config.json`` what transformers 4 reads; entries that are there stay, and parts are gone through."""
    config = json.loads(file.read_text(encoding="utf-8"))
    before = json.dumps(config)
    _add(config)
    if json.dumps(config) != before:
        file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def name_tokenizer_as_earlier(file: Path) -> None:
    """Give a ``tokenizer_config.json`` the class and the list of special tokens that both releases read."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    before = json.dumps(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    more = settings.get("extra_special_tokens")
    if isinstance(more, list):  # transformers 4 takes a mapping from names there
        del settings["extra_special_tokens"]
        if more:
            settings.setdefault("additional_special_tokens", more)
    if json.dumps(settings) != before:
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def earlier_names(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 calls the settings that are ``rope_parameters`` to transformers 5.

    Args:
        model_type: Of the configuration they lie in.
        rope: One set of settings, or one for each kind of layer.

    Returns:
        Nothing for a family with settings by kind of layer that transformers 4 does not have.
    """
    if any(isinstance(value, Mapping) for value in rope.values()):
        whole, sliding = rope.get("full_attention"), rope.get("sliding_attention")
        if model_type not in _PAIRS or not isinstance(whole, Mapping) or not isinstance(sliding, Mapping):
            return {}
        names = _PAIRS[model_type]
        bases = zip(names, (whole, sliding), strict=True)
        found = {name: part["rope_theta"] for name, part in bases if "rope_theta" in part}
    else:
        whole = rope
        found = {_BASES.get(model_type, "rope_theta"): rope["rope_theta"]} if "rope_theta" in rope else {}
        if "partial_rotary_factor" in rope:
            found[_SHARES.get(model_type, "partial_rotary_factor")] = rope["partial_rotary_factor"]
    # Sections of several axes (Qwen-VL) stand there even where nothing is scaled.
    if whole.get("rope_type", "default") != "default" or set(whole) - {"rope_type", *_NOT_SCALING}:
        found["rope_scaling"] = {name: value for name, value in whole.items() if name not in _NOT_SCALING}
    return found


def _add(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        for name, value in earlier_names(str(config.get("model_type")), rope).items():
            config.setdefault(name, value)
    for part in config.values():
        if isinstance(part, dict):
            _add(part)

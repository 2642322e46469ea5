"""The rules that rewrite a configuration, each on the smallest configuration that shows it.

What a list must become is written out by hand, or worked out from the meaning of the entry: which of the original
layers had the property, and which of those are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    PretrainedConfig,
    T5Config,
)

import tiny
from sglp_deploy.errors import UnsupportedModelError
from sglp_deploy.models import FAMILIES, ConfigChange, Family, pruned_config
from sglp_deploy.models.transformers.config import config_changes
from sglp_deploy.models.transformers.rules import INDEX_LISTS, NOT_PER_LAYER, PREFIX_COUNTS, SUPERSEDED, fitting_period

KEEP = (0, 2, 3, 6)
DEPTH = 7
# Rising sets of kept layers that are first, last, mixed, single and everything.
KEEPS = [KEEP, (0, 1, 2), (4, 5, 6), (3,), tuple(range(DEPTH)), (1, 3, 5)]


def _config(**entries: Any) -> PretrainedConfig:
    return PretrainedConfig(num_hidden_layers=DEPTH, **entries)


def _change(config: PretrainedConfig, entry: str, keep: tuple[int, ...] = KEEP, side: str = "layers") -> ConfigChange:
    return next(change for change in config_changes(config, keep, side=side) if change.entry == entry)


# ------------------------------------------------------------------------------------------- entries found by length


@pytest.mark.parametrize("entry", ["label_list", "class_weights", "experts"])
def test_a_user_s_own_list_as_long_as_the_depth_is_left_and_reported(entry: str) -> None:
    config = BertConfig(num_hidden_layers=DEPTH, **{entry: list(range(DEPTH))})
    change = _change(config, entry)
    assert change.after == change.before == list(range(DEPTH))
    assert change.rule == "not known here, left as it is: as long as the model is deep, but no entry of its family"
    assert getattr(pruned_config(config, KEEP), entry) == list(range(DEPTH))


def test_a_list_that_speaks_of_layers_is_cut_though_the_family_does_not_declare_it() -> None:
    types = [("full" if layer % 3 else "sliding") + "_attention" for layer in range(DEPTH)]
    config = BertConfig(num_hidden_layers=DEPTH, layer_types=types)
    assert pruned_config(config, KEEP).layer_types == [types[layer] for layer in KEEP]


def test_a_list_as_long_as_the_depth_is_sliced_by_surviving_index() -> None:
    config = _config(layer_widths=[10, 11, 12, 13, 14, 15, 16])
    pruned = pruned_config(config, KEEP)
    assert pruned.layer_widths == [10, 12, 13, 16]
    assert pruned.num_hidden_layers == 4
    assert config.layer_widths == [10, 11, 12, 13, 14, 15, 16]
    assert config.num_hidden_layers == 7


def test_a_tuple_stays_a_tuple() -> None:
    assert pruned_config(_config(layer_widths=(10, 11, 12, 13, 14, 15, 16)), KEEP).layer_widths == (10, 12, 13, 16)


def test_a_string_with_one_letter_for_each_layer_is_sliced_and_another_string_is_not() -> None:
    config = _config(hybrid_override_pattern="M-M*-ME", name="sevenis")
    pruned = pruned_config(config, KEEP)
    assert pruned.hybrid_override_pattern == "MM*E"
    assert pruned.name == "sevenis"


def test_a_pattern_of_another_length_is_left_alone() -> None:
    assert pruned_config(_config(pattern="SSSL"), KEEP).pattern == "SSSL"


@pytest.mark.parametrize("entry", sorted(NOT_PER_LAYER - {"architectures", "id2label", "label2id"}))
def test_a_list_known_to_be_about_something_else_is_left_alone_however_long_it_is(entry: str) -> None:
    value = list(range(1, DEPTH + 1))
    config = _config()
    vars(config)[entry] = list(value)
    assert vars(pruned_config(config, KEEP))[entry] == value
    assert entry not in [change.entry for change in config_changes(config, KEEP)]


def test_labels_as_many_as_layers_are_left_alone() -> None:
    config = _config(id2label={number: f"label {number}" for number in range(DEPTH)})
    assert pruned_config(config, KEEP).id2label == config.id2label


def test_a_family_can_name_lists_that_are_not_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(anchors=[1, 2, 3, 4, 5, 6, 7])
    config.model_type = "declared-for-this-test"
    monkeypatch.setitem(FAMILIES, config.model_type, Family(not_per_layer=frozenset({"anchors"})))  # type: ignore[arg-type]
    assert pruned_config(config, KEEP).anchors == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("entry", ["strange_layers", "block_interval", "some_layer_pattern", "special_indices"])
def test_what_only_sounds_like_layers_is_left_and_listed_for_a_person(entry: str) -> None:
    config = _config()
    vars(config)[entry] = 3
    change = _change(config, entry)
    assert (change.before, change.after) == (3, 3)
    assert change.rule.startswith("not known here, left as it is")
    assert vars(pruned_config(config, KEEP))[entry] == 3


def test_what_has_nothing_to_do_with_layers_is_not_listed() -> None:
    config = _config(layer_norm_eps=1e-5, layerdrop=0.1, hidden_size=7, rope_theta=7.0, use_layer_scale=True)
    assert [change.entry for change in config_changes(config, KEEP)] == ["num_hidden_layers"]


# ---------------------------------------------------------------------------------------------------- named entries


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("entry", sorted(PREFIX_COUNTS))
@pytest.mark.parametrize("count", [0, 3, DEPTH])
def test_a_count_of_leading_layers_becomes_the_number_of_them_that_are_kept(
    entry: str, keep: tuple[int, ...], count: int
) -> None:
    config = _config()
    vars(config)[entry] = count
    leading = [old < count for old in keep]  # what each kept layer was
    after = vars(pruned_config(config, keep))[entry]
    assert [new < after for new in range(len(keep))] == leading


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("entry", sorted(INDEX_LISTS - {"mlp_only_layers"}))
def test_a_list_of_layer_numbers_loses_removed_ones_and_renumbers_the_rest(entry: str, keep: tuple[int, ...]) -> None:
    config, listed = _config(), [2, 5, 6]
    vars(config)[entry] = listed
    after = vars(pruned_config(config, keep))[entry]
    assert [new in after for new in range(len(keep))] == [old in listed for old in keep]
    assert all(number < len(keep) for number in after)


def test_a_list_of_layer_numbers_as_long_as_the_model_is_still_a_list_of_numbers() -> None:
    config = _config(moe_layers=[0, 1, 2, 3, 4, 5, 6])
    assert pruned_config(config, (2, 5)).moe_layers == [0, 1]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("listed", [[], [1, 3]])
def test_which_layers_have_experts_is_said_by_number_once_the_step_no_longer_fits(
    keep: tuple[int, ...], step: int, listed: list[int]
) -> None:
    def has_experts(config: PretrainedConfig, layer: int) -> bool:  # as in the modelling code of Qwen2-MoE
        return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0

    config = _config(decoder_sparse_step=step, mlp_only_layers=listed)
    pruned = pruned_config(config, keep)
    assert [has_experts(pruned, new) for new in range(len(keep))] == [has_experts(config, old) for old in keep]


def test_a_sparse_step_without_a_list_to_replace_it_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"decoder_sparse_step=2 derives .* no mlp_only_layers to say it"):
        pruned_config(_config(decoder_sparse_step=2), KEEP)


@pytest.mark.parametrize(
    "names", [("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset")]
)
def test_a_period_and_offset_become_those_of_the_kept_layers(names: tuple[str, str]) -> None:
    config = _config()
    vars(config).update(zip(names, (3, 1), strict=True))  # layers 1 and 4 of 7
    pruned = vars(pruned_config(config, (1, 2, 4, 5)))  # of the four, the first and the third
    period, offset = (pruned[name] for name in names)
    assert [new % period == offset for new in range(4)] == [True, False, True, False]


def test_a_period_that_still_fits_keeps_its_numbers() -> None:
    config = _config(attn_layer_period=3, attn_layer_offset=1)
    pruned = pruned_config(config, (0, 1, 2))
    assert (pruned.attn_layer_period, pruned.attn_layer_offset) == (3, 1)


def test_kept_layers_no_period_describes_are_refused_with_the_rule() -> None:
    config = _config(attn_layer_period=3, attn_layer_offset=1)
    with pytest.raises(UnsupportedModelError) as caught:
        pruned_config(config, (0, 1, 4, 5))  # special at 1 and 2, and at 0 and 3 not
    assert "attn_layer_period=3 and attn_layer_offset=1 make every 3th layer special" in str(caught.value)
    assert "layers [1, 2] of 4 would be, which no period and offset describes; keep whole periods" in str(caught.value)


@pytest.mark.parametrize("length", range(1, 9))
def test_the_fitting_period_is_found_exactly_when_there_is_one(length: int) -> None:
    # Every pattern any period and offset can make of so many layers, by trying far more of them than are needed.
    made: dict[tuple[bool, ...], tuple[int, int]] = {}
    for period in range(1, 3 * length + 2):
        for offset in range(period):
            made.setdefault(tuple(layer % period == offset for layer in range(length)), (period, offset))
    for bits in range(2**length):
        special = tuple(bool(bits >> layer & 1) for layer in range(length))
        found = fitting_period(special)
        assert (found is not None) == (special in made)
        if found is not None:
            period, offset = found
            assert 0 <= offset < period
            assert tuple(layer % period == offset for layer in range(length)) == special


def _every_third(entry: str) -> tuple[PretrainedConfig, str, list[Any]]:
    """Layers 2 and 5 of 7 are special, by ``entry`` and by the list it fills; what is kept of the list by KEEP."""
    explicit, sliding, full = SUPERSEDED[entry], "sliding_attention", "full_attention"
    lists: dict[str, tuple[list[Any], list[Any]]] = {
        "layer_types": ([sliding, sliding, full, sliding, sliding, full, sliding], [sliding, full, sliding, sliding]),
        "no_rope_layers": ([1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1]),
        "moe_layers": ([2, 5], [1]),
    }
    config = _config()
    vars(config).update({entry: 3, explicit: lists[explicit][0]})
    return config, explicit, lists[explicit][1]


@pytest.mark.parametrize("entry", sorted(SUPERSEDED))
def test_a_scalar_that_fills_a_list_is_refused_where_the_list_is_not_there(entry: str) -> None:
    config, explicit, _ = _every_third(entry)
    del vars(config)[explicit]
    with pytest.raises(UnsupportedModelError, match=rf"{entry}=3 derives .* {explicit} is not there to say it"):
        pruned_config(config, KEEP)


@pytest.mark.parametrize("entry", sorted(SUPERSEDED))
def test_a_scalar_no_number_of_which_is_true_of_the_kept_layers_goes_and_its_list_stays(entry: str) -> None:
    config, explicit, kept = _every_third(entry)
    pruned = pruned_config(config, KEEP)  # special is the second of four
    assert vars(pruned)[explicit] == kept
    assert entry not in vars(pruned)
    assert vars(config)[entry] == 3
    change = _change(config, entry)
    assert (change.before, change.after) == (3, None)
    assert change.rule == f"removed, because no number fits the kept layers; {explicit} says it for each layer"


@pytest.mark.parametrize(
    ("keep", "after"), [((0, 1, 2), 3), ((1, 2, 4, 5), 2), ((2, 5), 1), ((0, 1, 3, 4), 5), (tuple(range(DEPTH)), 3)]
)
@pytest.mark.parametrize("entry", sorted(SUPERSEDED))
def test_a_scalar_becomes_the_number_that_is_true_of_the_kept_layers(
    entry: str, keep: tuple[int, ...], after: int
) -> None:
    # Special of those kept: the third; the second and the fourth; both; none; the third and the sixth.
    config, _, _ = _every_third(entry)
    assert vars(pruned_config(config, keep))[entry] == after


def test_a_scalar_may_count_from_the_first_layer_or_to_the_last_of_each_period() -> None:
    full, sliding = "full_attention", "sliding_attention"
    ends = _config(global_attn_every_n_layers=3, layer_types=[sliding, sliding, full] * 2 + [sliding])
    begins = _config(global_attn_every_n_layers=3, layer_types=[full, sliding, sliding] * 2 + [full])
    assert pruned_config(ends, (1, 2, 4, 5)).global_attn_every_n_layers == 2  # the second and the fourth of four
    assert pruned_config(begins, (0, 1, 3, 4)).global_attn_every_n_layers == 2  # the first and the third


def test_a_scalar_that_was_not_true_before_goes() -> None:
    full, sliding = "full_attention", "sliding_attention"
    config = _config(sliding_window_pattern=3, layer_types=[full, full, sliding, sliding, full, sliding, sliding])
    assert "sliding_window_pattern" not in vars(pruned_config(config, (1, 2, 4)))


def test_a_list_that_is_longer_than_the_model_is_deep_is_still_one_entry_for_each_layer() -> None:
    config = _config(no_rope_layers=[1, 1, 0, 1, 1, 0, 1, 1, 0, 1])
    assert pruned_config(config, (0, 2, 5)).no_rope_layers == [1, 0, 0]


def _shares(n_shared: int) -> PretrainedConfig:
    sliding, full = "sliding_attention", "full_attention"
    types = [sliding, full, sliding, full, sliding, full, sliding]
    return _config(num_kv_shared_layers=n_shared, layer_types=types)


@pytest.mark.parametrize(
    ("keep", "shared"), [((0, 2, 3, 5, 6), 2), ((2, 3, 4), 1), ((0, 1), 0), (tuple(range(DEPTH)), 3)]
)
def test_layers_that_read_anothers_cache_are_counted_when_kept(keep: tuple[int, ...], shared: int) -> None:
    # Of 7, the last 3 (4, 5, 6) read the last sliding (2) and the last full layer (3) before them.
    assert pruned_config(_shares(3), keep).num_kv_shared_layers == shared


@pytest.mark.parametrize(("keep", "source", "reader"), [((0, 1, 3, 4), 2, 4), ((1, 2, 5), 3, 5)])
def test_a_layer_whose_cache_a_kept_layer_reads_cannot_go(keep: tuple[int, ...], source: int, reader: int) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"layer {source} cannot be removed while layer {reader} is kept; .*keep {source}"
    ):
        pruned_config(_shares(3), keep)


# --------------------------------------------------------------------------------------- settings filed by number


def test_settings_filed_under_a_layers_number_are_renumbered(tmp_path: Path) -> None:
    sliding, full = "sliding_attention", "full_attention"
    config = Gemma4TextConfig(
        num_hidden_layers=6,
        layer_types=[sliding, sliding, full, sliding, sliding, full],
        head_dim=16,
        global_head_dim=32,
    )
    heads = [layer.head_dim for layer in config.per_layer_config]
    assert heads == [16, 16, 32, 16, 16, 32]
    pruned = pruned_config(config, (0, 2, 4, 5))
    assert [layer.head_dim for layer in pruned.per_layer_config] == [16, 32, 16, 32]
    assert [layer.head_dim for layer in config.per_layer_config] == heads
    pruned.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert [layer.head_dim for layer in again.per_layer_config] == [16, 32, 16, 32]
    assert again.layer_types == [sliding, full, sliding, full]


# -------------------------------------------------------------------------------------- several parts and sides


def test_a_composite_model_is_changed_in_the_part_that_counts_the_layers() -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    text = Gemma3TextConfig(num_hidden_layers=6, layer_types=types, hidden_size=64, num_attention_heads=2)
    config = Gemma3Config(text_config=text, vision_config={"num_hidden_layers": 6, "hidden_size": 32})
    pruned = pruned_config(config, (0, 2, 5))
    assert pruned.text_config.num_hidden_layers == 3
    assert pruned.text_config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert pruned.vision_config.num_hidden_layers == 6
    assert pruned.vision_config.to_dict() == config.vision_config.to_dict()
    assert {change.entry.partition(".")[0] for change in config_changes(config, (0, 2, 5))} == {"text_config"}


@pytest.mark.parametrize(
    ("config", "side", "depth", "other"),
    [
        (BartConfig(encoder_layers=6, decoder_layers=6), "decoder", "decoder_layers", "encoder_layers"),
        (BartConfig(encoder_layers=6, decoder_layers=6), "encoder", "encoder_layers", "decoder_layers"),
        (T5Config(num_layers=6, num_decoder_layers=6), "decoder", "num_decoder_layers", "num_layers"),
        (T5Config(num_layers=6, num_decoder_layers=6), "encoder", "num_layers", "num_decoder_layers"),
    ],
)
def test_the_other_side_of_an_encoder_decoder_is_left_alone(
    config: PretrainedConfig, side: str, depth: str, other: str
) -> None:
    before = config.to_dict()
    after = pruned_config(config, (0, 2), side=side).to_dict()
    changed = {name for name, value in after.items() if before.get(name) != value}
    assert after[depth] == 2
    assert after[other] == 6
    assert changed <= {depth, config.attribute_map.get("num_hidden_layers", depth), "num_hidden_layers"}


def test_a_list_as_long_as_both_sides_is_not_guessed_to_be_of_one() -> None:
    config = BartConfig(encoder_layers=6, decoder_layers=6)
    config.layer_widths = [1, 2, 3, 4, 5, 6]
    assert pruned_config(config, (0, 2), side="decoder").layer_widths == [1, 2, 3, 4, 5, 6]
    assert "does not say whose" in _change(config, "layer_widths", (0, 2), "decoder").rule


def test_a_configuration_that_counts_no_layers_is_refused() -> None:
    config = PretrainedConfig(depth=3)
    config.model_type = "unheard-of"
    with pytest.raises(
        UnsupportedModelError, match=r"of 'unheard-of' counts its layers under none of num_hidden_layers"
    ):
        config_changes(config, (0,))


# ----------------------------------------------------------------------------- what a family derives from a position


def _declare(monkeypatch: pytest.MonkeyPatch, family: Family, **entries: Any) -> PretrainedConfig:
    config = PretrainedConfig(**entries)
    config.model_type = "declared-for-this-test"
    monkeypatch.setitem(FAMILIES, config.model_type, family)  # type: ignore[arg-type]
    return config


def test_a_layer_that_would_behave_otherwise_at_its_new_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(derived=lambda _config, _side, index: index % 2, derived_rule="keep layers in pairs")
    config = _declare(monkeypatch, family, num_hidden_layers=6)
    assert pruned_config(config, (0, 1, 4, 5)).num_hidden_layers == 4
    with pytest.raises(UnsupportedModelError, match=r"layer 3 would become layer 2 and behave differently .*in pairs"):
        pruned_config(config, (0, 1, 3, 4))


def test_stages_are_counted_each_and_places_start_anew_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted = Family(stages=r"x", derived=lambda _config, _side, index: index % 2, derived_rule="keep pairs")
    config = _declare(monkeypatch, shifted, depths=[2, 2, 6])
    changes = config_changes(config, (0, 1, 2, 3, 4, 5, 8, 9))
    assert [(change.entry, change.before, change.after) for change in changes] == [("depths", [2, 2, 6], [2, 2, 4])]
    with pytest.raises(UnsupportedModelError, match=r"layer 5 would become number 0 of its stage .*keep pairs"):
        config_changes(config, (0, 1, 2, 3, 5, 6))


# -------------------------------------------------------------------------------------------------- what is recorded


def test_changes_are_json_and_name_what_was_and_what_becomes() -> None:
    config = tiny.config("gemma3")
    changes = {change.entry: change for change in config_changes(config, (0, 2, 5, 6))}
    assert changes["num_hidden_layers"].before == 7
    assert changes["num_hidden_layers"].after == 4
    assert len(changes["layer_types"].before) == 7
    assert changes["layer_types"].rule == "one entry for each layer"
    for change in changes.values():
        value = change.to_json()
        assert json.loads(json.dumps(value)) == value
        assert set(value) == {"entry", "before", "after", "rule"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keeping_every_layer_changes_nothing(family: str) -> None:
    config = tiny.config(family)
    if family == "qwen3":
        config.max_window_layers = 6  # its default counts more leading layers than there are
    everything = tuple(range(config.num_hidden_layers))
    assert pruned_config(config, everything).to_dict() == config.to_dict()
    assert all(change.before == change.after for change in config_changes(config, everything))

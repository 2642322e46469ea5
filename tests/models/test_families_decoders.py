"""What is special about single decoder families: literal configurations, refusals with their reasons, proof.

Expected configurations are written out by hand; expected logits come from the original with the removed layers passed
over, and from plain ``from_pretrained``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

import tiny
import zoo
import zoo_decoders
from sglp_deploy.errors import ArtifactError, UnsupportedModelError
from sglp_deploy.materialize import CompressedModel, check_reload, materialize, save_checkpoint
from sglp_deploy.models import FAMILIES, layer_stack, pruned_config, source_of
from sglp_deploy.models.transformers.config import config_changes
from zoo_decoders import FULL, SLIDING, WINDOW

SPECIMENS = {
    specimen.name: specimen for specimen in (*zoo_decoders.SPECIMENS, *zoo_decoders.MODES, *zoo_decoders.UNDECLARED)
} | {specimen.name: specimen for specimen, _ in zoo_decoders.REFUSED}


def _pruned(module: nn.Module, keep: tuple[int, ...]) -> CompressedModel:
    return materialize(module, tiny.plan_for(module, keep), source_of(module, "tiny"))


def _saved(name: str, folder: Path, keep: tuple[int, ...] | None = None) -> tuple[Any, CompressedModel, Path]:
    """The original, the pruned model and its checkpoint."""
    specimen = SPECIMENS[name]
    module = specimen.build()
    pruned = _pruned(module, keep or specimen.keep["layers"])
    return module, pruned, save_checkpoint(pruned, folder / "checkpoint")


def _config_of(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def _edit(folder: Path, **entries: Any) -> None:
    config = _config_of(folder) | entries
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _logits(module: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return zoo.main_output(module(input_ids=ids, attention_mask=torch.ones_like(ids)))


def _ids(length: int) -> torch.Tensor:
    return torch.randint(0, 250, (2, length), generator=torch.Generator().manual_seed(7))


def _passed_over(module: nn.Module, keep: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
    removed = {index: layer for index, layer in enumerate(layer_stack(module).layers) if index not in keep}
    with zoo.identity(removed):
        return _logits(module, ids)


def _check_reloaded(module: nn.Module, pruned: CompressedModel, folder: Path) -> None:
    """What plain transformers reads back is the original with the other layers passed over, beyond any window."""
    ids = _ids(WINDOW + 64)
    again = AutoModelForCausalLM.from_pretrained(folder)
    wanted = _passed_over(module, pruned.plan.keep, ids)
    torch.testing.assert_close(_logits(again, ids), wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


def _changed(config: PretrainedConfig, keep: tuple[int, ...], *names: str) -> dict[str, Any]:
    after = vars(pruned_config(config, keep))
    return {name: after.get(name) for name in names}


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("specimen", "reason"), [pytest.param(*pair, id=pair[0].name) for pair in zoo_decoders.REFUSED]
)
def test_what_no_configuration_can_say_is_refused_with_the_reason(specimen: zoo.Specimen, reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        _pruned(specimen.build(), specimen.keep["layers"])
    assert reason in str(caught.value)


def test_the_refusal_of_gpt2_names_the_switch_and_what_can_be_removed() -> None:
    with pytest.raises(UnsupportedModelError, match=r"scale_attn_by_inverse_layer_idx .*only layers at the end can be"):
        config_changes(SPECIMENS["gpt2-inverse"].build().config, (0, 2))


def test_gpt2_with_inverse_scale_can_lose_layers_at_the_end(tmp_path: Path) -> None:
    _check_reloaded(*_saved("gpt2-inverse", tmp_path, (0, 1, 2, 3)))


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "jamba"])
def test_a_hybrid_keeps_at_least_one_layer_of_attention(name: str, tmp_path: Path) -> None:
    model = SPECIMENS[name].build()
    attention = [index for index, kind in enumerate(model.config.layer_types) if kind == FULL]
    others = tuple(index for index in range(len(model.config.layer_types)) if index not in attention)
    with pytest.raises(UnsupportedModelError, match=r"none of the layers with attention \(2, [56]\) is kept"):
        _pruned(model, (others[0], others[2]))
    _check_reloaded(*_saved(name, tmp_path, tuple(attention)))  # and attention alone will do


def test_the_last_layer_of_gemma4_is_pinned_and_no_other_is() -> None:
    stack = layer_stack(SPECIMENS["gemma4"].build())
    assert stack.prunable == (True, True, True, True, True, False)


# ---------------------------------------------------------------------------------------- literal configurations


@pytest.mark.parametrize(
    ("keep", "attention", "experts"),
    [
        ((1, 2, 5, 6), (2, 1), (2, 0)),  # attention second and fourth, experts first and third
        ((0, 1, 2, 3), (4, 2), (2, 1)),  # one whole period of both: as before
        ((2, 3, 6, 7), (2, 0), (2, 1)),
        ((2, 6), (1, 0), (3, 2)),  # attention everywhere, experts nowhere: an offset past the end
        ((0, 1, 3, 6), (4, 3), None),  # experts second and third of four
    ],
)
def test_jamba_gets_the_period_and_offset_of_what_is_kept(
    keep: tuple[int, ...], attention: tuple[int, int], experts: tuple[int, int] | None, tmp_path: Path
) -> None:
    if experts is None:
        with pytest.raises(UnsupportedModelError, match=r"expert_layer_period=2 .* layers \[1, 2\] of 4 would be"):
            _pruned(SPECIMENS["jamba"].build(), keep)
        return
    module, pruned, folder = _saved("jamba", tmp_path, keep)
    config = _config_of(folder)
    assert (config["attn_layer_period"], config["attn_layer_offset"]) == attention
    assert (config["expert_layer_period"], config["expert_layer_offset"]) == experts
    _check_reloaded(module, pruned, folder)


@pytest.mark.parametrize(
    ("step", "listed", "keep", "dense"),
    [
        (1, [1, 4], (0, 1, 3, 4, 5), [1, 3]),
        (2, [], (0, 1, 3, 4), [0, 3]),
        (2, [3], (1, 2, 3, 5), [1, 2]),  # 2 by the step, 3 by the list
        (3, [], (2, 5), []),
        (1, [], (0, 4), []),
    ],
)
@pytest.mark.parametrize("family", [Qwen3MoeConfig, Qwen3NextConfig])
def test_layers_without_experts_are_named_by_their_new_numbers(
    family: type[PretrainedConfig], step: int, listed: list[int], keep: tuple[int, ...], dense: list[int]
) -> None:
    types = {"layer_types": [FULL] * 6} if family is Qwen3NextConfig else {}
    config = family(num_hidden_layers=6, decoder_sparse_step=step, mlp_only_layers=listed, **types)
    assert _changed(config, keep, "decoder_sparse_step", "mlp_only_layers") == {
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


@pytest.mark.parametrize(("keep", "dense"), [((0, 1, 5), 2), ((1, 2, 4, 5), 1), ((2, 3), 0), ((1,), 1)])
def test_deepseek_counts_the_leading_dense_layers_that_are_kept_and_no_prediction_heads(
    keep: tuple[int, ...], dense: int
) -> None:
    config = DeepseekV3Config(num_hidden_layers=6, first_k_dense_replace=2, num_mtp_layers=1)
    assert _changed(config, keep, "first_k_dense_replace", "num_nextn_predict_layers") == {
        "first_k_dense_replace": dense,
        "num_nextn_predict_layers": 0,
    }


def test_prediction_heads_stay_counted_while_no_layer_goes() -> None:
    config = DeepseekV3Config(num_hidden_layers=3, num_mtp_layers=1)
    assert pruned_config(config, (0, 1, 2)).num_mtp_layers == 1


def test_llama4_keeps_its_three_lists_in_step() -> None:
    config = Llama4TextConfig(num_hidden_layers=6, no_rope_layer_interval=3, interleave_moe_layer_step=2)
    names = ("layer_types", "no_rope_layers", "no_rope_layer_interval", "moe_layers", "interleave_moe_layer_step")
    chunked = "chunked_attention"
    # Before: every third layer full and without rotary position, experts in layers 1, 3 and 5.
    assert _changed(config, (0, 2, 3, 5), *names) == {
        "layer_types": [chunked, FULL, chunked, FULL],
        "no_rope_layers": [1, 0, 1, 0],
        "no_rope_layer_interval": 2,
        "moe_layers": [2, 3],
        "interleave_moe_layer_step": None,  # experts in the third and the fourth of four: no step says so
    }
    assert _changed(config, (1, 3, 5), *names) == {
        "layer_types": [chunked, chunked, FULL],
        "no_rope_layers": [1, 1, 0],
        "no_rope_layer_interval": 3,
        "moe_layers": [0, 1, 2],
        "interleave_moe_layer_step": 1,
    }


@pytest.mark.parametrize("listed", [[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0, 1, 0, 0]])
def test_smollm3_says_layer_by_layer_which_of_them_rotate(listed: list[int]) -> None:
    # transformers takes a list that is longer than the model is deep.
    config = SmolLM3Config(
        num_hidden_layers=6, no_rope_layers=listed, use_sliding_window=True, sliding_window=8, no_rope_layer_interval=3
    )
    assert _changed(config, (0, 1, 2, 5), "no_rope_layers", "layer_types", "no_rope_layer_interval") == {
        "no_rope_layers": [1, 1, 0, 0],
        "layer_types": [FULL, FULL, SLIDING, SLIDING],  # those that do not rotate slide
        "no_rope_layer_interval": None,
    }


def test_the_layers_of_smollm3_rotate_after_a_reload_as_they_did_before(tmp_path: Path) -> None:
    module, _, folder = _saved("smollm3", tmp_path)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert [layer.self_attn.use_rope for layer in module.model.layers] == [1, 1, 0, 1, 1, 0]
    assert [layer.self_attn.use_rope for layer in again.model.layers] == [1, 0, 1, 0]


@pytest.mark.parametrize(("keep", "full"), [((0, 2, 3, 5), 2), ((0, 1, 2), 3), ((3, 4, 5), 0)])
def test_qwen2_counts_the_leading_full_layers_that_are_kept(keep: tuple[int, ...], full: int) -> None:
    config = Qwen2Config(num_hidden_layers=6, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert _changed(config, keep, "max_window_layers", "layer_types") == {
        "max_window_layers": full,
        "layer_types": [FULL] * full + [SLIDING] * (len(keep) - full),
    }


def test_gpt_neo_says_its_layer_types_in_both_of_its_entries() -> None:
    config = GPTNeoConfig(num_layers=6, attention_types=[[["global", "local"], 3]])
    pruned = pruned_config(config, (1, 2, 4, 5))
    assert pruned.attention_layers == ["local", "global", "global", "local"]
    assert pruned.attention_types == [[["local"], 1], [["global"], 1], [["global"], 1], [["local"], 1]]
    # A reader of the patterns alone arrives at the same list.
    assert GPTNeoConfig.expand_attention_types_params(pruned.attention_types) == pruned.attention_layers


def test_settings_filed_by_number_in_a_part_of_the_configuration_are_renumbered() -> None:
    types = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
    text = Gemma4TextConfig(num_hidden_layers=6, layer_types=types, head_dim=16, global_head_dim=32)
    pruned = pruned_config(Gemma4Config(text_config=text), (0, 2, 4, 5))
    assert [layer.head_dim for layer in pruned.text_config.per_layer_config] == [16, 32, 16, 32]


def test_lfm2_renumbers_its_layers_of_attention_beside_their_types(tmp_path: Path) -> None:
    _, _, folder = _saved("lfm2", tmp_path)  # keeps 1, 2, 5 and 6 of which 2 and 5 attend
    config = _config_of(folder)
    assert config["layer_types"] == ["conv", FULL, FULL, "conv"]
    assert config["full_attn_idxs"] == [1, 2]


# ------------------------------------------------------------------------------------- a scalar beside an explicit list


@pytest.mark.parametrize(
    ("keep", "types", "pattern"),
    [
        ((0, 2, 3, 5), [SLIDING, FULL, SLIDING, FULL], 2),
        ((0, 1, 2), [SLIDING, SLIDING, FULL], 3),
        ((0, 2, 5), [SLIDING, FULL, FULL], None),
    ],
)
def test_the_saved_pattern_of_gemma3_is_true_of_the_kept_layers_or_not_there(
    keep: tuple[int, ...], types: list[str], pattern: int | None, tmp_path: Path
) -> None:
    # Programs that read sliding_window_pattern and no layer_types exist.
    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window_pattern=3, sliding_window=8)
    pruned_config(config, keep).save_pretrained(tmp_path)
    saved = _config_of(tmp_path)
    assert saved["layer_types"] == types
    assert saved.get("sliding_window_pattern") == saved.get("_sliding_window_pattern") == pattern
    assert Gemma3TextConfig.from_pretrained(tmp_path).layer_types == types


# -------------------------------------------------------------------------------------------- beyond the window


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_oss", "olmo3"])
def test_one_wrong_layer_type_shows_beyond_the_window_and_only_there(name: str, tmp_path: Path) -> None:
    """So a comparison on a short prompt proves nothing; the check of the checkpoint finds it anyway."""
    _, pruned, folder = _saved(name, tmp_path)
    types = _config_of(folder)["layer_types"]
    for index, kind in enumerate(types):
        flipped = [*types[:index], FULL if kind == SLIDING else SLIDING, *types[index + 1 :]]
        _edit(folder, layer_types=flipped)
        wrong = AutoModelForCausalLM.from_pretrained(folder)
        near, far = _ids(WINDOW), _ids(WINDOW + 64)
        assert torch.allclose(_logits(wrong, near), _logits(pruned.module, near), rtol=1e-4, atol=1e-5)
        assert (_logits(wrong, far) - _logits(pruned.module, far)).abs().max() > 0.1
        with pytest.raises(ArtifactError, match=r"layer_types of the configuration changed on the way to disk"):
            check_reload(pruned, folder)


# --------------------------------------------------------------------- shared keys and values, packed embeddings


@pytest.mark.parametrize("name", ["gemma4-shared", "gemma3n"])
def test_a_source_of_keys_and_values_may_go_when_nobody_reads_it(name: str, tmp_path: Path) -> None:
    # 3 is the source of the sliding layers 5 and 6 only; 7 reads 4.
    module, pruned, folder = _saved(name, tmp_path, (1, 2, 4, 7))
    config = _config_of(folder)
    assert config["num_kv_shared_layers"] == 1
    assert config["layer_types"] == [FULL, SLIDING, FULL, FULL]
    _check_reloaded(module, pruned, folder)


@pytest.mark.parametrize(
    ("keep", "source", "reader"), [((1, 2, 4, 6, 7), 3, 6), ((1, 3, 5, 7), 4, 7), ((0, 1, 2, 5, 7), 3, 5)]
)
@pytest.mark.parametrize("name", ["gemma4-shared", "gemma3n"])
def test_a_source_of_keys_and_values_stays_while_a_kept_layer_reads_it(
    name: str, keep: tuple[int, ...], source: int, reader: int
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"layer {source} cannot be removed while layer {reader} is kept"):
        _pruned(SPECIMENS[name].build(), keep)


def test_a_stale_count_of_shared_layers_loads_without_a_word_and_is_found(tmp_path: Path) -> None:
    """Gemma-3n tells transformers to ignore the keys and values of layers that share, so its report stays empty."""
    _, pruned, folder = _saved("gemma3n", tmp_path)
    _edit(folder, num_kv_shared_layers=3)
    wrong, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    ids = _ids(24)
    assert (_logits(wrong, ids) - _logits(pruned.module, ids)).abs().max() > 0.1
    with pytest.raises(ArtifactError):
        check_reload(pruned, folder)


@pytest.mark.parametrize("name", ["gemma4-embeddings", "gemma4-shared", "gemma3n"])
def test_packed_embeddings_are_cut_to_those_of_the_kept_layers(name: str) -> None:
    specimen = SPECIMENS[name]
    module: Any = specimen.build()
    keep, depth, width = specimen.keep["layers"], module.config.num_hidden_layers, 16
    pruned: Any = _pruned(module, keep).module
    table, projection = pruned.model.embed_tokens_per_layer, pruned.model.per_layer_model_projection
    assert (table.embedding_dim, projection.out_features) == (len(keep) * width, len(keep) * width)
    before = module.model.embed_tokens_per_layer.weight.view(-1, depth, width)
    assert torch.equal(table.weight.view(-1, len(keep), width), before[:, list(keep)])
    before = module.model.per_layer_model_projection.weight.view(depth, width, -1)
    assert torch.equal(projection.weight.view(len(keep), width, -1), before[list(keep)])
    # The original is what it was.
    assert module.model.embed_tokens_per_layer.weight.shape[1] == depth * width
    assert module.model.per_layer_model_projection.out_features == depth * width


def test_every_other_tensor_of_a_pruned_model_is_shared_with_the_original() -> None:
    module = SPECIMENS["gemma3n"].build()
    pruned = _pruned(module, (1, 3, 4, 6, 7)).module
    original = {parameter.data_ptr() for parameter in module.parameters()}
    own = [name for name, parameter in pruned.named_parameters() if parameter.data_ptr() not in original]
    assert own == ["model.embed_tokens_per_layer.weight", "model.per_layer_model_projection.weight"]


# --------------------------------------------------------------------------------------------- declared and not


@pytest.mark.parametrize("specimen", [pytest.param(item, id=item.name) for item in zoo_decoders.MODES])
def test_switches_of_a_family_do_not_matter(specimen: zoo.Specimen, tmp_path: Path) -> None:
    _check_reloaded(*_saved(specimen.name, tmp_path))


@pytest.mark.parametrize("specimen", [pytest.param(item, id=item.name) for item in zoo_decoders.SPECIMENS])
def test_nothing_in_the_configuration_of_a_declared_family_is_unknown(specimen: zoo.Specimen) -> None:
    config: Any = specimen.build().config
    assert config.model_type in FAMILIES
    for every in (config, type(config)()):  # the specimen's, and what the library fills in by itself
        changes = config_changes(every, tuple(range(every.num_hidden_layers)))
        assert not [change.entry for change in changes if change.rule.startswith("not known here")]


@pytest.mark.parametrize("specimen", [pytest.param(item, id=item.name) for item in zoo_decoders.UNDECLARED])
def test_a_family_nobody_declared_is_let_through_by_proof(specimen: zoo.Specimen, tmp_path: Path) -> None:
    module, pruned, folder = _saved(specimen.name, tmp_path)
    assert module.config.model_type not in FAMILIES
    _check_reloaded(module, pruned, folder)


def test_a_family_that_derives_from_a_layers_number_is_refused_by_proof_when_nobody_declared_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(FAMILIES, "gpt2")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError) as caught:
        _pruned(SPECIMENS["gpt2-inverse"].build(), (0, 2, 3, 5))
    assert "model type 'gpt2' is not declared" in str(caught.value)
    assert "computes something else than the original with the removed layers passed over" in str(caught.value)
    # The same family without the switch passes, and so does the switch where no layer changes its number.
    _pruned(SPECIMENS["gpt2"].build(), (0, 2, 3, 5))
    _pruned(SPECIMENS["gpt2-inverse"].build(), (0, 1, 2))


def test_packed_embeddings_nobody_declared_are_refused_by_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "gemma3n_text")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="is not declared, and proving it on a rebuilt model failed"):
        _pruned(SPECIMENS["gemma3n"].build(), (1, 3, 4, 6, 7))

"""What is special about encoders, encoder-decoders and speech models; the checks they share are in test_families.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    HubertConfig,
    HubertForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForSequenceClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForXVector,
    WhisperConfig,
    WhisperForAudioClassification,
)

import tiny
import zoo
import zoo_encoders
from sglp_deploy.errors import UnsupportedModelError
from sglp_deploy.materialize import CompressedModel, materialize, save_checkpoint
from sglp_deploy.models import ConfigChange, adapter_for, layer_stack, layer_stacks, source_of

SPECIMENS = {specimen.name: specimen for specimen in zoo_encoders.SPECIMENS}
FULL, LOCAL = "full_attention", "sliding_attention"

# Entries of the configuration that differ after pruning, with the value they must have; every other one is as before.
WRITTEN: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("bert", "layers"): {"num_hidden_layers": 3},
    ("roberta", "layers"): {"num_hidden_layers": 4},
    ("distilbert", "layers"): {"n_layers": 3},
    ("modernbert", "layers"): {"num_hidden_layers": 4, "layer_types": [FULL, LOCAL, FULL, FULL]},
    ("deberta-v2", "layers"): {"num_hidden_layers": 3},
    ("deberta-v2-convolution", "layers"): {"num_hidden_layers": 4},
    ("albert", "layers"): {"num_hidden_layers": 4},
    # The decoder of five is now the deeper side, and generate() must hear of it.
    ("t5", "encoder"): {"num_layers": 4, "decoder_layers": 5},
    ("t5", "decoder"): {"num_decoder_layers": 3},
    ("t5-gated", "encoder"): {"num_layers": 4, "decoder_layers": 5},
    ("t5-gated", "decoder"): {"num_decoder_layers": 3},
    ("mt5", "encoder"): {"num_layers": 3, "decoder_layers": 5},
    ("mt5", "decoder"): {"num_decoder_layers": 2},
    ("bart", "encoder"): {"encoder_layers": 3},
    ("bart", "decoder"): {"decoder_layers": 4},
    ("whisper", "encoder"): {"encoder_layers": 4},
    ("whisper", "decoder"): {"decoder_layers": 3},
    ("wav2vec2", "layers"): {"num_hidden_layers": 3},
    ("wav2vec2-stable-layer-norm", "layers"): {"num_hidden_layers": 4},
    ("wav2vec2-convolutions-as-deep", "layers"): {"num_hidden_layers": 3},
    ("hubert", "layers"): {"num_hidden_layers": 4},
    ("wav2vec2-conformer", "layers"): {"num_hidden_layers": 3},
}
MASKED = [name for name, specimen in SPECIMENS.items() if "attention_mask" in specimen.inputs(specimen.build(), 0)]
HEAD_OVER_ALL_LAYERS = {
    "hubert": (HubertForSequenceClassification, HubertConfig),
    "wav2vec2": (Wav2Vec2ForSequenceClassification, Wav2Vec2Config),
    "wav2vec2-conformer": (Wav2Vec2ConformerForSequenceClassification, Wav2Vec2ConformerConfig),
}


def _pruned(module: nn.Module, keep: tuple[int, ...], side: str | None = None) -> CompressedModel:
    plan = tiny.plan_for(module, keep, stack=None if side is None else layer_stack(module, side).path)
    return materialize(module, plan, source_of(module, "tiny"))


def _saved(pruned: CompressedModel, folder: Path) -> Any:
    save_checkpoint(pruned, folder)
    return adapter_for(pruned.module).load(folder)


def _run(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return zoo.main_output(module(**inputs))


def _close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


@contextmanager
def _passed_over(module: nn.Module, keep: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    with ExitStack() as hooks:
        for side, kept in keep.items():
            layers = layer_stack(module, side if len(keep) > 1 else None).layers
            hooks.enter_context(zoo.identity({i: layer for i, layer in enumerate(layers) if i not in kept}))
        yield


def _changes(module: nn.Module, keep: tuple[int, ...], side: str) -> dict[str, ConfigChange]:
    changes = adapter_for(module).changes(module, layer_stack(module, side), keep)
    return {change.entry: change for change in changes}


def _facts(module: Any) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(module.config.to_json_string(use_diff=False))
    return facts


# --- configuration ---------------------------------------------------------------------------------------------------


def test_every_specimen_says_what_it_writes() -> None:
    assert set(WRITTEN) == {(name, side) for name, specimen in SPECIMENS.items() for side in specimen.keep}


@pytest.mark.parametrize(("name", "side"), WRITTEN)
def test_only_the_entries_about_layers_change(name: str, side: str) -> None:
    """Among those that must not: five convolutions and five TDNN widths beside five layers."""
    module = SPECIMENS[name].build()
    before = _facts(module)
    after = _facts(_pruned(module, SPECIMENS[name].keep[side], side if len(SPECIMENS[name].keep) > 1 else None).module)
    assert {entry: after[entry] for entry in after if after[entry] != before.get(entry)} == WRITTEN[name, side]
    assert before.keys() <= after.keys()
    assert _facts(module) == before


@pytest.mark.parametrize(("name", "side"), WRITTEN)
def test_no_entry_of_a_declared_family_is_left_for_a_person_to_look_at(name: str, side: str) -> None:
    module, keep = SPECIMENS[name].build(), SPECIMENS[name].keep[side]
    unknown = [change.entry for change in _changes(module, keep, side).values() if "not known" in change.rule]
    assert unknown == []


@pytest.mark.parametrize(
    ("keep", "types", "every"),
    [
        ((0, 2, 3, 6), [FULL, LOCAL, FULL, FULL], None),  # no period says this, and 3 would be a lie
        ((0, 1, 3, 4, 6), [FULL, LOCAL, FULL, LOCAL, FULL], 2),
        ((0, 1, 2, 3), [FULL, LOCAL, LOCAL, FULL], 3),
        ((0, 3, 6), [FULL, FULL, FULL], 1),
    ],
)
def test_modernbert_says_the_kind_of_each_layer_and_nothing_else_beside_it(
    keep: tuple[int, ...], types: list[str], every: int | None, tmp_path: Path
) -> None:
    """Published checkpoints carry ``global_attn_every_n_layers``, and older readers know nothing but that."""
    torch.manual_seed(0)
    facts = {"num_hidden_layers": 7, "local_attention": 128, "global_attn_every_n_layers": 3}
    config = ModernBertConfig(**zoo_encoders.ENCODER | facts)
    again = _saved(_pruned(ModernBertForMaskedLM(config).eval(), keep), tmp_path / "out")
    assert again.config.layer_types == types
    reach = {FULL: None, LOCAL: 65}  # tokens to each side, the own one counted
    assert [layer.attn.sliding_window for layer in again.model.layers] == [reach[kind] for kind in types]
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written.get("global_attn_every_n_layers") == every


# --- layers that must stay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "keep", "why"),
    [
        ("modernbert", None, (1, 2, 3, 6), "it has no norm before its attention"),
        ("deberta-v2-convolution", None, (1, 2, 5), "the encoder's convolution follows whichever layer comes first"),
        ("t5", "encoder", (1, 2, 5), "holds the table of relative positions that all layers of its side share"),
        ("t5", "decoder", (1, 4), "holds the table of relative positions that all layers of its side share"),
        ("mt5", "decoder", (2, 3), "holds the table of relative positions that all layers of its side share"),
    ],
)
def test_the_first_layer_is_refused_with_the_reason(
    name: str, side: str | None, keep: tuple[int, ...], why: str
) -> None:
    module = SPECIMENS[name].build()
    with pytest.raises(UnsupportedModelError, match=rf"layer 0 \(.*\.0\) cannot be removed; .*{why}.*; keep it"):
        _pruned(module, keep, side)
    assert layer_stack(module, side).prunable == (False,) + (True,) * (layer_stack(module, side).n_layers - 1)


@pytest.mark.parametrize("name", ["bert", "bart", "deberta-v2", "wav2vec2"])
def test_the_first_layer_of_others_may_go(name: str) -> None:
    assert all(all(stack.prunable) for stack in layer_stacks(SPECIMENS[name].build()))


@pytest.mark.parametrize("family", HEAD_OVER_ALL_LAYERS)
def test_a_head_that_weighs_all_layers_is_refused(family: str) -> None:
    model_class, config_class = HEAD_OVER_ALL_LAYERS[family]
    module = model_class(config_class(**zoo_encoders.SPEECH, use_weighted_layer_sum=True))
    with pytest.raises(UnsupportedModelError, match="use_weighted_layer_sum makes its head weigh the outputs of all"):
        layer_stack(module)


# --- ALBERT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [1, 2])
def test_albert_runs_fewer_passes_of_the_same_weights(inner: int, tmp_path: Path) -> None:
    specimen = SPECIMENS["albert"]
    module = zoo_encoders.seeded(
        lambda: AlbertForMaskedLM(AlbertConfig(**zoo_encoders.ENCODER, embedding_size=32, inner_group_num=inner))
    )
    stack, inputs = layer_stack(module), specimen.inputs(module, 1)
    assert stack.shares_one_module
    assert stack.n_layers == 6
    with zoo_encoders.identity_passes(module, {1, 4}):
        wanted = _run(module, inputs)
    pruned = _pruned(module, (0, 2, 3, 5))
    again = _saved(pruned, tmp_path / "out")
    _close(_run(pruned.module, inputs), wanted)
    assert torch.equal(_run(again, inputs), _run(pruned.module, inputs))
    assert (wanted - _run(module, inputs)).abs().max() > 0.1 * wanted.abs().max()  # a pass matters
    assert {p.data_ptr() for p in pruned.module.parameters()} == {p.data_ptr() for p in module.parameters()}
    assert len(again.albert.encoder.albert_layer_groups) == 1


def test_albert_of_several_groups_is_refused() -> None:
    """With four passes for six, the second group would start at pass 2, also when passes 0 to 3 are the kept ones."""
    module = AlbertForMaskedLM(AlbertConfig(**zoo_encoders.ENCODER, embedding_size=32, num_hidden_groups=2))
    with pytest.raises(UnsupportedModelError, match="num_hidden_groups=2 makes its code choose each pass's weights by"):
        layer_stack(module)


# --- encoder-decoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5", "bart", "whisper"])
def test_both_sides_can_be_pruned_one_after_the_other(name: str, tmp_path: Path) -> None:
    """The reference is the model nobody pruned, passed over in both its sides; it also writes the tokens to expect."""
    specimen = SPECIMENS[name]
    module: Any = specimen.build()
    inputs = specimen.inputs(module, 5)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    with _passed_over(module, specimen.keep), torch.no_grad():
        wanted = _run(module, inputs)
        tokens = module.generate(**prompt, **options)

    half = _saved(_pruned(module, specimen.keep["decoder"], "decoder"), tmp_path / "half")
    whole = _saved(_pruned(half, specimen.keep["encoder"], "encoder"), tmp_path / "whole")
    assert [stack.n_layers for stack in layer_stacks(whole)] == [len(specimen.keep[s]) for s in ("decoder", "encoder")]
    _close(_run(whole, inputs), wanted)
    with torch.no_grad():
        assert torch.equal(whole.generate(**prompt, **options), tokens)


def test_t5_generates_with_a_decoder_deeper_than_its_encoder(tmp_path: Path) -> None:
    """Otherwise transformers sizes the cache by the encoder, and fails with an IndexError."""
    module: Any = SPECIMENS["t5"].build()
    prompt = {key: value for key, value in SPECIMENS["t5"].inputs(module, 6).items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    keep = {"encoder": (0, 4), "decoder": (0, 1, 3)}
    with _passed_over(module, keep), torch.no_grad():
        tokens = module.generate(**prompt, **options)

    pruned = _pruned(module, keep["encoder"], "encoder")
    in_memory: Any = pruned.module
    assert (in_memory.encoder.config.num_layers, in_memory.decoder.config.num_layers) == (2, 5)
    half = _saved(pruned, tmp_path / "half")
    assert (half.config.num_layers, half.config.num_decoder_layers, half.config.decoder_layers) == (2, 5, 5)
    whole = _saved(_pruned(half, keep["decoder"], "decoder"), tmp_path / "whole")
    assert (whole.config.num_layers, whole.config.num_decoder_layers, whole.config.decoder_layers) == (2, 3, 3)
    with torch.no_grad():
        assert torch.equal(whole.generate(**prompt, **options), tokens)
        in_memory.generate(**prompt, **options)


def test_a_t5_whose_encoder_stays_deeper_needs_no_further_entry() -> None:
    module = SPECIMENS["t5"].build()
    assert "decoder_layers" not in _changes(module, (0, 1, 2, 3, 5), "encoder")
    assert "decoder_layers" not in _changes(module, (0, 4), "decoder")


@pytest.mark.parametrize("half", ["bart-decoder", "whisper-encoder", "t5-encoder"])
def test_one_half_of_an_encoder_decoder_is_pruned_as_that_half(half: str, tmp_path: Path) -> None:
    """Both depths are 5: the configuration's ``num_hidden_layers`` is the depth of the side that may not be there."""
    text = zoo_encoders.TEXT
    sizes = {
        "d_model": 64, "encoder_layers": 5, "decoder_layers": 5, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "init_std": 0.1,
    }  # fmt: skip
    inputs = zoo_encoders.tokens(0)
    module: Any
    torch.manual_seed(0)
    if half == "bart-decoder":
        module = BartForCausalLM(BartConfig(**text, **sizes, decoder_start_token_id=258))
    elif half == "whisper-encoder":
        config = WhisperConfig(**text, **sizes, num_mel_bins=16, max_source_positions=30, decoder_start_token_id=257)
        module = WhisperForAudioClassification(config)
        inputs = {"input_features": torch.randn(2, 16, 60)}
    else:
        module = T5EncoderModel(T5Config(**zoo_encoders.T5 | {"num_layers": 5}))
    module = module.eval()
    (stack,) = layer_stacks(module)
    assert stack.n_layers == 5
    with zoo.identity({1: stack.layers[1], 2: stack.layers[2]}):
        wanted = _run(module, inputs)
    again = _saved(_pruned(module, (0, 3, 4)), tmp_path / "out")
    _close(_run(again, inputs), wanted)


# --- Whisper's word timestamps ---------------------------------------------------------------------------------------


def _timestamps(model: Any) -> torch.Tensor:
    settings = {"no_timestamps_token_id": 255, "is_multilingual": False, "return_timestamps": False, "max_length": 64}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    features = SPECIMENS["whisper"].inputs(model, 7)["input_features"]
    with torch.no_grad():
        output = model.generate(
            features, max_new_tokens=8, return_token_timestamps=True, return_dict_in_generate=True, do_sample=False
        )
    times: torch.Tensor = output["token_timestamps"]
    return times


def test_whisper_times_words_by_the_same_heads_as_before(tmp_path: Path) -> None:
    module: Any = SPECIMENS["whisper"].build()
    pruned = _pruned(module, (0, 2, 4), "decoder")
    again = _saved(pruned, tmp_path / "out")
    assert again.generation_config.alignment_heads == [[1, 1], [2, 0], [2, 1]]
    assert module.generation_config.alignment_heads == [[1, 0], [2, 1], [4, 0], [4, 1]]
    module.generation_config.alignment_heads = [[2, 1], [4, 0], [4, 1]]
    with _passed_over(module, {"encoder": tuple(range(6)), "decoder": (0, 2, 4)}):
        wanted = _timestamps(module)
    torch.testing.assert_close(_timestamps(again), wanted)
    again.generation_config.alignment_heads = [[0, 1], [1, 0], [1, 1]]
    assert not torch.equal(_timestamps(again), wanted)  # other heads would show


def test_whisper_without_any_timing_layer_loses_the_entry_and_says_so(tmp_path: Path) -> None:
    module: Any = SPECIMENS["whisper"].build()
    change = _changes(module, (0, 3), "decoder")["generation_config.alignment_heads"]
    assert change.before == [[1, 0], [2, 1], [4, 0], [4, 1]]
    assert change.after is None
    assert change.rule == "every decoder layer that times words is removed; the entry goes, and word timestamps with it"
    again = _saved(_pruned(module, (0, 3), "decoder"), tmp_path / "out")
    assert not hasattr(again.generation_config, "alignment_heads")
    with pytest.raises(ValueError, match="has no `alignment_heads`"):
        _timestamps(again)


def test_whisper_keeps_its_alignment_heads_when_the_encoder_is_pruned() -> None:
    module: Any = SPECIMENS["whisper"].build()
    pruned: Any = _pruned(module, (0, 2, 3, 5), "encoder").module
    assert pruned.generation_config.alignment_heads == [[1, 0], [2, 1], [4, 0], [4, 1]]
    assert "generation_config.alignment_heads" not in _changes(module, (0, 2, 3, 5), "encoder")


# --- other lists as long as the stack --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "changes", "keep"),
    [
        (Wav2Vec2ForCTC, {}, (4,)),  # one layer, and one parametrization of the positional convolution
        (Wav2Vec2ForCTC, {"add_adapter": True, "conv_dim": [32] * 3}, (0, 2, 5)),  # three of each
        (Wav2Vec2ForXVector, {"num_hidden_layers": 5, "tdnn_dim": [16] * 5, "xvector_output_dim": 8}, (1, 2, 4)),
    ],
)
def test_speech_layers_are_told_from_lists_of_the_same_length(
    model_class: Any, changes: dict[str, Any], keep: tuple[int, ...], tmp_path: Path
) -> None:
    module: Any = model_class(Wav2Vec2Config(**zoo_encoders.SPEECH | changes)).eval()
    inputs = {"input_values": torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))}
    layers = module.wav2vec2.encoder.layers
    with zoo.identity({index: layer for index, layer in enumerate(layers) if index not in keep}):
        wanted = _run(module, inputs)
    again = _saved(_pruned(module, keep), tmp_path / "out")
    assert layer_stack(again).path == "wav2vec2.encoder.layers"
    _close(_run(again, inputs), wanted)


# --- caches and masks ------------------------------------------------------------------------------------------------


def test_bert_as_a_decoder_keeps_its_cache_in_order() -> None:
    torch.manual_seed(0)
    module = BertLMHeadModel(BertConfig(**zoo_encoders.ENCODER, is_decoder=True)).eval()
    pruned: Any = _pruned(module, (0, 3, 5)).module
    ids = zoo_encoders.decoder_tokens(0)
    with torch.no_grad():
        whole = pruned(input_ids=ids).logits
        start = pruned(input_ids=ids[:, :-1], use_cache=True)
        step = pruned(input_ids=ids[:, -1:], past_key_values=start.past_key_values, use_cache=True).logits
    assert len(start.past_key_values.layers) == 3
    _close(step, whole[:, -1:])


@pytest.mark.parametrize("name", MASKED)
def test_what_stands_in_the_padding_changes_nothing(name: str) -> None:
    specimen = SPECIMENS[name]
    side, keep = next(iter(specimen.keep.items()))
    module: Any = _pruned(specimen.build(), keep, None if side == "layers" else side).module
    inputs = specimen.inputs(module, 8)
    mask = inputs["attention_mask"].bool()
    main = "input_ids" if "input_ids" in inputs else "input_values"
    other = inputs[main].clone()
    other[~mask] = 7 if main == "input_ids" else 3.0
    assert not torch.equal(other, inputs[main])
    before, after = _run(module, inputs), _run(module, inputs | {main: other})
    if main == "input_values":
        frames = int(module._get_feat_extract_output_lengths(mask.sum(-1))[1])
    else:
        frames = int(mask[1].sum())
    if specimen.group == "encoder-decoder" or before.ndim == 2:  # the decoder was not padded; a class has no position
        frames = before.shape[1]
    _close(after[0], before[0])
    _close(after[1, :frames], before[1, :frames])

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4TextConfig,
    MistralConfig,
    ModernBertConfig,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import tiny
from sglp_deploy.errors import ConfigError, UnsupportedModelError
from sglp_deploy.models import (
    LayerStack,
    ModelSource,
    adapter_for,
    fingerprint,
    layer_stack,
    layer_stacks,
    precision,
    pruned_config,
)
from sglp_deploy.models.loading import facts_digest
from sglp_deploy.models.samples import attention_window


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_stack_holds_the_models_own_layers_in_order(family: str) -> None:
    model = tiny.model(family)
    stack = layer_stack(model)
    assert stack.n_layers == model.config.num_hidden_layers
    assert stack.names[0] == "model.layers.0"
    assert all(model.get_submodule(name) is layer for name, layer in zip(stack.names, stack.layers, strict=True))
    assert stack.prunable == (True,) * stack.n_layers


def test_a_family_nobody_declared_still_has_its_stack_found() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=32))
    assert layer_stack(model).names == ("transformer.h.0", "transformer.h.1")


def test_a_model_without_a_head_has_a_stack_of_its_own() -> None:
    model = tiny.model("llama").model
    stack = layer_stack(model)
    assert stack.path == "layers"
    assert stack.names == tuple(f"layers.{index}" for index in range(6))
    assert all(model.layers[index] is layer for index, layer in enumerate(stack.layers))


def test_a_module_of_no_known_library_is_refused_and_those_that_were_asked_are_named() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        adapter_for(nn.Linear(2, 2))
    said = str(caught.value)
    assert said.startswith("torch.nn.modules.linear.Linear is a model of none of the known libraries; asked: ")
    assert "transformers" in said.split(";")[1]
    assert said.endswith("an adapter for another one is added under the entry-point group 'sglp_deploy.adapters'")
    with pytest.raises(UnsupportedModelError, match=r"Sequential is a model of none of the known libraries"):
        layer_stack(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_a_stack_that_disagrees_with_its_configuration_is_refused() -> None:
    model = tiny.model("llama")
    del model.model.layers[2]
    with pytest.raises(
        UnsupportedModelError,
        match=r"no module list of 6 layers, as num_hidden_layers=6 says; .*: model\.layers \(5\); .*config\.json",
    ):
        layer_stack(model)


def test_a_second_list_as_long_as_the_depth_is_refused_and_not_guessed() -> None:
    model = tiny.model("llama")
    model.model.gates = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    with pytest.raises(
        UnsupportedModelError, match=r"2 module lists of 6 entries \(model\.layers, model\.gates\); .*not decl"
    ):
        layer_stack(model)


def test_a_list_without_weights_does_not_count() -> None:
    model = tiny.model("llama")
    model.model.gates = nn.ModuleList(nn.Identity() for _ in range(6))
    assert layer_stack(model).path == "model.layers"


def _encoder_decoder() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=3, num_decoder_layers=4)
    )


def test_an_encoder_decoder_has_two_stacks_and_generation_spends_its_time_in_the_first() -> None:
    model = _encoder_decoder()
    assert [(stack.side, stack.path, stack.n_layers) for stack in layer_stacks(model)] == [
        ("decoder", "decoder.block", 4),
        ("encoder", "encoder.block", 3),
    ]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (None, "decoder.block"),
        ("decoder", "decoder.block"),
        ("encoder", "encoder.block"),
        ("encoder.block", "encoder.block"),
    ],
)
def test_a_stack_is_asked_for_by_its_side_or_its_path(name: str | None, path: str) -> None:
    assert layer_stack(_encoder_decoder(), name).path == path


def test_a_stack_that_is_not_there_is_named_beside_those_that_are() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown layer stack 'encodr'; .*did you mean 'encoder'\? .*decoder, encoder$"
    ):
        layer_stack(_encoder_decoder(), "encodr")
    with pytest.raises(ConfigError, match=r"unknown layer stack 'encoder'; .*model\.layers$"):
        layer_stack(tiny.model("llama"), "encoder")


def test_a_stack_needs_one_entry_per_layer_and_refuses_when_nothing_can_be_removed() -> None:
    layers = (torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(ValueError, match=r"one entry per layer"):
        LayerStack("m", ("m.0",), layers, (True, True))
    with pytest.raises(UnsupportedModelError, match=r"none of the 2 layers under m can be removed"):
        LayerStack("m", ("m.0", "m.1"), layers, (False, False)).check_removable([0])
    with pytest.raises(UnsupportedModelError, match=r"none of the 2 layers under m can be removed; it must not$"):
        LayerStack("m", ("m.0", "m.1"), layers, (False, False), {0: "it must not", 1: "nor may it"}).check_removable(
            [0]
        )
    LayerStack("m", ("m.0", "m.1"), layers, (False, False)).check_removable([])


def test_a_pinned_layer_is_refused_with_its_reason() -> None:
    layers = (nn.Identity(), nn.Identity(), nn.Identity())
    stack = LayerStack("m", ("m.0", "m.1", "m.2"), layers, (False, True, False), {0: "it holds the position bias"})
    stack.check_removable((1,))
    with pytest.raises(
        UnsupportedModelError,
        match=r"layer 0 \(m\.0\) cannot be removed; it holds the position bias; keep it and remove",
    ):
        stack.check_removable((1, 0))
    with pytest.raises(
        UnsupportedModelError, match=r"layer 2 \(m\.2\) cannot be removed; its output has another shape"
    ):
        stack.check_removable((2,))


def test_the_containers_of_a_stack_in_stages_come_in_order_and_once() -> None:
    names = ("stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0")
    stack = LayerStack("stages", names, (nn.Identity(), nn.Identity(), nn.Identity()), (True, True, True))
    assert stack.containers == ("stages.0.blocks", "stages.1.blocks")
    assert not stack.shares_one_module
    looped = nn.Identity()
    assert LayerStack("loop", ("loop", "loop"), (looped, looped), (True, True)).shares_one_module


def test_layer_types_are_sliced_by_surviving_index_and_not_by_position() -> None:
    config = tiny.config("gemma3")
    pruned = pruned_config(config, (0, 2, 5, 6))
    # Written out by hand from sliding, sliding, full, sliding, sliding, full, sliding.
    assert pruned.layer_types == ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert pruned.num_hidden_layers == 4
    assert config.num_hidden_layers == len(config.layer_types) == 7


@pytest.mark.parametrize(
    ("keep", "window_layers"),
    [((0, 1, 2, 3, 4, 5), 3), ((0, 1, 3, 5), 2), ((3, 4, 5), 0), ((0, 1, 2), 3), ((2, 5), 1)],
)
def test_qwen2_counts_the_kept_layers_below_max_window_layers(keep: tuple[int, ...], window_layers: int) -> None:
    pruned = pruned_config(tiny.config("qwen2"), keep)
    assert pruned.max_window_layers == window_layers
    # The rule older readers apply: layer i slides when i >= max_window_layers.
    derived = ["sliding_attention" if i >= window_layers else "full_attention" for i in range(len(keep))]
    assert pruned.layer_types == derived


def test_a_list_as_long_as_the_model_that_is_not_per_layer_is_left_alone() -> None:
    config = tiny.config("llama", num_hidden_layers=2, eos_token_id=[258, 259])
    config.per_layer_scale = [0.5, 0.25]
    pruned = pruned_config(config, (1,))
    assert pruned.eos_token_id == [258, 259]
    assert pruned.per_layer_scale == [0.25]


def test_the_fingerprint_tells_weights_and_settings_apart() -> None:
    same, other_weights = tiny.model("llama"), tiny.model("llama", seed=1)
    assert fingerprint(tiny.model("llama")) == fingerprint(same)
    assert fingerprint(other_weights) != fingerprint(same)
    other_setting = tiny.model("llama", rms_norm_eps=1e-5)
    assert torch.equal(other_setting.model.layers[0].mlp.up_proj.weight, same.model.layers[0].mlp.up_proj.weight)
    assert fingerprint(other_setting) != fingerprint(same)
    assert facts_digest(other_setting) != facts_digest(same)


def test_the_source_survives_json() -> None:
    source = ModelSource("a/b", "f", "c", "weights.gguf")
    assert ModelSource.from_json(source.to_json()) == source
    assert source.to_json().keys() == {"id", "fingerprint", "config_digest", "gguf_file"}  # as before overlays
    with_overlay = ModelSource("a/b", "f", "c", None, "runs/x/overlay.safetensors")
    assert ModelSource.from_json(with_overlay.to_json()) == with_overlay


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_precision_has_the_short_names_of_the_field(dtype: torch.dtype, name: str) -> None:
    assert precision(tiny.model("llama", num_hidden_layers=1).to(dtype)) == name


@pytest.mark.parametrize(
    ("config", "keep", "window"),
    [
        (tiny.config("llama"), None, None),
        (tiny.config("gemma3"), None, tiny.WINDOW),
        (tiny.config("gemma3"), (2, 5), None),  # the two layers that attend fully
        (tiny.config("gemma3"), (2, 6), tiny.WINDOW),
        (tiny.config("qwen2"), (0, 1, 2), None),
        (tiny.config("qwen2", use_sliding_window=False), None, None),
        (MistralConfig(sliding_window=12), (0, 1), 12),  # on every layer, and no list says so
        (MistralConfig(sliding_window=None), None, None),
        (ModernBertConfig(local_attention=16), None, 16),
        (Llama4TextConfig(attention_chunk_size=32), None, 32),
    ],
)
def test_the_attention_window_is_that_of_the_kept_layers(
    config: PretrainedConfig, keep: tuple[int, ...] | None, window: int | None
) -> None:
    assert attention_window(config, keep) == window

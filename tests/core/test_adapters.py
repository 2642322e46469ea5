from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
from sglp_deploy.adapters import (
    SUPPORTED_MODEL_TYPES,
    LayerStack,
    ModelSource,
    fingerprint,
    layer_stack,
    precision,
    pruned_config,
)
from sglp_deploy.adapters.loading import config_digest
from sglp_deploy.errors import UnsupportedModelError


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_stack_holds_the_models_own_layers_in_order(family: str) -> None:
    model = tiny.model(family)
    stack = layer_stack(model)
    assert stack.n_layers == model.config.num_hidden_layers
    assert stack.names[0] == "model.layers.0"
    assert all(model.get_submodule(name) is layer for name, layer in zip(stack.names, stack.layers, strict=True))
    assert stack.prunable == (True,) * stack.n_layers


def test_another_family_is_refused_and_the_supported_ones_are_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=32))
    with pytest.raises(UnsupportedModelError, match=r"model type 'gpt2' is not supported; .*guessing it") as caught:
        layer_stack(model)
    assert str(caught.value).endswith("supported: gemma3_text, llama, qwen2, qwen3")
    assert set(SUPPORTED_MODEL_TYPES) == {tiny.config(family).model_type for family in tiny.FAMILIES}


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel has no model\.layers; .*AutoModelForCausalLM"):
        layer_stack(tiny.model("llama").model)


def test_a_stack_that_disagrees_with_its_configuration_is_refused() -> None:
    model = tiny.model("llama")
    del model.model.layers[2]
    with pytest.raises(UnsupportedModelError, match=r"holds 5 layers but num_hidden_layers says 6; .*config\.json"):
        layer_stack(model)


def test_a_stack_needs_one_entry_per_layer_and_something_to_remove() -> None:
    layers = (torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(ValueError, match=r"one entry per layer"):
        LayerStack("m", ("m.0",), layers, (True, True))
    with pytest.raises(UnsupportedModelError, match=r"none of the 2 layers under m can be removed"):
        LayerStack("m", ("m.0", "m.1"), layers, (False, False))


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
    assert config_digest(other_setting.config) != config_digest(same.config)


def test_the_source_survives_json() -> None:
    source = ModelSource("a/b", "f", "c", "weights.gguf")
    assert ModelSource.from_json(source.to_json()) == source


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_precision_has_the_short_names_of_the_field(dtype: torch.dtype, name: str) -> None:
    assert precision(tiny.model("llama", num_hidden_layers=1).to(dtype)) == name

"""Tiny decoder-only language models, one for each way in which a family writes down what its layers are.

A depth that is only a number (Llama), a window on every layer (Mistral), a list of layer types (Gemma), a scalar that
gives layers their type by counting (DeepSeek-V3), lists of layer numbers (Qwen3-MoE), periods (Jamba).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    Ernie4_5Config,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from tiny import VOCAB_SIZE
from zoo import Specimen

WINDOW = 8
N_TOKENS = 24  # three windows: what a layer sees through its window differs from what it would see without
N_PADDING = 3
PAD, BOS, EOS = 256, 257, 258
SLIDING, FULL = "sliding_attention", "full_attention"

TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.1,
}
# Two key-value heads for four query heads: a layer built for another number of heads cannot take these weights.
SIZES: dict[str, Any] = TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# For families that split the hidden size over their heads: two heads of 32 that share one key-value head.
TWO_HEADS: dict[str, Any] = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}
# For families older than shared key-value heads; a stray num_key_value_heads would mislead who reads their file.
PLAIN: dict[str, Any] = TOKENS | {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


def text_inputs(_model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Two prompts of random bytes; the second is shorter and padded on the left, as for generation."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, 256, (2, N_TOKENS), generator=generator)
    input_ids[1, :N_PADDING] = PAD
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :N_PADDING] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def randomise(model: nn.Module) -> None:
    """Draw anew what a family starts at 0 or 1, and make embeddings small against what the layers add.

    Norms, biases and scalars all start alike, so a test would not see two layers mixed up; and with large embeddings
    a tied head only repeats the last token.  Call it with the seed set.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    saved = model.state_dict(keep_vars=True)  # without the buffers a model computes for itself
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in saved.values()}.values():
            if not tensor.is_floating_point():
                continue
            if id(tensor) in embeddings:
                tensor.copy_(torch.randn_like(tensor) * 0.05)
            elif tensor.ndim == 1 or bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.randn_like(tensor) * 0.1)


def decoder(
    name: str,
    config: type[PretrainedConfig],
    keep: tuple[int, ...],
    *,
    window: int | None = None,
    note: str = "",
    **settings: Any,
) -> Specimen:
    """The specimen of the causal language model that ``config(**settings)`` describes."""

    def build() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config(**settings))
            randomise(model)
        return model.eval()

    return Specimen(name, "decoder", build, {"layers": keep}, text_inputs, window=window, generates=True, note=note)


LFM2: dict[str, Any] = TWO_HEADS | {"num_hidden_layers": 7, "full_attn_idxs": [2, 5], "block_multiple_of": 16}
GPT2: dict[str, Any] = TOKENS | {"n_embd": 64, "n_layer": 6, "n_head": 2, "n_positions": 256, "n_inner": 96}
JAMBA: dict[str, Any] = SIZES | {
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_d_state": 8,
}
GEMMA4: dict[str, Any] = SIZES | {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
}
# The last three layers attend to the keys and values of the last sliding and the last full layer before them: 3 and 4.
GEMMA4_SHARED: dict[str, Any] = GEMMA4 | {
    "num_hidden_layers": 8,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
GEMMA3N: dict[str, Any] = SIZES | {
    "num_hidden_layers": 8,
    "head_dim": 16,
    "intermediate_size": [64, 96, 64, 96, 96, 64, 64, 96],
    "activation_sparsity_pattern": [0.95, 0.95, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "num_kv_shared_layers": 3,
    "sliding_window": WINDOW,
    "laurel_rank": 8,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}

SPECIMENS: tuple[Specimen, ...] = (
    decoder("llama", LlamaConfig, (0, 2, 3, 5), **SIZES | {"head_dim": 32}),
    decoder(
        "mistral",
        MistralConfig,
        (0, 2, 3, 5),
        window=WINDOW,
        note="a window on every layer, no list of layer types",
        **SIZES | {"head_dim": 32, "sliding_window": WINDOW},
    ),
    decoder(
        "qwen2",
        Qwen2Config,
        (0, 2, 3, 5),
        window=WINDOW,
        note="max_window_layers counts the leading full layers; the saved layer_types win over it",
        **TWO_HEADS | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
    ),
    decoder("qwen3", Qwen3Config, (1, 2, 5), **SIZES | {"head_dim": 32}),
    decoder(
        "qwen3_moe",
        Qwen3MoeConfig,
        (0, 1, 3, 4, 6),
        note="mlp_only_layers lists the numbers of the dense layers",
        **SIZES
        | {"num_hidden_layers": 7, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1, 4]},
    ),
    decoder(
        "qwen3_moe-step",
        Qwen3MoeConfig,
        (0, 1, 3, 4),
        note="every second layer has experts; what is kept has no step and needs mlp_only_layers",
        **SIZES
        | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    decoder(
        "gemma2",
        Gemma2Config,
        (1, 2, 4, 5),
        window=WINDOW,
        note="sliding and full alternate; keeps full, sliding, sliding, full",
        **SIZES | {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW},
    ),
    decoder(
        "gemma3",
        Gemma3TextConfig,
        (0, 2, 5, 6),
        window=WINDOW,
        note="the two layer types rotate with different bases",
        **SIZES
        | {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW}
        | {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING]},
    ),
    decoder("phi3", Phi3Config, (0, 2, 3, 5), window=WINDOW, **TWO_HEADS | {"sliding_window": WINDOW}),
    decoder(
        "smollm3",
        SmolLM3Config,
        (0, 2, 3, 5),
        note="every third layer has no rotary position; no_rope_layers holds 1 for rotary, 0 for none",
        **TWO_HEADS | {"no_rope_layer_interval": 3},
    ),
    decoder(
        "smollm3-window",
        SmolLM3Config,
        (0, 2, 3, 5),
        window=WINDOW,
        note="the layers without rotary position slide: two lists that must agree",
        **TWO_HEADS | {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    decoder("olmo2", Olmo2Config, (0, 2, 3, 5), **TWO_HEADS),
    decoder(
        "granite",
        GraniteConfig,
        (0, 2, 3, 5),
        note="multipliers on embedding, residual, attention and logits; none depends on the depth",
        **TWO_HEADS
        | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    decoder(
        "gpt_oss",
        GptOssConfig,
        (1, 2, 4, 5),
        window=WINDOW,
        note="sliding and full alternate; keeps full, sliding, sliding, full",
        **SIZES
        | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    decoder(
        "mixtral",
        MixtralConfig,
        (0, 2, 3, 5),
        **SIZES | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    decoder(
        "gpt2",
        GPT2Config,
        (0, 2, 3, 5),
        note="the depth is called n_layer",
        **GPT2,
    ),
    decoder(
        "opt",
        OPTConfig,
        (0, 2, 3, 5),
        note="the layers hang under model.decoder",
        **PLAIN | {"ffn_dim": 96, "init_std": 0.1},
    ),
    decoder("gpt_neox", GPTNeoXConfig, (0, 2, 3, 5), **PLAIN | {"intermediate_size": 96}),
    decoder(
        "falcon",
        FalconConfig,
        (0, 2, 3, 5),
        note="a layer returns a tuple; alibi only changes the mask, which is the same for every layer",
        **PLAIN | {"ffn_hidden_size": 96},
    ),
    decoder("stablelm", StableLmConfig, (0, 2, 3, 5), **TWO_HEADS),
    decoder("cohere", CohereConfig, (0, 2, 3, 5), **TWO_HEADS | {"logit_scale": 1.0, "use_qk_norm": True}),
    decoder(
        "cohere2",
        Cohere2Config,
        (0, 2, 4, 5),
        window=WINDOW,
        note="full layers have no rotary position, so a wrong layer type changes short prompts too",
        **TWO_HEADS | {"logit_scale": 1.0, "sliding_window": WINDOW, "sliding_window_pattern": 3},
    ),
    decoder(
        "lfm2",
        Lfm2Config,
        (1, 2, 5, 6),
        note="convolutions and attention; full_attn_idxs lists layer numbers, layer_types win over it",
        **LFM2,
    ),
    decoder(
        "qwen3_next",
        Qwen3NextConfig,
        (0, 2, 3, 5, 6),
        note="gated delta nets and attention by list, experts and dense by layer number",
        **SIZES
        | {"num_hidden_layers": 7, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "mlp_only_layers": [3]}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "full_attention_interval": 3},
    ),
    decoder(
        "jamba",
        JambaConfig,
        (1, 2, 5, 6),
        note="attention at 2 and 6 and experts at odd numbers by period and offset; what is kept has other ones",
        **JAMBA,
    ),
    decoder(
        "deepseek_v3",
        DeepseekV3Config,
        (1, 2, 4, 5),
        note="first_k_dense_replace counts the leading dense layers; of two, one stays",
        **SIZES
        | {"num_key_value_heads": 4, "first_k_dense_replace": 2, "q_lora_rank": 24, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 32}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    ),
    decoder(
        "llama4",
        Llama4TextConfig,
        (0, 2, 3, 5),
        window=WINDOW,
        note="three ways at once: layer_types, a 0/1 list for rotary position, numbers of the layers with experts",
        **SIZES
        | {"head_dim": 32, "intermediate_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 4}
        | {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 3}
        | {"attention_chunk_size": WINDOW, "floor_scale": 4},
    ),
    # Layers that lean on others, or whose settings are filed under their number or packed.
    decoder(
        "gpt_neo",
        GPTNeoConfig,
        (1, 2, 4, 5),
        window=WINDOW,
        note="layer types twice: attention_types repeats patterns, attention_layers lists them and wins",
        **TOKENS
        | {"hidden_size": 64, "intermediate_size": 96, "num_layers": 6, "num_heads": 2, "window_size": WINDOW}
        | {"max_position_embeddings": 256, "attention_types": [[["global", "local"], 3]]},
    ),
    decoder(
        "gemma4",
        Gemma4TextConfig,
        (0, 2, 4, 5),
        window=WINDOW,
        note="full layers have heads of another size, filed under the layer's number in per_layer_config",
        **GEMMA4,
    ),
    decoder(
        "gemma4-shared",
        Gemma4TextConfig,
        (1, 3, 4, 6, 7),
        window=WINDOW,
        note="layers 5 to 7 use the keys and values of 3 and 4, which must stay",
        **GEMMA4_SHARED,
    ),
    decoder(
        "gemma4-embeddings",
        Gemma4TextConfig,
        (0, 2, 4, 5),
        window=WINDOW,
        note="one embedding for each layer, packed in tensors outside the layers",
        **GEMMA4 | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE},
    ),
    decoder(
        "gemma3n",
        Gemma3nTextConfig,
        (1, 3, 4, 6, 7),
        window=WINDOW,
        note="shared keys and values, packed embeddings and sizes by layer; four streams of hidden states",
        **GEMMA3N,
    ),
)

# What no configuration can say once those layers are gone, and a piece of the refusal.
REFUSED: tuple[tuple[Specimen, str], ...] = (
    (
        decoder(
            "gpt2-inverse",
            GPT2Config,
            (0, 2, 3, 5),
            note="attention is divided by the layer's number plus one, which cannot be written down",
            **GPT2 | {"scale_attn_by_inverse_layer_idx": True},
        ),
        "layer 2 would become layer 1 and behave differently there",
    ),
    (
        decoder(
            "jamba-irregular",
            JambaConfig,
            (1, 2, 6, 7),
            note="attention would be at 1 and 2 of four layers, which no period and offset give",
            **JAMBA,
        ),
        "attn_layer_period=4 and attn_layer_offset=2 make every 4th layer special",
    ),
    (
        decoder(
            "diffllama",
            DiffLlamaConfig,
            (0, 2, 3, 5),
            note="each layer starts from a constant computed from its number, in no configuration and no tensor",
            **SIZES,
        ),
        "derives a layer's behaviour from its number",
    ),
    (
        decoder(
            "lfm2-convolutions",
            Lfm2Config,
            (0, 1, 3, 4),
            note="without one attention layer the cache has no length, and the first call fails",
            **LFM2,
        ),
        "none of the layers with attention (2, 5) is kept",
    ),
    (
        decoder(
            "gemma4-last",
            Gemma4TextConfig,
            (0, 2, 4),
            note="the last layer is read back as a full one, whatever layer_types says",
            **GEMMA4,
        ),
        "layer 5 (model.layers.5) cannot be removed; transformers reads the last layer back as one of full_attention",
    ),
    (
        decoder(
            "gemma4-source",
            Gemma4TextConfig,
            (1, 2, 4, 6, 7),
            note="layer 6 used the keys and values of 3; without 3 it would silently use those of 2",
            **GEMMA4_SHARED,
        ),
        "layer 3 cannot be removed while layer 6 is kept",
    ),
)

# Families nobody declared: they are let through by proof, each on its own.
UNDECLARED: tuple[Specimen, ...] = (
    decoder("ernie4_5", Ernie4_5Config, (0, 2, 3, 5), **SIZES | {"head_dim": 32}),
    decoder(
        "olmo3",
        Olmo3Config,
        (0, 2, 4, 5),
        window=WINDOW,
        note="a list of layer types",
        **TWO_HEADS | {"sliding_window": WINDOW, "layer_types": [SLIDING, SLIDING, FULL] * 2},
    ),
    decoder("seed_oss", SeedOssConfig, (1, 2, 5), **SIZES | {"head_dim": 32}),
    decoder("starcoder2", Starcoder2Config, (0, 2, 3, 5), window=WINDOW, **TWO_HEADS | {"sliding_window": WINDOW}),
)

# Switches of declared families that change what a layer holds or is given.
MODES: tuple[Specimen, ...] = (
    decoder("falcon-alibi", FalconConfig, (0, 2, 3, 5), **PLAIN | {"ffn_hidden_size": 96, "alibi": True}),
    decoder(
        "falcon-grouped",
        FalconConfig,
        (0, 2, 3, 5),
        **PLAIN | {"ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 1},
    ),
    decoder(
        "gpt_neox-serial", GPTNeoXConfig, (1, 4), **PLAIN | {"intermediate_size": 96, "use_parallel_residual": False}
    ),
    decoder(
        "opt-post-norm",
        OPTConfig,
        (0, 2, 3, 5),
        note="as the 350m model: norms after the additions, and embeddings narrower than the layers",
        **PLAIN | {"ffn_dim": 96, "init_std": 0.1, "do_layer_norm_before": False, "word_embed_proj_dim": 48},
    ),
    decoder(
        "stablelm-parallel",
        StableLmConfig,
        (0, 2, 3, 5),
        **TWO_HEADS | {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    decoder("qwen2-full", Qwen2Config, (0, 2, 3, 5), note="no window, whatever max_window_layers says", **TWO_HEADS),
)

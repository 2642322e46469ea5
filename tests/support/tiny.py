"""Tiny random models, a tokenizer and checkpoint folders, so that no test needs a download.

Weights are drawn from a fixed seed with a spread large enough that layers matter: a dropped layer changes the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sglp_deploy.models import LoadedModel, ModelSource, layer_stack, quiet_libraries, source_of
from sglp_deploy.plan import PruningPlan

FAMILIES = ("llama", "llama-untied", "qwen2", "qwen3", "gemma3")
WINDOW = 8
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Non-contiguous, and irregular in the pattern of sliding and full layers: Gemma-3 keeps sliding, full, full, sliding.
KEEP = {
    "llama": (0, 2, 3, 5),
    "llama-untied": (0, 2, 3, 5),
    "qwen2": (0, 1, 3, 5),
    "qwen3": (1, 2, 5),
    "gemma3": (0, 2, 5, 6),
}


def config(family: str, **changes: Any) -> PretrainedConfig:
    """A configuration of 6 layers (Gemma-3: 7), hidden size 64, four heads of 32 with two key-value heads.

    ``qwen2`` (two heads that share one) attends fully in its first three layers and through a window of 8 in the
    rest; ``gemma3`` repeats two sliding layers and a full one.
    """
    facts: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
    }
    if family == "llama":
        return LlamaConfig(**facts | changes)
    if family == "llama-untied":
        return LlamaConfig(**facts | {"tie_word_embeddings": False} | changes)
    if family == "qwen2":
        del facts["head_dim"]  # Qwen2 derives it
        facts |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}
        return Qwen2Config(**facts | window | changes)
    if family == "qwen3":
        return Qwen3Config(**facts | {"tie_word_embeddings": False} | changes)
    if family == "gemma3":
        types = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
        window = {"num_hidden_layers": 7, "layer_types": types, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}
        return Gemma3TextConfig(**facts | window | changes)
    raise ValueError(f"no tiny model of family {family!r}; there are {FAMILIES}")


def model(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of ``family`` in evaluation mode, float32; the same weights for the same seed."""
    settings = config(family, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(settings)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.ndim == 1:  # norms start at 0 or 1 and biases at 0; a test would not see them mixed up
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "embed" in name:
                    # Small against what the layers add, or a tied head would only repeat the last token.
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
    made.generation_config = GenerationConfig(
        bos_token_id=257, eos_token_id=258, pad_token_id=256, do_sample=True, temperature=0.7, top_k=11
    )
    return made.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte and five special ones; with a chat template; adds nothing by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *SPECIAL_TOKENS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=256
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def source(module: nn.Module, name: str = "tiny") -> ModelSource:
    """The identity of a model that was never on disk."""
    return source_of(module, name)


def loaded(family: str = "llama", *, seed: int = 0, **changes: Any) -> LoadedModel:
    """Model, tokenizer and identity, as :func:`sglp_deploy.models.load_model` would return them."""
    module = model(family, seed=seed, **changes)
    return LoadedModel(module, tokenizer(), source(module, f"tiny-{family}"))


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint folder with tokenizer, chat template and generation config; returns ``folder``."""
    with quiet_libraries():
        model(family, seed=seed, **changes).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def plan_for(module: nn.Module, keep: tuple[int, ...], *, stack: str | None = None) -> PruningPlan:
    """A plan that keeps ``keep`` of ``module``, as if a user had chosen the layers."""
    depth = layer_stack(module, stack).n_layers
    return PruningPlan(
        method="by-hand",
        n_layers=depth,
        keep=keep,
        drop=tuple(layer for layer in range(depth) if layer not in keep),
        segments=((0, depth),),
        segment_losses=(),
        scores={},
        similarity=None,
        criterion=None,
        quota=None,
        budget={"keep": len(keep)},
        model=source(module).to_json(),
        stack=stack,
    )

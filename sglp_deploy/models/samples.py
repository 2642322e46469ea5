"""Inputs of the right names and shapes for any model: to trace it, to prove it, to compare two of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sglp_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of a window's length in configurations.
_WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "attention_window", "window_size")
_DEFAULT_IMAGE = 224  # pixels; what convolutional classifiers are trained on when their configuration names no size
_DEFAULT_CHANNELS = 3
# A speech model turns about 320 samples (20 ms at 16 kHz) into one frame; a third of a second gives some frames.
_SAMPLES = 5_600


def attention_window(config: Any, keep: Sequence[int] | None = None) -> int | None:
    """The longest window, in tokens, that any of the layers ``keep`` attends through; None when all see every token."""
    text = config.get_text_config()
    types: Sequence[str] = getattr(text, "layer_types", None) or ()
    kept = range(len(types)) if keep is None else keep
    # Some convolutional families have a ``layer_types`` that lists the kinds there are, not the layers.
    if types and len(types) > max(kept) and {types[index] for index in kept} <= {"full_attention"}:
        return None
    found = [getattr(text, name, None) for name in _WINDOWS]
    return max((value for value in found if isinstance(value, int)), default=None)


def most_tokens(module: Any) -> int:
    """Length of the model's table of positions, where it has one, less what some reserve for padding."""
    text: Any = module.config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    # RoBERTa and its kin number positions from the padding's number on, in the same table.
    shifted = any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules())
    offset = (getattr(text, "pad_token_id", None) or 0) + 1 if shifted else 0
    return int(most) - offset if isinstance(most, int) else sys.maxsize


def table_of_positions(module: nn.Module) -> int | None:
    """How many positions a model has learned a vector for, beyond which there is none; None where it has no table."""
    learned = any(
        isinstance(part, nn.Embedding) and re.search(r"wpe|position", path.rpartition(".")[2])
        for path, part in module.named_modules()
    )
    return most_tokens(module) if learned and hasattr(module, "config") else None


def main_input(module: nn.Module) -> str:
    """Name of the input a model is about: "input_ids", "pixel_values", "input_values", "input_features", or "x"."""
    return str(getattr(module, "main_input_name", "x"))


def generates(module: nn.Module) -> bool:
    """Whether it is a decoder language model: tokens in, next-token logits out, with a cache."""
    can = getattr(module, "can_generate", None)
    return bool(can is not None and can() and main_input(module) == "input_ids" and not is_encoder_decoder(module))


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether it reads one sequence and writes another."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def sample_inputs(
    module: nn.Module, *, rows: int = 2, tokens: int = 24, padded: bool = True, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs ``module`` accepts, on its device.

    Args:
        module: A model of any supported library.
        rows: Batch size.
        tokens: Length of a token row; also of what a decoder is given of an encoder-decoder.
        padded: Pad the first row where the family takes a mask, on the side its users pad: left for a decoder.
        seed: Which inputs.

    Raises:
        UnsupportedModelError: If the kind of input is unknown.
    """
    generator = torch.Generator().manual_seed(seed)
    name = main_input(module)
    config: Any = getattr(module, "config", None)
    if name == "input_ids":
        inputs = _text(cast("PreTrainedModel", module), rows, tokens, padded, generator)
    elif name in ("pixel_values", "x"):
        size = image_size(module)
        channels = int(getattr(config, "num_channels", None) or getattr(module, "in_chans", None) or _DEFAULT_CHANNELS)
        inputs = {name: torch.randn(rows, channels, *size, generator=generator)}
    elif name == "input_values":
        inputs = {name: torch.randn(rows, _SAMPLES, generator=generator)}
        if padded and rows > 1:
            mask = torch.ones(rows, _SAMPLES, dtype=torch.int64)
            mask[0, _SAMPLES * 3 // 4 :] = 0
            inputs = {name: inputs[name] * mask, "attention_mask": mask}
    elif name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs = {name: torch.randn(rows, config.num_mel_bins, frames, generator=generator)}
    else:
        raise UnsupportedModelError(
            f"{type(module).__name__} takes {name!r}; inputs are known for input_ids, pixel_values, input_values and "
            "input_features; write an adapter for this family"
        )
    if is_encoder_decoder(module):
        inputs["decoder_input_ids"] = _tokens(cast("PreTrainedModel", module), rows, max(2, tokens // 2), generator)
    parameter = next(module.parameters())
    return {
        key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for key, value in inputs.items()
    }


def image_size(module: nn.Module) -> tuple[int, int]:
    """Height and width in pixels that a vision model was made for."""
    config: Any = getattr(module, "config", None)
    size = getattr(config, "image_size", None)
    if size is None:  # timm: the size asked for when the model was made, else the one its weights were trained on
        made: dict[str, Any] = getattr(module, "_traits", None) or {}
        trained: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
        size = made.get("img_size") or tuple(trained.get("input_size", ())[-2:]) or _DEFAULT_IMAGE
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _text(
    model: PreTrainedModel, rows: int, tokens: int, padded: bool, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    ids = _tokens(model, rows, tokens, generator)
    mask = torch.ones_like(ids)
    if padded and rows > 1:
        short = max(1, tokens // 4)
        mask[0, slice(None, short) if generates(model) else slice(tokens - short, None)] = 0
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        ids = torch.where(mask == 1, ids, pad if isinstance(pad, int) else 0)
    return {"input_ids": ids, "attention_mask": mask}


def _tokens(model: PreTrainedModel, rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    config = model.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (rows, tokens), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    # Some encoders number positions by counting tokens that are not padding.
    return torch.where(ids == pad, (ids + 1) % config.vocab_size, ids) if isinstance(pad, int) else ids

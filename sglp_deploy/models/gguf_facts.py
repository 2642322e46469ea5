"""What a GGUF file says that transformers' reader passes over: mapped where it can be, refused where numbers change.

llama.cpp reads rotary scaling off keys, or off a tensor of factors that its converter wrote; transformers reads neither
for most families, and computes something else without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

_FACTORS: Final = "rope_freqs.weight"
_TABLE: Final = "token_embd.weight"
_HEAD: Final = "output.weight"
_BLOCK: Final = re.compile(r"blk\.(\d+)\.")
_SHOWN: Final = 4  # names of tensors in a message
# Keys behind the architecture's name that a model computes with, to the configuration's name for it and the value that
# changes nothing.  What transformers does not read must agree with what it assumes.
_NUMBERS: Final[Mapping[str, tuple[str, Any]]] = {
    "attn_logit_softcapping": ("attn_logit_softcapping", 0.0),
    "final_logit_softcapping": ("final_logit_softcapping", 0.0),
    "attention.sliding_window": ("sliding_window", 0),
    "attention.scale": ("attention_multiplier", 0.0),
    "attention.clamp_kqv": ("clip_qkv", 0.0),
    "logit_scale": ("logit_scale", 1.0),
    "embedding_scale": ("embedding_multiplier", 1.0),
    "residual_scale": ("residual_multiplier", 1.0),
    "expert_weights_norm": ("norm_topk_prob", False),
    "expert_weights_scale": ("routed_scaling_factor", 1.0),
}
_YARN: Final = re.compile(r"rope\.scaling\.(?:attn_factor|yarn_.*)")
_READS_SCALING: Final = {"gptoss"}
# Factor, and the shares of the original length below and above which a wave is stretched or left alone, of Llama 3.1
# and 3.2 (their config.json: factor 8 or 32, low 1, high 4, of 8,192 positions).
_LLAMA_3: Final = tuple((factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0, 16.0, 4.0))


def beyond_transformers(file: Path, config: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Keys of a GGUF file that nobody reads, and entries that its configuration must have beyond what was read.

    Args:
        file: The GGUF file.
        config: As transformers made it of the file.

    Raises:
        UnsupportedModelError: If the file states numbers that transformers would leave out and that cannot be mapped.
    """
    from gguf import GGUFReader
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    reader = GGUFReader(str(file))
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    family = str(values.get("general.architecture", ""))
    # Some families have an underscore more there ("qwen3moe" is "qwen3_moe").
    mappings = {re.sub("[-_]", "", name): entries for name, entries in GGUF_CONFIG_MAPPING.items()}
    plain = re.sub("[-_]", "", family)
    if plain not in mappings:
        return (), {}  # read by a function of its own, key by key
    own = {name.removeprefix(f"{family}."): value for name, value in values.items() if name.startswith(f"{family}.")}
    left = {name: value for name, value in own.items() if mappings[plain].get(name) is None}
    text = config.get_text_config()
    changes: dict[str, Any] = {}
    rope = {} if plain in _READS_SCALING else _scaling(file, left)
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == _FACTORS), None)
    # Where transformers knows the key and passes it over, its own default is meant.
    stated = None if mappings[plain].get("rope.freq_base", "") is None else own.get("rope.freq_base")
    base = float(stated or _base(text))
    if factors is not None:
        found = _as_llama_3(np.asarray(factors, np.float64).reshape(-1), base)
        if found is None:
            raise UnsupportedModelError(
                f"{file} scales its rotary positions by the tensor {_FACTORS}, which follows no rule known here; "
                "transformers would leave it out; give the checkpoint it was converted from"
            )
        rope = found
    left.pop("rope.freq_base", None)
    if rope or not math.isclose(base, _base(text), rel_tol=1e-6):
        changes["rope_parameters"] = _merged(getattr(text, "rope_parameters", None) or {}, {"rope_theta": base, **rope})
    changing = []
    for name in [name for name in left if name in _NUMBERS or _YARN.fullmatch(name)]:
        value = left.pop(name)
        entry, without_effect = _NUMBERS.get(name, ("", 1.0))
        if value in (without_effect, getattr(text, entry, None) if entry else None):
            continue
        if entry == "sliding_window" and hasattr(text, entry):
            changes[entry] = int(value)
        else:
            changing.append(f"{family}.{name} = {value}")
    if changing:
        raise UnsupportedModelError(
            f"{file} states what transformers does not read for this family ({', '.join(changing)}); the model would "
            "compute something else; give the checkpoint it was converted from"
        )
    return tuple(f"{family}.{name}" for name in sorted(left) if name not in mappings[plain]), changes


def refuse_unread_tensors(file: Path, module: nn.Module) -> tuple[str, ...]:
    """Hold the numbers in a GGUF file against those of the model that was made of it.

    transformers passes over tensors that its configuration of the family has no place for: biases of attention, norms
    of queries, factors of a long rotary scaling.  Its own report of what it read does not name them.  Whatever is
    renamed, split or merged on the way, no number comes or goes; so the counts tell.

    Returns:
        Tensors of blocks that predict further tokens, which nothing here runs.

    Raises:
        UnsupportedModelError: If other numbers of the file are in no tensor of the model.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(str(file))
    architecture = reader.fields.get("general.architecture")
    family = str(architecture.contents()) if architecture else ""
    depth = int(getattr(cast("Any", module).config.get_text_config(), "num_hidden_layers", 0) or 0)
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors if tensor.name != _FACTORS}
    further = tuple(name for name in sizes if (block := _BLOCK.match(name)) and int(block[1]) >= depth)
    sizes = {name: size for name, size in sizes.items() if name not in further}
    tied = bool(getattr(cast("Any", module).config.get_text_config(), "tie_word_embeddings", False))
    if tied and _HEAD in sizes and _same_values(reader, _HEAD, _TABLE):
        del sizes[_HEAD]  # BLOOM's converter writes the table twice
    held = {tensor.data_ptr(): tensor.numel() for tensor in module.state_dict().values()}
    if (more := sum(sizes.values()) - sum(held.values())) <= 0:
        return further
    known = next((get_tensor_name_map(arch, depth) for arch, name in MODEL_ARCH_NAMES.items() if name == family), None)
    named = {known.get_name(name, (".weight", ".bias")) for name in module.state_dict()} if known else set()
    unread = [name for name, size in sizes.items() if (name not in named or (tied and name == _HEAD)) and size <= more]
    what = ", ".join(unread[:_SHOWN]) + (f" and {len(unread) - _SHOWN} more" if unread[_SHOWN:] else "")
    raise UnsupportedModelError(
        f"{file} holds {more} numbers that are in no tensor of the model as transformers makes it"
        f"{f' ({what})' if unread else ''}; it would compute something else; give the checkpoint it was converted from"
    )


def _same_values(reader: Any, one: str, other: str) -> bool:
    """Whether two tensors of a GGUF file hold the same numbers, in whatever type."""
    from gguf.quants import dequantize

    found = [dequantize(each.data, each.tensor_type) for each in reader.tensors if each.name in (one, other)]
    return len(found) == 2 and found[0].shape == found[1].shape and bool(np.array_equal(*found))


def _scaling(file: Path, left: dict[str, Any]) -> dict[str, Any]:
    """Rotary scaling that keys state, taken out of those that are left.

    Raises:
        UnsupportedModelError: If its kind has no counterpart here.
    """
    kind = str(left.pop("rope.scaling.type", "none"))
    factor = float(left.pop("rope.scaling.factor", 0.0) or left.pop("rope.scale_linear", 0.0) or 1.0)
    original = left.pop("rope.scaling.original_context_length", None)
    left.pop("rope.scaling.finetuned", None)
    if kind in ("none", "linear") and factor == 1.0:
        return {}
    if kind in ("none", "linear"):  # older files have the factor alone
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{file} scales its rotary positions by the type {kind!r}, which transformers would leave out of a GGUF "
            "file; give the checkpoint it was converted from"
        )
    return {"rope_type": kind, "factor": factor} | (
        {} if original is None else {"original_max_position_embeddings": int(original)}
    )


def _merged(there: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with ``rope`` in them; where kinds of layers have their own, in those of the layers that see all."""
    if isinstance(whole := there.get("full_attention"), Mapping):
        return {**there, "full_attention": {**whole, **rope}}
    return {**there, **rope}


def _base(text: Any) -> float:
    rope = getattr(text, "rope_parameters", None) or {}
    return float(rope.get("full_attention", rope).get("rope_theta", 10_000.0))


def _as_llama_3(factors: NDArray[np.float64], base: float) -> dict[str, Any] | None:
    """The settings of rope_type "llama3" that give these factors of each wave's length; None when none does.

    Source: ``_compute_llama3_parameters`` of transformers; ``generate_extra_tensors`` of llama.cpp's converter.
    """
    if np.allclose(factors, 1.0):
        return {"rope_type": "default"}
    waves = 2 * math.pi * base ** (np.arange(len(factors)) / len(factors))
    for factor, low, high, original in _LLAMA_3:
        smooth = (original / waves - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        wanted = np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, between))
        if np.allclose(factors, wanted, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None

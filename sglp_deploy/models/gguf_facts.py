"""What a GGUF file says that transformers' reader passes over: mapped where it can be, refused where numbers change.

llama.cpp reads rotary scaling off keys, or off a tensor of factors that its converter wrote; transformers reads neither
for most families, and computes something else without a word.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.errors import UnsupportedModelError

_FACTORS: Final = "rope_freqs.weight"
# Keys behind the architecture's name that a model computes with.
_NUMBERS: Final = re.compile(
    r"rope\.scaling\.(?:factor|attn_factor|yarn_.*)|.*softcapping|attention\.(?:sliding_window.*|scale|clamp_kqv)|"
    r"(?:logit|embedding|residual)_scale|expert_(?:weights_scale|weights_norm|gating_func)|attention\.temperature_.*"
)
_NO_OP: Final = (None, 0, 0.0, 1, 1.0, "none")
# Factor, and the shares of the original length below and above which a wave is stretched or left alone, of Llama 3.1
# and 3.2 (their config.json: factor 8 or 32, low 1, high 4, of 8,192 positions).
_LLAMA_3: Final = tuple((factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0, 16.0, 4.0))


def beyond_transformers(file: Path, config: Any) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """Keys of a GGUF file that nobody reads, and what ``config.rope_parameters`` must be; None where it is right.

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
    read = set(GGUF_CONFIG_MAPPING.get(family, {}))
    if not read:
        return (), None  # read by a mapping of its own, key by key
    own = {name.removeprefix(f"{family}."): value for name, value in values.items() if name.startswith(f"{family}.")}
    left = {name: value for name, value in own.items() if name not in read}
    text = config.get_text_config()
    rope: dict[str, Any] | None = None
    kind = str(left.pop("rope.scaling.type", "none"))
    if kind in ("linear", "yarn"):
        rope = {"rope_type": kind, "factor": float(left.pop("rope.scaling.factor", 1.0))}
        if (original := left.pop("rope.scaling.original_context_length", None)) is not None:
            rope["original_max_position_embeddings"] = int(original)
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == _FACTORS), None)
    if factors is not None:
        rope = _as_llama_3(np.asarray(factors, np.float64).reshape(-1), _base(text))
        if rope is None:
            raise UnsupportedModelError(
                f"{file} scales its rotary positions by the tensor {_FACTORS}, which follows no rule known here; "
                "transformers would leave it out; give the checkpoint it was converted from"
            )
    changing = {name: value for name, value in left.items() if _NUMBERS.fullmatch(name) and value not in _NO_OP}
    if changing:
        named = ", ".join(f"{family}.{name} = {value}" for name, value in sorted(changing.items()))
        raise UnsupportedModelError(
            f"{file} states what transformers does not read for this family ({named}); the model would compute "
            "something else; give the checkpoint it was converted from"
        )
    passed_over = tuple(f"{family}.{name}" for name in sorted(left) if not name.startswith("rope.scaling."))
    return passed_over, None if rope is None else {"rope_theta": _base(text), **rope}


def _base(text: Any) -> float:
    return float((getattr(text, "rope_parameters", None) or {}).get("rope_theta", 10_000.0))


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

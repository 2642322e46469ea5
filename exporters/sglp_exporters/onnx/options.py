"""What a caller may ask of the ``onnx`` exporter, and what of it can be had from a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ConfigError

FLOATS = ("fp32", "fp16")
BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
# Below 18 the traced operators do not exist; above 25 there is no converter, and ONNX Runtime 1.31 ends at 26.
OPSETS = range(18, 26)
ATTENTION = ("grouped", "traced")
_BLOCK_SIZES = (16, 32, 64, 128, 256)  # of MatMulNBits on a CPU


@dataclass(frozen=True)
class OnnxOptions:
    """Options of an export, checked.

    Attributes:
        precision: Of the weights in the file: "fp32", "fp16", "int8" or "int4".
        opset: Version of ONNX's operators, or None for that of the trace.
        block_size: Weights that share a scale; None for weights that are not quantised.
        symmetric: Whether a block has a scale and no zero point; None for weights that are not quantised.
        mixed: Whether matrices that most depends on keep 8 bits where the others have 4.
        attention: "grouped" (heads that share keys are rows of one product) or "traced" (keys repeated for each head).
    """

    precision: str
    opset: int | None
    block_size: int | None
    symmetric: bool | None
    mixed: bool
    attention: str

    @property
    def bits(self) -> int | None:
        """Bits of a quantised weight; None where they are floating point."""
        return BITS.get(self.precision)


def read_options(given: Mapping[str, Any], own: str) -> OnnxOptions:
    """The options for a model whose weights are ``own`` ("fp32" or "fp16").

    Raises:
        ConfigError: If an option is unknown or out of range, or the precision cannot be had from this model.
    """
    known = tuple(OnnxOptions.__dataclass_fields__)
    for name in given:
        if name not in known:
            raise unknown_name("option of exporter 'onnx'", name, known)
    precision = given.get("precision") or own
    if precision not in (*FLOATS, *BITS):
        raise ConfigError(
            f"precision={precision!r} is not offered; weights are {', '.join((*FLOATS, *BITS))} here; pass one of them"
        )
    if own == "fp16" and precision != "fp16":
        raise ConfigError(
            f"precision={precision!r} was asked for a model whose weights are fp16; what that rounding lost is not to "
            "be had back; load the model with --dtype fp32, or leave precision out"
        )
    return OnnxOptions(
        precision=precision,
        opset=_opset(given.get("opset")),
        block_size=_block_size(given.get("block_size"), precision),
        symmetric=_symmetric(given.get("symmetric"), precision),
        mixed=mixed_of(given.get("mixed"), precision),
        attention=_attention(given.get("attention", ATTENTION[0])),
    )


def _attention(wanted: Any) -> str:
    if wanted not in ATTENTION:
        raise ConfigError(
            f"attention={wanted!r} is not offered; it is written {' or '.join(ATTENTION)} here; pass one of them"
        )
    return str(wanted)


def _opset(wanted: Any) -> int | None:
    if wanted is None:
        return None
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted not in OPSETS:
        raise ConfigError(
            f"opset={wanted!r} is not offered; graphs can be written for opset {OPSETS[0]} to {OPSETS[-1]}; pass one "
            "of these numbers, or leave opset out"
        )
    return wanted


def _block_size(wanted: Any, precision: str) -> int | None:
    if wanted is None:
        return 32 if precision in BITS else None
    _only_quantised("block_size", precision)
    if isinstance(wanted, bool) or wanted not in _BLOCK_SIZES:
        raise ConfigError(
            f"block_size={wanted!r} is not offered; ONNX Runtime multiplies blocks of "
            f"{', '.join(map(str, _BLOCK_SIZES))} weights; pass one of these numbers"
        )
    return int(wanted)


def _symmetric(wanted: Any, precision: str) -> bool | None:
    if wanted is None:
        # Measured on SmolLM2-135M: a zero point does nothing for 8 bits, and takes a tenth off the loss of 4 bits.
        return precision == "int8" if precision in BITS else None
    _only_quantised("symmetric", precision)
    if not isinstance(wanted, bool):
        raise ConfigError(f"symmetric={wanted!r} is neither true nor false; it says that a block has no zero point")
    return wanted


def mixed_of(wanted: Any, precision: str) -> bool:
    """Whether some matrices of an int4 file keep 8 bits, where ``wanted`` was asked for.

    Raises:
        ConfigError: If it is neither true nor false, or asked for where nothing has 4 bits.
    """
    if wanted is None:
        return False
    if not isinstance(wanted, bool):
        raise ConfigError(f"mixed={wanted!r} is neither true nor false; it says that some matrices keep 8 bits")
    if precision != "int4":
        raise ConfigError(
            f"mixed says which matrices keep 8 bits among those of 4 and those of this file are {precision}; nothing "
            "would come of it; leave it out, or pass precision=int4"
        )
    return wanted


def _only_quantised(name: str, precision: str) -> None:
    if precision not in BITS:
        raise ConfigError(
            f"{name} says how weights are quantised and those of this file are {precision}; nothing would come of it; "
            f"leave it out, or pass precision={' or '.join(BITS)}"
        )

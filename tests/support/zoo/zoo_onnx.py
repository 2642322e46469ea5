"""What ONNX can hold of each family: read by the tests that export them and by the table in the documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why a family cannot be exported.

    Attributes:
        error: A piece of the error that is raised.
        reason: The same for the table.
    """

    error: str
    reason: str


# Decoders that keep the state of convolutions or recurrences, which the common interface has no place for.
WITHOUT_CACHE = {"lfm2": "LinearAttentionLayer"}
# Decoders whose layers are no copies of one another: shared keys and values, embeddings filed under a layer's number.
TRACED_WHOLE = {"gemma4-shared", "gemma4-embeddings"}
# What ONNX has no operators for, as the first cause names it.
REFUSED = {
    "jamba": Refusal(
        "the model has layers of linear attention, which run through the tokens in chunks",
        "its recurrence runs through the tokens, which a trace fixes",
    ),
    "qwen3_next": Refusal(
        "the model has layers of linear attention, which run through the tokens in chunks",
        "linear attention runs through the tokens in chunks, which a trace fixes",
    ),
    "llama4": Refusal(
        "No decompositions registered for the complex-valued input", "its rotation is written in complex numbers"
    ),
    "gemma3n": Refusal(
        "No ONNX function found for <OpOverload(op='prims.erf_inv'", "ONNX has no inverse error function"
    ),
}

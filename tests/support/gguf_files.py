"""GGUF files of tiny Llamas, written with the ``gguf`` package by rules stated here and not by a converter's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch

import tiny
from sglp_deploy import _io
from sglp_deploy.artifact import MANIFEST, ExportArtifact

HEADS = (4, 2)  # of the tiny Llama


def _halves_to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's llama rotates rows 2i and 2i + 1 of a head; transformers rows i and i + half."""
    size = weight.shape[0] // heads
    order = [head * size + part * size // 2 + i for head in range(heads) for i in range(size // 2) for part in (0, 1)]
    return weight[order]


PLACES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def named(module: Any) -> dict[str, torch.Tensor]:
    """A tiny Llama's tensors as llama.cpp names and arranges them; its head is its embedding."""
    found = {"token_embd.weight": module.model.embed_tokens.weight, "output_norm.weight": module.model.norm.weight}
    for index, layer in enumerate(module.model.layers):
        for theirs, ours in PLACES.items():
            weight = layer.get_submodule(theirs).weight
            if ours in ("attn_q", "attn_k"):
                weight = _halves_to_pairs(weight, HEADS[0] if ours == "attn_q" else HEADS[1])
            found[f"blk.{index}.{ours}.weight"] = weight
    return {name: tensor.detach().float() for name, tensor in found.items()}


def write(file: Path, tensors: dict[str, torch.Tensor], *, layers: int, kind: str = "F32", also: str = "") -> Path:
    """A GGUF file of ``tensors``; ``also`` names one that is written as float16 whatever the others are."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS[0])
    writer.add_head_count_kv(HEADS[1])
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(tiny.VOCAB_SIZE)
    for name, tensor in tensors.items():
        matrix = tensor.ndim > 1
        chosen = gguf.GGMLQuantizationType["F16" if name == also else kind if matrix else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def forge(artifact: ExportArtifact, file: Path, name: str = "model.gguf") -> ExportArtifact:
    """The artifact with another file, and a manifest that agrees with it."""
    target = artifact.path / name
    target.write_bytes(file.read_bytes())
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": _io.sha256_file(target), "bytes": target.stat().st_size}
    (artifact.path / MANIFEST).write_text(json.dumps(manifest))
    return ExportArtifact.load(artifact.path)

"""Plan, export and verify with the public API, on a tiny random model made on the spot (no download, half a minute).

With a model of your own, give its folder or hub identifier to ``Compressor.from_pretrained`` and leave out
``make_tiny_model``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sglp_deploy import CalibrationSet, Compressor


def make_tiny_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def byte_rows(text: CalibrationSet) -> CalibrationSet:
    """This model has no tokenizer: its tokens are bytes.  A model with one takes the text as it is."""
    rows = [
        np.frombuffer(document.encode(), dtype=np.uint8) for document in text.documents if isinstance(document, str)
    ]
    return CalibrationSet.from_token_ids(rows, max_tokens=4_096, sequence_length=128)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        # 1. Load the model and choose the text it is measured on.
        compressor = Compressor.from_pretrained(
            make_tiny_model(folder / "model"), calibration=byte_rows(CalibrationSet.builtin())
        )

        # 2. Decide which layers go.  The plan is a file: review it, keep it.
        plan = compressor.plan(drop=2)
        plan.save(folder / "plan.json")
        print(f"keep layers {list(plan.keep)}, drop {list(plan.drop)}")
        print(f"segments {[list(segment) for segment in plan.segments]}, ranked by {plan.criterion}")

        # 3. Export the smaller model, and prove that the export computes what the smaller model computes.
        artifact = compressor.export(plan, "onnx", folder / "onnx")
        parity = compressor.verify(artifact)
        parity.save(folder / "parity.json")
        parity.require()
        print(f"{artifact.format}: {artifact.n_layers} layers, {artifact.weight_bytes / 1e6:.1f} MB of weights")
        worst = max(case["statistics"]["max_abs"] for case in parity.cases)
        print(f"parity passed: {len(parity.cases)} cases, largest logit difference {worst:.1e}")

        # 4. What pruning cost, which is another question.  (This model is random, so it cost nothing worth knowing.)
        quality = compressor.evaluate(plan, byte_rows(CalibrationSet.builtin_held_out()))
        print(f"perplexity {quality['dense']['perplexity']:.1f} -> {quality['pruned']['perplexity']:.1f}")


if __name__ == "__main__":
    main()

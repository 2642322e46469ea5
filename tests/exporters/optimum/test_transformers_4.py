"""A pruned checkpoint means the same to transformers 4, which reads rotary settings and tokenizers by other names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PhiConfig,
    PreTrainedModel,
)

import tiny
from sglp_deploy.compressor import Compressor
from sglp_deploy.isolation import environments

_FOUR = environments.variable("optimum")  # optimum asks for transformers 4

pytestmark = [
    pytest.mark.optimum,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(_FOUR),
        reason=f"needs {_FOUR}, the interpreter of an environment with transformers 4 (make test-optimum)",
    ),
]

_READ = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
kind = getattr(transformers, json.load(open(sys.argv[1] + "/config.json"))["architectures"][0])
model = kind.from_pretrained(sys.argv[1]).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
chat = tokenizer.apply_chat_template([{"role": "user", "content": "a mill"}], tokenize=False)
with torch.no_grad():
    logits = model(torch.arange(150)[None] * 7 % 250).logits[0, -1]
found = {"version": transformers.__version__, "logits": logits.tolist(), "ids": tokenizer("a mill <eos>")["input_ids"]}
found |= {"chat": chat, "special": sorted(map(str, tokenizer.all_special_tokens))}
print("FOUND" + json.dumps(found))
"""
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}


def _read(python: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-W", "ignore", "-c", _READ, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.partition("FOUND")[2])
    return found


def _causal(config: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def _model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    match name:
        case "llama-3":
            return tiny.model("llama", rope_parameters=_LLAMA_3)
        case "yarn":
            scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 777.0}
            return tiny.model("qwen3", rope_parameters=scaling)
        case "gemma3":
            bases = {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 70_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
            return tiny.model("gemma3", rope_parameters=bases)
        case "gpt-neox":
            rope = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}
            return _causal(GPTNeoXConfig(**_SMALL, rope_parameters=rope))
        case "phi":
            rope = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25}
            return _causal(PhiConfig(**_SMALL, rope_parameters=rope))
        case "modernbert":
            bases = {
                "full_attention": {"rope_type": "default", "rope_theta": 70_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
            ids = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 256)
            config = ModernBertConfig(
                **_SMALL | {"num_hidden_layers": 6}, **ids, rope_parameters=bases, local_attention=16
            )
            return ModernBertForMaskedLM(config).eval()
    return tiny.model(name)


@pytest.mark.parametrize("name", ["llama-3", "qwen3", "yarn", "gemma3", "gpt-neox", "phi", "modernbert"])
def test_both_releases_compute_the_same_from_a_pruned_checkpoint(name: str, tmp_path: Path) -> None:
    _model(name).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    compressor = Compressor.from_pretrained(tmp_path / "model")
    # transformers 4 lets every third layer of ModernBERT attend to everything, whatever a list says.
    folder = compressor.save(compressor.plan_by_hand([1, 2, 3] if name == "modernbert" else [1]), tmp_path / "pruned")
    five, four = _read(sys.executable, folder), _read(os.environ[_FOUR], folder)
    assert (five["version"][0], four["version"][0]) == ("5", "4")
    np.testing.assert_allclose(four["logits"], five["logits"], atol=1e-4)
    assert np.ptp(five["logits"]) > 0.1
    assert [four[each] for each in ("ids", "chat", "special")] == [five[each] for each in ("ids", "chat", "special")]

"""The folder the vllm exporter writes, loaded by vLLM itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from sglp_deploy import registry
from sglp_deploy.materialize import materialize

PYTHON = os.environ.get("SGLP_VLLM_PYTHON", "")
STEPS = 24

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="needs SGLP_VLLM_PYTHON, the interpreter of an environment that holds vLLM (docs/vllm.md)"
    ),
]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_vllm_decodes_the_pruned_folder_like_pytorch(family: str, tmp_path: Path) -> None:
    loaded = tiny.loaded(family)
    pruned = materialize(
        loaded.module, tiny.plan_for(loaded.module, tiny.KEEP[family]), loaded.source, tokenizer=loaded.tokenizer
    )
    registry.exporter("vllm").export(pruned, tmp_path / "vllm")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, tiny.VOCAB_SIZE, size=length).tolist() for length in (1, 17, 40)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    worker = Path(__file__).with_name("vllm_worker.py")
    files = [str(tmp_path / name) for name in ("vllm", "prompts.json")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, str(worker), *files, str(STEPS), str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for prompt, answer in zip(prompts, json.loads((tmp_path / "out.json").read_text()), strict=True):
        # Teacher-forced with vLLM's own tokens: the log-probabilities must agree at every step.
        ids = torch.tensor([prompt + answer["tokens"]])
        with torch.no_grad():
            logprobs = pruned.module(ids).logits[0].float().log_softmax(-1)
        steps = range(len(prompt) - 1, len(prompt) - 1 + STEPS)
        wanted = [float(logprobs[step, token]) for step, token in zip(steps, answer["tokens"], strict=True)]
        np.testing.assert_allclose(answer["logprobs"], wanted, atol=1e-4)
        greedy = [int(logprobs[step].argmax()) for step in steps]
        assert answer["tokens"] == greedy

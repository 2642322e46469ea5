"""What planning costs: time against one forward and backward pass, and peak memory when the calibration text grows.

    python bench/measure_planning.py MODEL -o bench/results/planning.json

Both are ratios inside one run.  Time: the same token rows, planning and a plain forward and backward pass by turns in
one process (A B B A).  Memory: peak resident memory (VmHWM) of a fresh process for one and for eight times the text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sglp_bench.devices.environment import collect_environment
from sglp_deploy import _io
from sglp_deploy.evidence.collect import collect_layer_stats
from sglp_deploy.evidence.text import CalibrationSet, TokenBatches
from sglp_deploy.models import LoadedModel, load_model
from sglp_deploy.plan import Budget, make_plan
from sglp_deploy.tasks.language import LanguageTask

_GROWTH = 8


def plan_once(loaded: LoadedModel, batches: TokenBatches) -> float:
    """Seconds for the whole of planning: statistics, similarity, segmentation, decision."""
    started = time.perf_counter()
    stats = collect_layer_stats(loaded.module, batches, task=LanguageTask())
    make_plan(stats, Budget(fraction=0.2), model=loaded.source.to_json())
    return time.perf_counter() - started


def forward_backward_once(loaded: LoadedModel, batches: TokenBatches) -> float:
    """Seconds for the loss and all its parameter gradients over the same rows, and nothing else."""
    model = loaded.module
    started = time.perf_counter()
    for ids, mask in batches:
        tokens = torch.from_numpy(ids)
        labels = tokens.masked_fill(torch.from_numpy(mask) == 0, -100)[:, 1:]
        logits = model(input_ids=tokens, attention_mask=torch.from_numpy(mask), use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def peak_bytes(model: str, tokens: int) -> int:
    """VmHWM of a fresh process that plans on ``tokens`` tokens."""
    command = [sys.executable, __file__, model, "--peak-only", "--tokens", str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--peak-only", action="store_true")
    parser.add_argument("-o", "--output")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    batches = CalibrationSet.builtin(max_tokens=arguments.tokens).encode(loaded.tokenizer)
    if arguments.peak_only:
        plan_once(loaded, batches)
        print(_high_water_mark())
        return
    plan_once(loaded, batches)  # warm-up
    forward_backward_once(loaded, batches)
    planning, plain = [], []
    for _ in range(arguments.cycles):
        planning.append(plan_once(loaded, batches))
        plain.append(forward_backward_once(loaded, batches))
        plain.append(forward_backward_once(loaded, batches))
        planning.append(plan_once(loaded, batches))
    ratios = np.array(planning) / np.array(plain)
    small = peak_bytes(arguments.model, arguments.tokens)
    large = peak_bytes(arguments.model, _GROWTH * arguments.tokens)
    result: dict[str, Any] = {
        "schema": "planning-cost/1",
        "model": loaded.source.to_json(),
        "tokens": batches.n_tokens,
        "planning_s": planning,
        "forward_backward_s": plain,
        "time_ratio": {"median": float(np.median(ratios)), "pairs": ratios.tolist()},
        "peak_host_bytes": {"tokens": small, f"{_GROWTH} x tokens": large, "ratio": large / small, "probe": "VmHWM"},
        "environment": collect_environment(),
    }
    if arguments.output:
        _io.write_json(Path(arguments.output), result)
    print(json.dumps({key: result[key] for key in ("tokens", "time_ratio", "peak_host_bytes")}, indent=2))


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM; this measurement needs Linux")


if __name__ == "__main__":
    main()

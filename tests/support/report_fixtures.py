"""The files of one invented run of a 30-layer model, with numbers of the size real ones have.

Results and comparison go through the harness's own types, so a change of their format shows up in the report's tests.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sglp_bench.judge.compare import compare_results
from sglp_bench.result import BenchmarkResult
from sglp_deploy.parity.bounds import thresholds_for

Json = dict[str, Any]

N_LAYERS = 30
SEGMENTS = [[0, 2], [2, 9], [9, 15], [15, 21], [21, 28], [28, 30]]
DROP = [6, 11, 13, 18, 24, 25]
LABELS = ("baseline", "pruned", "control")


def digest(text: str) -> str:
    """A plausible digest."""
    return hashlib.sha256(text.encode()).hexdigest()


def plan_json() -> Json:
    """plan/1: a graded similarity with six segments, importance over two decades."""
    rng = np.random.default_rng(1)
    depth = np.arange(N_LAYERS)
    segment = np.searchsorted([end for _, end in SEGMENTS], depth, side="right")
    distance = np.abs(depth[:, None] - depth[None, :])
    apart = np.abs(segment[:, None] - segment[None, :])
    noise = rng.normal(0, 0.004, (N_LAYERS, N_LAYERS))
    similarity = np.clip(1 - 0.012 * distance - 0.075 * apart + (noise + noise.T) / 2, 0.3, 1)
    np.fill_diagonal(similarity, 1)
    importance = 0.9 * np.exp(-((depth - 1) / 5.0)) + 0.05 + 0.02 * rng.random(N_LAYERS)
    importance[DROP] *= 0.25
    importance[-2:] *= 5
    influence = 0.02 + 0.2 * rng.random(N_LAYERS)
    losses = 6.0 * np.exp(-np.arange(N_LAYERS) / 2.4)
    losses[-1] = 0
    return {
        "schema": "plan/1",
        "method": "sglp",
        "n_layers": N_LAYERS,
        "keep": [layer for layer in range(N_LAYERS) if layer not in DROP],
        "drop": DROP,
        "segments": SEGMENTS,
        "segment_losses": losses.tolist(),
        "scores": {"grad-norm": importance.tolist(), "block-influence": influence.tolist()},
        "criterion": "grad-norm",
        "similarity": similarity.tolist(),
        "quota": "global",
        "budget": {"drop": 6},
        "model": {
            "id": "HuggingFaceTB/SmolLM2-135M",
            "fingerprint": digest("model"),
            "config_digest": digest("config"),
            "gguf_file": None,
            "parameters": 134_515_008,
        },
        "calibration": {"digest": digest("text"), "n_samples": 16, "n_tokens": 4096, "source": "wikitext2_valid.txt"},
        "compensation": None,
        "seed": 0,
        "versions": {"python": "3.11.2", "sglp-deploy": "0.1.0", "numpy": "2.3.5"},
        "elapsed_s": {"calibration": 41.2, "similarity": 0.02, "segmentation": 0.004},
        "options": {"n_segments": None, "profile": "row_sum"},
    }


def manifest_json(n_layers: int, weight_bytes: int) -> Json:
    """artifact/1."""
    return {
        "schema": "artifact/1",
        "format": "onnx",
        "files": {"model.onnx": {"sha256": digest(f"graph{n_layers}"), "bytes": weight_bytes + 812_345}},
        "inputs": [],
        "outputs": [],
        "precision": "fp32",
        "weight_bytes": weight_bytes,
        "n_layers": n_layers,
        "plan_digest": digest(f"plan{n_layers}"),
        "model": {"id": "HuggingFaceTB/SmolLM2-135M", "fingerprint": digest("model")},
        "derived_from": None,
        "producer": {"sglp-deploy": "0.1.0", "onnx": "1.21.0"},
        "details": {},
    }


def parity_json(*, passed: bool = True, artifact_digest: str = digest("pruned")) -> Json:
    """parity/1 with three cases; a failing one has its culprit in the last case."""
    cases = []
    for index, (name, positions) in enumerate(
        (("prompt-64", 64), ("past-the-window", 2176), ("left-padded-batch", 96))
    ):
        bad = not passed and index == 2
        cases.append(
            {
                "name": name,
                "passed": not bad,
                "positions": positions,
                "statistics": {
                    "max_abs": 4.81 if bad else 3.1e-5 * (index + 1),
                    "max_abs_median": 6.2e-6,
                    "kl_median": 1.2e-12,
                    "kl_p99": 8.1e-11,
                    "kl_max": 0.92 if bad else 3.4e-10,
                    "cosine_min": 0.81 if bad else 0.99999997,
                    "top1_stable": 0.61 if bad else 1.0,
                    "top1_unstable": 0.9,
                    "n_stable": positions - 3,
                    "n_unstable": 3,
                },
                "worst": {
                    "row": 0,
                    "phase": "prefill",
                    "position": positions - 5,
                    "token": 1201 + index,
                    "max_abs": 4.81 if bad else 3.1e-5,
                },
                "last_position_max_abs": 0.0,
                "greedy": {"tokens": 32, "equal_tokens": 3 if bad else 32, "departures": []},
            }
        )
    return {
        "schema": "parity/1",
        "artifact_digest": artifact_digest,
        "format": "onnx",
        "runner": "onnxruntime 1.31.0 (CPU)",
        "reference": "torch 2.13 float32",
        "precision": "fp32",
        "passed": passed,
        "reasons": [] if passed else ["left-padded-batch: KL of 0.92 nats at position 91 is above the threshold 1e-4"],
        "thresholds": asdict(thresholds_for("fp32")),
        "noise_floor": {"max_abs": 2.4e-5, "kl_p99": 7.1e-11, "kl_max": 2.1e-10},
        "cases": cases,
    }


def result_json(*, decode_gain: float = 1.19, prefill_gain: float = 1.23, spread: float = 0.012) -> Json:
    """result/1: three arms, four mirrored cycles, raw samples in seconds."""
    rng = np.random.default_rng(7)
    arms: Json = {
        label: {"artifact": _artifact_facts(label), "blocks": [], "memory": _memory(label)} for label in LABELS
    }
    index = 0
    for cycle in range(4):
        for half in (0, 1):
            for label in LABELS if half == 0 else LABELS[::-1]:
                gains = (decode_gain, prefill_gain) if label == "pruned" else (1.0, 1.0)
                place = 1 + rng.normal(0, spread)

                def draw(middle: float, size: tuple[int, ...], place: float = place) -> list[Any]:
                    tail = np.where(rng.random(size) < 0.02, rng.random(size) * 0.6, 0)
                    times = middle * place * (1 + np.abs(rng.normal(0, 0.03, size)) + tail)
                    return list(times.tolist())

                block = {
                    "index": index,
                    "cycle": cycle,
                    "half": half,
                    "load_s": 0.8,
                    "samples": {
                        "prefill_s": draw(0.118 / gains[1], (6,)),
                        "decode_s": draw(0.0214 / gains[0], (5, 32)),
                    },
                    "warm_up": {"prefill_s": [0.3, 0.2], "decode_s": [[0.05] * 32, [0.03] * 32], "settled": True},
                    "conditions": {"start": {"load_average_1min": 1.1}, "end": {}},
                }
                arms[label]["blocks"].append(block)
                index += 1
    workload = {
        "name": "decode-small", "batch_size": 1, "prompt_tokens": 64, "decode_tokens": 32, "warmup_max": 10,
        "prefill_repeats": 6, "decode_repeats": 5, "cycles": 4, "seed": 0, "threads": 2, "device": "cpu",
    }  # fmt: skip
    return {
        "schema": "result/1",
        "workload": workload,
        "workload_digest": digest("workload"),
        "baseline": "baseline",
        "control": "control",
        "vocab_size": 49152,
        "environment": {"cpu_model": "Intel(R) Xeon(R) Platinum 8481C", "cpus_usable": 2, "gpus": None},
        "arms": arms,
    }


def _artifact_facts(label: str) -> Json:
    n_layers, weight_bytes = (24, 452_900_000) if label == "pruned" else (30, 538_060_032)
    return {
        "digest": digest("pruned" if label == "pruned" else "baseline"),
        "format": "onnx",
        "precision": "fp32",
        "n_layers": n_layers,
        "weight_bytes": weight_bytes,
        "artifact_bytes": weight_bytes + 812_345,
        "plan_digest": digest(f"plan{n_layers}"),
        "model_id": "HuggingFaceTB/SmolLM2-135M",
        "model_fingerprint": digest("model"),
    }


def _memory(label: str) -> Json:
    peak = 903_000_000 if label == "pruned" else 1_081_000_000
    return {
        "host_idle": {"probe": "VmRSS", "bytes": 61_000_000, "note": None},
        "host_peak": {"probe": "VmHWM", "bytes": peak, "note": None},
    }


def comparison_json(result: Json, ceilings: dict[str, float] | None = None) -> Json:
    """comparison/1 as the harness makes it."""
    known = ceilings or {"decode_latency_s_per_token": 1.19, "prefill_latency_s": 1.25}
    comparison = compare_results(BenchmarkResult.from_json(result), candidate="pruned", resamples=500)
    return comparison.with_ceilings(known).to_json()


def quality_json() -> Json:
    """quality/1."""
    return {
        "schema": "quality/1",
        "protocol": {
            "text": "wikitext2_test.txt", "text_digest": digest("test"), "chunk_tokens": 1024, "n_chunks": 8,
            "n_tokens": 8184,
        },
        "dense": {"perplexity": 23.61, "nats_per_token": 3.1617},
        "pruned": {"perplexity": 58.92, "nats_per_token": 4.0762},
        "ratio": 58.92 / 23.61,
    }  # fmt: skip


def provenance_json() -> Json:
    """What a run folder records about itself."""
    return {
        "versions": {"python": "3.11.2", "sglp-deploy": "0.1.0", "torch": "2.13.0+cpu", "onnxruntime": "1.31.0"},
        "machine": {
            "cpu": "Intel(R) Xeon(R) Platinum 8481C",
            "cpus": 2,
            "system": "Linux x86_64",
            "ram_bytes": 8 << 30,
        },
        "command": "sglp-deploy run HuggingFaceTB/SmolLM2-135M --drop 6 --to onnx -o runs/demo",
        "created": "2026-09-14T10:22:31+00:00",
        "seed": 0,
        "stages": [
            {"name": "plan", "state": "done", "elapsed_s": 41.3},
            {"name": "export onnx", "state": "done", "elapsed_s": 63.0},
            {"name": "bench onnx", "state": "done", "elapsed_s": 402.5},
        ],
    }


def run_inputs(*, parity_passed: bool = True, **result_options: float) -> Json:
    """Keyword arguments of a whole ``RunReport``."""
    result = result_json(**result_options)
    return copy.deepcopy(
        {
            "plan": plan_json(),
            "artifacts": [
                {"name": "onnx-baseline", "manifest": manifest_json(30, 538_060_032), "digest": digest("baseline")},
                {"name": "onnx", "manifest": manifest_json(24, 452_900_000), "digest": digest("pruned")},
            ],
            "parity": {"onnx": parity_json(passed=parity_passed)},
            "comparisons": {"onnx": comparison_json(result)},
            "quality": quality_json(),
            "results": {"onnx": result},
            "provenance": provenance_json(),
            "checkpoint": {"parameters": 113_272_704, "dense_parameters": 134_515_008},
        }
    )


def write_run_folder(root: Path) -> None:
    """The files of a finished run of one ONNX export."""
    result = result_json()
    files = {
        "run.json": {
            "schema": "run/1",
            "title": "demo: 30 to 24 layers",
            **provenance_json(),
            "stages": {"plan": {"key": "k", "state": "done", "elapsed_s": 41.0}},
            "checkpoint": {"parameters": 113_272_704, "dense_parameters": 134_515_008},
        },
        "plan.json": plan_json(),
        "quality.json": quality_json(),
        "checkpoint/manifest.json": manifest_json(24, 452_900_000) | {"format": "torch"},
        "artifacts/onnx/manifest.json": manifest_json(24, 452_900_000),
        "artifacts/onnx-baseline/manifest.json": manifest_json(30, 538_060_032),
        "parity/onnx.json": parity_json(),
        "bench/onnx/result.json": result,
        "bench/onnx/comparison.json": comparison_json(result),
    }  # fmt: skip
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value))

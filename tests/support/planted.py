"""Layer statistics whose right answer is known because it was planted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglp_deploy.evidence.statistics import LayerStats

MODEL = {"id": "planted", "fingerprint": "f" * 8, "config_digest": "c" * 8, "gguf_file": None}


def block_matrix(sizes: Sequence[int], inside: float = 0.95, outside: float = 0.3) -> np.ndarray:
    """A similarity matrix of contiguous groups; positive definite for 0 <= outside <= inside < 1."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    values = np.where(group[:, None] == group[None, :], inside, outside)
    np.fill_diagonal(values, 1.0)
    return values


def planted_stats(sizes: Sequence[int] = (2, 4, 6), **changes: Any) -> LayerStats:
    """Statistics of ``sum(sizes)`` layers in groups; HSIC carries a scale per layer that CKA must divide out."""
    similarity = block_matrix(sizes)
    n = len(similarity)
    scale = np.linspace(1.0, 5.0, n)
    ramp = np.arange(n, dtype=np.float64)
    facts: dict[str, Any] = {
        "layer_names": tuple(f"layers.{index}" for index in range(n)),
        "prunable": (True,) * n,
        "parameters": np.full(n, 100, dtype=np.int64),
        "other_parameters": 1000,
        "hsic_unbiased": similarity * np.outer(scale, scale),
        "hsic_biased": (0.5 * similarity + 0.5) * np.outer(scale, scale),
        "cka_batch_mean": 0.9 * similarity + 0.1 * np.eye(n),
        "cosine": 1.0 - (ramp + 1) / 100,
        "grad_l2": ramp + 1,
        "grad_weight_sum": ramp + 2,
        "grad_output": ramp + 3,
        "taylor": ramp + 4,
        "loss": 3.5,
        "n_samples": 8,
        "n_tokens": 512,
        "n_rows": 256,
        "options": {"rows": "rms", "skip_positions": 1},
        "elapsed_s": 1.25,
    }
    return LayerStats(**(facts | changes))

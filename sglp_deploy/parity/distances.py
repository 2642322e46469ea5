"""How far apart two outputs are, position by position, and what a certificate says of all positions together.

Arrays are (n, width) in float64: a vector of n positions, the reference first.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]


def first_not_finite(wanted: Vectors, got: Vectors) -> tuple[str, int, int] | None:
    """The side ("reference" or "artifact"), position and index of the first NaN or infinity; None without one."""
    for name, side in (("reference", wanted), ("artifact", got)):
        if not np.isfinite(side).all():
            position, index = np.argwhere(~np.isfinite(side))[0]
            return name, int(position), int(index)
    return None


def log_softmax(x: Vectors) -> Vectors:
    """Logarithm of the probabilities that logits of shape (..., vocabulary) stand for."""
    shifted = x - x.max(-1, keepdims=True)
    return cast("Vectors", shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def kl_divergence(wanted: Vectors, got: Vectors) -> Vectors:
    """KL(reference || artifact) of each position's logits (n), nats."""
    log_p, log_q = log_softmax(wanted), log_softmax(got)
    # Rounding can leave a tiny negative sum; KL is not negative.
    return cast("Vectors", np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0))


def cosine(wanted: Vectors, got: Vectors) -> Vectors:
    """Cosine between the two vectors of each position (n)."""
    norms = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(got, axis=-1)
    # Two zero vectors agree; a zero against anything else does not.
    same = (wanted == got).all(-1).astype(np.float64)
    return cast("Vectors", np.divide((wanted * got).sum(-1), norms, out=same, where=norms > 0))


def largest_difference(wanted: Vectors, got: Vectors) -> Vectors:
    """Greatest difference of any value of each position (n)."""
    return cast("Vectors", np.abs(wanted - got).max(-1))


def margins(logits: Vectors) -> Vectors:
    """Gap between the best two logits of each position (n): how sure it is of its choice."""
    top_two = np.partition(logits, -2, axis=-1)
    return top_two[:, -1] - top_two[:, -2]


def same_choice(wanted: Vectors, got: Vectors) -> NDArray[np.bool_]:
    """Whether the best logit of each position is the same one (n)."""
    return np.asarray(wanted.argmax(-1) == got.argmax(-1))


def kl_statistics(kl: Vectors) -> dict[str, float]:
    """Median, 99th percentile and maximum of :func:`kl_divergence`, as a certificate holds them."""
    return {
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
    }


def choice_statistics(gaps: Vectors, agree: NDArray[np.bool_], margin: float) -> dict[str, Any]:
    """Share of positions that choose the same, among those the reference is sure of and among the others.

    Args:
        gaps: From :func:`margins`, of the reference.
        agree: From :func:`same_choice`.
        margin: A position counts as stable above it.
    """
    stable = gaps > margin
    return {
        "n_stable": int(stable.sum()),
        "n_unstable": int((~stable).sum()),
        "top1_stable": float(agree[stable].mean()) if stable.any() else None,
        "top1_unstable": float(agree[~stable].mean()) if (~stable).any() else None,
    }

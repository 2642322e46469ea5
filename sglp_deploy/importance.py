"""What each layer is worth: one finite number per layer, low meaning "drop first", under a name a plan can record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import CalibrationError
from sglp_deploy.evidence.statistics import LayerStats


@dataclass(frozen=True, eq=False)
class ImportanceScores:
    """Importance of every layer under one criterion; the lowest is dropped first.

    Attributes:
        values: shape (L,), float64, finite, in the criterion's own unit; read-only.
        criterion: Name of the criterion, "grad-norm" for example.

    Raises:
        CalibrationError: If the values are not one finite number per layer.
    """

    values: NDArray[np.float64]
    criterion: str

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.ndim != 1 or not values.size:
            raise CalibrationError(
                f"{self.criterion} scores have shape {values.shape}; one number per layer is needed; pass shape (L,)"
            )
        for layer in np.flatnonzero(~np.isfinite(values)):
            raise CalibrationError(
                f"the {self.criterion} score of layer {layer} is {values[layer]}; layers cannot be ranked by it; "
                "check the weights and the calibration loss for NaN or overflow"
            )
        values.setflags(write=False)
        object.__setattr__(self, "values", values)


# GradNorm definition -> (field of LayerStats, criterion name).
GRAD_NORM_DEFINITIONS: Final[Mapping[str, tuple[str, str]]] = {
    "parameter_l2": ("grad_l2", "grad-norm"),
    "weight_sum": ("grad_weight_sum", "grad-norm-weight-sum"),
    "output": ("grad_output", "grad-norm-output"),
}


def grad_norm_scores(stats: LayerStats, definition: str = "parameter_l2") -> ImportanceScores:
    """GradNorm of each layer on the pretrained weights, a mean over minibatches.

    Three things go by this name; a plan records which.  None of them is the multi-task GradNorm of Chen et al. (2018).

    Args:
        stats: The streamed statistics.
        definition: "parameter_l2": L2 norm of the loss gradient in all parameters of the layer.  "weight_sum": sum
            of the norms of each weight matrix's gradient, biases and norms excluded.  "output": Frobenius norm of the
            loss gradient in the layer's output, which depends on batch and sequence length.

    Raises:
        ConfigError: If the definition is unknown.

    Source:
        SGLP (arXiv:2410.14720) names GradNorm without its formula in the abstract.  parameter_l2: the proxy of its
        ancestor's code (arXiv:2406.07929), per layer instead of per network; weight_sum: zero-cost NAS
        (arXiv:2101.08134); output: a language-model script of the same method.
    """
    if definition not in GRAD_NORM_DEFINITIONS:
        raise unknown_name("GradNorm definition", definition, GRAD_NORM_DEFINITIONS)
    field, criterion = GRAD_NORM_DEFINITIONS[definition]
    return ImportanceScores(stats.need(field), criterion)


def block_influence_scores(stats: LayerStats) -> ImportanceScores:
    """Block Influence, 1 - mean over tokens of cos(h_l, h_{l+1}): how far a layer turns the residual stream.

    Source:
        ShortGPT (arXiv:2403.03853), equation 1.
    """
    return ImportanceScores(1.0 - stats.need("cosine"), "block-influence")


def taylor_scores(stats: LayerStats) -> ImportanceScores:
    """First-order loss change from zeroing a layer: sum of |w * dloss/dw|, a mean over minibatches.

    Source:
        Shortened LLaMA (arXiv:2402.02834), the "Taylor" criterion; its "+" variant also protects the first four and
        last two layers, which here is the caller's choice (``prunable``).
    """
    return ImportanceScores(stats.need("taylor"), "taylor")


CRITERIA: Final[Mapping[str, Callable[[LayerStats], ImportanceScores]]] = {
    "grad-norm": grad_norm_scores,
    "grad-norm-weight-sum": lambda stats: grad_norm_scores(stats, "weight_sum"),
    "grad-norm-output": lambda stats: grad_norm_scores(stats, "output"),
    "block-influence": block_influence_scores,
    "taylor": taylor_scores,
}


# The probe that each criterion reads; see :mod:`sglp_deploy.evidence.probes`.
PROBE_OF: Final[Mapping[str, str]] = dict.fromkeys(CRITERIA, "gradients") | {"block-influence": "cosine"}


def score(stats: LayerStats, criterion: str = "grad-norm") -> ImportanceScores:
    """Score every layer by the criterion of that name (see ``CRITERIA``).

    Raises:
        ConfigError: If the criterion is unknown; the message has the nearest match and the list.
    """
    if criterion not in CRITERIA:
        raise unknown_name("criterion", criterion, CRITERIA)
    return CRITERIA[criterion](stats)

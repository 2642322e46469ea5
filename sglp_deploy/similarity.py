"""How alike two layers are: linear centred kernel alignment, and the matrix of it that segmentation cuts.

The functions on arrays are the reference that the streaming pass over a model is tested against.  A plan itself is made
from the sums that pass leaves behind (:meth:`SimilarityMatrix.from_stats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ArtifactError, CalibrationError, ConfigError
from sglp_deploy.evidence.hsic import gram, hsic_terms
from sglp_deploy.evidence.statistics import LayerStats

SCHEMA: Final = "similarity/1"  # history: 1 = first

# Estimator name -> field of LayerStats whose sums it is made of.
ESTIMATORS: Final[Mapping[str, str]] = {
    "unbiased": "hsic_unbiased",
    "biased": "hsic_biased",
    "mean_of_ratios": "cka_batch_mean",
}

# |CKA| <= 1 by Cauchy-Schwarz, for sums over minibatches too; float32 Gram matrices overshoot by about 1e-6.
_OVERSHOOT: Final = 1e-4
_EPS: Final = float(np.finfo(np.float64).eps)


def linear_cka(x: ArrayLike, y: ArrayLike, unbiased: bool = True) -> float:
    """Linear CKA between two representations of the same n rows.

    Invariant to rotation, isotropic scaling and shift of either side, but not to an arbitrary invertible map.

    Args:
        x: shape (n, d1), one row per sample or token.
        y: shape (n, d2), the same rows in the same order.
        unbiased: Divide unbiased HSIC values; with few rows the biased estimate is near 1 for unrelated data.

    Returns:
        CKA, unitless: in [0, 1] when biased; in [-1, 1] and about 0 for unrelated data when unbiased.

    Raises:
        ConfigError: If a shape is not (n, d), the row counts differ, or n < 4.
        CalibrationError: If a side is not finite, or its rows are all alike, so that its own HSIC is zero.

    Source:
        Kornblith et al. (2019), arXiv:1905.00414; unbiased: Nguyen et al. (2021), arXiv:2010.15327.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (x, y)]
    if any(side.ndim != 2 for side in sides) or len(sides[0]) != len(sides[1]):
        raise ConfigError(
            f"x has shape {sides[0].shape} and y {sides[1].shape}; CKA compares the same n rows; "
            "pass (n, d1) and (n, d2)"
        )
    grams = []
    for name, side in zip("xy", sides, strict=True):
        if not np.isfinite(side).all():
            raise CalibrationError(f"{name} holds NaN or infinity; CKA needs finite values; check what produced it")
        # HSIC ignores a shift; removing it first keeps the digits when the mean is large against the spread.
        grams.append(gram(side - side.mean(axis=0)))
    unbiased_terms, biased_terms = hsic_terms(np.stack(grams))
    terms = unbiased_terms if unbiased else biased_terms
    n = len(sides[0])
    for index, (name, side) in enumerate(zip("xy", sides, strict=True)):
        # What rounding alone leaves of a constant side: relative deviations of a few eps, squared by the Gram matrix.
        noise = ((8 * _EPS) ** 2 * float((side**2).sum()) / n) ** 2
        if terms[index, index] <= noise:
            raise CalibrationError(
                f"{name} does not vary over its {n} rows (its own HSIC is {terms[index, index]:.3g}); CKA divides by "
                "it; pass rows that differ"
            )
    return float(terms[0, 1] / np.sqrt(terms[0, 0]) / np.sqrt(terms[1, 1]))


@dataclass(frozen=True, eq=False)
class SimilarityMatrix:
    """CKA between every two layers, as measured.

    Negative values are kept: an unbiased estimate of zero is as often below as above it, and cutting it off would
    raise the row sums of unrelated layers.  A value beyond 1 in size can only be rounding (Cauchy-Schwarz holds for
    sums over minibatches too), so up to 1e-4 it is clamped; more is refused.

    Attributes:
        values: shape (L, L), float64, symmetric, unit diagonal, in [-1, 1]; read-only.
        estimator: "unbiased", "biased" or "mean_of_ratios".

    Raises:
        CalibrationError: If the matrix is not square, finite, symmetric, of unit diagonal and within [-1, 1].
        ConfigError: If the estimator is unknown.
    """

    values: NDArray[np.float64]
    estimator: str

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise unknown_name("CKA estimator", self.estimator, ESTIMATORS)
        values = np.array(self.values, dtype=np.float64)
        fault = None
        if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
            fault = f"it has shape {values.shape} and not (L, L)"
        elif not np.isfinite(values).all():
            fault = "it holds NaN or infinity"
        elif not np.allclose(values, values.T, rtol=0, atol=1e-6):
            fault = "it is not symmetric"
        elif not np.allclose(np.diag(values), 1.0, rtol=0, atol=1e-6):
            fault = "its diagonal is not 1"
        elif float(np.abs(values).max()) > 1 + _OVERSHOOT:
            row, column = (int(index) for index in np.unravel_index(np.abs(values).argmax(), values.shape))
            fault = f"layers {row} and {column} have {values[row, column]:.6g}, beyond 1 by more than rounding"
        if fault:
            raise CalibrationError(f"this is no CKA matrix; {fault}; make it with SimilarityMatrix.from_stats")
        values = np.clip((values + values.T) / 2, -1.0, 1.0)
        np.fill_diagonal(values, 1.0)
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return len(self.values)

    @classmethod
    def from_stats(cls, stats: LayerStats, estimator: str = "unbiased") -> SimilarityMatrix:
        """Turn streamed sums into CKA.

        ``unbiased`` and ``biased`` divide HSIC summed over minibatches by the geometric mean of the summed self-terms
        (ratio of sums, Nguyen et al. 2021); ``mean_of_ratios`` takes the mean of each minibatch's own unbiased CKA, as
        the code of SGLP's ancestor does.

        Raises:
            CalibrationError: If a layer's own HSIC is not positive; the message names the layer.
            ConfigError: If the estimator is unknown.
        """
        if estimator not in ESTIMATORS:
            raise unknown_name("CKA estimator", estimator, ESTIMATORS)
        sums = stats.need("hsic_biased" if estimator == "biased" else "hsic_unbiased")
        own = np.diag(sums)
        for layer in np.flatnonzero(own <= 0):
            raise CalibrationError(
                f"layer {layer} ({stats.layer_names[layer]}) has a self-HSIC of {own[layer]:.3g}; its output does not "
                "vary over the calibration rows, so its similarity to other layers is undefined; calibrate on more or "
                "more varied samples, or check the layer's weights"
            )
        if estimator == "mean_of_ratios":
            values = stats.need("cka_batch_mean").copy()
        else:
            root = np.sqrt(own)
            values = sums / root[:, None] / root[None, :]
        np.fill_diagonal(values, 1.0)  # in a mean of ratios the diagonal is 1 by definition, as in that code
        return cls(values, estimator)

    def to_json(self) -> dict[str, Any]:
        """The matrix as JSON values, with its schema."""
        return {"schema": SCHEMA, "estimator": self.estimator, "values": self.values.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SimilarityMatrix:
        """Inverse of :meth:`to_json`.

        Raises:
            ArtifactError: If the schema is unknown, or a field is missing or mistyped.
        """
        if value.get("schema") != SCHEMA:
            raise ArtifactError(
                f"the similarity matrix has schema {value.get('schema')!r}; this version reads {SCHEMA!r}; "
                "make it again"
            )
        try:
            return cls(np.asarray(value["values"], dtype=np.float64), value["estimator"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the similarity matrix lacks or mistypes a field; {error!r}; make it again") from error

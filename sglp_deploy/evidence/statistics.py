"""What one streaming pass over the calibration text leaves behind: everything a planner needs, none of it per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.errors import ArtifactError, CalibrationError

_MATRICES = ("hsic_unbiased", "hsic_biased", "cka_batch_mean")
_VECTORS = ("cosine", "grad_l2", "grad_weight_sum", "grad_output", "taylor")
MEASURED = (*_MATRICES, *_VECTORS)  # the fields that probes fill


@dataclass(frozen=True)
class LayerStats:
    """Sums over the calibration set, per layer or per pair of layers.

    L layers; layer ``l`` maps the residual stream ``h_l`` to ``h_{l+1}``; a layer's representation is its output.  A
    field whose probe was not asked for is None; :meth:`need` is the way to read one.

    Attributes:
        layer_names: Qualified module names, in order (L).
        prunable: Whether the layer may be removed (L).
        parameters: Parameters in each layer (L), int64.
        other_parameters: Parameters outside the layers, tied ones counted once.
        hsic_unbiased: Unbiased linear HSIC (Song et al. 2012) summed over minibatches (L, L).
        hsic_biased: Biased linear HSIC summed over minibatches (L, L).
        cka_batch_mean: Mean over minibatches of the unbiased CKA of each (L, L), as the ancestor code of SGLP does.
        cosine: Mean over tokens of cos(h_l, h_{l+1}) (L); Block Influence is one minus this.
        grad_l2: Mean over minibatches of the L2 norm of the loss gradient in all parameters of the layer (L).
        grad_weight_sum: Mean over minibatches of the sum, over the layer's weight matrices, of each one's gradient
            norm (L); biases and norms excluded.
        grad_output: Mean over minibatches of the Frobenius norm of the loss gradient in the layer's output (L).
        taylor: Mean over minibatches of sum |w * dloss/dw| over the layer's parameters (L).
        loss: Mean loss of the task on the calibration set, nats per prediction.
        n_samples: Sequences seen.
        n_tokens: Tokens seen, padding excluded.
        n_rows: Rows that entered the similarity, over all minibatches.
        more: What probes left that have no field here, by name, each (L) or (L, L).
        options: How rows were made: ``rows`` ("rms" or "raw"), ``skip_positions``, ``rows_per_batch``, ``seed``.
        elapsed_s: Wall time of the pass.
    """

    layer_names: tuple[str, ...]
    prunable: tuple[bool, ...]
    parameters: NDArray[np.int64]
    other_parameters: int
    loss: float
    n_samples: int
    n_tokens: int
    n_rows: int
    hsic_unbiased: NDArray[np.float64] | None = None
    hsic_biased: NDArray[np.float64] | None = None
    cka_batch_mean: NDArray[np.float64] | None = None
    cosine: NDArray[np.float64] | None = None
    grad_l2: NDArray[np.float64] | None = None
    grad_weight_sum: NDArray[np.float64] | None = None
    grad_output: NDArray[np.float64] | None = None
    taylor: NDArray[np.float64] | None = None
    more: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def __post_init__(self) -> None:
        n_layers = len(self.layer_names)
        measured = self.measured
        for name in ("prunable", "parameters", *(name for name in _VECTORS if name in measured)):
            if np.shape(getattr(self, name)) != (n_layers,):
                raise ValueError(f"{name} has shape {np.shape(getattr(self, name))}, expected {(n_layers,)}")
        for name in (name for name in _MATRICES if name in measured):
            value = measured[name]
            if value.shape != (n_layers, n_layers):
                raise ValueError(f"{name} has shape {value.shape}, expected {(n_layers, n_layers)}")
            if not np.allclose(value, value.T, rtol=1e-6, atol=1e-12, equal_nan=True):
                raise ValueError(f"{name} is not symmetric")
        for name, value in measured.items():
            bad = ~np.isfinite(value)
            if bad.any():
                layer = int(np.argwhere(bad)[0][-1])
                raise CalibrationError(
                    f"{name} of layer {layer} ({self.layer_names[layer]}) is not finite; the weights or activations "
                    "hold NaN or overflow; check the checkpoint, or calibrate in float32"
                )

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return len(self.layer_names)

    @property
    def measured(self) -> dict[str, NDArray[np.float64]]:
        """What probes left, by name."""
        found = {name: getattr(self, name) for name in MEASURED}
        return {name: value for name, value in found.items() if value is not None} | dict(self.more)

    def need(self, name: str) -> NDArray[np.float64]:
        """What a probe left under ``name``, shape (L,) or (L, L).

        Raises:
            CalibrationError: If no probe has taken it.
        """
        measured = self.measured
        if name not in measured:
            raise CalibrationError(
                f"the statistics lack {name}; its probe was not asked for; take them again with the probe that has it"
            )
        return measured[name]

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON values, without a schema (a run folder caches it beside the plan)."""
        return {
            item.name: value.tolist() if isinstance(value := getattr(self, item.name), np.ndarray) else value
            for item in fields(self)
        } | {"more": {name: value.tolist() for name, value in self.more.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerStats:
        """Inverse of :meth:`to_json`.

        Raises:
            ArtifactError: If a field is missing, mistyped or of the wrong length.
            CalibrationError: If a value is not finite.
        """
        try:
            facts: dict[str, Any] = {
                name: None if value[name] is None else np.asarray(value[name], dtype=np.float64) for name in MEASURED
            }
            facts["more"] = {name: np.asarray(each, dtype=np.float64) for name, each in value["more"].items()}
            facts |= {name: int(value[name]) for name in ("other_parameters", "n_samples", "n_tokens", "n_rows")}
            facts |= {name: float(value[name]) for name in ("loss", "elapsed_s")}
            facts["layer_names"] = tuple(map(str, value["layer_names"]))
            facts["prunable"] = tuple(map(bool, value["prunable"]))
            facts["parameters"] = np.asarray(value["parameters"], dtype=np.int64)
            facts["options"] = dict(value["options"])
            return cls(**facts)
        except KeyError as error:
            raise ArtifactError(f"the statistics lack {error}; the file is not complete; calibrate again") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"a field of the statistics is wrong; {error}; calibrate again") from error


@dataclass(frozen=True)
class GapDamage:
    """What every gap of consecutive layers costs after the layer before it is fitted to make up for it.

    The cost is the mean KL divergence of the predictions from the unpruned model's, in nats per prediction.  On few
    tokens it is far less noisy than a difference of losses.

    Attributes:
        values: Shape (L, longest): row ``b``, column ``n - 1`` is for layers ``b`` to ``b + n - 1``; infinite where
            there are no such layers.
        judged: Which of these were measured, same shape; the others go on as the last measured step of their row.
        n_tokens: Tokens that judge.
    """

    values: NDArray[np.float64]
    judged: NDArray[np.bool_]
    n_tokens: int


def gaps_of(drop: Sequence[int]) -> list[tuple[int, int]]:
    """First layer and length of each run of consecutive layers, in order."""
    gaps: list[tuple[int, int]] = []
    for layer in sorted(set(drop)):
        if gaps and sum(gaps[-1]) == layer:
            gaps[-1] = (gaps[-1][0], gaps[-1][1] + 1)
        else:
            gaps.append((layer, 1))
    return gaps

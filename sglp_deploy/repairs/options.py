"""What a caller may ask of each repair; read without torch, so that a run with nothing to do does not load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sglp_deploy._names import precision_faults
from sglp_deploy.errors import ConfigError


def _check(ridge: float | None, precision: str) -> None:
    faults = precision_faults(precision)
    if ridge is not None and not ridge > 0:
        faults.append(
            f"ridge={ridge} must be above 0; it is a pull towards the old weights; leave it out to have it chosen on "
            "held-out rows"
        )
    if faults:
        raise ConfigError(faults)


@dataclass(frozen=True)
class RefitOptions:
    """What a caller may ask of :class:`sglp_deploy.repairs.refit.Refit`.

    Attributes:
        ridge: Pull towards the old weights, in units of the mean squared activation; chosen on held-out rows when None.
        attention: Whether attention's output projection is fitted too, before the MLP's.
        later: Whether the MLPs of all layers behind the first gap are fitted, each to its own unpruned output.
        precision: What the model's matrices are multiplied in, "fp32", "bf16" or "auto" (bf16 where the processor
            multiplies it); the sums stay float64.
    """

    ridge: float | None = None
    attention: bool = True
    later: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        _check(self.ridge, self.precision)


@dataclass(frozen=True)
class LocalOptions:
    """What a caller may ask of :class:`sglp_deploy.repairs.local.Local`.

    Attributes:
        epochs: Passes over the calibration rows for each window.
        learning_rate: Of Adam, at its highest; 0.035 / sqrt(hidden size) when None.
        window: Layers trained together, at most; the last of them stands before a gap.
        later: Whether layers behind the last gap are trained too, each window to its own unpruned output.
        seed: Order of the minibatches.
        precision: What matrices are multiplied in, as for ``refit``; weights and hidden states stay float32.
    """

    epochs: int = 2
    learning_rate: float | None = None
    window: int = 2
    later: bool = True
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        faults = [
            *precision_faults(self.precision),
            *(
                f"{name}={getattr(self, name)} must be at least 1"
                for name in ("epochs", "window")
                if getattr(self, name) < 1
            ),
        ]
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            faults.append(
                f"learning_rate={self.learning_rate} must lie between 0 and 1; another one diverges; leave it out "
                "for the default"
            )
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True)
class LinearOptions:
    """What a caller may ask of :class:`sglp_deploy.repairs.linear.Linear`.

    Attributes:
        ridge: Pull towards the identity, in units of the mean squared output; chosen on held-out rows when None.
        precision: What the model's matrices are multiplied in, "fp32", "bf16" or "auto" (bf16 where the processor
            multiplies it); the sums stay float64.
    """

    ridge: float | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        _check(self.ridge, self.precision)


@dataclass(frozen=True)
class ScaleOptions:
    """:class:`sglp_deploy.repairs.scale.Scale` takes none."""


OPTIONS: Final[Mapping[str, type]] = {
    "refit": RefitOptions,
    "local": LocalOptions,
    "linear": LinearOptions,
    "scale": ScaleOptions,
}

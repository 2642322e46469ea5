"""What a repair is given and what it gives back; a new method implements :class:`Repair`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sglp_deploy.repairs.workbench import Workbench


@dataclass(frozen=True)
class Fitted:
    """What a repair did.

    Attributes:
        facts: What the plan records of it: what was fitted, with which error before and after.
        not_done: What was left as it was, and why, one sentence each.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    not_done: tuple[str, ...] = ()


class Repair(Protocol):
    """A way to change kept weights so that the pruned model comes closer to the unpruned one.

    Attributes:
        name: What users call it.
        source: The paper, or where else the rule comes from.
        Options: A frozen dataclass of what a caller may ask of it, each field with a default; its ``__post_init__`` may
            raise :class:`sglp_deploy.errors.ConfigError`.  A field ``precision`` ("auto", "fp32", "bf16") says what the
            model's matrices are multiplied in; without one it is the model's own type.
    """

    name: str
    source: str
    Options: type

    def fit(self, bench: Workbench, options: Any) -> Fitted:
        """Change weights of the bench's pruned model (:meth:`Workbench.put`); whether they help is judged afterwards.

        Raises:
            UnsupportedModelError: If it cannot be folded into a model of this family, with the reason.
            CalibrationError: If the calibration rows cannot support it.
        """
        ...

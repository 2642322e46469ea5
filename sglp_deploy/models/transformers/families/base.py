"""The few facts about a family that cannot be read off a model: declared here, one small value for each.

Most families need none.  Discovery finds the layers.  Per-layer entries are found by their length.  What must be
declared is what the code of a family does with a layer's *number*.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from sglp_deploy.models.base import ConfigChange

Config = Any  # a PretrainedConfig; transformers is not imported to declare facts

_NOTHING_PINNED: Mapping[int, str] = {}


def nothing_pinned(_config: Config, _side: str) -> Mapping[int, str]:
    """Every layer may go."""
    return _NOTHING_PINNED


def keep_first(reason: str) -> Callable[[Config, str], Mapping[int, str]]:
    """Layer 0 of every stack stays, for ``reason``."""
    return lambda _config, _side: {0: reason}


@dataclass(frozen=True)
class Family:
    """Declared facts of one ``model_type``.

    Attributes:
        pinned: (configuration, side) to the layers that cannot go and why.
        derived: (configuration, side, position) to what the library's code makes of a layer's position and no
            configuration entry can say otherwise: a kept layer must get the same value at its new position.  For a
            model in stages the position counts within the stage.
        derived_rule: What a set of kept layers must look like, for the refusal; required with ``derived``.
        not_per_layer: Configuration lists that may be as long as the depth by accident.
        not_layers: Module lists (by the end of their qualified name) that may be as long as the depth by accident.
        stages: Pattern of the stages' containers (a regular expression matched against a whole qualified name) for a
            model whose layers lie in stages; None for one plain list.
        stage_depths: Configuration entry with the number of layers of each stage.
        stage_lengths: (configuration) to those numbers where no entry holds them as they are; ``more_changes`` then
            writes the new ones.  Such a model may have all its stages in one container.
        loop: Path of the module that is run again and again in place of layers (ALBERT), or None.
        refuse: (configuration) to the reason why a model of this family cannot be pruned at all, or None.
        adjust: (pruned module, side, keep) changes what lies outside modules and configuration, such as entries of the
            generation configuration that name layers.
        reset: (module) undoes what running a model left in its modules, as if it were freshly loaded.
        more_changes: (module, side, keep) to changes that no per-layer rule finds: entries of the configuration, or of
            the generation configuration when the name begins with ``generation_config.`` (None removes the entry).
        note: For the table of families in the documentation.
    """

    pinned: Callable[[Config, str], Mapping[int, str]] = nothing_pinned
    derived: Callable[[Config, str, int], Hashable] | None = None
    derived_rule: str = ""
    not_per_layer: frozenset[str] = frozenset()
    not_layers: tuple[str, ...] = ()
    stages: str | None = None
    stage_depths: str = "depths"
    stage_lengths: Callable[[Config], Sequence[int]] | None = None
    loop: str | None = None
    refuse: Callable[[Config], str | None] = lambda _config: None
    adjust: Callable[[nn.Module, str, Sequence[int]], None] | None = None
    reset: Callable[[nn.Module], None] | None = None
    more_changes: Callable[[Any, str, Sequence[int]], Sequence[ConfigChange]] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if (self.derived is None) != (not self.derived_rule):
            raise ValueError("derived and derived_rule go together")

    def lengths(self, config: Config) -> list[int]:
        """Layers of each stage of a model in stages."""
        return list(self.stage_lengths(config) if self.stage_lengths else getattr(config, self.stage_depths))

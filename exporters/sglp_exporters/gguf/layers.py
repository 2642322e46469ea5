"""Which type of attention llama.cpp gives each layer of a family: from a list in the file, by counting, or none at all.

llama.cpp builds a family's graph in code of its own.  A window it counts out by the layer's number, or does not have,
shows only beyond the window's length.  So it is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglp_deploy.errors import UnsupportedModelError

FULL, SLIDING = "full_attention", "sliding_attention"
Formula = Callable[[int], str]

# All in this module was seen with the pinned converter and llama.cpp, on tiny models of each family whose layers were
# removed out of step.  The file holds a list made of layer_types, and llama.cpp goes by it.
_READ = frozenset({"jamba", "lfm2", "olmo3"})
# Every n-th layer attends fully, whatever the model says.
_EVERY = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}
# Every n-th layer goes without rotary positions.
_WITHOUT_ROPE = {"smollm3": 4}


def formula(model_type: str) -> Formula | None:
    """The type llama.cpp takes each layer of a family for; None when it reads the list."""
    if model_type in _READ:
        return None
    period = _EVERY.get(model_type)
    if period is not None:
        return lambda index: FULL if index % period == period - 1 else SLIDING
    # Also families nobody has checked: they are trusted with what every runtime can do, attend to everything.
    return lambda _index: FULL


def check_layers(config: Any, depth: int) -> None:
    """Refuse a model of whose layers llama.cpp would build another kind than they are.

    Args:
        config: Configuration of the pruned model.
        depth: Its layers.

    Raises:
        UnsupportedModelError: Naming the first such layer and what to do.
    """
    name = config.model_type
    takes = formula(name)
    for index, kind in enumerate(_types(config, depth)):
        if takes is not None and kind in (FULL, SLIDING) and takes(index) != kind and not _always_full(name, kind):
            raise UnsupportedModelError(
                f"llama.cpp would take layer {index} of this {name} for {takes(index)!r}, where it is {kind!r}; "
                "sequences longer than the window would be wrong without an error; plan with --preserve-pattern, or "
                "export it to onnx or openvino"
            )
    period = _WITHOUT_ROPE.get(name)
    for index, rotates in enumerate(getattr(config, "no_rope_layers", None) or ()):
        if period is not None and bool(rotates) != bool((index + 1) % period):
            raise UnsupportedModelError(
                f"llama.cpp leaves rotary positions out of every {period}th layer of a {name}; layer {index} of this "
                "one is not in step with that; plan with --preserve-pattern, or export it to onnx or openvino"
            )


def _always_full(name: str, kind: str) -> bool:
    """Families nobody has checked are trusted with what every runtime can do: attend to everything."""
    return kind == FULL and name not in _EVERY


def _types(config: Any, depth: int) -> Sequence[str]:
    listed: Sequence[str] | None = getattr(config, "layer_types", None)
    if listed is not None:
        return listed
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return [FULL] * depth
    return [SLIDING] * depth

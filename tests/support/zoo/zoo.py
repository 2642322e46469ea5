"""One tiny random model of every supported family, the layers it keeps and the inputs it runs on.

Each specimen is built from its configuration alone (no download), in evaluation mode, with every layer made to matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

GROUPS = ("decoder", "encoder", "encoder-decoder", "vision", "speech")


@dataclass(frozen=True)
class Specimen:
    """A family's tiny model and how the tests prune and run it.

    Attributes:
        name: Unique; what test ids show.
        group: One of :data:`GROUPS`.
        build: Makes the model, seeded.
        keep: Stack name to the old layer numbers that stay: non-contiguous, and irregular where there is a pattern.
        inputs: (model, seed) to named tensors of two rows, with a padding mask where the family takes one.
        window: Sliding or local window in tokens, if any layer has one.
        generates: Whether it decodes with a cache.
        note: Why something is special.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    keep: Mapping[str, tuple[int, ...]]
    inputs: Callable[[nn.Module, int], dict[str, torch.Tensor]]
    window: int | None = None
    generates: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        assert self.group in GROUPS, self.group


@contextmanager
def identity(layers: Mapping[int, nn.Module]) -> Iterator[None]:
    """Make each of ``layers`` hand its input on unchanged: the independent meaning of "this layer is removed".

    The layer still runs (a cache still fills); only the hidden state it returns is replaced by the one it was given.
    """

    def hand_on(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        given = arguments[0] if arguments else keywords["hidden_states"]
        if isinstance(output, tuple):
            return (given, *output[1:])
        return given

    handles = [layer.register_forward_hook(hand_on, with_kwargs=True) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main_output(output: Any) -> torch.Tensor:
    """Logits if the model has a head, else the last hidden state, else the tensor itself."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            assert isinstance(value, torch.Tensor)
            return value
    raise AssertionError(f"{type(output).__name__} has neither logits nor last_hidden_state")


def specimens() -> tuple[Specimen, ...]:
    """Every specimen of the zoo."""
    # Imported late: the three files import Specimen from here.
    import zoo_decoders
    import zoo_encoders
    import zoo_vision

    return (*zoo_decoders.SPECIMENS, *zoo_encoders.SPECIMENS, *zoo_vision.SPECIMENS)

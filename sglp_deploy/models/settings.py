"""What a layer is apart from its weights: the settings its code reads, its own number excepted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from sglp_deploy.errors import ArtifactError

# A layer's number under the names libraries give it; transformers keeps it inside each attention.
LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
# The rule that a list of kinds was filled by.  A layer that keeps a copy reads its own kind off the list.
_RULES = {"sliding_window_pattern"}
# Of no effect in evaluation mode, and stochastic depth grows with a layer's place in the whole model.
_TRAINING_ONLY = {
    "training",
    "drop_path",
    "drop_path_rate",
    "drop_prob",
    "drop_rate",
    "grad_checkpointing",
    "gradient_checkpointing",
    "layerdrop",
}
# The same as a module: where its rate is zero, as in a first layer, libraries put an identity or nothing at all.
_STOCHASTIC_DEPTH = re.compile(r"(?:.*\.)?(?:drop_path\d*|stochastic_depth)")
_SCALARS = (bool, int, float, str, type(None))


def layer_settings(layer: nn.Module) -> tuple[Any, ...]:
    """Module classes, parameter shapes and every plain setting of ``layer``; equal for layers of one kind.

    Two layers of one kind compute the same function of their weights and trace to the same nodes.  Settings are read
    off the modules (sliding or full attention, scaling, rotary or not), so no table of families is needed.
    """
    settings = []
    for path, module in layer.named_modules():
        if _STOCHASTIC_DEPTH.fullmatch(path) and not list(module.parameters()):
            continue
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, _SCALARS)
            and name not in LAYER_NUMBERS
            and name not in _TRAINING_ONLY
            and name not in _RULES
            and not (name == "p" and isinstance(module, _DropoutNd))
            and not name.startswith("_")
        }
        shapes = {
            name: (tuple(parameter.shape), str(parameter.dtype))
            for name, parameter in module.named_parameters(recurse=False)
        }
        settings.append((path, type(module).__qualname__, repr(sorted(plain.items())), repr(sorted(shapes.items()))))
    return tuple(settings)


def renumber(layer: nn.Module, old: int, new: int) -> None:
    """Give ``layer`` the number ``new`` wherever it holds ``old``, or the KV cache is addressed past its end."""
    for part in layer.modules():
        for name in LAYER_NUMBERS:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value == old:
                setattr(part, name, new)


def layer_numbers(layer: nn.Module) -> tuple[tuple[str, str, int], ...]:
    """Where in ``layer`` its own number is kept, under which name, and which number it is."""
    return tuple(
        (path, name, value)
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if name in LAYER_NUMBERS and isinstance(value, int) and not isinstance(value, bool)
    )


def check_settings(rebuilt: Sequence[nn.Module], meant: Sequence[nn.Module]) -> None:
    """Compare settings and numbers of layers rebuilt from a configuration with those of the layers in memory.

    Equal weights say nothing about a layer that attends through a window where it used to attend fully.

    Raises:
        ArtifactError: Naming the first layer and module that differ.
    """
    for index, (new, old) in enumerate(zip(rebuilt, meant, strict=True)):
        if layer_numbers(new) != layer_numbers(old):
            raise ArtifactError(
                f"layer {index} of the pruned model does not hold its own number ({layer_numbers(old)} and not "
                f"{layer_numbers(new)}); it would use another layer's cache; report this as a bug"
            )
        found, wanted = layer_settings(new), layer_settings(old)
        if found == wanted:
            continue
        differing = [(mine, theirs) for mine, theirs in zip(found, wanted, strict=False) if mine != theirs]
        mine, theirs = differing[0] if differing else (("", "other modules"), ("", "those it had"))
        raise ArtifactError(
            f"layer {index} of the checkpoint is rebuilt with other settings ({mine[0] or 'the layer itself'}: "
            f"{mine[1:]} and not {theirs[1:]}); it would compute something else from the same weights; report this as "
            "a bug"
        )

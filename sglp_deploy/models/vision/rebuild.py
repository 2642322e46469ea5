"""What timm and torchvision have in common: a pruned model is one their own constructor makes, with the old tensors.

Built that way, it cannot differ from what a user gets who reads the checkpoint with the plain library.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, MissingDependencyError, UnsupportedModelError
from sglp_deploy.models.base import LayerStack
from sglp_deploy.models.settings import layer_settings

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
NO_SKIP = "its output has another shape than its input, or it has no skip connection to hand its input on"
NO_EMPTY_STAGE = "it is the first layer of its stage, and no stage is built without one"


def library(name: str) -> Any:
    """The module ``name``, imported now.

    Raises:
        MissingDependencyError: If it is not installed, or installed and broken.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{name.partition('.')[0]} is needed for this model and cannot be imported; {error}; install it with: pip "
            "install 'sglp-deploy[vision]'"
        ) from error
    except Exception as error:
        # A torchvision whose compiled operators were built for another torch fails with a bare RuntimeError.
        raise MissingDependencyError(
            f"{name.partition('.')[0]} is installed and fails on import; {type(error).__name__}: "
            f"{(str(error).strip() or 'no message').splitlines()[0]}; install the build that belongs to this torch "
            f"({torch.__version__})"
        ) from error


def comes_from(module: nn.Module, name: str) -> bool:
    """Whether the class of ``module``, or one it is derived from, is defined in the library ``name``."""
    return any(kind.__module__.partition(".")[0] == name for kind in type(module).__mro__)


def qualified_name(value: object) -> str:
    """Module and name of the class of ``value``."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def keeps_shape(layer: nn.Module) -> bool:
    """Whether nothing in ``layer`` strides, and the last convolution returns as many channels as the first takes.

    Equal channels are not enough: a MobileNet has layers of stride 2 between equal widths, and a network still runs
    without them.
    """
    convolutions = [part for part in layer.modules() if isinstance(part, nn.Conv2d)]
    return (
        bool(convolutions)
        and all(part.stride == (1, 1) for part in convolutions)
        and convolutions[0].in_channels == convolutions[-1].out_channels
    )


def staged_stack(
    module: nn.Module, path: str, containers: Sequence[str], why_not: Callable[[nn.Module], str | None]
) -> LayerStack:
    """The children of ``containers``; a layer is pinned for the reason that ``why_not`` gives."""
    found = [
        (f"{container}.{name}", layer)
        for container in containers
        for name, layer in module.get_submodule(container).named_children()
    ]
    pinned = {index: why for index, (_, layer) in enumerate(found) if (why := why_not(layer)) is not None}
    return LayerStack(
        path,
        tuple(name for name, _ in found),
        tuple(layer for _, layer in found),
        tuple(index not in pinned for index in range(len(found))),
        pinned,
    )


def all_alike(stack: LayerStack) -> tuple[tuple[Hashable, ...], ...]:
    """One kind for all layers of each stage."""
    return tuple(
        (None,) * sum(name.rpartition(".")[0] == container for name in stack.names) for container in stack.containers
    )


def kept_by_container(stack: LayerStack, keep: Sequence[int], containers: Sequence[str]) -> list[list[int]]:
    """For each of ``containers``, the places within it of the layers that stay.

    Raises:
        UnsupportedModelError: If ``keep`` does not rise, or a layer would go that must stay.
    """
    if list(keep) != sorted(set(keep)):
        raise UnsupportedModelError(f"layers {list(keep)} are not in rising order; a vision model keeps its order")
    stack.check_removable([index for index in range(stack.n_layers) if index not in set(keep)])
    kept: dict[str, list[int]] = {container: [] for container in containers}
    seen = dict.fromkeys(containers, 0)
    for index, name in enumerate(stack.names):
        container = name.rpartition(".")[0]
        if index in set(keep):
            kept[container].append(seen[container])
        seen[container] += 1
    return [kept[container] for container in containers]


def rebuilt(module: nn.Module, stack: LayerStack, keep: Sequence[int], build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` constructs, with the tensors of ``module`` in it: shared, not copied.

    Raises:
        UnsupportedModelError: If the constructor makes any part otherwise than it is in ``module``.
    """
    with torch.device("meta"):  # the constructor need not draw weights that are thrown away
        new = build().eval()
    rename = _renaming(module, stack, keep)
    tensors = {to: tensor for name, tensor in module.state_dict().items() if (to := rename(name)) is not None}
    try:
        fill(new, tensors, "the model")
    finally:  # where the tensors do not fit, this says why in words a user can act on
        _check_alike(module, new, rename)
    return new


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Put ``tensors`` into ``module``, which may have been built without memory of its own.

    Raises:
        ArtifactError: If a tensor is missing, left over or of another shape.
    """
    try:
        module.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"the weights of {what} and what its configuration builds do not belong together; "
            f"{' '.join(str(error).split())}; get the checkpoint again"
        ) from error
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise ArtifactError(f"{left[0]} of {what} is in no checkpoint, so it cannot be filled; report this as a bug")


def check_weights(module: nn.Module, folder: Path) -> None:
    """Compare ``module`` with the weights in ``folder``: a library may drop some and go on.

    Raises:
        ArtifactError: Naming the first tensor that differs.
    """
    from safetensors.torch import load_file

    stored, read = load_file(folder / WEIGHTS_FILE), module.state_dict()
    different = sorted(
        name
        for name in stored.keys() | read.keys()
        if name not in stored or name not in read or not torch.equal(stored[name], read[name].to("cpu"))
    )
    if different:
        raise ArtifactError(
            f"{len(different)} tensors in {folder} were not taken over as they are stored, first {different[0]}; the "
            "configuration and the weights do not belong together; get the checkpoint again"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in ``folder``, or nothing when there is none that can be read."""
    try:
        config = _io.parse_json((folder / CONFIG_FILE).read_text(encoding="utf-8"), ours=False)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def plain_json(value: Any) -> Any:
    """``value`` as a JSON file gives it back: tuples are lists, what JSON does not know is text."""
    return json.loads(json.dumps(value, default=str))


def _renaming(module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> Callable[[str], str | None]:
    """Old name of a tensor or module to its name after pruning; None for what is removed."""
    removed = {name for index, name in enumerate(stack.names) if index not in set(keep)}
    moved: dict[str, str] = {}
    for container in stack.containers:
        names = [f"{container}.{child}" for child, _ in module.get_submodule(container).named_children()]
        left = [name for name in names if name not in removed]
        moved.update({name: f"{container}.{new}" for new, name in enumerate(left)})

    def rename(name: str) -> str | None:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            start = ".".join(parts[:end])
            if start in removed:
                return None
            if start in moved:
                return ".".join([moved[start], *parts[end:]])
        return name

    return rename


def _check_alike(old: nn.Module, new: nn.Module, rename: Callable[[str], str | None]) -> None:
    """Weights fit a layer of another stride, dilation or epsilon just as well; compare what the constructor decides."""
    meant = {to: facts for path, *facts in layer_settings(old) if (to := rename(path)) is not None}
    made = {path: facts for path, *facts in layer_settings(new)}
    for path in (*meant, *made):
        if meant.get(path) != made.get(path):
            raise UnsupportedModelError(
                f"the constructor of {type(old).__name__} makes {path or 'the model'} otherwise than it is here "
                f"({made.get(path, 'not at all')} and not {meant.get(path, 'none')}); the model was changed after it "
                "was built, or has a setting its library does not record; build it with arguments alone"
            )

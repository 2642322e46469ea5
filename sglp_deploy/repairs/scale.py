"""``scale``: everything before a gap made larger, so that the stream has the size it would have behind it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from sglp_deploy.errors import CalibrationError, UnsupportedModelError
from sglp_deploy.evidence.branches import Branch
from sglp_deploy.evidence.streams import KeptStream
from sglp_deploy.repairs.options import ScaleOptions
from sglp_deploy.repairs.seam import Fitted
from sglp_deploy.repairs.workbench import Gap, Workbench

# How far the scaled stream may be from the stream times the factor: rounding, and the epsilon of its norms.
_ROUNDING = 2e-2


class Scale:
    """Magnitude compensation: the stream before each gap multiplied by one number.

        alpha = mean over channels k of  sum_tokens |h_k behind the gap| / sum_tokens |h_k before it|

    The factor is folded into the embeddings and into every output projection (weight and bias) up to the gap.  Layers
    with a norm in front see the same direction as before.  Where a norm stands behind a projection (Gemma-2 and later,
    OLMo-2), the norm's weight is scaled in its place.  A tied output head would be scaled with the embedding; the last
    norm's weight is divided by the product of all factors, which takes that back.  That the stream comes out scaled is
    checked on one minibatch.

    Source: Prune&Comp, arXiv:2507.18212.  Ours: biases, post-norms, tied heads, and one pass over the gaps from shallow
    to deep for a set of layers that is given.
    """

    name = "scale"
    source = "Prune&Comp, arXiv:2507.18212"
    Options = ScaleOptions

    def fit(self, bench: Workbench, options: ScaleOptions) -> Fitted:
        """See :class:`sglp_deploy.repairs.seam.Repair`."""
        del options
        behind = bench.dense([gap.behind for gap in bench.gaps])
        fits = []
        for gap in bench.gaps:
            alpha = _alpha(bench, gap, bench.drifted(None, 0, gap.before + 1), behind[gap.behind])
            _multiply(bench, gap.before, alpha)
            fits.append({"layer": bench.kept[gap.before], "behind": gap.behind, "alpha": alpha})
        return Fitted({"fits": fits})


def _alpha(bench: Workbench, gap: Gap, before: KeptStream, behind: KeptStream) -> float:
    top: Any = 0.0
    bottom: Any = 0.0
    for index in bench.fitted_on():
        valid = bench.valid(index)
        top = top + behind.read(index)[valid].double().abs().sum(0)
        bottom = bottom + before.read(index)[valid].double().abs().sum(0)
    alpha = float((top / bottom.clamp(min=1e-30)).mean())
    if not (math.isfinite(alpha) and alpha > 0):
        raise CalibrationError(
            f"the stream before the gap behind layer {bench.kept[gap.before]} is zero or not finite; no factor "
            "makes up for it; check the checkpoint"
        )
    return alpha


def _multiply(bench: Workbench, last: int, factor: float) -> None:
    """Multiply the stream behind layer ``last`` by ``factor``, and prove it on one minibatch."""
    module = bench.pruned.module
    first = bench.held_out[0]
    wanted = bench.states(first, last + 1) * factor
    outside = {name: one for name, one in module.named_modules() if not name.startswith(bench.layer_containers)}
    tied = _tied_head(module)
    for name, one in outside.items():
        if isinstance(one, nn.Embedding):
            bench.put_outside(f"{name}.weight", one.weight * factor)
    for layer in range(last + 1):
        # Its input is scaled by now, which changes none of its sums.
        for branch in bench.branches(layer):
            _scale_branch(bench, layer, branch, factor)
    if tied:
        norm = _last_norm(bench, outside)
        for leaf, value in _scaled_norm(outside[norm], 1 / factor).items():
            bench.put_outside(f"{norm}.{leaf}", value)
    got = bench.states(first, last + 1)
    gap = float((got - wanted).norm() / wanted.norm())
    if not gap <= _ROUNDING:
        raise UnsupportedModelError(
            f"the stream of {type(module).__name__} cannot be scaled by its weights alone (it differs by {gap:.2g}); "
            "something outside the layers adds to it; use another repair"
        )


def _scale_branch(bench: Workbench, layer: int, branch: Branch, factor: float) -> None:
    path = branch.norm or branch.projection
    if path is None:
        raise UnsupportedModelError(
            f"{branch.path} of layer {bench.kept[layer]} is made by no single linear map (a mixture of experts); it "
            "cannot be scaled as one; use refit"
        )
    owner = bench.layers[layer].get_submodule(path)
    if branch.norm is not None:
        scaled = _scaled_norm(owner, factor)
    else:
        scaled = {leaf: value.detach() * factor for leaf, value in owner.named_parameters(recurse=False)}
    for leaf, value in scaled.items():
        bench.put(layer, f"{path}.{leaf}", value)


def _scaled_norm(norm: nn.Module, factor: float) -> dict[str, torch.Tensor]:
    """The parameters of a norm whose output is to be ``factor`` times as large."""
    weight = norm.get_parameter("weight").detach()
    scaled = {"weight": weight + _gain(norm, weight) * (factor - 1)}
    if norm._parameters.get("bias") is not None:
        scaled["bias"] = norm.get_parameter("bias").detach() * factor
    return scaled


def _gain(norm: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """What a norm multiplies its channels by, whether its weight means w or 1 + w; asked of the norm itself."""
    if norm._parameters.get("bias") is not None:
        return weight
    with torch.inference_mode():
        made: torch.Tensor = norm(torch.ones_like(weight)[None])[0]
    return made.clone()


def _tied_head(module: nn.Module) -> bool:
    head = getattr(module, "get_output_embeddings", lambda: None)()
    embedding = getattr(module, "get_input_embeddings", lambda: None)()
    return head is not None and embedding is not None and head.weight is embedding.weight


def _last_norm(bench: Workbench, outside: dict[str, nn.Module]) -> str:
    """The norm between the last layer and the output head, by what it is given."""
    last = bench.states(bench.held_out[0], len(bench.layers))
    found: list[str] = []

    def noting(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], _output: Any) -> None:
            given = arguments[0] if arguments else None
            if isinstance(given, torch.Tensor) and given.shape == last.shape and torch.equal(given, last):
                found.append(name)

        return hook

    handles = [
        one.register_forward_hook(noting(name))
        for name, one in outside.items()
        if (weight := one._parameters.get("weight")) is not None and weight.ndim == 1
    ]
    try:
        with torch.inference_mode():
            bench.task.loss(bench.pruned.module, bench.batches[bench.held_out[0]])
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != 1:
        raise UnsupportedModelError(
            f"the output head of {type(bench.pruned.module).__name__} is its embedding, and no norm stands in front of "
            "it that could take the factor back; use another repair"
        )
    return found[0]

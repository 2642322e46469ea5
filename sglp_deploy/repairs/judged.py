"""Run a repair and keep what it did only where the loss on held-out calibration rows becomes lower."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from sglp_deploy import _io
from sglp_deploy.errors import PlanError, UnsupportedModelError
from sglp_deploy.evidence.precision import precision_of
from sglp_deploy.materialize import materialize
from sglp_deploy.models import layer_stack
from sglp_deploy.overlay import Overlay
from sglp_deploy.repairs.registry import read_options, repair
from sglp_deploy.repairs.seam import Fitted
from sglp_deploy.repairs.workbench import Progress, Workbench
from sglp_deploy.tasks import require

if TYPE_CHECKING:
    from sglp_deploy.evidence.text import TokenBatches
    from sglp_deploy.models import LoadedModel
    from sglp_deploy.plan import PruningPlan
    from sglp_deploy.tasks.base import Task


def repaired(
    loaded: LoadedModel,
    plan: PruningPlan,
    batches: TokenBatches,
    *,
    task: Task,
    method: str = "refit",
    calibration: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> PruningPlan:
    """The plan with weights that make up for its removed layers, or with the reason why it has none.

    The weights become the plan's overlay; weights it had before are kept and built on.  Every eighth minibatch is held
    out.  If the loss on these does not become lower, or the repair cannot be folded into this family, the plan's
    weights stay as they were, and ``compensation`` says why.

    Args:
        loaded: The unpruned model; it is left as it was.
        plan: Made for it.
        batches: Calibration rows.
        task: What the model is judged by.
        method: Name of a repair.
        calibration: Facts of the calibration set, its ``digest`` above all.
        options: For the repair; its ``Options`` say which there are.
        progress: Called with (stage, done, in all).

    Raises:
        ConfigError: If the name or an option is unknown.
        PlanError: If the plan removes nothing, or is for another model.
        UnsupportedModelError: If no task fits the model.
        CalibrationError: If the calibration rows cannot support it.
        StorageError: If hidden states cannot be kept on disk.
    """
    chosen = read_options(method, options or {})
    made = repair(method)
    if not plan.drop:
        raise PlanError("the plan removes no layer; there is nothing to repair; plan with a budget first")
    require(task, loaded.module)
    task.check(loaded.module, batches)
    started = time.perf_counter()
    pruned = materialize(loaded.module, plan, loaded.source, tokenizer=loaded.tokenizer)
    why = ""
    with _io.scratch("repair") as folder:
        stack = layer_stack(loaded.module, plan.stack)
        # A third party's repair that says nothing of it gets the model as it is.
        precision = precision_of(getattr(chosen, "precision", "fp32"), loaded.module)
        bench = Workbench(loaded.module, stack, pruned, task, list(batches), folder, progress, precision)
        dense, before = bench.loss(loaded.module), bench.loss(pruned.module)
        try:
            fitted = made.fit(bench, chosen)
        except UnsupportedModelError as error:
            fitted, why = Fitted(), str(error)
        after = bench.loss(pruned.module) if bench.changed else before
    losses = {"loss_dense": dense, "loss_before": before, "loss_after": after}
    record: dict[str, Any] = {
        "repair": method,
        "source": made.source,
        "options": asdict(chosen),
        "precision": str(precision).removeprefix("torch."),
        "calibration": {
            **(dict(calibration) if calibration else {"digest": batches.digest}),
            "n_tokens": batches.n_tokens,
            "n_held_out": len(bench.held_out),
            "n_minibatches": len(bench.batches),
        },
        # Beyond all numbers is not a number in a file: None.
        **{name: loss if isfinite(loss) else None for name, loss in losses.items()},
        **fitted.facts,
        "not_done": list(fitted.not_done),
    }
    record = _io.plain(record)
    elapsed = {**plan.elapsed_s, f"repair {method}": time.perf_counter() - started}
    if not why and not bench.changed:
        why = "; ".join(fitted.not_done) or "there is no kept layer before a gap"
    if not why and not after < before:
        why = f"the loss on held-out rows does not become lower ({before:.4f} to {after:.4f})"
    if why:
        earlier = plan.compensation or {}
        refused = [*(earlier.get("refused") or []), {**record, "why": why}]
        return replace(plan, compensation={**earlier, "refused": refused}, elapsed_s=elapsed)
    overlay = plan.require_weights()
    overlay = Overlay(bench.changed, [record]) if overlay is None else overlay.with_tensors(bench.changed, record)
    return replace(plan, elapsed_s=elapsed).with_overlay(overlay)

"""Heal a pruned model and keep what training did only where the loss on held-out rows becomes lower."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.errors import CalibrationError, PlanError
from sglp_deploy.evidence.precision import precision_of
from sglp_deploy.evidence.text import TokenBatches
from sglp_deploy.healing import parallel
from sglp_deploy.healing.losses import Speaker, nats
from sglp_deploy.healing.state import Keeper, key_of
from sglp_deploy.healing.student import Student, student_of
from sglp_deploy.healing.training import Progress, Training
from sglp_deploy.materialize import materialize
from sglp_deploy.overlay import HEAL, Overlay
from sglp_deploy.tasks import require

if TYPE_CHECKING:
    from sglp_deploy.healing.options import HealOptions
    from sglp_deploy.healing.texts.corpus import Mix
    from sglp_deploy.models import LoadedModel
    from sglp_deploy.plan import PruningPlan
    from sglp_deploy.tasks.base import Task

SOURCE: Final = "distillation, Hinton et al., arXiv:1503.02531; of a pruned model: compare Minitron, arXiv:2407.14679"

# Of each trained parameter: value, gradient, two moments, the best value so far; all float32.
_BYTES_PER_TRAINED = 20


def healed(
    loaded: LoadedModel,
    plan: PruningPlan,
    mix: Mix,
    *,
    task: Task,
    options: HealOptions,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> PruningPlan:
    """The plan with weights that were trained towards the unpruned model, or with the reason why it has none.

    The weights become the plan's overlay; weights it had before are what training starts from.  The loss that decides
    is taken on the mix's held-out rows.  If it does not become lower, the plan's weights stay as they were, and
    ``compensation`` says why.

    Args:
        loaded: The unpruned model; it is left as it was.
        plan: Made for it.
        mix: What is trained on.
        task: What the model is judged by; next-token prediction is the one that can be healed.
        options: How, and for how long.
        folder: Where the state of the training is kept while it lasts, for another process to go on; None keeps none.
        progress: Called with (stage, done, in all).

    Raises:
        PlanError: If the plan removes nothing, or is for another model.
        UnsupportedModelError: If the model predicts no next token, or its layers cannot be trained apart.
        CalibrationError: If training diverges, or memory is too small for it.
        StorageError: If the state cannot be kept.
    """
    if not plan.drop:
        raise PlanError("the plan removes no layer; there is nothing to heal; plan with a budget first")
    require(task, loaded.module)
    task.check(loaded.module, _as_batches(mix, options))
    started = time.perf_counter()
    device = next(loaded.module.parameters()).device
    precision = precision_of(options.precision, loaded.module)
    pruned = materialize(loaded.module, plan, loaded.source, tokenizer=loaded.tokenizer)
    try:
        with parallel.team(device) as team:
            teacher = Speaker(loaded.module, precision)
            dense, before = (_nats(one, mix, options) for one in (teacher, Speaker(pruned.module, precision)))
            student = student_of(pruned, loaded.module, options)
            _check_memory(student, device, team.size)
            key = key_of([plan.digest(), mix.digest, asdict(options), str(precision), team.size, torch.__version__])
            keeper = Keeper(folder, key)
            speaker = Speaker(student.module, precision, trains_head=options.embeddings)
            training = Training(speaker, student.trained, teacher, mix, options, keeper, team, progress)
            standing = training.run()
            changed = student.changed()
    except (RuntimeError, MemoryError) as error:
        if (words := _lack_of_memory(error)) is None:
            raise
        raise CalibrationError(_does_not_fit(words)) from error
    record = _io.plain(
        {
            "repair": HEAL,
            "source": SOURCE,
            "options": asdict(options),
            "learning_rate": training.rate,
            "precision": str(precision).removeprefix("torch."),
            "processes": team.size,
            "mix": mix.facts(),
            "left_out": list(mix.left_out),
            "digest": mix.digest,
            "n_trained": sum(one.numel() for one in student.trained.values()),
            "steps": standing.step,
            "tokens": standing.step * training.tokens_per_step,
            "best_step": standing.best_step,
            "held_out": standing.evaluations,
        }
    )
    after = before
    if changed:
        # As it is stored and will be loaded, and not as it was trained.
        again = materialize(loaded.module, _with(plan, changed, record), loaded.source, tokenizer=loaded.tokenizer)
        after = _nats(Speaker(again.module, precision), mix, options)
    record |= _losses(mix, dense, before, after)
    if team.leads:
        keeper.clear()
    plan = replace(plan, elapsed_s={**plan.elapsed_s, HEAL: time.perf_counter() - started})
    was, now = float(before.sum()), float(after.sum())
    if now < was:
        return _with(plan, changed, record)
    count = mix.held_out.shape[0] * (mix.sequence_length - 1)
    why = f"the loss on held-out rows does not become lower ({was / count:.4f} to {now / count:.4f})"
    earlier = plan.compensation or {}
    refused = [*(earlier.get("refused") or []), {**record, "why": why}]
    return replace(plan, compensation={**earlier, "refused": refused})


def _with(plan: PruningPlan, changed: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> PruningPlan:
    overlay = plan.require_weights()
    return plan.with_overlay(Overlay(changed, [record]) if overlay is None else overlay.with_tensors(changed, record))


def _nats(speaker: Speaker, mix: Mix, options: HealOptions) -> NDArray[np.float64]:
    return nats(speaker, mix.held_out, batch_size=options.batch_size)


def _losses(mix: Mix, *found: NDArray[np.float64]) -> dict[str, Any]:
    """Nats per predicted token of the unpruned model, before and after; over all shares, and of each."""
    names = ("loss_dense", "loss_before", "loss_after")
    predictions = mix.sequence_length - 1
    ends = np.cumsum([0, *(len(share.held_out) for share in mix.shares)])

    def means(rows: slice) -> dict[str, float | None]:
        losses = [float(nats_of[rows].mean()) / predictions for nats_of in found]
        # Beyond all numbers is not a number in a file: None.
        return {name: loss if isfinite(loss) else None for name, loss in zip(names, losses, strict=True)}

    by_share = [
        {"source": share.name, **means(slice(int(start), int(end)))}
        for share, start, end in zip(mix.shares, ends, ends[1:], strict=False)
    ]
    return {**means(slice(None)), "by_share": by_share}


def _as_batches(mix: Mix, options: HealOptions) -> TokenBatches:
    """Every row of the mix, as the task checks them."""
    rows = np.concatenate([mix.held_out, *(share.rows for share in mix.shares)])
    return TokenBatches(rows, np.ones_like(rows), options.batch_size, mix.digest)


def _check_memory(student: Student, device: torch.device, processes: int) -> None:
    """Refuse what cannot fit before minutes go into it.

    Raises:
        CalibrationError: With what is needed, what is free, and what would need less.
    """
    needed = _BYTES_PER_TRAINED * sum(one.numel() for one in student.trained.values())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        needed, free = needed * processes, psutil.virtual_memory().available
    needed -= 4 * sum(one.numel() for one in student.trained.values())  # the values are there already
    if needed > free:
        raise CalibrationError(_does_not_fit(f"training needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"))


def _does_not_fit(why: str) -> str:
    return (
        f"the unpruned model, the pruned one and the training of it do not fit into memory together; {why}; train "
        "fewer weights (option lora=16), give a smaller batch_size, or use a larger machine"
    )


def _lack_of_memory(error: RuntimeError | MemoryError) -> str | None:
    """What the error says of memory that ran out; None where it is about something else."""
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in words
    return words.rstrip(".") if lacking else None

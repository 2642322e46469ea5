"""Two models, or one, through the same tasks: scores in, what ``quality.json`` says of them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglp_deploy.errors import CalibrationError
from sglp_deploy.tasks.generation import beside, greedy_sample
from sglp_deploy.tasks.scores import alone, paired

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sglp_deploy.tasks.asked import JudgedTask
    from sglp_deploy.tasks.base import Progress

# From the name of a stage to what is told of its progress.
Stage = Callable[[str], "Progress | None"]


def judged(
    dense: nn.Module,
    pruned: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[JudgedTask],
    stage: Stage,
) -> dict[str, dict[str, Any]]:
    """Task to the figures of ``dense``, and of ``pruned`` beside them with the difference.

    Raises:
        CalibrationError: If there is no tokenizer.
    """
    chosen = _required(tokenizer)
    found = {}
    for task in tasks:
        base = task.scores(dense, chosen, progress=stage(f"{task.name} dense"))
        if pruned is None:
            found[task.name] = alone(base)
        else:
            found[task.name] = paired(base, task.scores(pruned, chosen, progress=stage(f"{task.name} pruned")))
    return found


def sampled(
    dense: nn.Module, pruned: nn.Module, tokenizer: PreTrainedTokenizerBase | None, n_tokens: int, stage: Stage
) -> dict[str, Any]:
    """Greedy samples of both; why there is none where it cannot be made, because nothing is decided by it."""
    try:
        chosen = _required(tokenizer)
        left = greedy_sample(dense, chosen, n_tokens, progress=stage("sample dense"))
        right = greedy_sample(pruned, chosen, n_tokens, progress=stage("sample pruned"))
    except Exception as error:  # noqa: BLE001  # each family's generate() fails in its own way, and perplexity is there
        return {"not_made": f"{type(error).__name__}: {error}"}
    return beside(left, right, n_tokens)


def _required(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise CalibrationError(
            "the model has no tokenizer; tasks and samples are text; add tokenizer files to the model's folder"
        )
    return tokenizer

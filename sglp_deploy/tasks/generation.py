"""What a model writes: greedy continuations of a few prompts, and how much they repeat themselves.

A figure like perplexity says little about how a pruned model sounds.  A damaged model often falls into a loop, which
greedy decoding shows at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from sglp_deploy.evidence.text import row_start
from sglp_deploy.models.library import evaluating
from sglp_deploy.models.samples import table_of_positions
from sglp_deploy.tasks import require
from sglp_deploy.tasks.language import LanguageTask

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sglp_deploy.tasks.base import Progress

PROMPTS: Final = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "To make a good cup of tea, first",
    "The main reason why leaves are green is",
)
REPEATED: Final = 4  # tokens in a run that counts as repeated


def greedy_sample(
    module: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    *,
    prompts: Sequence[str] = PROMPTS,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """What ``module`` writes after each prompt, always the most probable token, up to its end-of-text token.

    Where the model has learned vectors for few positions, it writes as many as there is room for.

    Returns:
        For each prompt ``{"prompt", "text", "n_tokens", "repetition", "distinct_1", "distinct_2"}``; see
        :func:`repetition` and :func:`distinct`.

    Raises:
        UnsupportedModelError: If it is no decoder language model.
    """
    require(LanguageTask(), module)
    model = cast("PreTrainedModel", module)
    first = row_start(tokenizer)
    most = table_of_positions(module) or sys.maxsize
    rows = []
    for done, prompt in enumerate(prompts, 1):
        prompted = [*first, *tokenizer(prompt, add_special_tokens=False)["input_ids"]][: most - 1]
        ids = torch.tensor([prompted], device=model.device)
        room = max(1, min(n_tokens, most - ids.shape[1]))
        with _plain_greedy(model, room), evaluating(model), torch.inference_mode():
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()
        rows.append(
            {
                "prompt": prompt,
                "text": tokenizer.decode(written, skip_special_tokens=True),
                "n_tokens": len(written),
                "repetition": repetition(written),
                "distinct_1": distinct(written, 1),
                "distinct_2": distinct(written, 2),
            }
        )
        if progress is not None:
            progress(done, len(prompts))
    return rows


def beside(dense: Sequence[dict[str, Any]], pruned: Sequence[dict[str, Any]], n_tokens: int) -> dict[str, Any]:
    """Samples of two models side by side, as ``quality.json`` holds them."""
    return {
        "decoding": f"greedy, up to {n_tokens} tokens",
        "repetition": {"dense": mean_repetition(dense), "pruned": mean_repetition(pruned), "n": REPEATED},
        "rows": [
            {
                "prompt": left["prompt"],
                "dense": {key: value for key, value in left.items() if key != "prompt"},
                "pruned": {key: value for key, value in right.items() if key != "prompt"},
            }
            for left, right in zip(dense, pruned, strict=True)
        ],
    }


def mean_repetition(rows: Sequence[dict[str, Any]]) -> float | None:
    """Mean over the samples that are long enough; None when none is."""
    known = [row["repetition"] for row in rows if row["repetition"] is not None]
    return sum(known) / len(known) if known else None


def repetition(tokens: Sequence[int], n: int = REPEATED) -> float | None:
    """The share of runs of ``n`` tokens that stood in the text before; None when there is no such run.

    0 for a text that never repeats itself, near 1 for a loop.
    """
    found = distinct(tokens, n)
    return None if found is None else 1 - found


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Distinct runs of ``n`` tokens over all of them (distinct-n; Li et al. 2016, arXiv:1510.03055)."""
    runs = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(runs)) / len(runs) if runs else None


@contextmanager
def _plain_greedy(model: PreTrainedModel, n_tokens: int) -> Iterator[None]:
    """Only the most probable token: ``generate`` takes what it is not told (penalties, minimum length) from here."""
    from transformers import GenerationConfig

    own: Any = model.generation_config
    end = own.eos_token_id if own is not None else None
    pad = own.pad_token_id if own is not None else None
    if pad is None:  # of one row nothing is padded; without it transformers warns
        pad = end[0] if isinstance(end, list) else end if end is not None else 0
    try:
        model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=n_tokens, eos_token_id=end, pad_token_id=pad
        )
        yield
    finally:
        model.generation_config = own

"""How probable a model finds given words after a given text: what tasks with right answers are scored by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from sglp_deploy.errors import CalibrationError, ConfigError
from sglp_deploy.evidence.text import row_start
from sglp_deploy.models.library import evaluating
from sglp_deploy.tasks import require
from sglp_deploy.tasks.language import LanguageTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sglp_deploy.tasks.base import Progress


@dataclass(frozen=True)
class Continuation:
    """Tokens whose last ones are judged.

    Attributes:
        ids: The text's tokens, then the continuation's.
        n_context: How many of them are the text's; at least 1.
    """

    ids: tuple[int, ...]
    n_context: int


class Encoder:
    """Texts with continuations to tokens of one model.

    The boundary is tokenized as lm-eval does it: trailing spaces of the text go to the continuation, text and
    continuation are tokenized together, and the continuation's tokens are those beyond the number that the text has
    alone.  So " Paris" is one token where the model has learnt it as one.  The begin-of-text token comes first where
    the tokenizer normally adds it.

    Raises:
        UnsupportedModelError: If the model is no decoder language model.
    """

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        require(LanguageTask(), module)
        self._tokenizer = tokenizer
        self._first = tuple(row_start(tokenizer))
        window = getattr(module.config.get_text_config(), "max_position_embeddings", None)
        self._window: int | None = window if isinstance(window, int) and window > 0 else None

    def encode(self, context: str, continuation: str, place: str) -> Continuation:
        """Tokens of ``context`` followed by ``continuation``; ``place`` says where they came from.

        Raises:
            ConfigError: If they are longer than the model's window, or one of the two has no token of its own.
        """
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        alone, both = self._ids(bare), self._ids(bare + continuation)
        ids = (*self._first, *alone, *both[len(alone) :])
        n_context = len(self._first) + len(alone)
        if not n_context or len(ids) == n_context:
            what = "text" if not n_context else "words that are judged"
            raise ConfigError(f"{place}: the {what} have no token of their own; nothing can be scored; change the line")
        if self._window is not None and len(ids) > self._window:
            raise ConfigError(
                f"{place}: {len(ids)} tokens do not fit the model's window of {self._window}; cut off, it would be "
                "another question; leave the line out"
            )
        return Continuation(ids, n_context)

    def _ids(self, text: str) -> list[int]:
        return cast("list[int]", self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def score_continuations(
    module: PreTrainedModel, rows: Sequence[Continuation], *, batch_size: int = 8, progress: Progress | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-likelihood of each continuation, and whether greedy decoding would write it.

    Rows of like length go through the model together, padded on the right, which no earlier token sees.

    Args:
        module: A decoder language model.
        rows: From :meth:`Encoder.encode`.
        batch_size: Rows that go through the model together.
        progress: Called with (rows done, rows in all).

    Returns:
        Summed log-probability of the continuation's tokens (rows), nats; whether each of them is the most probable one
        (rows).

    Raises:
        CalibrationError: If a log-probability is not finite.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
    likelihood, greedy = np.empty(len(rows)), np.empty(len(rows), dtype=np.bool_)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(rows[chosen[0]].ids) - 1  # the last token is predicted and predicts nothing
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(chosen):
            tokens = torch.tensor(rows[index].ids[:-1])
            ids[place, : len(tokens)] = tokens
            mask[place, : len(tokens)] = 1
        with evaluating(module), torch.inference_mode():
            device: Any = module.device
            logits = module(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            for place, index in enumerate(chosen):
                row = rows[index]
                wanted = torch.tensor(row.ids[row.n_context :], device=logits.device)
                predicted = logits[place, row.n_context - 1 : len(row.ids) - 1].float()
                chances = predicted.log_softmax(-1).gather(-1, wanted[:, None])
                likelihood[index] = float(chances.double().sum())
                greedy[index] = bool((predicted.argmax(-1) == wanted).all())
        if not np.isfinite(likelihood[chosen]).all():
            raise CalibrationError(
                "the log-likelihood of an answer is not finite; the model's weights or activations overflow; check the "
                "checkpoint, or evaluate in float32"
            )
        if progress is not None:
            progress(min(start + batch_size, len(rows)), len(rows))
    return likelihood, greedy

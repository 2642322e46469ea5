"""Decoder language models: the loss of the next token, and perplexity on text a plan has never seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sglp_deploy.errors import CalibrationError
from sglp_deploy.evidence.text import CalibrationSet, TokenBatches
from sglp_deploy.models import LoadedModel
from sglp_deploy.models.library import evaluating
from sglp_deploy.models.samples import generates, table_of_positions
from sglp_deploy.tasks import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]

SCHEMA = "quality/3"  # history: 1 = first; 2 = unrepaired; 3 = repaired (before healing), repairs
_RESAMPLES = 2_000
_MOST_NATS = 700.0  # exp of more is not a float64


@dataclass(frozen=True)
class Perplexity:
    """Loss of a model on token rows.

    Attributes:
        nats: Summed next-token loss of each row (rows), nats.
        predictions: Predicted tokens of each row (rows).
    """

    nats: NDArray[np.float64]
    predictions: NDArray[np.int64]

    @property
    def nats_per_token(self) -> float:
        """Mean loss over all predicted tokens."""
        return float(self.nats.sum() / self.predictions.sum())

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return float(np.exp(self.nats_per_token))

    def to_json(self) -> dict[str, Any]:
        """The form kept in ``quality.json``."""
        return {
            "perplexity": self.perplexity,
            "nats_per_token": self.nats_per_token,
            "nats_by_row": self.nats.tolist(),
            "predictions_by_row": self.predictions.tolist(),
        }


class LanguageTask:
    """See :class:`sglp_deploy.tasks.base.Task`; a batch is token ids and their mask, each (batch, seq)."""

    name = "language"

    def refusal(self, module: nn.Module) -> str | None:
        """Why ``module`` predicts no next token, or None."""
        return None if generates(module) else "has no next-token loss to measure by"

    def encode(self, data: CalibrationSet, loaded: LoadedModel) -> TokenBatches:
        """Rows of tokens; see :meth:`sglp_deploy.evidence.text.CalibrationSet.encode`."""
        return data.at_most(table_of_positions(loaded.module)).encode(loaded.tokenizer)

    def held_out(self, **options: Any) -> CalibrationSet:
        """The held-out share of the built-in prose."""
        return CalibrationSet.builtin_held_out(**options)

    def check(self, module: nn.Module, batches: TokenBatches) -> None:
        """Refuse tokens outside the model's vocabulary."""
        require(self, module)
        vocabulary = cast("PreTrainedModel", module).get_input_embeddings().num_embeddings
        low, high = int(batches.input_ids.min()), int(batches.input_ids.max())
        if low < 0 or high >= vocabulary:
            raise CalibrationError(
                f"token {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}; the tokenizer "
                "has tokens that the embedding has no rows for (added and never resized), or the token ids belong to "
                "another model; resize the embedding (resize_token_embeddings), or use text without them"
            )

    def loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        """Mean cross entropy of the next token, nats; each row's first token is not predicted."""
        logits, labels = self._forward(module, batch)
        loss = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=-100
        )
        return loss, int((labels != -100).sum())

    def logits(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of every next token that :meth:`loss` predicts, (predictions, vocabulary), float32."""
        logits, labels = self._forward(module, batch)
        return logits[:, :-1][labels != -100].float()

    @staticmethod
    def _forward(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at every position, and the next tokens of all but the last; -100 where none is predicted."""
        model = cast("PreTrainedModel", module)
        ids, mask = (torch.from_numpy(part).to(model.device) for part in batch)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # the model's own numbering would count padding on the left
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        # Padding neither is predicted nor predicts: on the left, its last position would guess the first real token.
        labels = ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
        return logits, labels

    def valid(self, batch: Batch) -> NDArray[np.bool_]:
        """Tokens, padding excluded."""
        return np.asarray(batch[1] == 1)

    def evaluate(
        self, module: nn.Module, batches: TokenBatches, *, progress: Callable[[int, int], None] | None = None
    ) -> Perplexity:
        """See :func:`perplexity`."""
        return perplexity(cast("PreTrainedModel", module), batches, progress=progress)

    def compare(
        self,
        dense: Perplexity,
        pruned: Perplexity,
        batches: TokenBatches,
        source: str,
        *,
        unrepaired: Perplexity | None = None,
        repaired: Perplexity | None = None,
    ) -> dict[str, Any]:
        """See :func:`quality_report`."""
        return quality_report(dense, pruned, batches, source, unrepaired=unrepaired, repaired=repaired)

    def prompts(self, data: CalibrationSet, loaded: LoadedModel) -> NDArray[np.int64]:
        """The tokens of ``data`` in a row, padding left out."""
        batches = self.encode(data, loaded)
        tokens: NDArray[np.int64] = batches.input_ids[batches.attention_mask == 1]
        return tokens


def perplexity(
    model: PreTrainedModel, batches: TokenBatches, *, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Next-token loss of every row; rows are independent, and each row's first token is not predicted.

    Args:
        model: A causal language model.
        batches: Token rows; padding is left out.
        progress: Called with (minibatches done, minibatches in all).

    Raises:
        UnsupportedModelError: If the model predicts no next token.
        CalibrationError: If the loss is not finite, too large for a perplexity, or no token is predicted.
    """
    require(LanguageTask(), model)
    nats, predictions = [], []
    for done, (ids, mask) in enumerate(batches):
        tokens = torch.from_numpy(ids).to(model.device)
        attention = torch.from_numpy(mask).to(model.device)
        with evaluating(model), torch.inference_mode():
            logits = model(input_ids=tokens, attention_mask=attention, use_cache=False).logits[:, :-1]
            # Both the token and the one it is predicted from must be real, so padding may be on either side.
            predicted = (attention[:, 1:] == 1) & (attention[:, :-1] == 1)
            labels = tokens[:, 1:].masked_fill(~predicted, -100)
            losses = nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=-100, reduction="none"
            ).reshape(labels.shape)
        nats.append(losses.double().sum(1).cpu().numpy())
        predictions.append((labels != -100).sum(1).cpu().numpy())
        if not np.isfinite(nats[-1]).all():
            raise CalibrationError(
                "the loss on the evaluation text is not finite; the model's weights or activations overflow; check "
                "the checkpoint, or evaluate in float32"
            )
        if progress is not None:
            progress(done + 1, len(batches))
    result = Perplexity(np.concatenate(nats), np.concatenate(predictions).astype(np.int64))
    if not result.predictions.sum():
        raise CalibrationError(
            "the evaluation text predicts no token; every row holds fewer than two; give longer text"
        )
    if result.nats_per_token > _MOST_NATS:
        raise CalibrationError(
            f"the loss on the evaluation text is {result.nats_per_token:.3g} nats per token; no perplexity can express "
            "it, the model is broken; check the checkpoint, or remove fewer layers"
        )
    return result


def quality_report(
    dense: Perplexity,
    pruned: Perplexity,
    batches: TokenBatches,
    source: str,
    *,
    seed: int = 0,
    unrepaired: Perplexity | None = None,
    repaired: Perplexity | None = None,
) -> dict[str, Any]:
    """Both perplexities, their ratio with a 95 % interval, and the protocol that makes the figures mean something.

    The interval resamples rows in pairs (both models saw the same rows), so it says how much the ratio would move on
    other text of this kind.  With a single row it says nothing and is as narrow as a point.

    Args:
        dense: Of the unpruned model.
        pruned: Of the pruned model as it is deployed.
        batches: The rows.
        source: Where the text came from.
        seed: Of the resampling.
        unrepaired: Of the pruned model before repair and healing; None where there was neither.
        repaired: Of the pruned model after repair and before healing; None where there were not both.

    Raises:
        CalibrationError: If they were not taken on the same rows.
    """
    before = {
        name: found.to_json() | _ratio(dense, found, seed)
        for name, found in (("unrepaired", unrepaired), ("repaired", repaired))
        if found is not None
    }
    return {
        "schema": SCHEMA,
        "protocol": {
            "metric": "perplexity, exp of the mean next-token loss",
            "text": source,
            "text_digest": batches.digest,
            "chunk_tokens": int(batches.input_ids.shape[1]),
            "n_chunks": batches.n_samples,
            "n_tokens": int(dense.predictions.sum()),
            "note": "chunks are independent; the first token of each is not predicted",
        },
        "dense": dense.to_json(),
        "pruned": pruned.to_json(),
        **before,
        **_ratio(dense, pruned, seed),
    }


def _ratio(dense: Perplexity, pruned: Perplexity, seed: int) -> dict[str, Any]:
    if not np.array_equal(dense.predictions, pruned.predictions):
        raise CalibrationError(
            f"the dense model predicted {int(dense.predictions.sum())} tokens in {len(dense.predictions)} rows, the "
            f"pruned one {int(pruned.predictions.sum())} in {len(pruned.predictions)}; a ratio needs the same rows; "
            "evaluate both on one text"
        )
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(dense.nats), size=(_RESAMPLES, len(dense.nats)))
    difference = (pruned.nats - dense.nats)[rows].sum(1) / dense.predictions[rows].sum(1)
    low, high = np.quantile(np.exp(difference), [0.025, 0.975])
    return {"ratio": pruned.perplexity / dense.perplexity, "ratio_interval": [float(low), float(high)]}


def summary(report: Mapping[str, Any]) -> str:
    """One line for people."""
    between = {"unrepaired": "before repair", "repaired": "repaired"}
    steps = "".join(
        f", {report[name]['perplexity']:.2f} (x{report[name]['ratio']:.2f}) {words},"
        for name, words in between.items()
        if report.get(name)
    )
    return (
        f"perplexity {report['dense']['perplexity']:.2f} -> {report['pruned']['perplexity']:.2f} "
        f"(x{report['ratio']:.2f}){steps} on {report['protocol']['n_tokens']} tokens of {report['protocol']['text']}"
    )

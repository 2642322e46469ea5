"""What healing makes smaller: KL from the teacher's distribution of the next token, and cross entropy of the text.

A vocabulary is hundreds of times wider than a hidden state.  So logits are made and used up in pieces of a few rows,
and their gradient goes into the hidden states at once.  No tensor over all tokens and the vocabulary is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sglp_deploy.evidence.precision import computing
from sglp_deploy.models.library import evaluating

_PIECE: Final = 128  # tokens whose logits exist at once: their 25 MB (49,152 entries) stay near the processor


@dataclass(frozen=True)
class Weighting:
    """How the two losses are put together.

    Attributes:
        ce: Share of the cross entropy.
        temperature: Of both distributions in the KL, whose gradient is scaled back by its square.
    """

    ce: float
    temperature: float = 1.0


class _Reached(Exception):
    """The pass came to the head; the logits of all tokens are not made."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__("reached")
        self.hidden = hidden


class Speaker:
    """A language model up to its head, and the head.

    Where the logits are the head's product and nothing more, the pass ends in front of the head.  Where a model scales
    or caps them afterwards (Gemma-2, Cohere, Granite), they are made by the model itself.

    Args:
        module: A causal language model.
        precision: What matrices are multiplied in.
        trains_head: Whether the head's own weights are trained, whose gradient then is left to autograd.
    """

    def __init__(self, module: nn.Module, precision: torch.dtype, *, trains_head: bool = False) -> None:
        self.module: Any = module
        self.precision = precision
        self.device = next(module.parameters()).device
        self.head: Any = module.get_output_embeddings()  # type: ignore[operator]  # transformers' own, not nn.Module's
        self.split = not trains_head and self._is_split()
        self.width: int = self.head.weight.shape[-1]  # of a hidden state
        self._weight: torch.Tensor | None = None

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head is given, shape (rows, positions, width); the logits themselves where they are not split."""
        with evaluating(self.module), computing(self.device, self.precision):
            if not self.split:
                logits: torch.Tensor = self.module(input_ids=ids, use_cache=False).logits
                return logits
            handle = self.head.register_forward_pre_hook(_stop)
            try:
                self.module(input_ids=ids, use_cache=False)
            except _Reached as reached:
                return reached.hidden
            finally:
                handle.remove()
        raise AssertionError("the head was found and is not called")

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of some of these states, float32, without gradients."""
        if not self.split:
            return states.float()
        with torch.no_grad():
            found = states.to(self.precision) @ self.weight.T
            bias = self.head.bias
            return found.float() if bias is None else found.float() + bias

    @property
    def weight(self) -> torch.Tensor:
        """The head's, in the precision of the products; it is not trained where it is used."""
        if self._weight is None:
            self._weight = self.head.weight.detach().to(self.precision)
        return self._weight

    def _is_split(self) -> bool:
        """Whether the logits are what the head returns."""
        if not isinstance(self.head, nn.Linear):
            return False
        seen: list[torch.Tensor] = []
        handle = self.head.register_forward_hook(lambda _module, _given, output: seen.append(output))
        try:
            with evaluating(self.module), torch.no_grad():
                ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
                logits = self.module(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        return len(seen) == 1 and torch.equal(seen[0], logits)


def _stop(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
    raise _Reached(arguments[0])


def distilled(
    student: Speaker, states: torch.Tensor, teacher: Speaker, taught: torch.Tensor, ids: torch.Tensor, how: Weighting
) -> torch.Tensor:
    """Summed loss of all predicted tokens, a scalar with its graph; each row's first token is not predicted.

    Args:
        student: Is trained.
        states: Of the student (:meth:`Speaker.states`), with their graph.
        teacher: Is not.
        taught: Its states.
        ids: The tokens (rows, positions).
        how: Shares of the two losses.
    """
    given, wanted = _predicting(states), _predicting(taught)
    labels = ids[:, 1:].reshape(-1)
    if student.split:
        apply: Any = _Distilled.apply  # torch does not type it
        made: torch.Tensor = apply(given, student, teacher, wanted, labels, how)
        return made
    total = given.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), _PIECE):
        piece = slice(start, start + _PIECE)
        total = total + _loss(given[piece].float(), teacher.logits(wanted[piece]), labels[piece], how)
    return total


def _predicting(states: torch.Tensor) -> torch.Tensor:
    return states[:, :-1].reshape(-1, states.shape[-1])


def _loss(logits: torch.Tensor, taught: torch.Tensor, labels: torch.Tensor, how: Weighting) -> torch.Tensor:
    """The same as :class:`_Distilled`, left to autograd."""
    heat = how.temperature
    kl = nn.functional.kl_div(
        (logits / heat).log_softmax(-1), (taught / heat).log_softmax(-1), reduction="sum", log_target=True
    )
    cross = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return (1 - how.ce) * heat**2 * kl + how.ce * cross


class _Distilled(torch.autograd.Function):
    """Both losses from hidden states, and their gradient in one go, a few tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        student: Speaker,
        teacher: Speaker,
        taught: torch.Tensor,
        labels: torch.Tensor,
        how: Weighting,
    ) -> torch.Tensor:
        """Sum over tokens."""
        gradient = torch.empty_like(states, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        for start in range(0, len(labels), _PIECE):
            piece = slice(start, start + _PIECE)
            loss, by_logits = _piece(student.logits(states[piece]), teacher.logits(taught[piece]), labels[piece], how)
            total += loss
            gradient[piece] = (by_logits.to(student.precision) @ student.weight).float()
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        """Into the states alone."""
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(ctx.dtype), None, None, None, None, None


def _piece(
    logits: torch.Tensor, taught: torch.Tensor, labels: torch.Tensor, how: Weighting
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient by the logits of a few tokens."""
    rows = torch.arange(len(labels), device=labels.device)
    log_p = (taught / how.temperature if how.temperature != 1 else taught).log_softmax(-1)
    log_q = (logits / how.temperature if how.temperature != 1 else logits).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    kl = (p * log_p.sub_(log_q)).sum(dtype=torch.float64)
    plain = log_q if how.temperature == 1 else logits.log_softmax(-1)
    cross = -plain[rows, labels].sum(dtype=torch.float64)
    share, heat = how.ce, how.temperature
    if heat == 1:
        gradient = q.sub_(p, alpha=1 - share)  # (1 - c) (q - p) + c q = q - (1 - c) p
    else:
        gradient = q.sub_(p).mul_((1 - share) * heat).add_(plain.exp(), alpha=share)
    gradient[rows, labels] -= share
    return (1 - share) * heat**2 * kl + share * cross, gradient


def nats(speaker: Speaker, rows: NDArray[np.int64], *, batch_size: int) -> NDArray[np.float64]:
    """Cross entropy of each row, summed over its predicted tokens; infinity where it is not finite."""
    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        ids = torch.from_numpy(rows[start : start + batch_size]).to(speaker.device)
        with torch.inference_mode():
            states = speaker.states(ids)
            for row, labels in zip(states[:, :-1], ids[:, 1:], strict=True):
                total = 0.0
                for at in range(0, len(labels), _PIECE):
                    logits = speaker.logits(row[at : at + _PIECE])
                    total += float(nn.functional.cross_entropy(logits, labels[at : at + _PIECE], reduction="sum"))
                found.append(total if math.isfinite(total) else math.inf)
    return np.array(found)

"""What runners share whose runtime takes sequences without padding: rows go in bare, logits come back in their places.

Nothing here may import torch: a benchmark's worker comes this way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.errors import BackendError


class RowsRunner(ABC):
    """A generating runner (:class:`sglp_deploy.protocols.GeneratingRunner`) over a runtime that pads nothing."""

    _continued = 0  # rows that decode would continue

    @abstractmethod
    def start_rows(self, rows: list[list[int]], *, every_position: bool) -> NDArray[np.float32]:
        """Forget all sequences and begin these.

        Returns:
            Logits of the last position of each row (rows, vocab), or of every position of all rows one after another
            (tokens, vocab).
        """

    @abstractmethod
    def continue_rows(self, tokens: list[int]) -> NDArray[np.float32]:
        """Give each row one more token; logits (rows, vocab)."""

    def forget_rows(self) -> None:
        """No sequence is being continued any more."""
        self._continued = 0

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Logits of every position of ``input_ids``; sequences that were being continued are gone."""
        logits = self.prefill(inputs["input_ids"], inputs.get("attention_mask"), all_positions=True)
        self.forget_rows()
        return {"logits": logits}

    def synchronize(self) -> None:  # noqa: B027  # nothing to wait for, and nothing to override
        """Calls return when results exist."""

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        all_positions: bool = False,
    ) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`; logits at padding are zeros."""
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[real == 1].tolist() for ids, real in zip(input_ids, mask, strict=True)]
        self.forget_rows()
        found = self.start_rows(rows, every_position=all_positions)
        self._continued = len(rows)
        if not all_positions:
            return found
        padded = np.zeros((*input_ids.shape, found.shape[-1]), dtype=np.float32)
        padded[mask == 1] = found
        return padded

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`."""
        if not self._continued:
            raise BackendError("decode was called before prefill; there is no sequence to continue; call prefill first")
        tokens: list[int] = np.asarray(token_ids).reshape(-1).tolist()
        if len(tokens) != self._continued:
            raise BackendError(
                f"decode was given {len(tokens)} tokens for {self._continued} sequences; one for each is needed; pass "
                "as many as prefill had rows"
            )
        return self.continue_rows(tokens)

"""PyTorch as a Runner: the reference every artifact is judged by, and one of the runtimes to measure."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglp_deploy.errors import BackendError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class TorchRunner:
    """Runs a causal language model in eager PyTorch with transformers' own key-value cache.

    Args:
        model: The model, on its device; it is not copied.  None in a subclass that loads it on entry.
        threads: Threads within one operator, or None to leave PyTorch's setting.
    """

    def __init__(self, model: PreTrainedModel | None, *, threads: int | None = None) -> None:
        self._model = model
        self._threads = threads
        self._threads_before: int | None = None
        self._cache: Cache | None = None
        self._mask: torch.Tensor | None = None

    def __enter__(self) -> TorchRunner:
        """Set the thread count; the model is loaded already."""
        if self._threads is not None:
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
        self._cache = self._mask = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget the cache and restore the thread count."""
        self._cache = self._mask = None
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run without a cache on ``input_ids`` and, if given, ``attention_mask``; returns ``logits``."""
        model = self._live()
        tensors = {name: torch.as_tensor(value).to(model.device) for name, value in inputs.items()}
        with torch.inference_mode():
            logits = model(**tensors, use_cache=False).logits
        return {"logits": logits.float().cpu().numpy()}

    def synchronize(self) -> None:
        """Wait for the device; results on a CPU exist when a call returns."""
        device = self._live().device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        all_positions: bool = False,
    ) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`."""
        from transformers import DynamicCache

        model = self._live()
        ids = torch.as_tensor(input_ids).to(model.device)
        mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask).to(ids.device)
        self._cache = DynamicCache(config=model.config)
        self._mask = mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._run(ids, positions, keep=0 if all_positions else 1)
        return logits if all_positions else logits[:, -1]

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`."""
        if self._mask is None:
            raise BackendError("decode was called before prefill; there is no cache to continue; call prefill first")
        ids = torch.as_tensor(token_ids).to(self._live().device).reshape(-1, 1)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        positions = self._mask.sum(-1, keepdim=True) - 1
        return self._run(ids, positions, keep=1)[:, -1]

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, keep: int) -> NDArray[np.float32]:
        with torch.inference_mode():
            output = self._live()(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: NDArray[np.float32] = output.logits.float().cpu().numpy()
        return logits

    def _live(self) -> PreTrainedModel:
        if self._model is None:
            raise BackendError("the runner is not active; its model is loaded by 'with'; use it as a context manager")
        return self._model

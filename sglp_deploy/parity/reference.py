"""PyTorch as a Runner: the reference every artifact is judged by, and one of the runtimes to measure."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sglp_deploy.errors import BackendError

if TYPE_CHECKING:
    from transformers import Cache

_MAIN_OUTPUTS = ("logits", "last_hidden_state")


def main_output(output: Any) -> tuple[str, torch.Tensor]:
    """What a model is run for, with its name: its logits, else its last hidden state, else the one tensor ("output").

    Raises:
        BackendError: If it returns none of these.
    """
    if isinstance(output, torch.Tensor):
        return "output", output
    for name in _MAIN_OUTPUTS:
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return name, value
    raise BackendError(
        f"the model returned {type(output).__name__}, which has none of {', '.join(_MAIN_OUTPUTS)}; which of its "
        "tensors to compare is not known; wrap the model so that it returns one tensor"
    )


class TorchRunner:
    """Runs any model forward in eager PyTorch, and a causal language model with transformers' own key-value cache.

    float32 means all 23 bits of the mantissa while it is entered: PyTorch's default for convolutions on a GPU is TF32,
    which keeps 10, and what it is compared with keeps them all.

    Args:
        model: The model, on its device; it is not copied.  None in a subclass that loads it on entry.
        threads: Threads within one operator, or None to leave PyTorch's setting.
    """

    allocates_through_torch = True

    def __init__(self, model: nn.Module | None, *, threads: int | None = None) -> None:
        self._model = model
        self._tf32_before = False
        self._threads = threads
        self._threads_before: int | None = None
        self._cache: Cache | None = None
        self._mask: torch.Tensor | None = None

    def __enter__(self) -> TorchRunner:
        """Set the thread count; the model is loaded already."""
        if self._threads is not None:
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
        self._tf32_before = _convolves_in_tf32()
        if self._tf32_before:
            torch.backends.cudnn.allow_tf32 = False
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
        if self._tf32_before:
            torch.backends.cudnn.allow_tf32 = True
            self._tf32_before = False

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run without a cache on named inputs, real numbers cast to the weights' type; see :func:`main_output`."""
        model = self._live()
        weight = next(model.parameters())
        tensors = {name: torch.as_tensor(value).to(weight.device) for name, value in inputs.items()}
        tensors |= {name: value.to(weight.dtype) for name, value in tensors.items() if value.is_floating_point()}
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        with torch.inference_mode():
            name, value = main_output(model(**tensors, **options))
        return {name: value.float().cpu().numpy()}

    def synchronize(self) -> None:
        """Wait for the device; results on a CPU exist when a call returns."""
        device = _device(self._live())
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

        model: Any = self._live()
        ids = torch.as_tensor(input_ids).to(_device(model))
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
        ids = torch.as_tensor(token_ids).to(_device(self._live())).reshape(-1, 1)
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

    def _live(self) -> nn.Module:
        if self._model is None:
            raise BackendError("the runner is not active; its model is loaded by 'with'; use it as a context manager")
        return self._model


def _convolves_in_tf32() -> bool:
    """Whether float32 convolutions on a GPU keep 10 bits of the mantissa."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # PyTorch says so where somebody set its newer switches, one for each operator; theirs stay
        return False


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

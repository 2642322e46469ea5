"""One streaming pass over the calibration rows: forward and backward, with hooks that keep sums and nothing else.

Per minibatch a few hundred token rows of each layer's output become one Gram matrix, and the Gram matrices of all
layers become one (L, L) increment.  Gradients are reduced to norms the moment they exist and then freed.  So memory
holds one minibatch, whatever the size of the calibration set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import CalibrationError, ConfigError
from sglp_deploy.evidence.statistics import LayerStats
from sglp_deploy.evidence.text import TokenBatches
from sglp_deploy.models import LayerStack, layer_stack
from sglp_deploy.models.samples import require_next_token_loss
from sglp_deploy.similarity import hsic_terms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]

# Rows of one minibatch that enter the similarity.  The unbiased estimator has no bias at any count above 3; 256 keeps
# a Gram matrix at 256 KB for each layer and its cost at a few per cent of the forward pass.
ROWS_PER_BATCH = 256
ROW_KINDS = ("rms", "raw")
_LEAST_ROWS = 4  # the unbiased HSIC divides by n - 3


@dataclass
class _Sums:
    """What the pass accumulates; all arrays are (L,) or (L, L), float64."""

    n_layers: int
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    matrices: dict[str, np.ndarray] = field(default_factory=dict)
    n_batches: int = 0
    n_compared: int = 0  # minibatches that had rows enough for the similarity
    n_tokens: int = 0
    n_rows: int = 0
    loss: float = 0.0
    n_predictions: int = 0

    def __post_init__(self) -> None:
        for name in ("cosine", "grad_l2", "grad_weight_sum", "grad_output", "taylor"):
            self.vectors[name] = np.zeros(self.n_layers)
        for name in ("hsic_unbiased", "hsic_biased", "cka_batch_mean"):
            self.matrices[name] = np.zeros((self.n_layers, self.n_layers))


def collect_layer_stats(
    model: PreTrainedModel,
    batches: TokenBatches,
    *,
    rows: str = "rms",
    skip_positions: int = 1,
    rows_per_batch: int = ROWS_PER_BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> LayerStats:
    """Run the calibration rows through ``model`` once, forward and backward, and sum what planners need.

    Args:
        model: A causal language model; its weights, gradients and modes are left as they were.
        batches: Token rows; padding is masked everywhere.
        rows: "rms" divides every token row by its root mean square, which is what the next pre-norm layer sees; "raw"
            takes it as it is.  Raw rows let a handful of massive activations decide the whole matrix.
        skip_positions: Leading positions of each sequence left out of the similarity (attention sinks live there).
        rows_per_batch: Token rows drawn from each minibatch for the similarity.
        seed: Which rows are drawn.
        progress: Called with (minibatches done, minibatches in all).

    Raises:
        ConfigError: If ``rows`` is unknown or a count is out of range.
        CalibrationError: If the loss or an activation is not finite, a token is not in the model's vocabulary, a
            layer's output does not vary, or no minibatch has enough tokens.
        UnsupportedModelError: If the model's family is not supported.
    """
    _check_options(rows, skip_positions, rows_per_batch)
    require_next_token_loss(model)
    stack = layer_stack(model)
    _check_tokens(model, batches)
    sums = _Sums(stack.n_layers)
    generator = torch.Generator().manual_seed(seed)
    scale = _loss_scale(model)
    started = time.perf_counter()
    with _collecting(model, stack) as probe:
        for done, (ids, mask) in enumerate(batches):
            device = model.device
            input_ids = torch.from_numpy(ids).to(device)
            attention = torch.from_numpy(mask).to(device)
            probe.begin(attention, _draw_rows(mask, skip_positions, rows_per_batch, generator), rows)
            _forward_backward(model, input_ids, attention, sums, scale)
            probe.end(sums, scale)
            sums.n_batches += 1
            sums.n_tokens += int(mask.sum())
            if progress is not None:
                progress(done + 1, len(batches))
    if not sums.n_rows:
        raise CalibrationError(
            f"no minibatch has {_LEAST_ROWS} tokens after position {skip_positions}; similarity cannot be measured; "
            "give longer text"
        )
    matrices = dict(sums.matrices)
    matrices["cka_batch_mean"] = matrices["cka_batch_mean"] / sums.n_compared
    vectors = {name: value / sums.n_batches for name, value in sums.vectors.items()}
    vectors["cosine"] = sums.vectors["cosine"] / sums.n_tokens
    parameters = np.array([sum(p.numel() for p in layer.parameters()) for layer in stack.layers], dtype=np.int64)
    return LayerStats(
        layer_names=stack.names,
        prunable=stack.prunable,
        parameters=parameters,
        other_parameters=sum(p.numel() for p in model.parameters()) - int(parameters.sum()),
        loss=sums.loss / max(1, sums.n_predictions),
        n_samples=batches.n_samples,
        n_tokens=sums.n_tokens,
        n_rows=sums.n_rows,
        options={
            "rows": rows,
            "skip_positions": skip_positions,
            "rows_per_batch": rows_per_batch,
            "seed": seed,
        },
        elapsed_s=time.perf_counter() - started,
        **matrices,
        **vectors,
    )


def _check_options(rows: str, skip_positions: int, rows_per_batch: int) -> None:
    if rows not in ROW_KINDS:
        raise unknown_name("kind of rows", rows, ROW_KINDS)
    faults = [
        f"{name}={value} must be at least {least}; it counts {what}; pass {name}>={least}"
        for name, value, least, what in (
            ("skip_positions", skip_positions, 0, "tokens"),
            ("rows_per_batch", rows_per_batch, _LEAST_ROWS, "rows, and the unbiased HSIC divides by n - 3"),
        )
        if value < least
    ]
    if faults:
        raise ConfigError(faults)


def _check_tokens(model: PreTrainedModel, batches: TokenBatches) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(batches.input_ids.min()), int(batches.input_ids.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"token {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}; the token ids belong "
            "to another model; encode the text with this model's tokenizer"
        )


def _draw_rows(mask: np.ndarray, skip_positions: int, rows_per_batch: int, generator: torch.Generator) -> torch.Tensor:
    """Flat indices of the token rows that enter the similarity: real tokens past the skipped positions, in order."""
    position = np.cumsum(mask, axis=1) - 1
    valid = torch.from_numpy(np.flatnonzero(((mask == 1) & (position >= skip_positions)).reshape(-1)))
    if len(valid) <= rows_per_batch:
        return valid
    chosen = torch.randperm(len(valid), generator=generator)[:rows_per_batch]
    return valid[chosen.sort().values]


def _loss_scale(model: PreTrainedModel) -> float:
    """Factor on the loss that keeps float16 gradients of a mean loss from flushing to zero; undone in the sums."""
    return 4096.0 if model.dtype == torch.float16 else 1.0


def _forward_backward(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, sums: _Sums, scale: float) -> None:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # the model's own numbering would count padding on the left
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    # Padding neither is predicted nor predicts: on the left, its last position would guess the first real token.
    labels = ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
    predictions = int((labels != -100).sum())
    loss = nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=-100
    )
    if not torch.isfinite(loss):
        raise CalibrationError(
            f"the loss on the calibration text is {loss.item()}; the weights hold NaN or Inf, or activations overflow; "
            "check the checkpoint, or run in float32"
        )
    (loss * scale).backward()  # type: ignore[no-untyped-call]  # torch types backward only partly
    sums.loss += float(loss.detach()) * predictions
    sums.n_predictions += predictions


class _Probe:
    """Hooks on every layer and parameter; holds one minibatch's reductions between ``begin`` and ``end``."""

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack
        self._grams: list[torch.Tensor | None] = []
        self._eps = torch.finfo(torch.float32).eps  # equal tokens give bit-equal rows in any shorter type
        self._handles: list[Any] = []
        for index, layer in enumerate(stack.layers):
            self._handles.append(layer.register_forward_pre_hook(self._entered(), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._left(index)))
            for parameter in layer.parameters():
                handle = parameter.register_post_accumulate_grad_hook(self._gradient(index))  # type: ignore[no-untyped-call]  # torch leaves it untyped
                self._handles.append(handle)

    def begin(self, mask: torch.Tensor, chosen: torch.Tensor, rows: str) -> None:
        n, device = self._stack.n_layers, mask.device
        self._mask = mask.bool()
        self._chosen = chosen.to(device)
        self._rows = rows
        self._grams = [None] * n
        # Kept as tensors until the end of the minibatch: reading one would wait for an accelerator each time.
        self._cosine = [torch.zeros((), device=device)] * n
        self._square_sum = [torch.zeros((), device=device, dtype=torch.float64)] * n
        self._weight_sum = [torch.zeros((), device=device, dtype=torch.float64)] * n
        self._taylor = [torch.zeros((), device=device, dtype=torch.float64)] * n
        self._output = [torch.zeros((), device=device)] * n

    def _entered(self) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            self._hidden_in = hidden.detach()

        return hook

    def _left(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(self._output_gradient(index))
            after = hidden.detach()
            cosine = nn.functional.cosine_similarity(self._hidden_in.float(), after.float(), dim=-1)
            self._cosine[index] = cosine[self._mask].sum()
            if len(self._chosen) >= _LEAST_ROWS:
                # In float64: centring subtracts what the rows have in common, which can be nearly all of them.
                picked = after.reshape(-1, after.shape[-1])[self._chosen].double()
                if self._rows == "rms":
                    picked = picked * torch.rsqrt(picked.pow(2).mean(-1, keepdim=True) + 1e-12)
                self._grams[index] = picked @ picked.T

        return hook

    def _output_gradient(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            self._output[index] = torch.linalg.vector_norm(gradient[self._mask].float())

        return hook

    def _gradient(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            gradient = gradient.float()
            norm = torch.linalg.vector_norm(gradient).double()
            self._square_sum[index] = self._square_sum[index] + norm**2
            if parameter.ndim >= 2:
                self._weight_sum[index] = self._weight_sum[index] + norm
            product = (parameter.detach().float() * gradient).abs_()
            self._taylor[index] = self._taylor[index] + product.sum().double()
            parameter.grad = None  # reduced; freeing it here keeps one gradient alive and not the model's

        return hook

    def end(self, sums: _Sums, scale: float) -> None:
        """Fold this minibatch into ``sums``; gradients are those of ``scale`` times the loss."""
        sums.vectors["cosine"] += _numbers(self._cosine)
        sums.vectors["grad_l2"] += np.sqrt(_numbers(self._square_sum)) / scale
        sums.vectors["grad_weight_sum"] += _numbers(self._weight_sum) / scale
        sums.vectors["grad_output"] += _numbers(self._output) / scale
        sums.vectors["taylor"] += _numbers(self._taylor) / scale
        if any(gram is None for gram in self._grams):
            return
        grams = torch.stack([gram for gram in self._grams if gram is not None]).cpu().numpy()
        unbiased, biased = hsic_terms(grams)
        sums.matrices["hsic_unbiased"] += unbiased
        sums.matrices["hsic_biased"] += biased
        own = np.diag(unbiased)
        # What rounding alone leaves of equal rows: deviations of a few eps of their size, squared by the Gram matrix.
        size = np.diagonal(grams, axis1=1, axis2=2).mean(axis=1)
        constant = own <= ((8 * self._eps) ** 2 * size) ** 2
        if constant.any():
            layer = int(np.argmax(constant))
            raise CalibrationError(
                f"layer {layer} ({self._stack.names[layer]}) gives the same output for every token of a minibatch; its "
                "similarity to other layers is undefined; give longer text, or check the checkpoint"
            )
        sums.matrices["cka_batch_mean"] += unbiased / np.sqrt(np.outer(own, own))
        sums.n_rows += len(self._chosen)
        sums.n_compared += 1

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _numbers(values: list[torch.Tensor]) -> np.ndarray:
    return torch.stack(values).double().cpu().numpy()


@contextmanager
def _collecting(model: PreTrainedModel, stack: LayerStack) -> Iterator[_Probe]:
    """Gradients on for the layers and off for everything else; the model is as it was afterwards."""
    wanted = {id(parameter) for layer in stack.layers for parameter in layer.parameters()}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would make the plan depend on chance
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
        parameter.grad = None
    probe = _Probe(stack)
    try:
        with torch.enable_grad():
            yield probe
    finally:
        probe.close()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode

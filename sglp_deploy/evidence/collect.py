"""One streaming pass over the calibration data, with probes that keep sums and nothing else.

Per minibatch the model runs forward, and backward where a probe needs gradients.  Probes reduce what they see at once.
So memory holds one minibatch, whatever the size of the calibration set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import CalibrationError, ConfigError
from sglp_deploy.evidence.hsic import LEAST_ROWS
from sglp_deploy.evidence.probes import PROBES, make_probes
from sglp_deploy.evidence.probes.base import Minibatch, Seen
from sglp_deploy.evidence.statistics import MEASURED, LayerStats
from sglp_deploy.models import LayerStack, layer_stack
from sglp_deploy.models.library import evaluating

if TYPE_CHECKING:
    from sglp_deploy.evidence.text import TokenBatches
    from sglp_deploy.tasks.base import Task

Progress = Callable[[int, int], None]

# Rows of one minibatch that enter the similarity.  The unbiased estimator has no bias at any count above 3; 256 keeps
# a Gram matrix at 256 KB for each layer and its cost at a few per cent of the forward pass.
ROWS_PER_BATCH = 256
ROW_KINDS = ("rms", "raw")


def collect_layer_stats(
    model: nn.Module,
    batches: TokenBatches,
    *,
    task: Task,
    probes: Iterable[str] = tuple(PROBES),
    rows: str = "rms",
    skip_positions: int = 1,
    rows_per_batch: int = ROWS_PER_BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> LayerStats:
    """Run the calibration rows through ``model`` once and sum what planners asked for.

    Args:
        model: Its weights, gradients and modes are left as they were.
        batches: Calibration rows; padding is masked everywhere.
        task: Says what the loss is, and which positions hold data.
        probes: Names from :data:`sglp_deploy.evidence.probes.PROBES`; all of them when omitted.
        rows: "rms" divides every token row by its root mean square, which is what the next pre-norm layer sees; "raw"
            takes it as it is.  Raw rows let a handful of massive activations decide the whole matrix.
        skip_positions: Leading positions of each sequence left out of the similarity (attention sinks live there).
        rows_per_batch: Token rows drawn from each minibatch for the similarity.
        seed: Which rows are drawn.
        progress: Called with (minibatches done, minibatches in all).

    Raises:
        ConfigError: If ``rows`` or a probe is unknown, or a count is out of range.
        CalibrationError: If the loss or an activation is not finite, a token is not in the model's vocabulary, a
            layer's output does not vary, or no minibatch has enough tokens.
        UnsupportedModelError: If the model's family is not supported, or it has no loss of this task.
    """
    _check_options(rows, skip_positions, rows_per_batch)
    chosen_probes = make_probes(probes)
    task.check(model, batches)
    stack = layer_stack(model)
    backward = any(probe.backward for probe in chosen_probes)
    compares = any(probe.name == "cka" for probe in chosen_probes)
    generator = torch.Generator().manual_seed(seed)
    scale = _loss_scale(model)
    n_rows = n_compared = n_batches = n_tokens = n_predictions = 0
    total_loss = 0.0
    started = time.perf_counter()
    with ExitStack() as cleanup:
        cleanup.enter_context(_gradients_of_layers(model, stack, wanted=backward))
        for probe in chosen_probes:
            for handle in probe.attach(stack):
                cleanup.callback(handle.remove)
        for done, batch in enumerate(batches):
            valid = task.valid(batch)
            chosen = _draw_rows(valid, skip_positions, rows_per_batch, generator)
            device = next(model.parameters()).device
            minibatch = Minibatch(torch.from_numpy(valid).to(device).bool(), chosen.to(device), rows)
            for probe in chosen_probes:
                probe.begin(minibatch)
            with torch.set_grad_enabled(backward):
                loss, predictions = task.loss(model, batch)
            if not torch.isfinite(loss):
                raise CalibrationError(
                    f"the loss on the calibration text is {loss.item()}; the weights hold NaN or Inf, or activations "
                    "overflow; check the checkpoint, or run in float32"
                )
            if backward:
                (loss * scale).backward()  # type: ignore[no-untyped-call]  # torch types backward only partly
            for probe in chosen_probes:
                probe.end(scale)
            total_loss += float(loss.detach()) * predictions
            n_predictions += predictions
            n_batches += 1
            n_tokens += int(valid.sum())
            if compares and minibatch.comparable:
                n_rows += len(chosen)
                n_compared += 1
            if progress is not None:
                progress(done + 1, len(batches))
    if compares and not n_rows:
        raise CalibrationError(
            f"no minibatch has {LEAST_ROWS} tokens after position {skip_positions}; similarity cannot be measured; "
            "give longer text"
        )
    seen = Seen(n_batches, n_compared, n_tokens)
    found = {name: value for probe in chosen_probes for name, value in probe.result(seen).items()}
    parameters = np.array([sum(p.numel() for p in layer.parameters()) for layer in stack.layers], dtype=np.int64)
    return LayerStats(
        layer_names=stack.names,
        prunable=stack.prunable,
        parameters=parameters,
        other_parameters=sum(p.numel() for p in model.parameters()) - int(parameters.sum()),
        loss=total_loss / max(1, n_predictions),
        n_samples=batches.n_samples,
        n_tokens=n_tokens,
        n_rows=n_rows,
        options={
            "rows": rows,
            "skip_positions": skip_positions,
            "rows_per_batch": rows_per_batch,
            "seed": seed,
        },
        elapsed_s=time.perf_counter() - started,
        more={name: value for name, value in found.items() if name not in MEASURED},
        **{name: value for name, value in found.items() if name in MEASURED},
    )


def _check_options(rows: str, skip_positions: int, rows_per_batch: int) -> None:
    if rows not in ROW_KINDS:
        raise unknown_name("kind of rows", rows, ROW_KINDS)
    faults = [
        f"{name}={value} must be at least {least}; it counts {what}; pass {name}>={least}"
        for name, value, least, what in (
            ("skip_positions", skip_positions, 0, "tokens"),
            ("rows_per_batch", rows_per_batch, LEAST_ROWS, "rows, and the unbiased HSIC divides by n - 3"),
        )
        if value < least
    ]
    if faults:
        raise ConfigError(faults)


def _draw_rows(valid: np.ndarray, skip_positions: int, rows_per_batch: int, generator: torch.Generator) -> torch.Tensor:
    """Flat indices of the rows that enter the similarity: positions of data past the skipped ones, in order."""
    position = np.cumsum(valid, axis=1) - 1
    there = torch.from_numpy(np.flatnonzero((valid & (position >= skip_positions)).reshape(-1)))
    if len(there) <= rows_per_batch:
        return there
    chosen = torch.randperm(len(there), generator=generator)[:rows_per_batch]
    return there[chosen.sort().values]


def _loss_scale(model: nn.Module) -> float:
    """Factor on the loss that keeps float16 gradients of a mean loss from flushing to zero; undone in the sums."""
    return 4096.0 if next(model.parameters()).dtype == torch.float16 else 1.0


@contextmanager
def _gradients_of_layers(model: nn.Module, stack: LayerStack, *, wanted: bool) -> Iterator[None]:
    """Gradients on for the layers where ``wanted`` and off for everything else; the model is as it was afterwards."""
    trained = {id(parameter) for layer in stack.layers for parameter in layer.parameters()} if wanted else set()
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in trained)
        parameter.grad = None
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient

"""Hidden states of a model between its layers: run over a stretch of layers, and kept in files.

What is kept lies on disk, minibatch by minibatch.  So memory does not grow with the calibration set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from sglp_deploy.errors import StorageError, UnsupportedModelError
from sglp_deploy.evidence.precision import computing
from sglp_deploy.evidence.probes.base import hidden_into, hidden_of
from sglp_deploy.models import LayerStack
from sglp_deploy.models.library import evaluating

if TYPE_CHECKING:
    from sglp_deploy.tasks.base import Task

# Every so many minibatches one is held out: fitted on none, judged by.
HELD_OUT_EVERY: Final = 8


def held_out_of(n_minibatches: int) -> tuple[int, ...]:
    """Numbers of the minibatches that are held out; the last one where there are fewer than eight."""
    return tuple(range(HELD_OUT_EVERY - 1, n_minibatches, HELD_OUT_EVERY)) or (n_minibatches - 1,)


class _Reached(Exception):
    """The pass came to its last layer; what would follow is not needed."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__("reached")
        self.hidden = hidden


class KeptStream:
    """Hidden states at one boundary in a file, float32, minibatch by minibatch.

    Args:
        path: The file; it is made anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shapes: list[tuple[int, ...]] = []
        path.write_bytes(b"")

    def __len__(self) -> int:
        return len(self._shapes)

    def append(self, hidden: torch.Tensor) -> None:
        """Keep one minibatch more, shape (batch, positions, width).

        Raises:
            StorageError: If the disk is full.
        """
        self._shapes.append(tuple(hidden.shape))
        try:
            with self._path.open("ab") as file:
                hidden.detach().float().cpu().contiguous().numpy().tofile(file)
        except OSError as error:
            raise StorageError(
                f"hidden states cannot be kept in {self._path.parent}; {error.strerror or error}; free some space, set "
                "TMPDIR to another disk, or give fewer calibration tokens"
            ) from error

    def discard(self) -> None:
        """Give the room on the disk back; nothing can be read afterwards."""
        self._path.unlink(missing_ok=True)

    def read(self, index: int) -> torch.Tensor:
        """One minibatch."""
        start = sum(int(np.prod(shape)) for shape in self._shapes[:index])
        shape = self._shapes[index]
        values = np.fromfile(self._path, dtype=np.float32, count=int(np.prod(shape)), offset=4 * start)
        return torch.from_numpy(values.reshape(shape))


class StreamWindow:
    """Unpruned hidden states at consecutive boundaries, each made from the one before when it is first asked for."""

    def __init__(self, folder: Path, extend: Callable[[KeptStream | None, int, KeptStream], None]) -> None:
        self._folder, self._extend = folder, extend
        self._kept: dict[int, KeptStream] = {}

    def at(self, boundary: int) -> KeptStream:
        """The states at a boundary."""
        if boundary not in self._kept:
            before = self.at(boundary - 1) if boundary else None
            made = KeptStream(self._folder / f"{boundary}.f32")
            self._extend(before, boundary, made)
            self._kept[boundary] = made
        return self._kept[boundary]

    def forget_before(self, boundary: int) -> None:
        """Give up what no later gap needs; boundary 0 stays, for gaps in front of all layers."""
        for at in [at for at in self._kept if 0 < at < boundary]:
            self._kept.pop(at).discard()


class IndexedStream:
    """A kept stream of some minibatches only, read by the minibatch's own number."""

    def __init__(self, path: Path, indices: Sequence[int]) -> None:
        self._stream = KeptStream(path)
        self._place = {index: place for place, index in enumerate(indices)}

    def append(self, hidden: torch.Tensor) -> None:
        """Keep the next of the minibatches; see :meth:`KeptStream.append`."""
        self._stream.append(hidden)

    def read(self, index: int) -> torch.Tensor:
        """One minibatch, by its own number."""
        return self._stream.read(self._place[index])

    def discard(self) -> None:
        """Give the room on the disk back."""
        self._stream.discard()


class StackRunner:
    """Runs stretches of a model's layers; the other layers are not computed.

    Args:
        module: The model; it is left as it was.
        stack: Its layers.
        task: Knows how to call the model.
        precision: What matrices are multiplied in; what is added up between them stays as it is.
    """

    def __init__(
        self, module: nn.Module, stack: LayerStack, task: Task, precision: torch.dtype = torch.float32
    ) -> None:
        self.module = module
        self.stack = stack
        self._precision = precision
        self._task = task
        self._parts: list[int] | None = None  # entries of each layer's output; 0 for a bare tensor

    def run(self, batch: Any, start: int, stop: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """The hidden states at boundary ``stop``.

        Args:
            batch: As the task gives it.
            start: The first layer to run.
            stop: One beyond the last; 0 for what the first layer is given.
            hidden: The states at boundary ``start``; the model's own, with nothing skipped, when omitted.

        Raises:
            UnsupportedModelError: If the model does not hand its hidden states from layer to layer.
        """
        first = 0 if hidden is None else start
        with ExitStack() as cleanup:
            cleanup.enter_context(evaluating(self.module))
            cleanup.enter_context(computing(next(self.module.parameters()).device, self._precision))
            if first:
                cleanup.enter_context(self._skipping(batch, range(first)))
            if hidden is not None:
                place = next(self.module.parameters())
                given = hidden.to(place.device, place.dtype)
                handle = self.stack.layers[start].register_forward_pre_hook(_giving(given), with_kwargs=True)
                cleanup.callback(handle.remove)
            if stop == 0:
                handle = self.stack.layers[0].register_forward_pre_hook(_stop_before, with_kwargs=True)
                cleanup.callback(handle.remove)
            else:
                cleanup.callback(self.stack.layers[stop - 1].register_forward_hook(_stop).remove)
            return self._until_reached(batch)

    def logits_from(self, batch: Any, start: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the task's predictions are where the states at boundary ``start``, 0 to L, are ``hidden``."""
        place = next(self.module.parameters())
        # Behind the last layer nothing can be given: the last one hands on what it is given.
        entry = self.stack.layers[min(start, self.stack.n_layers - 1)]
        with ExitStack() as cleanup:
            cleanup.enter_context(evaluating(self.module))
            cleanup.enter_context(computing(next(self.module.parameters()).device, self._precision))
            cleanup.enter_context(self._skipping(batch, range(start)))
            giving = _giving(hidden.to(place.device, place.dtype))
            cleanup.callback(entry.register_forward_pre_hook(giving, with_kwargs=True).remove)
            return self._task.logits(self.module, batch)

    def watch(self, batch: Any, boundaries: Sequence[int]) -> dict[int, torch.Tensor]:
        """The hidden states at several boundaries from one pass without gradients."""
        seen: dict[int, torch.Tensor] = {}

        def keep(at: int) -> Callable[..., None]:
            def hook(_layer: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
                seen[at] = hidden_of(output).detach()

            return hook

        last = max(boundaries)
        with ExitStack() as cleanup:
            for at in sorted({*boundaries} - {0, last}):
                cleanup.callback(self.stack.layers[at - 1].register_forward_hook(keep(at)).remove)
            with torch.inference_mode():
                seen[last] = self.run(batch, 0, last)
        return seen

    def _until_reached(self, batch: Any) -> torch.Tensor:
        try:
            self._task.loss(self.module, batch)
        except _Reached as reached:
            return reached.hidden
        raise UnsupportedModelError(
            f"{type(self.module).__name__} does not run its layers one after the other; a repair cannot follow its "
            "hidden states; use the plan as it is (repair 'none')"
        )

    @contextmanager
    def _skipping(self, batch: Any, layers: range) -> Iterator[None]:
        parts = self._output_parts(batch)
        before: list[tuple[nn.Module, Any]] = []
        try:
            for index in layers:
                layer: Any = self.stack.layers[index]
                before.append((layer, layer.__dict__.get("forward")))
                layer.forward = _handing_on(parts[index])
            yield
        finally:
            for changed, forward in before:
                del changed.forward
                if forward is not None:
                    changed.__dict__["forward"] = forward

    def _output_parts(self, batch: Any) -> list[int]:
        """How many values each layer returns, asked once: what stands in for a layer must return as many."""
        if self._parts is None:
            parts: list[int] = []

            def count(_layer: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
                parts.append(len(output) if isinstance(output, tuple) else 0)

            with ExitStack() as cleanup:
                for layer in self.stack.layers:
                    cleanup.callback(layer.register_forward_hook(count).remove)
                with torch.inference_mode():
                    self.run(batch, 0, self.stack.n_layers)
            self._parts = parts
        return self._parts


def _giving(hidden: torch.Tensor) -> Callable[..., Any]:
    def hook(_layer: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        if arguments:
            return (hidden, *arguments[1:]), dict(keywords)
        return arguments, {**keywords, "hidden_states": hidden}

    return hook


def _stop(_layer: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
    raise _Reached(hidden_of(output))


def _stop_before(_layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    raise _Reached(hidden_into(arguments, keywords))


def _handing_on(parts: int) -> Callable[..., Any]:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        hidden = hidden_into(arguments, keywords)
        return (hidden, *[None] * (parts - 1)) if parts else hidden

    return forward

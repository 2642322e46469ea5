"""Stretches of layers run alone give what the whole model has there; what is kept comes back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import zoo
from sglp_deploy.evidence.streams import KeptStream, StackRunner
from sglp_deploy.models import layer_stack
from sglp_deploy.tasks.language import LanguageTask

FAMILIES = ("llama", "gemma3", "gpt2", "opt", "falcon", "qwen3_moe")


def model_of(family: str) -> Any:
    """A tiny random model."""
    if family in tiny.FAMILIES:
        return tiny.model(family)
    return next(each for each in zoo.specimens() if each.name == family).build()


def batch(rows: int = 2, length: int = 12, padding: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and a mask, the last row padded on the right."""
    ids = np.random.default_rng(0).integers(3, 200, size=(rows, length))
    mask = np.ones_like(ids)
    mask[-1, length - padding :] = 0
    return ids, mask


def _seen(module: nn.Module, data: Any) -> list[torch.Tensor]:
    """The hidden states at every boundary, by hooks that keep all of them."""
    found: list[torch.Tensor] = []
    stack = layer_stack(module)

    def into(_layer: nn.Module, arguments: Any, keywords: Any) -> None:
        found.append((arguments[0] if arguments else keywords["hidden_states"]).clone())

    def out(_layer: nn.Module, _arguments: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [layer.register_forward_pre_hook(into, with_kwargs=True) for layer in stack.layers]
    handles.append(stack.layers[-1].register_forward_hook(out))
    with torch.no_grad():
        LanguageTask().loss(module, data)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stretch_of_layers_gives_what_the_whole_model_has_there(family: str) -> None:
    module, data = model_of(family), batch()
    before = module.state_dict()
    wanted, runner = _seen(module, data), StackRunner(module, layer_stack(module), LanguageTask())
    with torch.no_grad():
        assert torch.equal(runner.run(data, 0, 0), wanted[0])
        assert torch.equal(runner.run(data, 0, 4), wanted[4])
        assert torch.equal(runner.run(data, 2, 5, wanted[2]), wanted[5])
        assert torch.equal(runner.run(data, 1, len(wanted) - 1, wanted[1]), wanted[-1])
        changed = runner.run(data, 2, 3, wanted[2] * 2)
        assert not torch.allclose(changed, wanted[3])
    watched = runner.watch(data, [3, 1, 5])
    assert sorted(watched) == [1, 3, 5]
    assert all(torch.equal(watched[at], wanted[at]) for at in watched)
    # Nothing stays behind: no hook, no replaced method.
    assert all(torch.equal(a, b) for a, b in zip(_seen(module, data), wanted, strict=True))
    assert all("forward" not in layer.__dict__ for layer in layer_stack(module).layers)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_gradients_flow_through_a_stretch_and_no_further() -> None:
    module, data = model_of("llama"), batch()
    stack = layer_stack(module)
    runner = StackRunner(module, stack, LanguageTask())
    given = runner.watch(data, [2])[2].clone()
    runner.run(data, 2, 4, given).pow(2).sum().backward()
    touched = {index for index, layer in enumerate(stack.layers) for p in layer.parameters() if p.grad is not None}
    assert touched == {2, 3}


def test_a_stream_is_read_as_it_was_kept(tmp_path: Path) -> None:
    stream = KeptStream(tmp_path / "s.f32")
    kept = [torch.randn(2, 5, 3), torch.randn(1, 4, 3), torch.randn(2, 5, 3)]
    for each in kept:
        stream.append(each)
    assert len(stream) == 3
    assert all(torch.equal(stream.read(index), kept[index]) for index in (2, 0, 1))
    assert (tmp_path / "s.f32").stat().st_size == 4 * sum(each.numel() for each in kept)

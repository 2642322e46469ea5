"""Every family, every check: pruned non-contiguously, saved, reloaded by its own library, and run.

``docs/families.md`` shows these checks as a table; each of its cells is one test here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
import zoo
from sglp_deploy.materialize import CompressedModel, materialize, save_checkpoint
from sglp_deploy.models import LayerStack, adapter_for, layer_stack, source_of
from sglp_deploy.models.settings import check_settings

ALL = zoo.specimens()
CASES = [pytest.param(specimen, side, id=f"{specimen.name}-{side}") for specimen in ALL for side in specimen.keep]
GENERATING = [case for case in CASES if case.values[0].generates]
WINDOWED = [case for case in CASES if case.values[0].window]

_BUILT: dict[str, nn.Module] = {}


def _model(specimen: zoo.Specimen) -> nn.Module:
    """Built once for all tests of a family; nothing here changes it."""
    if specimen.name not in _BUILT:
        _BUILT.clear()
        _BUILT[specimen.name] = specimen.build()
    return _BUILT[specimen.name]


def _pruned(specimen: zoo.Specimen, side: str) -> CompressedModel:
    module = _model(specimen)
    plan = tiny.plan_for(module, specimen.keep[side], stack=layer_stack(module, side).path)
    return materialize(module, plan, source_of(module, specimen.name))


def _reloaded(specimen: zoo.Specimen, side: str, folder: Path) -> nn.Module:
    pruned = _pruned(specimen, side)
    save_checkpoint(pruned, folder / "checkpoint")
    return adapter_for(pruned.module).load(folder / "checkpoint")


def _removed(stack: LayerStack, keep: tuple[int, ...]) -> dict[int, nn.Module]:
    return {index: layer for index, layer in enumerate(stack.layers) if index not in keep}


def _run(module: nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return zoo.main_output(module(**inputs, **options))


def _close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to the order of a few sums in float32."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("specimen", "side"), CASES)
def test_every_layer_of_the_specimen_matters(specimen: zoo.Specimen, side: str) -> None:
    """Else a wrong layer would go unnoticed by all the other checks."""
    module = _model(specimen)
    stack, inputs = layer_stack(module, side), specimen.inputs(module, 0)
    whole = _run(module, inputs)
    for index, layer in enumerate(stack.layers):
        if stack.prunable[index] and not stack.shares_one_module:  # one that must stay may change the shape
            with zoo.identity({index: layer}):
                without = _run(module, inputs)
            assert (whole - without).abs().max() > 1e-3 * whole.abs().max(), f"layer {index} changes nothing"


@pytest.mark.parametrize(("specimen", "side"), CASES)
def test_the_pruned_model_is_the_original_with_layers_passed_over(specimen: zoo.Specimen, side: str) -> None:
    module, pruned = _model(specimen), _pruned(specimen, side)
    stack, inputs = layer_stack(module, side), specimen.inputs(module, 1)
    if stack.shares_one_module:
        pytest.skip("its layers are one module run in a loop; a lower count is checked by its own test")
    with zoo.identity(_removed(stack, specimen.keep[side])):
        wanted = _run(module, inputs)
    _close(_run(pruned.module, inputs), wanted)


@pytest.mark.parametrize(("specimen", "side"), CASES)
def test_the_reloaded_checkpoint_is_the_model_in_memory(specimen: zoo.Specimen, side: str, tmp_path: Path) -> None:
    """Bit for bit in the weights, setting for setting in every layer, and bit for bit in what it computes."""
    pruned, again = _pruned(specimen, side), _reloaded(specimen, side, tmp_path)
    meant, read = pruned.module.state_dict(), again.state_dict()
    assert meant.keys() == read.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in meant.items())
    check_settings(layer_stack(again, side).layers, pruned.stack.layers)
    inputs = specimen.inputs(pruned.module, 2)
    # Read from a file, tensors lie where the file has them, and some convolutions sum in an order that depends on it.
    assert torch.equal(_run(copy.deepcopy(again), inputs), _run(copy.deepcopy(pruned.module), inputs))


@pytest.mark.parametrize(("specimen", "side"), WINDOWED)
def test_beyond_the_window_it_is_still_the_original_with_layers_passed_over(
    specimen: zoo.Specimen, side: str, tmp_path: Path
) -> None:
    """At window + 64 tokens a layer of the wrong kind shows; before the window it cannot."""
    module, again = _model(specimen), _reloaded(specimen, side, tmp_path)
    assert specimen.window is not None
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 250, (2, specimen.window + 64), generator=generator)
    with zoo.identity(_removed(layer_stack(module, side), specimen.keep[side])):
        wanted = _run(module, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    _close(_run(again, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}), wanted)


@pytest.mark.parametrize(("specimen", "side"), GENERATING)
def test_generation_with_and_without_a_cache_gives_the_same_tokens(
    specimen: zoo.Specimen, side: str, tmp_path: Path
) -> None:
    again: Any = _reloaded(specimen, side, tmp_path)
    inputs = specimen.inputs(again, 4)
    steps = 12 + (specimen.window or 0)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    with torch.no_grad():
        cached = again.generate(**inputs, use_cache=True, **options)
        uncached = again.generate(**inputs, use_cache=False, **options)
    assert cached.shape[1] >= steps
    assert torch.equal(cached, uncached)


def test_every_specimen_has_a_name_of_its_own() -> None:
    names = [specimen.name for specimen in ALL]
    assert len(names) == len(set(names)) >= 40

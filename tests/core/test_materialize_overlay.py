"""A plan's overlay in the pruned model: every tensor where it belongs, the caller's model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
import zoo
from overlays import changed, overlay_of
from sglp_deploy import materialize as materializing
from sglp_deploy.errors import ArtifactError, PlanError, UnsupportedModelError
from sglp_deploy.materialize import CompressedModel, check_reload, materialize, save_checkpoint
from sglp_deploy.models import layer_stack, source_of
from sglp_deploy.models.proof import overlaid
from sglp_deploy.overlay import OVERLAY_FILE, Overlay, stored_tensors

# One of each way a model can be built: tied and untied heads, Conv1D, experts, windows, linear attention, two sides,
# stages, layers that share a container with what is no layer, batch norms.
FAMILIES = (
    "llama", "gpt2", "gemma3", "qwen3_moe", "qwen3_next", "bert", "modernbert", "t5", "bart", "whisper", "wav2vec2",
    "vit", "swin", "convnext", "resnet", "efficientnet",
)  # fmt: skip
BY_NAME = {specimen.name: specimen for specimen in zoo.specimens()}
CASES = [pytest.param(BY_NAME[name], side, id=f"{name}-{side}") for name in FAMILIES for side in BY_NAME[name].keep]


def _pruned(module: nn.Module, keep: tuple[int, ...], overlay: Overlay, stack: str | None = None) -> CompressedModel:
    return materialize(module, tiny.plan_for(module, keep, stack=stack).with_overlay(overlay), source_of(module, "m"))


def _run(module: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return zoo.main_output(module(**inputs))


def _values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in stored_tensors(module).items()}


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def _loaded_by_name(module: nn.Module, overlay: Overlay) -> Iterator[None]:
    """The overlay in the unpruned model by torch's own reader of names."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(dict(overlay.tensors), strict=False)
    yield
    module.load_state_dict(before)


@pytest.mark.parametrize(("specimen", "side"), CASES)
def test_the_pruned_model_computes_what_the_original_does_with_the_overlay_and_layers_passed_over(
    specimen: zoo.Specimen, side: str
) -> None:
    module = specimen.build()
    overlay, stack, keep = overlay_of(module), layer_stack(module, side), specimen.keep[side]
    before, inputs = _values(module), specimen.inputs(module, 1)
    got = _run(_pruned(module, keep, overlay, stack.path).module, inputs)
    assert _equal(_values(module), before)
    removed = {index: layer for index, layer in enumerate(stack.layers) if index not in keep}
    with zoo.identity(removed):
        unchanged = _run(module, inputs)
        with _loaded_by_name(module, overlay):
            wanted = _run(module, inputs)
    size = float(wanted.abs().max())
    assert float((wanted - unchanged).abs().max()) > 0.01 * size
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5 * size)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("end", [0, 1], ids=["embedding", "head"])
def test_a_tied_tensor_is_replaced_under_both_its_names(family: str, end: int, tmp_path: Path) -> None:
    module: Any = tiny.model("llama") if family == "llama" else BY_NAME["gpt2"].build()
    names = ("model.embed_tokens.weight" if family == "llama" else "transformer.wte.weight", "lm_head.weight")
    value = changed(module.get_parameter(names[end]), 3)
    pruned = _pruned(module, (0, 2, 3, 5), Overlay({names[end]: value}))
    one, other = (pruned.module.get_parameter(name) for name in names)
    assert one is other
    assert torch.equal(one, value)
    assert module.get_parameter(names[0]) is module.get_parameter(names[1])
    assert (
        pruned.n_parameters
        == materialize(module, tiny.plan_for(module, (0, 2, 3, 5)), source_of(module, "m")).n_parameters
    )
    check_reload(pruned, save_checkpoint(pruned, tmp_path / "checkpoint"))


def test_equal_values_for_both_ends_of_a_tie_are_one_and_different_ones_are_refused() -> None:
    module: Any = tiny.model("llama")
    value = changed(module.lm_head.weight, 3)
    both = {"model.embed_tokens.weight": value, "lm_head.weight": value.clone()}
    pruned: Any = _pruned(module, (0, 2, 3, 5), Overlay(both)).module
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    message = (
        r"gives lm_head\.weight and model\.embed_tokens\.weight different values; .* could hold; give one of the two"
    )
    with pytest.raises(PlanError, match=message):
        _pruned(module, (0, 2, 3, 5), Overlay(both | {"lm_head.weight": value + 1}))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_two_parameters_in_one_memory_are_refused_where_the_overlay_names_one(name: str) -> None:
    """Some loaders tie by the values and not by the parameter; an overlay would untie them without a word."""
    module: Any = tiny.model("llama-untied")
    module.lm_head.weight = nn.Parameter(module.model.embed_tokens.weight.detach(), requires_grad=False)
    message = (
        r"model\.embed_tokens\.weight and lm_head\.weight of the model are two parameters in one memory; .*"
        "tie them by assigning one parameter to both"
    )
    with pytest.raises(PlanError, match=message):
        _pruned(module, (0, 2, 3, 5), overlay_of(module, [name]))
    untouched = overlay_of(module, ["model.norm.weight"])
    assert _pruned(module, (0, 2, 3, 5), untouched).n_layers == 4


def test_an_untied_head_and_its_embedding_are_two() -> None:
    module: Any = tiny.model("llama-untied")
    value = changed(module.lm_head.weight, 3)
    pruned: Any = _pruned(module, (0, 2, 3, 5), Overlay({"lm_head.weight": value})).module
    assert torch.equal(pruned.lm_head.weight, value)
    assert pruned.model.embed_tokens.weight is module.model.embed_tokens.weight


def test_only_what_the_overlay_changes_has_memory_of_its_own() -> None:
    module: Any = tiny.model("llama")
    name = "model.layers.3.mlp.up_proj.weight"
    overlay = overlay_of(module, [name])
    pruned = _pruned(module, (0, 2, 3, 5), overlay)
    mine, old = dict(pruned.module.named_parameters()), dict(module.named_parameters())
    own = {new for new, value in mine.items() if not any(value is one for one in old.values())}
    assert own == {"model.layers.2.mlp.up_proj.weight"}
    assert torch.equal(mine["model.layers.2.mlp.up_proj.weight"], overlay.tensors[name])
    assert mine["model.layers.2.mlp.up_proj.weight"].requires_grad == old[name].requires_grad


def test_a_buffer_that_is_stored_is_replaced() -> None:
    module = BY_NAME["resnet"].build()
    stack = layer_stack(module)
    name = "resnet.embedder.embedder.normalization.running_mean"
    before = module.get_buffer(name).clone()
    value = before + 1
    pruned = _pruned(module, BY_NAME["resnet"].keep[stack.side], Overlay({name: value}))
    assert torch.equal(pruned.module.get_buffer(name), value)
    assert torch.equal(module.get_buffer(name), before)


def test_tensors_of_removed_layers_are_ignored() -> None:
    module = tiny.model("llama")
    kept = tiny.plan_for(module, (0, 2, 3, 5))
    plain = materialize(module, kept, source_of(module, "m")).module
    pruned = _pruned(module, (0, 2, 3, 5), overlay_of(module, ["model.layers.1.mlp.up_proj.weight"])).module
    assert all(one is other for one, other in zip(plain.parameters(), pruned.parameters(), strict=True))


def test_the_overlays_place_is_recorded_where_it_has_one_and_nothing_else_is_said(tmp_path: Path) -> None:
    module = tiny.model("llama")
    overlay = overlay_of(module, ["model.norm.weight"])
    source = source_of(module, "m")
    assert _pruned(module, (0, 2), overlay).source == source
    assert "overlay_file" not in source.to_json()
    overlay.save(tmp_path / OVERLAY_FILE)
    placed = _pruned(module, (0, 2), overlay).source
    assert placed == replace(source, overlay_file=str(tmp_path / OVERLAY_FILE))
    assert type(source).from_json(placed.to_json()) == placed


# ---------------------------------------------------------------------------------------------------- what is refused


def test_layers_that_are_one_module_take_no_overlay() -> None:
    specimen = BY_NAME["albert"]
    module = specimen.build()
    with pytest.raises(
        UnsupportedModelError, match=r"one module run \d+ times; an overlay .* at once; use a plan with"
    ):
        _pruned(module, next(iter(specimen.keep.values())), overlay_of(module))


def test_a_tensor_that_pruning_cuts_is_refused() -> None:
    """Gemma-3n packs an embedding for every layer into one tensor."""
    specimen = BY_NAME["gemma3n"]
    module = specimen.build()
    name = next(name for name, _ in module.named_parameters() if name.endswith("embed_tokens_per_layer.weight"))
    with pytest.raises(
        PlanError, match=rf"changes {name}, which the pruned model does not take over .*; make the over"
    ):
        _pruned(module, specimen.keep["layers"], overlay_of(module, [name]))


def test_a_plan_without_its_overlay_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.model("llama")
    plan = replace(tiny.plan_for(module, (0, 2)).with_overlay(overlay_of(module)), weights=None)
    monkeypatch.setattr(materializing, "select_layers", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(PlanError, match=r"is not at hand; without it .*; put overlay\.safetensors beside the plan"):
        materialize(module, plan, source_of(module, "m"))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    module = tiny.model("llama")
    plan = tiny.plan_for(module, (0, 2)).with_overlay(overlay_of(module, ["model.norm.weight"]))
    file = plan.save_overlay(tmp_path)
    assert file is not None
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        ArtifactError, match=r"is not the overlay the plan names .*; it was altered or belongs to anoth"
    ):
        materialize(module, plan.with_weights_from(file), source_of(module, "m"))


def test_an_overlay_of_another_type_is_refused() -> None:
    module = tiny.model("llama")
    with pytest.raises(PlanError, match=r"is bfloat16 of shape \[64\], the model's is float32 .*; load the model with"):
        _pruned(module, (0, 2), Overlay({"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}))


# --------------------------------------------------------------------------------------- the reference of comparisons


def test_the_original_computes_with_the_overlay_inside_the_block_and_as_before_behind_it() -> None:
    module: Any = tiny.model("llama")
    overlay, before, ids = overlay_of(module), _values(module), torch.arange(8)[None]
    parameters = list(module.parameters())
    plain = _run(module, {"input_ids": ids})
    with _loaded_by_name(module, overlay):
        wanted = _run(module, {"input_ids": ids})
    with overlaid(module, overlay):
        assert torch.equal(_run(module, {"input_ids": ids}), wanted)
        assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.equal(_run(module, {"input_ids": ids}), plain)
    assert _equal(_values(module), before)
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))


def test_the_original_is_as_before_when_the_block_fails_and_when_a_tie_was_named_twice() -> None:
    module: Any = tiny.model("llama")
    before = _values(module)
    value = changed(module.lm_head.weight, 1)
    both = Overlay({"model.embed_tokens.weight": value, "lm_head.weight": value})

    def stop() -> None:
        assert torch.equal(module.lm_head.weight, value)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), overlaid(module, both):
        stop()
    assert _equal(_values(module), before)
    with pytest.raises(KeyError), overlaid(module, Overlay({"lm_head.weight": value, "none": value})):
        pytest.fail("a name the model has not was taken")
    assert _equal(_values(module), before)


def test_without_an_overlay_nothing_is_exchanged() -> None:
    module = tiny.model("llama")
    before = [tensor.data_ptr() for tensor in module.parameters()]
    with overlaid(module, None):
        assert [tensor.data_ptr() for tensor in module.parameters()] == before


def test_an_undeclared_family_is_proved_with_the_overlay_in_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.model("llama")
    monkeypatch.setattr(materializing, "FAMILIES", {})
    assert _pruned(module, (0, 2, 3, 5), overlay_of(module)).n_layers == 4
    real = materializing.put_overlay
    other = Overlay({name: value * 1.01 for name, value in overlay_of(module).tensors.items()})
    monkeypatch.setattr(materializing, "put_overlay", lambda pruned, _overlay, *rest: real(pruned, other, *rest))
    with pytest.raises(UnsupportedModelError, match="computes something else than the original"):
        _pruned(module, (0, 2, 3, 5), overlay_of(module))

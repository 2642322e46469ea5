"""What is special about vision models: stages, shapes, windows that shift, and libraries that may not be there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Backbone,
    Dinov2Config,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
)

import tiny
import zoo
import zoo_vision
from sglp_deploy.errors import MissingDependencyError, UnsupportedModelError
from sglp_deploy.materialize import CompressedModel, materialize, save_checkpoint
from sglp_deploy.models import adapter_for, adapter_of_folder, layer_stack, load_model, pruned_config, source_of

BY_NAME = {specimen.name: specimen for specimen in zoo_vision.SPECIMENS}


def _compressed(module: nn.Module, keep: tuple[int, ...]) -> CompressedModel:
    return materialize(module, tiny.plan_for(module, keep), source_of(module, "tiny"))


def _all_but(module: nn.Module, *dropped: int) -> tuple[int, ...]:
    return tuple(index for index in range(layer_stack(module).n_layers) if index not in dropped)


def _run(module: nn.Module, size: int | tuple[int, int] = zoo_vision.NON_SQUARE) -> torch.Tensor:
    with torch.no_grad():
        return zoo.main_output(module(pixel_values=zoo_vision.images(size, 2, 5)))


def _passed_over(
    module: nn.Module, keep: tuple[int, ...], size: int | tuple[int, int] = zoo_vision.NON_SQUARE
) -> torch.Tensor:
    layers = layer_stack(module).layers
    with zoo.identity({index: layer for index, layer in enumerate(layers) if index not in keep}):
        return _run(module, size)


def _saved_and_loaded(module: nn.Module, keep: tuple[int, ...], folder: Path) -> nn.Module:
    return load_model(save_checkpoint(_compressed(module, keep), folder / "checkpoint")).module


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_no_entry_of_a_declared_family_is_left_unknown(name: str) -> None:
    module = BY_NAME[name].build()
    changes = adapter_for(module).changes(module, layer_stack(module), BY_NAME[name].keep["layers"])
    assert [change.entry for change in changes if change.rule.startswith("not known here")] == []


@pytest.mark.parametrize(
    ("name", "dropped", "said"),
    [
        ("swin", (3,), r"^layer 4 would become number 1 of its stage and behave differently there; "),
        ("swin", (0,), r"^layer 1 would become number 0 of its stage and behave differently there; "),
        ("swin", (2, 3, 4), r"^layer 5 would become number 0 of its stage "),
        ("swinv2", (8,), r"every second layer of a stage shifts its windows, so layers must go in neighbouring pairs"),
    ],
)
def test_a_layer_whose_windows_would_shift_otherwise_is_refused(name: str, dropped: tuple[int, ...], said: str) -> None:
    module = BY_NAME[name].build()
    with pytest.raises(UnsupportedModelError, match=said):
        _compressed(module, _all_but(module, *dropped))


@pytest.mark.parametrize("name", ["swin", "swinv2"])
@pytest.mark.parametrize("dropped", [(3, 4), (2, 5, 6, 7), (7,), (1, 9), (0, 1), (8, 9)], ids=str)
def test_pairs_tails_and_whole_stages_of_shifting_layers_may_go(
    name: str, dropped: tuple[int, ...], tmp_path: Path
) -> None:
    module = BY_NAME[name].build()
    keep = _all_but(module, *dropped)
    if dropped == (2, 5, 6, 7):  # 3 and 4 would be first and second: the other way round
        with pytest.raises(UnsupportedModelError, match="layer 3 would become number 0 of its stage"):
            _compressed(module, keep)
        return
    wanted = _passed_over(module, keep)
    torch.testing.assert_close(_run(_saved_and_loaded(module, keep, tmp_path)), wanted, rtol=1e-4, atol=1e-4)


def test_a_wrongly_shifted_layer_would_load_and_compute_something_else() -> None:
    """The reason for the refusal: same weights, same shapes, another function."""
    module = BY_NAME["swin"].build()
    keep = _all_but(module, 3, 9)
    config = pruned_config(module.config, _all_but(module, 4, 5))  # type: ignore[arg-type]
    config.depths = [2, 5, 1]
    rebuilt = SwinForImageClassification(config).eval()
    names = {f"swin.encoder.layers.1.blocks.{old}.": f"swin.encoder.layers.1.blocks.{old - 1}." for old in range(2, 6)}
    tensors = {}
    for name, tensor in module.state_dict().items():
        if ".1.blocks.1." in name or ".2.blocks.1." in name:
            continue
        start = next((old for old in names if name.startswith(old)), "")
        tensors[names.get(start, "") + name.removeprefix(start)] = tensor
    rebuilt.load_state_dict(tensors, strict=True)
    assert (_run(rebuilt) - _passed_over(module, keep)).abs().max() > 1e-2


def test_a_swin_that_once_saw_a_small_image_is_saved_as_it_was_made(tmp_path: Path) -> None:
    """A stage no larger than the window stops its layers from shifting, for good; a checkpoint must not care."""
    keep = (0, 1, 2, 3, 6, 7, 8, 9)
    wanted = _passed_over(BY_NAME["swin"].build(), keep)
    module = BY_NAME["swin"].build()
    _run(module, 32)
    assert layer_stack(module).layers[9].shift_size == 0
    pruned = _compressed(module, keep)
    torch.testing.assert_close(_run(pruned.module), wanted, rtol=1e-4, atol=1e-4)
    _run(pruned.module, 32)
    again = load_model(save_checkpoint(pruned, tmp_path / "checkpoint")).module
    torch.testing.assert_close(_run(again), wanted, rtol=1e-4, atol=1e-4)


def test_a_swin_whose_last_stage_is_one_window_is_pruned_after_it_has_run(tmp_path: Path) -> None:
    """As in the stock models: 7x7 in windows of 7, so the layers there are no longer what they were built as."""
    settings = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 4, 2], num_heads=[1, 2, 4], window_size=4, num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = zoo_vision.enliven(SwinForImageClassification(settings).eval(), zoo_vision.images(32, 2, 1))
    wanted = _passed_over(module, (0, 1, 2, 3, 6, 7), 32)
    assert layer_stack(module).layers[7].shift_size == 0
    again = _saved_and_loaded(module, (0, 1, 2, 3, 6, 7), tmp_path)
    torch.testing.assert_close(_run(again, 32), wanted, rtol=1e-4, atol=1e-5)


def test_a_stage_of_convnext_may_lose_all_its_layers(tmp_path: Path) -> None:
    module = BY_NAME["convnext"].build()
    keep = _all_but(module, 2, 3)
    wanted = _passed_over(module, keep)
    again = _saved_and_loaded(module, keep, tmp_path)
    assert again.config.depths == [2, 0, 4, 2]  # type: ignore[union-attr]
    torch.testing.assert_close(_run(again), wanted, rtol=1e-4, atol=1e-4)


def test_as_many_stages_as_layers_does_not_make_a_list_of_stages_one_of_layers() -> None:
    settings = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32)
    module = ConvNextForImageClassification(settings)
    changes = adapter_for(module).changes(module, layer_stack(module), (0, 1, 3))
    assert [(change.entry, change.after) for change in changes] == [("depths", [1, 1, 0, 1])]


def test_the_size_of_images_is_not_a_list_of_two_layers() -> None:
    after = pruned_config(ViTConfig(num_hidden_layers=2, image_size=(48, 64), patch_size=(8, 16)), (1,))
    assert after.num_hidden_layers == 1
    assert (list(after.image_size), list(after.patch_size)) == ([48, 64], [8, 16])


@pytest.mark.parametrize(
    ("name", "first"),
    [("resnet", (0, 2, 5, 9)), ("resnet-basic", (0, 2, 5, 9)), ("efficientnet", (0, 2, 5, 8))],
)
def test_the_first_layer_of_each_stage_is_refused_with_its_reason(name: str, first: tuple[int, ...]) -> None:
    module = BY_NAME[name].build()
    stack = layer_stack(module)
    assert tuple(stack.pinned) == first
    for index in first:
        with pytest.raises(
            UnsupportedModelError, match=rf"^layer {index} .* cannot be removed; it is the first layer of"
        ):
            _compressed(module, _all_but(module, index))


def test_a_resnet_of_pinned_layers_only_can_still_be_saved(tmp_path: Path) -> None:
    module = BY_NAME["resnet"].build()
    again = _saved_and_loaded(module, (0, 2, 5, 9), tmp_path)
    assert again.config.depths == [1, 1, 1, 1]  # type: ignore[union-attr]
    torch.testing.assert_close(_run(again), _passed_over(module, (0, 2, 5, 9)), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match=r"none of the 4 layers under .* can be removed"):
        _compressed(again, (0, 1, 2))


def test_the_depth_of_an_efficientnet_becomes_exact_and_its_paddings_follow_their_layers() -> None:
    """Two layers for 1.4 x 1, three for 1.4 x 2, five for 1.4 x 3; layers 5 and 8 are padded on two sides only."""
    module = BY_NAME["efficientnet"].build()
    changes = adapter_for(module).changes(module, layer_stack(module), (0, 2, 4, 5, 6, 8, 10, 11))
    assert {change.entry: (change.before, change.after) for change in changes} == {
        "depth_coefficient": (1.4, 1.0),
        "num_block_repeats": ([1, 2, 2, 3], [1, 2, 2, 3]),
        "depthwise_padding": ([5, 8], [3, 5]),
        "num_hidden_layers": (32, 32),
    }
    changes = adapter_for(module).changes(module, layer_stack(module), (0, 1, 2, 5, 8, 9, 10, 11, 12))
    assert {change.entry: change.after for change in changes} == {
        "depth_coefficient": 1.0,
        "num_block_repeats": [2, 1, 1, 5],
        "depthwise_padding": [3, 4],
        "num_hidden_layers": 36,
    }


def test_an_efficientnet_whose_configuration_counts_otherwise_is_refused() -> None:
    module = EfficientNetForImageClassification(
        EfficientNetConfig(width_coefficient=0.1, depth_coefficient=1.0, hidden_dim=128, image_size=32)
    )
    module.config.depth_coefficient = 2.0
    with pytest.raises(UnsupportedModelError, match=r"stages of \[16\] layers where its configuration says \[2, 4, 4"):
        layer_stack(module)


def test_mobilenet_v2_of_transformers_is_refused_because_its_depth_is_code() -> None:
    with pytest.raises(UnsupportedModelError, match="its 16 layers are written into the code of transformers"):
        layer_stack(zoo_vision.mobilenet_v2())


def _backbone(**settings: Any) -> Dinov2Backbone:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=2, image_size=24, patch_size=8, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Dinov2Backbone = zoo_vision.enliven(Dinov2Backbone(config).eval(), zoo_vision.images(24, 2, 1))
    return module


def test_the_stages_of_dinov2_follow_its_layers() -> None:
    """Else a reload fails, or keeps the names of layers that are gone."""
    after = pruned_config(_backbone(out_features=["stage2", "stage5"]).config, (0, 1, 3, 5))
    assert after.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    # Stage 5 is what layer 4 returns; with it gone, what layer 3 hands on: the third kept one.
    assert (after.out_features, after.out_indices) == (["stage2", "stage3"], [2, 3])


def test_the_feature_maps_of_a_backbone_are_the_original_with_layers_passed_over(tmp_path: Path) -> None:
    # Features are recorded before an identity hook replaces a layer's output, so the layers they follow are kept here.
    module, keep = _backbone(out_indices=[0, 2, -1]), (1, 3, 5)
    layers = layer_stack(module).layers
    image = zoo_vision.images(24, 2, 5)
    with torch.no_grad(), zoo.identity({index: layers[index] for index in (0, 2, 4)}):
        wanted = module(image).feature_maps
    folder = save_checkpoint(_compressed(module, keep), tmp_path / "checkpoint")
    with torch.no_grad():
        got = Dinov2Backbone.from_pretrained(folder)(image).feature_maps
    assert len(got) == len(wanted) == 3
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_two_stages_that_would_become_one_are_refused() -> None:
    module = _backbone(out_features=["stage2", "stage3"])
    with pytest.raises(
        UnsupportedModelError, match=r"hidden states \['stage2', 'stage3'\].*two of them would be the sa"
    ):
        _compressed(module, (0, 1, 3, 4, 5))


TIMM_CONFIG = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}
TORCHVISION_CONFIG = {"library": "torchvision", "builder": "torchvision.models.resnet.ResNet", "arguments": {}}


def _folder(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"not read before the library is there")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "library"),
    [
        (TIMM_CONFIG, "timm"),
        (TORCHVISION_CONFIG, "torchvision"),
        (TIMM_CONFIG | {"model_type": "timm_wrapper"}, "transformers"),
        ({"model_type": "llama"}, "transformers"),
    ],
)
def test_a_folder_says_which_library_it_belongs_to(config: dict[str, Any], library: str, tmp_path: Path) -> None:
    adapter = adapter_of_folder(_folder(tmp_path, config))
    assert adapter is not None
    assert adapter.name == library


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"library": "another"}'])
def test_a_folder_of_no_known_library_belongs_to_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert adapter_of_folder(tmp_path) is None
    assert adapter_of_folder(tmp_path / "missing") is None


@pytest.mark.parametrize(("config", "library"), [(TIMM_CONFIG, "timm"), (TORCHVISION_CONFIG, "torchvision")])
def test_a_library_that_is_missing_is_named_with_what_installs_it(
    config: dict[str, Any], library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # import then fails as if it were not installed
    said = rf"{library} is needed for this model and cannot be imported; .*pip install 'sglp-deploy\[vision\]'"
    with pytest.raises(MissingDependencyError, match=said):
        load_model(_folder(tmp_path, _buildable(config)))


@pytest.mark.parametrize(("config", "library"), [(TIMM_CONFIG, "timm"), (TORCHVISION_CONFIG, "torchvision")])
def test_a_library_that_fails_on_import_is_told_from_one_that_is_missing(
    config: dict[str, Any], library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchvision does beside a torch that its operators were not built for."""
    package = tmp_path / "packages" / library
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    said = rf"{library} is installed and fails on import; RuntimeError: operator .* does not exist; install the build"
    with pytest.raises(MissingDependencyError, match=said):
        load_model(_folder(tmp_path, _buildable(config)))


def _buildable(config: dict[str, Any]) -> dict[str, Any]:
    """With arguments, so that the library is asked for."""
    return config | ({"arguments": {"norm_layer": {}}} if "library" in config else {})


def test_a_model_is_told_to_be_of_a_library_without_importing_it() -> None:
    kind = type("ResNet", (nn.Module,), {"__module__": "timm.models.resnet_of_tomorrow"})
    before = set(sys.modules)
    assert adapter_for(kind()).name == "timm"
    kind = type("VGG", (nn.Module,), {"__module__": "torchvision.models.vgg"})
    assert adapter_for(kind()).name == "torchvision"
    with pytest.raises(UnsupportedModelError, match=r"^torchvision\.models\.vgg\.VGG is not among the torchvision mod"):
        layer_stack(kind())
    assert not {name for name in set(sys.modules) - before if name.startswith(("timm", "torchvision"))}

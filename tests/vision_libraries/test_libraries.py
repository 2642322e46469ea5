"""Models of timm and torchvision: pruned, saved, read back with the plain library, and compared with the original."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
import zoo
import zoo_vision
from overlays import overlay_of
from sglp_deploy.errors import ArtifactError, UnsupportedModelError
from sglp_deploy.materialize import CompressedModel, materialize, save_checkpoint, select_layers
from sglp_deploy.models import adapter_for, adapter_of_folder, fingerprint, layer_stack, load_model, source_of
from sglp_deploy.models.samples import image_size, sample_inputs

_REASON = "needs timm and torchvision: make test-vision, or pip install 'sglp-deploy[vision]'"
timm = pytest.importorskip("timm", reason=_REASON)
torchvision = pytest.importorskip("torchvision", reason=_REASON)

from timm.models import get_model_args  # noqa: E402 - only once it is known to be there
from torchvision.models import EfficientNet, MobileNetV2, ResNet  # noqa: E402
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

SIZE = zoo_vision.NON_SQUARE
LABELS = zoo_vision.N_LABELS


@dataclass(frozen=True)
class Case:
    """A tiny model, the layers it keeps and what that changes in its configuration."""

    name: str
    make: Callable[[], nn.Module]
    keep: tuple[int, ...]
    entry: str
    after: Any

    @property
    def library(self) -> str:
        return self.name.partition("-")[0]


def _efficientnet_rows(lengths: tuple[int, int, int, int]) -> list[Any]:
    return [
        FusedMBConvConfig(1, 3, 1, 16, 16, lengths[0]),
        FusedMBConvConfig(4, 3, 2, 16, 24, lengths[1]),
        MBConvConfig(4, 5, 2, 24, 32, lengths[2]),
        MBConvConfig(6, 3, 1, 32, 40, lengths[3]),
    ]


def _row(kind: str, *facts: int) -> dict[str, Any]:
    names = ("expand_ratio", "kernel", "stride", "input_channels", "out_channels", "num_layers")
    return {"class": kind, **dict(zip(names, facts, strict=True))}


def _timm(architecture: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(architecture, num_classes=LABELS, **arguments)


_EPSILON = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
_VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 2, "drop_path_rate": 0.1}

CASES = (
    Case(
        "timm-resnet",
        _timm("resnet26", layers=(2, 3, 4, 2), channels=(24, 32, 40, 48), drop_path_rate=0.1),
        (0, 2, 4, 5, 7, 9),
        "model_args.layers",
        [1, 2, 2, 1],
    ),
    Case(
        "timm-resnet-basic",
        _timm("resnet18d", layers=(3, 2, 2, 2), channels=(64, 24, 32, 48)),
        (0, 2, 3, 5, 7, 8),
        "model_args.layers",
        [2, 1, 1, 2],
    ),
    Case("timm-vit", _timm("vit_tiny_patch16_224", **_VIT), (0, 2, 3, 5), "model_args.depth", 4),
    Case(
        "timm-efficientnet",
        _timm("efficientnet_b0", drop_path_rate=0.2),
        (0, 1, 3, 4, 5, 7, 8, 9, 11, 13, 15),
        "kept_blocks",
        [[0], [0], [0, 1], [0, 2], [0, 1], [0, 2], [0]],
    ),
    Case(
        "timm-mobilenetv2",
        _timm("mobilenetv2_035"),
        (0, 1, 3, 5, 6, 8, 10, 12, 13, 15, 16),
        "kept_blocks",
        [[0], [0], [0, 2], [0, 2], [0, 2], [0, 2], [0]],
    ),
    Case(
        "timm-mobilenetv3",
        _timm("mobilenetv3_small_050"),
        (0, 1, 3, 5, 8, 10, 11),
        "kept_blocks",
        [[0], [0], [0, 2], [], [0, 2], [0]],
    ),
    Case(
        "torchvision-resnet",
        lambda: ResNet(BasicBlock, [3, 2, 2, 2], num_classes=LABELS),
        (0, 2, 3, 5, 7, 8),
        "arguments.layers",
        [2, 1, 1, 2],
    ),
    Case(
        "torchvision-resnet-dilated",
        lambda: ResNet(
            Bottleneck,
            [2, 3, 2, 2],
            num_classes=LABELS,
            groups=2,
            width_per_group=16,
            replace_stride_with_dilation=[False, False, True],
            norm_layer=_EPSILON,
        ),
        (0, 2, 4, 5, 7),
        "arguments.layers",
        [1, 2, 1, 1],
    ),
    Case(
        "torchvision-mobilenetv2",
        lambda: MobileNetV2(
            num_classes=LABELS,
            width_mult=0.5,
            inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 3, 2], [6, 24, 3, 2], [4, 32, 2, 1]],
        ),
        (0, 1, 3, 4, 6, 7),
        "arguments.inverted_residual_setting",
        # Channels are given before the width is applied; the first asks for 4 and gets the 8 it is rounded up to.
        [[1, 16, 1, 1], [6, 16, 1, 2], [6, 16, 1, 1], [6, 32, 1, 2], [6, 32, 1, 1], [4, 32, 1, 1]],
    ),
    Case(
        "torchvision-efficientnet",
        lambda: EfficientNet(
            _efficientnet_rows((2, 3, 3, 2)), dropout=0.3, num_classes=LABELS, norm_layer=_EPSILON, last_channel=96
        ),
        (1, 2, 4, 5, 7, 8),
        "arguments.inverted_residual_setting",
        [
            _row("FusedMBConvConfig", 1, 3, 1, 16, 16, 1),
            _row("FusedMBConvConfig", 4, 3, 2, 16, 24, 2),
            _row("MBConvConfig", 4, 5, 2, 24, 32, 2),
            _row("MBConvConfig", 6, 3, 1, 32, 40, 1),
        ],
    ),
    Case(
        "torchvision-efficientnet-empty-stage",
        lambda: EfficientNet(_efficientnet_rows((2, 2, 3, 1)), dropout=0.2, num_classes=LABELS),
        (2, 3, 4, 6, 7),
        "arguments.inverted_residual_setting",
        [
            _row("MBConvConfig", 1, 3, 1, 16, 16, 0),
            _row("FusedMBConvConfig", 4, 3, 2, 16, 24, 2),
            _row("MBConvConfig", 4, 5, 2, 24, 32, 2),
            _row("MBConvConfig", 6, 3, 1, 32, 40, 1),
        ],
    ),
)
BY_NAME = {case.name: case for case in CASES}
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

_BUILT: dict[str, nn.Module] = {}


def _enlivened(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return zoo_vision.enliven(make().eval(), zoo_vision.images(SIZE, 16, 1))


def _model(case: Case) -> nn.Module:
    """Built once for all tests of a case; nothing here changes it."""
    if case.name not in _BUILT:
        _BUILT.clear()
        _BUILT[case.name] = _enlivened(case.make)
    return _BUILT[case.name]


def _compressed(module: nn.Module, keep: tuple[int, ...]) -> CompressedModel:
    return materialize(module, tiny.plan_for(module, keep), source_of(module, "tiny"))


def _saved(module: nn.Module, keep: tuple[int, ...], folder: Path) -> Path:
    return save_checkpoint(_compressed(module, keep), folder / "checkpoint")


def _run(module: nn.Module, seed: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return zoo.main_output(module(zoo_vision.images(SIZE, 2, seed)))


def _passed_over(module: nn.Module, keep: tuple[int, ...], seed: int = 2) -> torch.Tensor:
    layers = layer_stack(module).layers
    with zoo.identity({index: layer for index, layer in enumerate(layers) if index not in keep}):
        return _run(module, seed)


def _close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to the order of a few sums in float32."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


@EVERY
def test_every_removable_layer_matters(case: Case) -> None:
    module = _model(case)
    whole, stack = _run(module), layer_stack(module)
    assert sum(stack.prunable) >= 3
    for index, prunable in enumerate(stack.prunable):
        if prunable:
            without = _passed_over(module, tuple(other for other in range(stack.n_layers) if other != index))
            assert (whole - without).abs().max() > 1e-3 * whole.abs().max(), f"layer {index} changes nothing"


@EVERY
def test_the_pruned_model_is_the_original_with_layers_passed_over(case: Case) -> None:
    module = _model(case)
    _close(_run(_compressed(module, case.keep).module), _passed_over(module, case.keep))


@EVERY
def test_the_pruned_model_shares_every_tensor_and_leaves_the_original_alone(case: Case) -> None:
    module = _model(case)
    before = _run(module)
    pruned = _compressed(module, case.keep).module
    mine = {tensor.data_ptr() for tensor in module.state_dict().values()}
    assert {tensor.data_ptr() for tensor in pruned.state_dict().values()} <= mine
    assert not pruned.training
    assert torch.equal(_run(module), before)


@EVERY
def test_an_overlay_goes_where_the_constructor_puts_its_tensors(case: Case) -> None:
    """Stems and last convolutions share a container with the layers in some; all of them move."""
    module = copy.deepcopy(_model(case))
    overlay = overlay_of(module)
    before = _run(module)
    got = _run(
        materialize(module, tiny.plan_for(module, case.keep).with_overlay(overlay), source_of(module, "m")).module
    )
    assert torch.equal(_run(module), before)
    module.load_state_dict(dict(overlay.tensors), strict=False)
    _close(got, _passed_over(module, case.keep))
    assert float((_run(module) - before).abs().max()) > 0.01 * float(before.abs().max())


@EVERY
def test_keeping_every_layer_reproduces_the_output_bit_for_bit(case: Case) -> None:
    module = _model(case)
    pruned = _compressed(module, tuple(range(layer_stack(module).n_layers)))
    assert torch.equal(_run(pruned.module), _run(module))


@EVERY
def test_the_change_of_the_configuration_is_listed(case: Case) -> None:
    module = _model(case)
    (change,) = adapter_for(module).changes(module, layer_stack(module), case.keep)
    assert (change.entry, change.after) == (case.entry, case.after)
    assert change.before != change.after


@EVERY
def test_a_saved_folder_is_read_back_as_the_model_in_memory(case: Case, tmp_path: Path) -> None:
    module = _model(case)
    pruned = _compressed(module, case.keep)
    folder = save_checkpoint(pruned, tmp_path / "checkpoint")
    again = load_model(folder)
    meant, read = pruned.module.state_dict(), again.module.state_dict()
    assert meant.keys() == read.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in meant.items())
    assert again.source.fingerprint == fingerprint(pruned.module)
    assert again.tokenizer is None
    assert not again.module.training
    _close(_run(again.module), _passed_over(module, case.keep))


@EVERY
def test_half_precision_weights_stay_as_they_are(case: Case, tmp_path: Path) -> None:
    module = _enlivened(case.make).to(torch.bfloat16)
    pruned = _compressed(module, case.keep)
    again = load_model(save_checkpoint(pruned, tmp_path / "checkpoint")).module
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        image = zoo_vision.images(SIZE, 2, 2).to(torch.bfloat16)
        # Copied: some convolutions sum in an order that depends on where a file has its tensors.
        assert torch.equal(copy.deepcopy(again)(image), copy.deepcopy(pruned.module)(image))


def _plain_timm(folder: Path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    if "kept_blocks" not in config:
        made: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return made
    model = timm.create_model(config["architecture"], **config["model_args"])
    for stage, kept in enumerate(config["kept_blocks"]):
        model.blocks[stage] = nn.Sequential(*[model.blocks[stage][number] for number in kept])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    whole: nn.Module = model
    return whole


def _plain_torchvision(folder: Path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    arguments = config["arguments"]
    arguments["norm_layer"] = partial(nn.BatchNorm2d, **arguments["norm_layer"])
    if config["builder"] == "torchvision.models.resnet.ResNet":
        arguments["block"] = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[arguments["block"]]
        model = torchvision.models.ResNet(**arguments)
    elif config["builder"] == "torchvision.models.mobilenetv2.MobileNetV2":
        model = torchvision.models.MobileNetV2(**arguments)
    else:
        kinds = {"MBConvConfig": MBConvConfig, "FusedMBConvConfig": FusedMBConvConfig}
        rows = arguments["inverted_residual_setting"]
        arguments["inverted_residual_setting"] = [kinds[row.pop("class")](**row) for row in rows]
        model = torchvision.models.EfficientNet(**arguments)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    made: nn.Module = model
    return made


@EVERY
def test_the_plain_library_reads_the_folder_without_any_code_of_ours(case: Case, tmp_path: Path) -> None:
    module = _model(case)
    folder = _saved(module, case.keep, tmp_path)
    plain = {"timm": _plain_timm, "torchvision": _plain_torchvision}[case.library](folder).eval()
    _close(_run(plain), _passed_over(module, case.keep))


@EVERY
def test_a_pruned_model_read_back_can_be_pruned_again(case: Case, tmp_path: Path) -> None:
    module = _model(case)
    again = load_model(_saved(module, case.keep, tmp_path)).module
    last = max(index for index, prunable in enumerate(layer_stack(again).prunable) if prunable)
    second = tuple(index for index in range(len(case.keep)) if index != last)
    both = tuple(case.keep[index] for index in second)
    folder = save_checkpoint(_compressed(again, second), tmp_path / "twice")
    _close(_run(load_model(folder).module), _passed_over(module, both))


@EVERY
def test_layers_of_another_shape_or_without_a_skip_are_refused_by_name(case: Case) -> None:
    module = _model(case)
    stack = layer_stack(module)
    for index, prunable in enumerate(stack.prunable):
        if not prunable:
            others = tuple(other for other in range(stack.n_layers) if other != index)
            with pytest.raises(UnsupportedModelError, match=rf"layer {index} \({stack.names[index]}\) cannot be remo"):
                _compressed(module, others)
            with pytest.raises(UnsupportedModelError, match="cannot be removed"):
                select_layers(module, others)


@EVERY
def test_a_layer_changed_after_the_model_was_built_is_not_rebuilt_silently(case: Case) -> None:
    """Epsilon is in no weight: the checkpoint would load and compute something else."""
    module = _enlivened(case.make)
    norms = [part for part in layer_stack(module).layers[case.keep[-1]].modules() if hasattr(part, "eps")]
    norms[-1].eps *= 7  # type: ignore[operator, assignment]
    with pytest.raises(UnsupportedModelError, match=r"otherwise than it is here|kinds of normalisation"):
        _compressed(module, case.keep)


@EVERY
def test_layers_out_of_order_are_refused(case: Case) -> None:
    with pytest.raises(UnsupportedModelError, match="not in rising order"):
        select_layers(_model(case), (*reversed(case.keep),))


@EVERY
@pytest.mark.parametrize("fault", ["lost", "extra", "reshaped", "no file"])
def test_a_folder_whose_weights_do_not_fit_is_refused(case: Case, fault: str, tmp_path: Path) -> None:
    folder = _saved(_model(case), case.keep, tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = sorted(name for name in tensors if name.endswith(("conv1.weight", ".bias")))[0]
    if fault == "lost":
        del tensors[name]
    elif fault == "extra":
        tensors["one.too.many"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name].repeat(2, *[1] * (tensors[name].ndim - 1))
    file.unlink()
    if fault != "no file":
        save_file(tensors, file)
    adapter = adapter_of_folder(folder)
    assert adapter is not None
    with pytest.raises(ArtifactError, match=r"do not belong together|the weights are missing"):
        adapter.load(folder)


def _edit(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("builder", ["os.system", "torchvision.models.vgg.VGG", ["a", "list"], None])
def test_only_known_constructors_are_called(builder: Any, tmp_path: Path) -> None:
    case = BY_NAME["torchvision-resnet"]
    folder = _saved(_model(case), case.keep, tmp_path)
    _edit(folder, builder=builder, arguments={"command": "true"})
    with pytest.raises(ArtifactError, match="asks for the constructor"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("torchvision-resnet", {"block": "ResNet"}),
        ("torchvision-resnet", {"block": "conv3x3"}),
        ("torchvision-resnet", {"layers": "many"}),
        ("torchvision-resnet", {"surprise": 1}),
        ("torchvision-efficientnet", {"inverted_residual_setting": [{"class": "EfficientNet"}]}),
        ("torchvision-mobilenetv2", {"inverted_residual_setting": []}),
    ],
)
def test_arguments_that_no_constructor_takes_are_refused(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = _saved(_model(BY_NAME[name]), BY_NAME[name].keep, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    _edit(folder, arguments=config["arguments"] | changes)
    with pytest.raises(ArtifactError, match="torchvision cannot build"):
        load_model(folder)


def test_an_architecture_timm_does_not_know_is_refused(tmp_path: Path) -> None:
    case = BY_NAME["timm-resnet"]
    folder = _saved(_model(case), case.keep, tmp_path)
    _edit(folder, architecture="resnet_of_tomorrow")
    with pytest.raises(ArtifactError, match="'resnet_of_tomorrow', which this timm"):
        load_model(folder)


def test_a_head_that_timm_leaves_out_and_fills_at_random_is_noticed(tmp_path: Path) -> None:
    """With another number of classes in its entry, timm drops the stored head and only logs it."""
    case = BY_NAME["timm-resnet"]
    folder = _saved(_model(case), case.keep, tmp_path)
    _edit(folder, num_classes=LABELS + 2)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True) is not None
    with pytest.raises(ArtifactError, match=r"2 tensors in .* were not taken over as they are stored, first fc.bias"):
        load_model(folder)


def test_timm_itself_does_not_take_kept_blocks_for_the_whole_model(tmp_path: Path) -> None:
    case = BY_NAME["timm-mobilenetv3"]
    folder = _saved(_model(case), case.keep, tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("kept", [[[0]], [[0], [0], [0, 9], [], [0, 2], [0]], "all"])
def test_kept_blocks_that_fit_no_model_are_refused(kept: Any, tmp_path: Path) -> None:
    case = BY_NAME["timm-mobilenetv3"]
    folder = _saved(_model(case), case.keep, tmp_path)
    _edit(folder, kept_blocks=kept)
    with pytest.raises(ArtifactError, match="timm cannot build"):
        load_model(folder)


def test_a_layer_of_stride_two_between_equal_widths_must_stay() -> None:
    """The network would still run without it, on features of another size."""
    stack = layer_stack(_model(BY_NAME["timm-mobilenetv2"]))
    layer: Any = stack.layers[1]
    assert (stack.names[1], layer.conv_pw.in_channels, layer.conv_pwl.out_channels) == ("blocks.1.0", 8, 8)
    assert not stack.prunable[1]


def test_a_layer_of_equal_shape_without_a_skip_must_stay() -> None:
    stack = layer_stack(timm.create_model("mobilenetv4_conv_small_035"))
    assert stack.names[1] == "blocks.0.1"
    assert not stack.prunable[1]
    assert "no skip connection" in stack.pinned[1]


def test_the_first_layer_of_a_stage_stays_even_where_it_keeps_the_shape() -> None:
    stack = layer_stack(_model(BY_NAME["torchvision-resnet"]))
    assert stack.pinned[0] == "it is the first layer of its stage, and no stage is built without one"


def test_attention_that_depends_on_the_number_of_its_layer_is_refused() -> None:
    module = timm.create_model("vit_tiny_patch16_224", **_VIT, attn_layer="diff")
    with pytest.raises(UnsupportedModelError, match=r"none of the 6 layers .* scaled by the layer's number"):
        select_layers(module, (0, 1, 2, 3, 4))


def test_a_timm_model_that_create_model_did_not_make_is_refused() -> None:
    from timm.models.resnet import Bottleneck as TimmBottleneck
    from timm.models.resnet import ResNet as TimmResNet

    with pytest.raises(UnsupportedModelError, match=r"make it with timm\.create_model"):
        layer_stack(TimmResNet(TimmBottleneck, (1, 1, 1, 1)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        lambda: torchvision.models.vit_b_16(),
        lambda: type("Mine", (ResNet,), {})(BasicBlock, [1, 1, 1, 1]),
    ],
    ids=["timm swin", "torchvision vit", "a class derived from ResNet"],
)
def test_other_models_of_the_libraries_are_refused_with_what_is_known(make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        module = make()
    with pytest.raises(UnsupportedModelError, match=r"is not among the .* models that can be pruned; known: .*ResNet"):
        layer_stack(module)


def test_an_argument_that_is_no_json_is_refused_when_saving(tmp_path: Path) -> None:
    module = _enlivened(_timm("resnet18", layers=(2, 1, 1, 1), channels=(64, 24, 32, 48), norm_layer=nn.BatchNorm2d))
    with pytest.raises(UnsupportedModelError, match="cannot write what ResNet was created with"):
        _saved(module, (0, 2, 3, 4), tmp_path)


def test_normalisations_of_two_kinds_are_refused() -> None:
    module = ResNet(BasicBlock, [2, 1, 1, 1])
    module.layer1[1].bn1 = nn.GroupNorm(4, 64)
    with pytest.raises(UnsupportedModelError, match="2 kinds of normalisation"):
        _compressed(module, (0, 2, 3, 4))


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4])
def test_every_width_of_mobilenet_is_read_off_the_model(width: float) -> None:
    module = MobileNetV2(width_mult=width).eval()
    pruned = select_layers(module, tuple(range(17)))
    assert {name: tensor.shape for name, tensor in pruned.state_dict().items()} == {
        name: tensor.shape for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("name", ["efficientnet_b1", "efficientnet_v2_s", "resnet50", "resnext50_32x4d", "resnet34"])
def test_the_stock_models_of_torchvision_are_rebuilt_as_they_are(name: str) -> None:
    """Keeping everything compares every module with what the constructor makes from the arguments that were read."""
    module = torchvision.models.get_model(name).eval()
    stack = layer_stack(module)
    pruned = adapter_for(module).select(module, stack, tuple(range(stack.n_layers)))
    assert pruned.state_dict().keys() == module.state_dict().keys()


@EVERY
def test_sample_images_have_the_size_the_model_was_made_for(case: Case) -> None:
    module = _model(case)
    asked = get_model_args(module).get("img_size") if case.library == "timm" else None
    assert image_size(module) == tuple(asked or (224, 224))
    (image,) = sample_inputs(module, rows=1).values()
    assert image.shape == (1, 3, *image_size(module))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pruned_model_is_certified_on_onnx_runtime(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from sglp_deploy import Compressor
    from sglp_deploy.models import LoadedModel

    module = _model(case)
    compressor = Compressor(LoadedModel(module, None, source_of(module, case.name)))
    drop = [index for index in range(compressor.n_layers) if index not in case.keep]
    artifact = compressor.export(compressor.plan_by_hand(drop), "onnx", tmp_path / "artifact")
    assert artifact.details["interface"] == "forward"
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons

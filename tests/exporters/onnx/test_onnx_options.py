"""Options of the ``onnx`` exporter: what each makes is certified, is what it says, and wrong ones are refused.

The reference of every certificate here is the unpruned model with its removed layers passed over, in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import tiny
import zoo
from exports import Exported, compressed, share_traces
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.materialize import materialize
from sglp_deploy.models import LoadedModel, load_model, source_of
from sglp_deploy.parity import check_parity, prompt_cases
from sglp_deploy.parity.bounds import forward_thresholds_for, thresholds_for
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.plan import PruningPlan
from sglp_exporters.onnx import quantize as onnx_quantize
from sglp_exporters.onnx.exporter import OnnxExporter
from sglp_exporters.onnx.layer_template import LayerTemplate
from sglp_exporters.onnx.options import OPSETS, read_options

Lookup = Callable[[str], Exported]
QUANTISED = ("int8", "int4")


@dataclass
class Made:
    """A compressor, a plan that removes a third of its layers, and artifacts by precision."""

    compressor: Compressor
    plan: PruningPlan
    artifacts: dict[str, ExportArtifact]
    template: LayerTemplate
    reports: dict[str, ParityReport] = field(default_factory=dict)

    def export(self, folder: Path, **options: Any) -> ExportArtifact:
        """Of the same plan, from the trace that is there: another test may have put its own in its place."""
        OnnxExporter._template = self.template
        return self.compressor.export(self.plan, "onnx", folder, **options)

    def report(self, precision: str) -> ParityReport:
        """The certificate of an artifact, made once: nothing changes the artifacts."""
        if precision not in self.reports:
            self.reports[precision] = self.compressor.verify(self.artifacts[precision], threads=1)
        return self.reports[precision]


@pytest.fixture(scope="module")
def made(exported: Lookup, tmp_path_factory: pytest.TempPathFactory) -> Made:
    compressor = Compressor(tiny.loaded("llama"))
    plan = compressor.plan_by_hand([1, 4])
    folder = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        artifacts = {"fp16": compressor.export(plan, "onnx", folder / "fp16", precision="fp16")}
    OnnxExporter._template = exported("llama").template  # the others are made from the model's own float32
    for precision in ("fp32", *QUANTISED):
        artifacts[precision] = compressor.export(plan, "onnx", folder / precision, precision=precision)
    assert OnnxExporter._template is exported("llama").template
    return Made(compressor, plan, artifacts, exported("llama").template)


@pytest.fixture
def shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)


def _specimen(name: str) -> Compressor:
    module = next(each for each in zoo.specimens() if each.name == name).build()
    return Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, name)))


def _graph(artifact: ExportArtifact) -> ir.Graph:
    return ir.load(artifact.path / "model.onnx").graph


def _operators(graph: ir.Graph) -> dict[str, int]:
    kinds = [node.op_type for node in graph]
    return {kind: kinds.count(kind) for kind in kinds}


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["fp16", "fp32", *QUANTISED])
def test_every_precision_is_certified_against_the_float32_model_by_its_own_bounds(made: Made, precision: str) -> None:
    report = made.report(precision)
    assert report.passed, report.reasons
    assert report.precision == precision
    assert report.reference == "PyTorch, 4 layers, fp32"
    assert report.thresholds["kl_p99"] == thresholds_for(precision).kl_p99
    compared = f"; weights are {precision}, the reference's are not" if precision in QUANTISED else ""
    assert report.runner == f"ONNX Runtime {onnxruntime.__version__} on cpu{compared}"


def test_fewer_bits_take_less_room_and_cost_more(made: Made) -> None:
    order = ["fp32", "fp16", "int8", "int4"]
    sizes = [made.artifacts[precision].total_bytes for precision in order]
    assert sizes == sorted(sizes, reverse=True)
    assert made.artifacts["fp16"].weight_bytes < 0.51 * made.artifacts["fp32"].weight_bytes
    # 32 weights of 8 bits and a scale of 32 make 9 bits for each; 4 bits with a scale and a zero point 5.25.
    assert made.artifacts["int8"].weight_bytes < 0.3 * made.artifacts["fp32"].weight_bytes
    assert made.artifacts["int4"].weight_bytes < 0.2 * made.artifacts["fp32"].weight_bytes
    worst = [max(case["statistics"]["kl_max"] for case in made.report(precision).cases) for precision in order]
    assert worst == sorted(worst)
    assert worst[0] < worst[1] / 1000
    assert worst[2] < worst[3] / 10


def test_weights_and_graph_are_half_precision_and_tokens_stay_whole_numbers(made: Made) -> None:
    artifact = made.artifacts["fp16"]
    assert artifact.precision == "fp16"
    assert {spec.dtype for spec in artifact.outputs} == {"float16"}
    assert {spec.dtype for spec in artifact.inputs} == {"float16", "int64"}
    large = [value for value in _graph(artifact).initializers.values() if value.const_value.size > 64]
    assert {value.dtype for value in large} == {ir.DataType.FLOAT16}
    assert next(made.compressor.model.parameters()).dtype == torch.float32  # the caller's model is as it was


def test_a_quantised_decoder_takes_and_gives_float32(made: Made) -> None:
    for precision in QUANTISED:
        artifact = made.artifacts[precision]
        assert artifact.inputs == made.artifacts["fp32"].inputs
        assert artifact.outputs == made.artifacts["fp32"].outputs
        assert artifact.details["model_precision"] == "fp32"


def test_the_manifest_says_how_the_weights_are_quantised(made: Made) -> None:
    eight, four = (made.artifacts[precision].details["quantized"] for precision in QUANTISED)
    # Seven matrices in each of four layers, and the table that is the output head too.
    assert (eight["weights"], eight["block_size"], eight["symmetric"], eight["table_bits"]) == (29, 32, True, 8)
    assert (four["weights"], four["block_size"], four["symmetric"], four["table_bits"]) == (29, 32, False, 8)
    assert 0.99 < eight["share"] < 1
    assert "quantized" not in made.artifacts["fp32"].details


@pytest.mark.parametrize("precision", QUANTISED)
def test_stored_whole_numbers_stand_for_the_model_s_weights(made: Made, precision: str) -> None:
    weights = dict(made.compressor.materialize(made.plan).module.named_parameters())
    initializers = _graph(made.artifacts[precision]).initializers
    for name, bits in (
        ("model.layers.2.mlp.down_proj.weight.T", 8 if precision == "int8" else 4),
        ("model.layers.0.self_attn.q_proj.weight.T", 8 if precision == "int8" else 4),
        (next(each for each in initializers if each.endswith(".scales") and ".layers." not in each)[:-7], 8),
    ):
        packed = initializers[f"{name}.int{bits}"].const_value.numpy()
        scales = initializers[f"{name}.scales"].const_value.numpy()
        values = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
        points = np.full(scales.shape, 1 << bits - 1)
        if f"{name}.zero_points" in initializers:
            packed_points = initializers[f"{name}.zero_points"].const_value.numpy()
            points = np.stack([packed_points & 15, packed_points >> 4], axis=-1).reshape(len(packed), -1)
        found = ((values - points[:, : scales.shape[1], None].astype(float)) * scales[..., None]).reshape(
            len(packed), -1
        )
        wanted = (
            weights[name.removesuffix(".T") if ".layers." in name else "model.embed_tokens.weight"].detach().numpy()
        )
        # To nearest, so within half a step; the far end of a block may be clipped by a whole one.
        steps = np.abs(found[:, : wanted.shape[1]] - wanted) / np.abs(scales).repeat(32, 1)[:, : wanted.shape[1]]
        assert steps.max() < 1.01
        assert np.quantile(steps, 0.95) < 0.51


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_table_tied_to_the_output_head_is_stored_once_in_8_bits(made: Made, precision: str) -> None:
    graph = _graph(made.artifacts[precision])
    assert "MatMul" in _operators(graph)  # attention's own products have no weights
    (look_up,) = [node for node in graph if node.op_type == "GatherBlockQuantized"]
    (head,) = [node for node in graph if node.op_type == "MatMulNBits" and node.attributes.get_int("N") == 261]
    assert look_up.inputs[0].producer().inputs[0] is head.inputs[1]
    assert look_up.inputs[2] is head.inputs[2]
    assert (head.attributes.get_int("bits"), look_up.attributes.get_int("bits")) == (8, 8)
    assert not any(
        value.const_value.size >= 261 * 64 for value in graph.initializers.values() if value.dtype.is_floating_point()
    )


@pytest.mark.parametrize(
    ("made_as", "change", "reason"),
    [
        (
            "int8",
            {"precision": "int4"},
            "wrong dtype: the weights are stored in 8 bits each, and the manifest says int4",
        ),
        ("fp32", {"weight_bytes": 200_000}, "the manifest says 200000 bytes of weights, the stored tensors take "),
    ],
)
def test_no_fact_of_a_manifest_loosens_what_the_tensors_show(
    made: Made, made_as: str, change: dict[str, Any], reason: str
) -> None:
    claimed = replace(made.artifacts[made_as], **change)
    report = made.compressor.verify(claimed, threads=1)
    assert not report.passed
    assert any(each.startswith(reason) for each in report.reasons), report.reasons


def test_a_mixture_keeps_8_bits_where_every_third_layer_has_more_inputs_than_outputs(
    made: Made, tmp_path: Path
) -> None:
    artifact = made.export(tmp_path / "a", precision="int4", mixed=True)
    graph = _graph(artifact)
    finer = {
        str(node.inputs[1].name)
        for node in graph
        if node.op_type == "MatMulNBits" and node.attributes.get_int("bits") == 8 and ".layers." in node.inputs[1].name
    }
    # Four layers: of the third, 96 inputs to 64 outputs and 4 heads of 32 to 64.
    assert finer == {f"model.layers.2.{name}.weight.T.int8" for name in ("mlp.down_proj", "self_attn.o_proj")}
    assert artifact.details["quantized"]["weights_of_8_bits"] == 3  # with the table
    assert made.artifacts["int4"].details["quantized"]["weights_of_8_bits"] == 1
    report = made.compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons
    worst = [max(case["statistics"]["kl_max"] for case in each.cases) for each in (report, made.report("int4"))]
    assert worst[0] < worst[1]


@pytest.mark.usefixtures("shared_traces")
def test_an_output_head_of_its_own_is_quantised_like_the_rest(tmp_path: Path) -> None:
    compressor = Compressor(tiny.loaded("llama-untied", num_hidden_layers=2))
    artifact = compressor.export(compressor.plan_by_hand([1]), "onnx", tmp_path / "artifact", precision="int4")
    assert artifact.details["quantized"]["weights"] == 7 + 2
    (head,) = [n for n in _graph(artifact) if n.op_type == "MatMulNBits" and n.attributes.get_int("N") == 261]
    assert head.attributes.get_int("bits") == 4
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons


def test_rows_that_do_not_end_with_a_block_are_padded_and_their_table_stays(made: Made, tmp_path: Path) -> None:
    artifact = made.export(tmp_path / "a", precision="int8", block_size=128)
    assert artifact.details["quantized"]["table_bits"] is None
    assert _operators(_graph(artifact))["Gather"] >= 1
    assert "GatherBlockQuantized" not in _operators(_graph(artifact))
    report = made.compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("precision", QUANTISED)
def test_either_kind_of_block_is_certified(made: Made, tmp_path: Path, precision: str, symmetric: bool) -> None:
    artifact = made.export(tmp_path / "a", precision=precision, block_size=16, symmetric=symmetric)
    points = [name for name in _graph(artifact).initializers if name.endswith(".zero_points")]
    assert len(points) == (0 if symmetric else 28)
    report = made.compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons


@pytest.mark.usefixtures("shared_traces")
def test_a_family_whose_products_carry_a_bias_is_quantised_and_certified(tmp_path: Path) -> None:
    compressor = _specimen("gpt2")  # its matrices lie the other way round, in Gemm
    plan = compressor.plan_by_hand([1])
    artifact = compressor.export(plan, "onnx", tmp_path / "artifact", precision="int8")
    assert "Gemm" not in _operators(_graph(artifact))
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_quantised_artifact_of_other_layers_fails(made: Made, precision: str) -> None:
    other = made.compressor.materialize(made.compressor.plan_by_hand([1, 3])).module
    artifact = made.artifacts[precision]
    with OnnxExporter().open(artifact, threads=1) as judged, TorchRunner(other) as reference:
        report = check_parity(artifact, judged, reference, prompt_cases(np.arange(200)), decode_steps=4)
    assert not report.passed


def test_a_wrong_scale_fails(made: Made, tmp_path: Path) -> None:
    model = ir.load(made.artifacts["int8"].path / "model.onnx")
    scales = model.graph.initializers["model.layers.2.mlp.down_proj.weight.T.scales"]
    scales.const_value = ir.tensor(scales.const_value.numpy() * 4, name=scales.name)
    folder = tmp_path / "damaged"
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    artifact = made.artifacts["int8"]
    damaged = ExportArtifact(**{**{f: getattr(artifact, f) for f in artifact.__dataclass_fields__}, "path": folder})
    with (
        OnnxExporter().open(damaged, threads=1) as judged,
        TorchRunner(made.compressor.materialize(made.plan).module) as reference,
    ):
        report = check_parity(damaged, judged, reference, prompt_cases(np.arange(200)), decode_steps=4)
    assert not report.passed


def test_a_graph_without_a_cache_is_certified_in_half_precision_and_not_quantised(tmp_path: Path) -> None:
    compressor = _specimen("bert")
    plan = compressor.plan_by_hand([1])
    with pytest.raises(
        ConfigError, match=r"precision='int8' is for decoders with a cache; no bounds .* a BertForMaskedLM in it; pass"
    ):
        compressor.export(plan, "onnx", tmp_path / "a", precision="int8")
    assert list(tmp_path.iterdir()) == []
    report = compressor.verify(compressor.export(plan, "onnx", tmp_path / "a", precision="fp16"), threads=1)
    assert report.passed, report.reasons
    assert report.thresholds["max_relative"] == forward_thresholds_for("fp16").max_relative


def test_a_file_that_would_be_quantised_in_name_only_is_refused(made: Made) -> None:
    model = ir.load(made.artifacts["fp32"].path / "model.onnx")
    table = np.zeros((600, 600, 4), np.float32)  # as the weights of grouped experts lie
    extra = ir.Value(
        name="experts", const_value=ir.tensor(table), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(table.shape)
    )
    model.graph.register_initializer(extra)
    model.graph.append(ir.node("Identity", [extra]))
    with pytest.raises(
        BackendError, match=r"8\d% of the weights are not in matrices .* quantised in name only; export"
    ):
        onnx_quantize.quantize_weights(model, bits=8, block_size=32, symmetric=True)


def test_a_value_too_large_for_half_precision_is_named(tmp_path: Path) -> None:
    model = compressed("llama", (0,))
    with torch.no_grad():
        model.module.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(BackendError, match=r"layers\.0\.mlp\.up_proj\.weight holds 1e\+05, beyond fp16"):
        OnnxExporter().export(model, tmp_path / "a", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_the_quantiser_s_import_leaves_logging_as_it_was() -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    with onnx_quantize._root_logger_as_it_is():
        root.addHandler(logging.NullHandler())  # what basicConfig does
        root.setLevel(logging.INFO)
    assert (root.level, root.handlers) == before


# ------------------------------------------------------------------------------------------------------- opset


@pytest.mark.parametrize(
    ("opset", "ir_version"), [(18, 8), (19, 9), (20, 9), (21, 10), (22, 10), (23, 11), (24, 12), (25, 13)]
)
def test_every_opset_that_is_offered_is_written_checked_and_certified(
    made: Made, tmp_path: Path, opset: int, ir_version: int
) -> None:
    artifact = made.export(tmp_path / "a", opset=opset)
    loaded = onnx.load(str(artifact.path / "model.onnx"))
    assert {each.domain: each.version for each in loaded.opset_import} == {"": opset}
    assert loaded.ir_version == ir_version
    assert artifact.details["opset"] == opset
    report = made.compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons


def test_opset_and_precision_may_be_asked_for_together(made: Made, tmp_path: Path) -> None:
    artifact = made.export(tmp_path / "a", opset=22, precision="int4")
    versions = {each.domain: each.version for each in onnx.load(str(artifact.path / "model.onnx")).opset_import}
    assert versions == {"": 22, "com.microsoft": 1}
    assert made.compressor.verify(artifact, threads=1).passed


def test_an_operator_the_opset_lacks_is_named(exported: Lookup, tmp_path: Path) -> None:
    OnnxExporter._template = exported("gemma3").template
    with pytest.raises(
        BackendError,
        match=r"opset=18 cannot be had; it lacks Gelu, which the traced graph of opset 20 uses; pass opset=20",
    ):
        OnnxExporter().export(exported("gemma3").models["pruned"], tmp_path / "a", opset=18)
    assert list(tmp_path.iterdir()) == []


def test_without_an_opset_the_graph_is_not_converted(exported: Lookup) -> None:
    assert exported("llama").artifacts["pruned"].details["opset"] == 20
    assert (OPSETS[0], OPSETS[-1]) == (18, 25)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precison": "int4"}, "unknown option of exporter 'onnx' 'precison'; .*did you mean 'precision'"),
        ({"precision": "fp8"}, "precision='fp8' is not offered; weights are fp32, fp16, int8, int4 here"),
        ({"opset": 17}, "opset=17 is not offered; graphs can be written for opset 18 to 25"),
        ({"opset": 26}, "opset=26 is not offered"),
        ({"opset": True}, "opset=True is not offered"),
        ({"opset": "latest"}, "opset='latest' is not offered"),
        ({"block_size": 32}, "block_size says how weights are quantised and those of this file are fp32"),
        ({"symmetric": True, "precision": "fp16"}, "symmetric says how weights .* are fp16; .*precision=int8 or int4"),
        ({"precision": "int4", "block_size": 48}, "block_size=48 is not offered; .* blocks of 16, 32, 64, 128, 256"),
        ({"precision": "int4", "symmetric": "yes"}, "symmetric='yes' is neither true nor false"),
        ({"precision": "int4", "mixed": 1}, "mixed=1 is neither true nor false"),
        ({"precision": "int8", "mixed": True}, "mixed says which matrices .* are int8; .*pass precision=int4"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    exported: Lookup, out: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        OnnxExporter().export(exported("llama").models["pruned"], out, **options)
    assert not out.exists()


@pytest.mark.parametrize("precision", ["fp32", *QUANTISED])
def test_what_half_precision_has_lost_is_not_claimed_back(tmp_path: Path, precision: str) -> None:
    loaded = load_model(tiny.save_tiny(tmp_path / "in", num_hidden_layers=2), dtype="fp16")
    model = materialize(loaded.module, tiny.plan_for(loaded.module, (1,)), tiny.source(loaded.module))
    with pytest.raises(ConfigError, match=rf"precision='{precision}' was asked for a model whose weights are fp16; .*"):
        OnnxExporter().export(model, tmp_path / "a", precision=precision)


def test_defaults_depend_on_the_precision_and_nothing_else() -> None:
    assert [read_options({}, own).precision for own in ("fp32", "fp16")] == ["fp32", "fp16"]
    assert read_options({}, "fp32").bits is None
    assert [read_options({"precision": each}, "fp32").bits for each in QUANTISED] == [8, 4]


@pytest.mark.usefixtures("shared_traces")
def test_the_command_line_exports_and_verifies_a_quantised_graph(tmp_path: Path) -> None:
    compressor = Compressor.from_pretrained(tiny.save_tiny(tmp_path / "model", num_hidden_layers=2))
    compressor.plan_by_hand([0]).save(tmp_path / "plan.json")
    folder = tmp_path / "artifact"
    options = ["precision=int8", "block_size=16", "symmetric=false", "opset=21"]
    arguments = [
        "export",
        str(tmp_path / "model"),
        str(tmp_path / "plan.json"),
        "--to",
        "onnx",
        "-o",
        str(folder),
        "-q",
    ]
    assert main([*arguments, *(word for option in options for word in ("--option", option))]) == 0
    artifact = ExportArtifact.load(folder)
    assert (artifact.precision, artifact.details["opset"]) == ("int8", 21)
    assert artifact.details["quantized"]["block_size"] == 16
    assert artifact.details["quantized"]["symmetric"] is False
    arguments = ["verify", str(folder), "--threads", "1", "-o", str(tmp_path / "parity.json"), "-q"]
    assert main(arguments) == 0
    assert ParityReport.load(tmp_path / "parity.json").reference == "PyTorch, 1 layers, fp32"

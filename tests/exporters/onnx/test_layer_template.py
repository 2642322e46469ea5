from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import tiny
from exports import Exported, compressed
from sglp_deploy.errors import BackendError
from sglp_deploy.models.settings import layer_settings
from sglp_exporters.onnx.decoder_trace import trace_decoder
from sglp_exporters.onnx.layer_template import LayerTemplate

Lookup = Callable[[str], Exported]


def _run(graph: ir.Model, folder: Path, n_layers: int, rename: dict[str, str]) -> dict[str, np.ndarray]:
    """Run a graph as it is, without any rewrite of ours; ``rename`` maps our names to those of the graph."""
    rng = np.random.default_rng(1)
    past, new = 13, 6
    mask = np.ones((3, past + new), dtype=np.int64)
    mask[0, :4] = 0
    feed: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 256, (3, new)),
        "attention_mask": mask,
        "position_ids": mask.cumsum(-1)[:, past:] - 1,
        "logits_to_keep": np.arange(new),
    }
    for index in range(n_layers):
        for part in ("key", "value"):
            name = f"past_key_values.{index}.{part}"
            feed[rename.get(name, name)] = rng.normal(size=(3, 2, past, 32)).astype(np.float32)
    ir.save(graph, folder / "graph.onnx")
    session = onnxruntime.InferenceSession(str(folder / "graph.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def test_an_assembled_graph_computes_what_a_direct_trace_of_the_same_model_computes(
    exported: Lookup, tmp_path: Path
) -> None:
    keep = (0, 2, 5)  # sliding, full, full
    module = compressed("gemma3", keep).module
    assembled = _run(exported("gemma3").template.assemble(module), tmp_path, 3, {})
    theirs = {
        f"{ours}.{index}.{part}": f"{side}.past_key_values.layers.{index}.{part}s"
        for index in range(3)
        for part in ("key", "value")
        for ours, side in (("past_key_values", "input"), ("present", "output"))
    }
    direct = _run(trace_decoder(module), tmp_path, 3, theirs)
    assert len(assembled) == len(direct) == 7
    for name, value in assembled.items():
        np.testing.assert_allclose(value, direct[theirs.get(name, name)], rtol=0, atol=1e-6, err_msg=name)


def test_layers_of_one_kind_differ_in_nothing_but_weights_and_place() -> None:
    kinds = [layer_settings(layer) for layer in tiny.model("gemma3").model.layers]
    assert [kinds.index(kind) for kind in kinds] == [0, 0, 2, 0, 0, 2, 0]  # sliding, sliding, full, ...
    other = [layer_settings(layer) for layer in tiny.model("gemma3", seed=1).model.layers]
    assert other == kinds
    qwen2 = [layer_settings(layer) for layer in tiny.model("qwen2").model.layers]
    assert [qwen2.index(kind) for kind in qwen2] == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 4}, {"intermediate_size": 128}, {"attention_bias": True}, {"query_pre_attn_scalar": 8}],
)
def test_a_setting_that_changes_a_layers_graph_makes_it_another_kind(change: dict[str, Any]) -> None:
    sliding = [layer_settings(tiny.model("gemma3", **options).model.layers[0]) for options in ({}, change)]
    assert sliding[0] != sliding[1]


def test_a_template_covers_other_depths_and_weights_and_nothing_else(exported: Lookup) -> None:
    template = exported("llama").template
    assert template.covers(tiny.model("llama", seed=3, num_hidden_layers=2))
    for change in (
        {"intermediate_size": 128},
        {"vocab_size": 300},
        {"rms_norm_eps": 1e-3},
        {"tie_word_embeddings": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ):
        assert not template.covers(tiny.model("llama", **change)), change
    assert not template.covers(tiny.model("llama").to(torch.float16))
    assert not template.covers(tiny.model("qwen3"))


def test_a_layer_that_was_not_traced_is_refused(exported: Lookup) -> None:
    with pytest.raises(BackendError, match=r"layer 0 is of a kind that was not traced; .*with a template of its own"):
        exported("llama").template.assemble(tiny.model("llama", intermediate_size=128))


class _AddsFirstLayer(nn.Module):
    """A last norm that also reads what the first layer wrote."""

    def __init__(self, norm: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.first = [first]  # a list: not a submodule

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden + self.first[0].kept)


def _keep_output(module: Any, _arguments: Any, output: torch.Tensor) -> None:
    module.kept = output


class _ReadsEarlierLayer(nn.Module):
    """A layer norm that adds what the layer before the last one wrote."""

    def __init__(self, norm: nn.Module, source: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.source = [source]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden) + self.source[0].kept


def _trace_of(model: PreTrainedModel) -> LayerTemplate:
    """A template from a trace of ``model`` as it is, every layer its own kind."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kinds = [(index,) for index in range(model.config.num_hidden_layers)]
    return LayerTemplate(trace_decoder(model), kinds, "model.layers", parameters, "frame")


def test_a_model_whose_end_reads_an_earlier_layer_is_refused() -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    model.model.layers[0].register_forward_hook(_keep_output)
    model.model.norm = _AddsFirstLayer(model.model.norm, model.model.layers[0])
    with pytest.raises(
        BackendError, match=r"cannot be repeated: only the last layer's output may be read after the lay"
    ):
        _trace_of(model)


def test_a_model_whose_layer_reads_two_others_is_refused() -> None:
    model = tiny.model("llama", num_hidden_layers=3)
    model.model.layers[0].register_forward_hook(_keep_output)
    model.model.layers[2].input_layernorm = _ReadsEarlierLayer(
        model.model.layers[2].input_layernorm, model.model.layers[0]
    )
    with pytest.raises(
        BackendError, match=r"layer 2 of the trace reads 2 and writes 1 hidden states; exactly one of each"
    ):
        _trace_of(model)

"""Attention rewritten so that it does not copy the cache: the same numbers, and hands off what has another form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import tiny
from exports import Exported
from sglp_deploy import Compressor
from sglp_deploy.errors import ConfigError
from sglp_deploy.models import quiet_libraries
from sglp_exporters.onnx.attention import share_key_value_heads
from sglp_exporters.onnx.exporter import OnnxExporter
from sglp_exporters.onnx.passes import simplify

HEADS, KEY_HEADS, SIZE = 6, 2, 8
Tensor = torch.Tensor


def _repeated(x: Tensor) -> Tensor:
    """Each head three times in a row, as models with grouped heads do it."""
    batch, heads, tokens, size = x.shape
    times = HEADS // heads
    return x[:, :, None, :, :].expand(batch, heads, times, tokens, size).reshape(batch, heads * times, tokens, size)


def _tiled(x: Tensor) -> Tensor:
    """All heads, then all heads again: query head 1 reads key head 1 and not 0."""
    batch, heads, tokens, size = x.shape
    times = HEADS // heads
    return x[:, None, :, :, :].expand(batch, times, heads, tokens, size).reshape(batch, heads * times, tokens, size)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, _repeated(k), _repeated(v))


def _capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ _repeated(k).transpose(-1, -2) * 0.2) * 5.0
    return torch.softmax(scores, dim=-1) @ _repeated(v)


def _in_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _grouped(q, k[:, :, -4:], v[:, :, -4:])


def _in_other_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, _tiled(k), _tiled(v))


def _every_head_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


class _Module(nn.Module):
    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v)


def _values(key_heads: int, tokens: int, total: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, HEADS, tokens), (2, key_heads, total), (2, key_heads, total))
    q, k, v = (torch.randn(*shape, SIZE, generator=generator) for shape in shapes)
    return q, k, v


def _traced(attention: Callable[[Tensor, Tensor, Tensor], Tensor], key_heads: int) -> ir.Model:
    any_size = torch.export.Dim.AUTO
    cache = {0: any_size, 2: any_size}
    with quiet_libraries():
        program = torch.onnx.export(
            _Module(attention).eval(),
            _values(key_heads, 3, 11, 0),
            dynamic_shapes={"q": cache, "k": cache, "v": cache},
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model.clone()
    simplify(model)
    return model


@pytest.mark.parametrize(
    ("attention", "key_heads", "rewritten", "repeats"),
    [
        (_grouped, KEY_HEADS, 2, 0),
        (_grouped, 1, 2, 0),
        (_capped, KEY_HEADS, 2, 0),
        (_in_window, KEY_HEADS, 2, 0),
        (_in_other_order, KEY_HEADS, 1, 2),  # only the scaling of the keys goes
        (_every_head_its_own, HEADS, 1, 0),
    ],
)
def test_the_numbers_stay_and_nothing_is_repeated(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    key_heads: int,
    rewritten: int,
    repeats: int,
    tmp_path: Path,
) -> None:
    model = _traced(attention, key_heads)
    assert share_key_value_heads(model) == rewritten
    assert share_key_value_heads(model) == 0
    assert sum(node.op_type == "Expand" for node in model.graph) == repeats
    ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for tokens, total in ((1, 30), (7, 7), (3, 11)):
        values = _values(key_heads, tokens, total, tokens)
        names = [value.name for value in session.get_inputs()]
        (found,) = session.run(None, dict(zip(names, (value.numpy() for value in values), strict=True)))
        np.testing.assert_allclose(found, attention(*values).numpy(), rtol=2e-5, atol=2e-6)


def test_a_slice_that_leaves_something_out_stays() -> None:
    model = _traced(_in_window, KEY_HEADS)
    share_key_value_heads(model)
    assert sum(node.op_type == "Slice" for node in model.graph) == 2


@pytest.mark.parametrize(("attention_form", "repeats"), [("grouped", 0), ("traced", 12)])
def test_a_decoder_is_written_in_the_form_that_was_asked_for(
    exported: Callable[[str], Exported], attention_form: str, repeats: int, tmp_path: Path
) -> None:
    OnnxExporter._template = exported("llama").template
    compressor = Compressor(tiny.loaded("llama"))
    artifact = compressor.export(compressor.keep_all(), "onnx", tmp_path / "onnx", attention=attention_form)
    graph = ir.load(artifact.path / "model.onnx").graph
    wide = [node for node in graph if node.op_type == "Expand" and node.outputs[0].shape.rank() == 5]
    assert len(wide) == repeats
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons


def test_another_form_is_refused_by_name(tmp_path: Path) -> None:
    compressor = Compressor(tiny.loaded("llama"))
    with pytest.raises(ConfigError, match=r"attention='fused' is not offered; it is written grouped or traced"):
        compressor.export(compressor.keep_all(), "onnx", tmp_path / "onnx", attention="fused")
    assert not (tmp_path / "onnx").exists()

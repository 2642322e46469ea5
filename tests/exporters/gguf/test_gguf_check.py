"""A GGUF file is compared with the model tensor by tensor, and what is wrong with it is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import tiny
from gguf_files import HEADS, PLACES, named, write
from sglp_deploy.errors import ArtifactError
from sglp_exporters.gguf.check import _agrees, _forms, compare, stored_weights


def faults(file: Path, module: Any, *, layers: int = 6, kind: str = "F32") -> tuple[str, ...]:
    return compare(file, module.state_dict(), n_layers=layers, kind=kind, heads=HEADS).faults


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.model("llama")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_file_of_the_model_is_compared_whole_and_without_a_fault(llama: Any, tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "m.gguf", named(llama), layers=6, kind=kind)
    found = compare(file, llama.state_dict(), n_layers=6, kind=kind, heads=HEADS)
    assert found.faults == ()
    assert found.not_compared == ()
    assert found.compared == 6 * 9 + 2


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_one_changed_element_is_named_by_its_tensor(llama: Any, tmp_path: Path, kind: str) -> None:
    tensors = named(llama)
    damaged = tensors["blk.3.ffn_up.weight"].clone()
    damaged[5, 7] += 0.05 * damaged.abs().max()
    tensors["blk.3.ffn_up.weight"] = damaged
    file = write(tmp_path / "m.gguf", tensors, layers=6, kind=kind)
    (fault,) = faults(file, llama, kind=kind)
    assert fault.startswith("blk.3.ffn_up.weight differs from the model's by up to 0.0")


def test_rows_of_very_small_weights_are_no_fault(tmp_path: Path) -> None:
    """An untrained token or a dead neuron: the scale of such a block is a subnormal float16, with few bits."""
    model = tiny.model("llama")
    with torch.no_grad():
        for row, size in enumerate((4e-3, 1e-3, 1e-4, 1e-5, 1e-7)):
            model.model.embed_tokens.weight[row] *= size / model.model.embed_tokens.weight[row].abs().max()
    file = write(tmp_path / "m.gguf", named(model), layers=6, kind="Q8_0")
    assert faults(file, model, kind="Q8_0") == ()


def test_a_norm_counted_from_zero_may_be_added_in_float16() -> None:
    """As the converter does for Gemma in float16; in float32 the sum has other bits."""
    norm = torch.randn(64, generator=torch.Generator().manual_seed(0)).half().float().numpy()
    written = (norm.astype(np.float16) + np.float16(1)).astype(np.float32)
    tensor = SimpleNamespace(tensor_type=gguf.GGMLQuantizationType.F32, data=written)
    assert not np.array_equal(written, norm + np.float32(1))
    agreeing = [form for form, values in _forms("output_norm.weight", norm, (0, 0)) if _agrees(tensor, values)]
    assert agreeing == ["one added in float16"]


def test_a_value_that_is_not_finite_is_named(llama: Any, tmp_path: Path) -> None:
    tensors = named(llama)
    tensors["blk.0.ffn_norm.weight"] = tensors["blk.0.ffn_norm.weight"].clone()
    tensors["blk.0.ffn_norm.weight"][3] = float("inf")
    file = write(tmp_path / "m.gguf", tensors, layers=6)
    assert faults(file, llama) == ("blk.0.ffn_norm.weight holds 1 values that are not finite",)


def test_layers_in_another_order_are_named_by_what_they_hold(llama: Any, tmp_path: Path) -> None:
    tensors = named(llama)
    for ours in PLACES.values():
        one, two = f"blk.1.{ours}.weight", f"blk.2.{ours}.weight"
        tensors[one], tensors[two] = tensors[two], tensors[one]
    found = faults(write(tmp_path / "m.gguf", tensors, layers=6), llama)
    assert len(found) == 18
    assert "blk.1.attn_k.weight holds what belongs in blk.2.attn_k.weight" in found


def test_heads_left_as_transformers_rotates_them_in_one_layer_are_a_fault(llama: Any, tmp_path: Path) -> None:
    tensors = named(llama)
    tensors["blk.4.attn_q.weight"] = llama.model.layers[4].self_attn.q_proj.weight.detach()
    (fault,) = faults(write(tmp_path / "m.gguf", tensors, layers=6), llama)
    assert fault.startswith("blk.4.attn_q.weight differs")


def test_a_tensor_of_another_type_is_named(llama: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", named(llama), layers=6, also="blk.2.attn_v.weight")
    assert faults(file, llama) == ("blk.2.attn_v.weight is F16; F32 was asked for",)


def test_a_missing_tensor_and_a_layer_too_many_are_named(llama: Any, tmp_path: Path) -> None:
    tensors = named(llama)
    del tensors["blk.5.ffn_down.weight"]
    assert faults(write(tmp_path / "a.gguf", tensors, layers=6), llama) == ("blk.5.ffn_down.weight is missing",)
    shallow = tiny.model("llama", num_hidden_layers=5)
    shallow.load_state_dict({k: v for k, v in llama.state_dict().items() if ".layers.5." not in k})
    found = faults(write(tmp_path / "b.gguf", named(llama), layers=6), shallow, layers=5)
    assert found[0] == "b.gguf says it has 6 layers; the plan keeps 5"
    assert "blk.5.attn_k.weight belongs to no layer that was kept" in found


def test_another_shape_and_a_file_that_is_none_are_named(llama: Any, tmp_path: Path) -> None:
    tensors = named(llama)
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:64]
    assert faults(write(tmp_path / "m.gguf", tensors, layers=6), llama) == (
        "blk.0.ffn_up.weight has the shape (64, 64); the model's is (96, 64)",
    )
    (tmp_path / "none.gguf").write_bytes(b"no GGUF at all")
    with pytest.raises(ArtifactError, match=r"none.gguf cannot be read as GGUF; .*; export it again"):
        faults(tmp_path / "none.gguf", llama)


def test_stored_weights_lie_as_in_the_model(llama: Any, tmp_path: Path) -> None:
    stored = {each.name: each for each in stored_weights(write(tmp_path / "m.gguf", named(llama), layers=6))}
    assert len(stored) == 6 * 9 + 2
    attention = llama.model.layers[2].self_attn
    for name, weight in {"attn_q": attention.q_proj.weight, "attn_k": attention.k_proj.weight}.items():
        tensor = stored[f"blk.2.{name}.weight"]
        assert (tensor.dtype, tensor.shape) == ("float32", tuple(weight.shape))
        assert (tensor.read() == weight.detach().numpy()).all()
    rounded = stored_weights(write(tmp_path / "q.gguf", named(llama), layers=6, kind="Q8_0"))
    assert {each.dtype for each in rounded if len(each.shape) > 1} == {"int8"}

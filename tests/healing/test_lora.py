"""LoRA trains little, starts from the same model, and merged computes what it computed beside the weights."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import tiny
from sglp_deploy import Compressor
from sglp_deploy.errors import ConfigError
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.healing.lora import merge
from sglp_deploy.healing.options import HealOptions
from sglp_deploy.healing.student import Student, student_of
from sglp_deploy.models import LoadedModel

IDS = torch.arange(60).reshape(2, 30)


def gpt2() -> LoadedModel:
    config = GPT2Config(vocab_size=tiny.VOCAB_SIZE, n_embd=32, n_layer=4, n_head=2, n_positions=64)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval()
    return LoadedModel(module, tiny.tokenizer(), tiny.source(module))


def student(loaded: LoadedModel, drop: list[int], rank: int = 4) -> tuple[Compressor, Student, torch.Tensor]:
    pytest.importorskip("peft", reason="needs peft: pip install 'sglp-deploy[heal]'")
    compressor = Compressor(loaded)
    pruned = compressor.materialize(compressor.plan_by_hand(drop))
    with torch.no_grad():
        before = pruned.module(input_ids=IDS).logits
    return compressor, student_of(pruned, compressor.model, HealOptions(tokens=1, lora=rank)), before


@pytest.mark.parametrize("made", [tiny.loaded, gpt2])
def test_merged_it_computes_what_it_computed_and_leaves_no_operator(made: Any) -> None:
    compressor, own, before = student(made(), [2])
    raw = compressor.materialize(compressor.plan_by_hand([2])).module
    dense = {name: one.detach().clone() for name, one in compressor.model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(own.module(input_ids=IDS).logits, before)  # it begins where the pruned model is
        torch.manual_seed(1)
        for parameter in own.trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        beside = own.module(input_ids=IDS).logits
    assert float((beside - before).abs().max()) > 0.01
    changed = own.changed()
    with torch.no_grad():
        merged = own.module(input_ids=IDS).logits
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    assert [type(one) for one in own.module.modules()] == [type(one) for one in raw.modules()]
    assert own.module.state_dict().keys() == raw.state_dict().keys()
    assert changed.keys() == {*own.names.values()}
    assert all(changed[name].shape == dense[name].shape for name in changed)
    assert all(torch.equal(one, dense[name]) for name, one in compressor.model.named_parameters())


def test_only_the_low_rank_matrices_of_the_layers_are_trained() -> None:
    _, own, _ = student(tiny.loaded(), [2, 3], rank=3)
    trained = {name for name, one in own.module.named_parameters() if one.requires_grad}
    assert trained == {*own.trained}
    assert all(".layers." in name and "lora_" in name for name in trained)
    assert len(trained) == 4 * 7 * 2  # layers, linear maps of each, matrices beside each
    assert {min(one.shape) for one in own.trained.values()} == {3}


def test_healing_with_it_is_kept_and_certified_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install 'sglp-deploy[heal]'")
    compressor = Compressor(tiny.loaded())
    plan = compressor.plan_by_hand([2, 3])
    given: dict[str, Any] = {"tokens": 32 * 8 * 30, "sequence_length": 32, "batch_size": 8, "held_out": 256, "ce": 1.0}
    first, again = (
        compressor.heal(plan, corpus=[CalibrationSet.builtin()], lora=8, learning_rate=2e-2, **given) for _ in range(2)
    )
    assert first.weights is not None
    assert all(".layers." in name and name.endswith("proj.weight") for name in first.weights.tensors)
    assert first.overlay is not None
    record = first.overlay["made_by"][0]
    assert record["loss_after"] < record["loss_before"] - 0.2
    assert first.digest() == again.digest()


def test_without_peft_it_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    words = r"lora needs the package peft; it is not installed; pip install 'sglp-deploy\[heal\]', or train all weights"
    compressor = Compressor(tiny.loaded())
    with pytest.raises(ConfigError, match=words):
        compressor.heal(compressor.plan_by_hand([2]), corpus=[CalibrationSet.builtin()], tokens=1, lora=4)


def test_merging_a_model_without_it_changes_nothing() -> None:
    pytest.importorskip("peft", reason="needs peft: pip install 'sglp-deploy[heal]'")
    model = tiny.model()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    merge(model)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())

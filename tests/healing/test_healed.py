"""Healing is kept only where held-out rows say so; its record, its overlay, what it builds on and its refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from overlays import overlay_of
from sglp_deploy import Compressor
from sglp_deploy.errors import CalibrationError, ConfigError, PlanError, UnsupportedModelError
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.healing import healed
from sglp_deploy.healing.options import HealOptions
from sglp_deploy.healing.training import Training
from sglp_deploy.overlay import OVERLAY_FILE
from sglp_deploy.plan import PruningPlan

DROP = (2, 3)
TEXT = CalibrationSet.builtin()
FEW: dict[str, Any] = {
    "tokens": 32 * 8 * 6, "sequence_length": 32, "batch_size": 8, "held_out": 128, "precision": "fp32",
    "corpus": [TEXT],
}  # fmt: skip


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    return Compressor(tiny.loaded("llama"))


def losses(monkeypatch: pytest.MonkeyPatch, *said: float) -> None:
    """Held-out loss of the unpruned model, before and after, as they are asked for; nothing is said of it meanwhile."""
    answers = iter(said)

    def nats(_speaker: Any, rows: NDArray[np.int64], *, batch_size: int) -> NDArray[np.float64]:
        return np.full(len(rows), next(answers) * (rows.shape[1] - 1))

    monkeypatch.setattr(healed, "nats", nats)
    monkeypatch.setattr(Training, "held_out_loss", lambda own: 10.0 - own._standing.step)


def test_healing_that_helps_becomes_the_plan_s_overlay(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses(monkeypatch, 3.0, 5.0, 4.0)
    dense = {name: one.detach().clone() for name, one in compressor.model.named_parameters()}
    plan = compressor.plan_by_hand(DROP)
    made = compressor.heal(plan, **FEW)
    assert (made.drop, made.compensation) == (plan.drop, None)
    assert made.weights is not None
    # Every weight of the kept layers and the last norm, and neither the embeddings nor a removed layer's.
    layers = [name for name in dense if ".layers." in name and name.split(".")[2] not in ("2", "3")]
    assert set(made.weights.tensors) == {*layers, "model.norm.weight"}
    assert made.overlay is not None
    (record,) = made.overlay["made_by"]
    assert (record["repair"], record["steps"], record["tokens"]) == ("heal", 6, 6 * 256)
    assert [record[f"loss_{name}"] for name in ("dense", "before", "after")] == [3.0, 5.0, 4.0]
    (share,) = record["by_share"]
    assert share == {"source": "builtin:calibration", "loss_dense": 3.0, "loss_before": 5.0, "loss_after": 4.0}
    assert record["mix"][0]["n_held_out"] == 128
    assert (record["options"]["learning_rate"], record["learning_rate"]) == (None, 0.17 / 64)
    assert made.elapsed_s["heal"] > 0
    # It goes through a file and into a model that computes something else than the plan without it.
    made.save(tmp_path / "plan.json")
    made.save_overlay(tmp_path)
    read = PruningPlan.load(tmp_path / "plan.json")
    assert read.digest() == made.digest() != plan.digest()
    small = compressor.materialize(read).module
    name = "mlp.down_proj.weight"  # layer 4 is the third that stays
    assert torch.equal(small.get_parameter(f"model.layers.2.{name}"), made.weights.tensors[f"model.layers.4.{name}"])
    assert small.num_parameters() == compressor.materialize(plan).module.num_parameters()
    assert all(torch.equal(one, dense[name]) for name, one in compressor.model.named_parameters())
    assert all(one.requires_grad and one.grad is None for one in compressor.model.parameters())


def test_it_really_lowers_the_loss_that_the_task_measures(compressor: Compressor) -> None:
    text = CalibrationSet.builtin_held_out(max_tokens=1024, sequence_length=32)
    plan = compressor.plan_by_hand(DROP)
    made = compressor.heal(plan, **FEW | {"tokens": 32 * 8 * 40}, learning_rate=3e-3, ce=1.0)
    before, after = (compressor.evaluate(each, text)["pruned"]["nats_per_token"] for each in (plan, made))
    assert after < before - 0.5


def test_the_same_tokens_give_the_same_weights_and_another_seed_others(compressor: Compressor) -> None:
    plan = compressor.plan_by_hand(DROP)
    first, again, other = (compressor.heal(plan, **FEW, seed=seed) for seed in (0, 0, 1))
    assert first.digest() == again.digest()
    assert first.weights is not None
    assert other.weights is not None
    assert first.weights.digest != other.weights.digest


def test_its_artifact_is_certified_against_the_unpruned_model(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses(monkeypatch, 3.0, 5.0, 4.0)
    plan = compressor.heal(compressor.plan_by_hand(DROP), **FEW, learning_rate=1e-2)
    plan.save_overlay(tmp_path)
    artifact = compressor.export(plan, "torch", tmp_path / "torch")
    text = CalibrationSet.builtin_held_out(max_tokens=400, sequence_length=200)
    assert compressor.verify(artifact, text=text).passed
    raw = compressor.export(compressor.plan_by_hand(DROP), "torch", tmp_path / "raw")
    assert not compressor.verify(replace(raw, plan_digest=plan.digest()), plan, text=text).passed


def test_it_starts_from_the_weights_of_the_plan_and_keeps_those_it_does_not_train(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses(monkeypatch, 3.0, 5.0, 4.0)
    names = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
    given = compressor.plan_by_hand(DROP).with_overlay(overlay_of(compressor.model, names))
    started: dict[str, torch.Tensor] = {}

    def step(own: Training, *_: Any) -> None:
        started.update({name: one.detach().clone() for name, one in own.trained.items()})
        for one in own.trained.values():
            one.data += 1

    monkeypatch.setattr(Training, "_step", step)
    made = compressor.heal(given, **FEW | {"tokens": 1})
    assert given.weights is not None
    assert made.weights is not None
    assert torch.equal(started[names[1]], given.weights.tensors[names[1]])
    assert torch.equal(made.weights.tensors[names[1]], given.weights.tensors[names[1]] + 1)
    assert torch.equal(made.weights.tensors[names[0]], given.weights.tensors[names[0]])


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma3"])
def test_embeddings_are_trained_where_they_are_asked_for(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses(monkeypatch, 3.0, 5.0, 4.0)
    own = Compressor(tiny.loaded(family))
    made = own.heal(own.plan_by_hand([2]), **FEW, embeddings=True)
    assert made.weights is not None
    outside = {name for name in made.weights.tensors if ".layers." not in name}
    head = {"lm_head.weight"} if family == "llama-untied" else set()
    assert outside == {"model.embed_tokens.weight", "model.norm.weight"} | head
    module = own.materialize(made).module
    tied = module.get_input_embeddings().weight is module.get_output_embeddings().weight
    assert tied == (family != "llama-untied")


def test_a_model_of_half_precision_is_trained_in_float32_and_stored_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses(monkeypatch, 3.0, 5.0, 4.0)
    loaded = tiny.loaded("llama")
    loaded.module.to(torch.bfloat16)
    own = Compressor(replace(loaded, source=tiny.source(loaded.module)))
    made = own.heal(own.plan_by_hand(DROP), **FEW | {"precision": "bf16"}, learning_rate=1e-2)
    assert made.weights is not None
    assert {one.dtype for one in made.weights.tensors.values()} == {torch.bfloat16}
    assert {one.dtype for one in own.model.parameters()} == {torch.bfloat16}


def test_healing_that_does_not_help_is_refused_and_the_plan_says_why(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses(monkeypatch, 3.0, 5.0, 5.0)
    plan = compressor.plan_by_hand(DROP)
    made = compressor.heal(plan, **FEW)
    assert (made.overlay, made.weights) == (None, None)
    assert made.compensation is not None
    (refused,) = made.compensation["refused"]
    assert refused["repair"] == "heal"
    assert refused["why"] == "the loss on held-out rows does not become lower (5.0000 to 5.0000)"
    assert PruningPlan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_training_that_changes_nothing_is_refused(compressor: Compressor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "_step", lambda *_: None)
    made = compressor.heal(compressor.plan_by_hand(DROP), **FEW)
    assert made.compensation is not None
    assert "does not become lower" in made.compensation["refused"][0]["why"]


def test_a_loss_beyond_all_numbers_before_it_is_none_in_the_file(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses(monkeypatch, 3.0, float("inf"), 4.0)
    made = compressor.heal(compressor.plan_by_hand(DROP), **FEW)
    assert made.overlay is not None
    assert made.overlay["made_by"][0]["loss_before"] is None
    made.save(tmp_path / "plan.json")


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, r"healing has no budget; nothing says when to stop; give tokens \(1_000_000\), minutes \(15\) or both"),
        ({"tokens": 0}, "tokens=0 is no budget; nothing would be trained; give 1_000_000, or none"),
        ({"minutes": 0}, r"minutes=0\.0 is no budget; nothing would be trained; give 15, or leave it out"),
        ({"minutes": -1}, r"minutes=-1\.0 is no budget"),
        (
            {"tokens": 1, "batch_size": 0},
            "batch_size=0 must be at least 1; healing cannot work with less; leave it out",
        ),
        ({"tokens": 1, "learning_rate": 2}, r"learning_rate=2\.0 must lie between 0 and 1; another one diverges"),
        ({"tokens": 1, "ce": 1.5}, r"ce=1\.5 is a share; the loss would make no sense; give 0 to 1"),
        (
            {"tokens": 1, "temperature": 0},
            r"temperature=0\.0 must be above 0; it divides the logits; leave it out for 1",
        ),
        ({"tokens": 1, "weight_decay": -1}, r"weight_decay=-1\.0 is negative; weights would grow; give 0 or more"),
        ({"tokens": 1, "lora": 4, "embeddings": True}, "lora and embeddings exclude each other; LoRA changes layers"),
        ({"tokens": 1, "precision": "fp8"}, "unknown precision 'fp8'; .* auto, bf16, fp32"),
        ({"tokens": 1, "learningrate": 1}, "unknown option of healing 'learningrate'; .*did you mean 'learning_rate'"),
        ({"tokens": "many"}, "tokens='many' does not fit healing"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], words: str, compressor: Compressor) -> None:
    with pytest.raises(ConfigError, match=words):
        compressor.heal(compressor.plan_by_hand(DROP), corpus=[TEXT], **given)


def test_a_plan_that_removes_nothing_or_is_of_another_model_is_refused(compressor: Compressor) -> None:
    with pytest.raises(PlanError, match="removes no layer; there is nothing to heal; plan with a budget first"):
        compressor.heal(compressor.keep_all(), **FEW)
    other = Compressor(tiny.loaded("llama", seed=1)).plan_by_hand(DROP)
    with pytest.raises(PlanError, match="a layer number means another layer there"):
        compressor.heal(other, **FEW)


def test_tokens_of_another_vocabulary_are_refused(compressor: Compressor) -> None:
    text = CalibrationSet.from_token_ids([np.full(400, 9999)])
    with pytest.raises(CalibrationError, match="outside the model's vocabulary"):
        compressor.heal(compressor.plan_by_hand(DROP), **FEW | {"corpus": [text]})


def test_memory_that_cannot_hold_the_training_is_said_before_it_begins(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healed.psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    words = (
        r"the unpruned model, the pruned one and the training of it do not fit into memory together; training needs "
        r"0\.0 GB and 0\.0 GB are free; train fewer weights \(option lora=16\), give a smaller batch_size, or use a"
    )
    with pytest.raises(CalibrationError, match=words):
        compressor.heal(compressor.plan_by_hand(DROP), **FEW)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")])
def test_memory_that_runs_out_meanwhile_is_said_in_the_same_words(
    error: Exception, compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Training, "_step", full)
    with pytest.raises(CalibrationError, match=r"do not fit into memory together; .*; train fewer weights"):
        compressor.heal(compressor.plan_by_hand(DROP), **FEW)


def test_another_failure_is_not_called_a_lack_of_memory(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Training, "_step", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        compressor.heal(compressor.plan_by_hand(DROP), **FEW)


def test_a_model_that_predicts_no_token_is_refused() -> None:
    loaded = tiny.loaded("llama")
    own = Compressor(replace(loaded, module=loaded.module.model, source=tiny.source(loaded.module.model)))
    with pytest.raises(UnsupportedModelError):
        own.heal(own.plan_by_hand(DROP), **FEW)


def test_nothing_is_left_of_the_state_when_it_is_done(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sglp_deploy.healing.state import Keeper

    monkeypatch.setattr(Keeper, "due", True)
    folder = tmp_path / "healing"
    seen: list[list[str]] = []
    write = Keeper.write

    def written(keeper: Keeper, *given: Any) -> None:
        write(keeper, *given)
        seen.append([path.suffix for path in folder.iterdir()])

    monkeypatch.setattr(Keeper, "write", written)
    made = compressor.heal(compressor.plan_by_hand(DROP), **FEW, folder=folder)
    assert seen == [[".safetensors"]] * 6
    assert not folder.exists()
    assert made.overlay is not None
    assert not (tmp_path / OVERLAY_FILE).exists()


def test_options_may_come_as_one_object(compressor: Compressor) -> None:
    plan = compressor.plan_by_hand(DROP)
    options = HealOptions(**{name: value for name, value in FEW.items() if name != "corpus"})
    assert compressor.heal(plan, corpus=[TEXT], options=options).digest() == compressor.heal(plan, **FEW).digest()

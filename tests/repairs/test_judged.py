"""A repair is kept only where held-out rows say so; its record, its overlay and its refusals."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from sglp_deploy import Compressor, _io
from sglp_deploy.errors import CalibrationError, ConfigError, PlanError, StorageError
from sglp_deploy.evidence.streams import KeptStream
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.plan import PruningPlan
from sglp_deploy.repairs import judged
from sglp_deploy.repairs.registry import REPAIRS, read_options, repair
from sglp_deploy.repairs.seam import Fitted
from sglp_deploy.repairs.workbench import Workbench

DROP = (2, 3)


@dataclass(frozen=True)
class Options:
    """None."""


class Planted:
    """Puts ``value`` into a weight."""

    name = "planted"
    source = "a test"
    Options = Options

    def __init__(self, value: float) -> None:
        self.value = value

    def fit(self, bench: Workbench, options: Any) -> Fitted:
        del options
        own = bench.layers[1].get_parameter("mlp.down_proj.weight").detach()
        changed = own.clone()
        changed[0, 0] = self.value
        bench.put(1, "mlp.down_proj.weight", changed)
        return Fitted({"fits": []})


def plant(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    monkeypatch.setattr(judged, "repair", lambda _name: made)
    monkeypatch.setattr(judged, "read_options", lambda _name, _given: Options())


@pytest.fixture
def compressor() -> Compressor:
    text = CalibrationSet.builtin(max_tokens=1024, sequence_length=64)
    return Compressor(tiny.loaded("llama"), calibration=text)


def losses(monkeypatch: pytest.MonkeyPatch, dense: float, before: float, after: float) -> None:
    """What the bench will say, in the order in which it is asked."""
    answers = iter((dense, before, after))
    monkeypatch.setattr(Workbench, "loss", lambda _self, _module: next(answers))


def test_a_repair_that_helps_becomes_the_plan_s_overlay(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses(monkeypatch, 3.0, 5.0, 4.0)
    plan = compressor.plan_by_hand(DROP)
    made = compressor.repair(plan, ridge=0.1)
    assert (made.drop, made.compensation) == (plan.drop, None)
    assert made.weights is not None
    assert set(made.weights.tensors) == {
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert made.overlay is not None
    (record,) = made.overlay["made_by"]
    assert record["repair"] == "refit"
    assert (record["loss_dense"], record["loss_before"], record["loss_after"]) == (3.0, 5.0, 4.0)
    assert record["options"] == {"ridge": 0.1, "attention": True, "later": False, "precision": "auto"}
    assert record["calibration"]["source"] == "builtin:calibration"
    assert record["calibration"]["n_minibatches"] == 4
    assert record["calibration"]["n_held_out"] == 1
    assert [fit["layer"] for fit in record["fits"]] == [1, 1]
    assert made.elapsed_s["repair refit"] > 0
    # It goes through a file and into a model that computes something else than the plan without it.
    made.save(tmp_path / "plan.json")
    made.save_overlay(tmp_path)
    read = PruningPlan.load(tmp_path / "plan.json")
    assert read.digest() == made.digest() != plan.digest()
    repaired, raw = compressor.materialize(read).module, compressor.materialize(plan).module
    own = repaired.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(own, made.weights.tensors["model.layers.1.mlp.down_proj.weight"])
    assert not torch.equal(own, raw.get_parameter("model.layers.1.mlp.down_proj.weight"))
    assert repaired.num_parameters() == raw.num_parameters()


def test_its_artifact_is_certified_against_the_unpruned_model(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses(monkeypatch, 3.0, 5.0, 4.0)
    plan = compressor.repair(compressor.plan_by_hand(DROP))
    plan.save_overlay(tmp_path)
    artifact = compressor.export(plan, "torch", tmp_path / "torch")
    text = CalibrationSet.builtin_held_out(max_tokens=400, sequence_length=200)
    report = compressor.verify(artifact, text=text)
    assert report.passed, report.reasons
    raw = compressor.plan_by_hand(DROP)
    unrepaired = replace(compressor.export(raw, "torch", tmp_path / "raw"), plan_digest=plan.digest())
    assert not compressor.verify(unrepaired, plan, text=text).passed


def test_repairs_follow_one_another(compressor: Compressor, monkeypatch: pytest.MonkeyPatch) -> None:
    losses(monkeypatch, 3.0, 5.0, 4.0)
    first = compressor.repair(compressor.plan_by_hand(DROP), "linear")
    losses(monkeypatch, 3.0, 4.0, 3.9)
    second = compressor.repair(first, "refit")
    assert second.overlay is not None
    assert [record["repair"] for record in second.overlay["made_by"]] == ["linear", "refit"]
    assert first.weights is not None
    assert second.weights is not None
    down = "model.layers.1.mlp.down_proj.weight"  # linear's is what refit started from
    assert set(first.weights.tensors) == {down}
    assert not torch.equal(first.weights.tensors[down], second.weights.tensors[down])


def test_a_repair_that_does_not_help_is_refused_and_the_plan_says_why(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses(monkeypatch, 3.0, 5.0, 5.0)
    plan = compressor.plan_by_hand(DROP)
    made = compressor.repair(plan)
    assert (made.overlay, made.weights) == (None, None)
    assert made.compensation is not None
    (refused,) = made.compensation["refused"]
    assert refused["why"] == "the loss on held-out rows does not become lower (5.0000 to 5.0000)"
    assert PruningPlan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_loss_beyond_all_numbers_is_none_in_the_file(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses(monkeypatch, 3.0, float("inf"), 4.0)
    made = compressor.repair(compressor.plan_by_hand(DROP))
    assert made.overlay is not None
    assert made.overlay["made_by"][0]["loss_before"] is None
    made.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json").digest() == made.digest()


def test_what_cannot_be_folded_is_refused_with_the_reason(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglp_deploy.evidence.branches._ROUNDING", {torch.float32: -1.0})
    made = compressor.repair(compressor.plan_by_hand(DROP))
    assert made.compensation is not None
    assert re.search(
        r"layer 1: a LlamaDecoderLayer does not add the outputs of two of its modules .*repair 'none'",
        made.compensation["refused"][0]["why"],
    )


def test_no_kept_layer_before_the_gap_leaves_nothing_to_fit(compressor: Compressor) -> None:
    made = compressor.repair(compressor.plan_by_hand([0, 1]))
    assert made.compensation is not None
    assert made.compensation["refused"][0]["why"] == "there is no kept layer before a gap"


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_plan_that_removes_nothing_is_refused(compressor: Compressor) -> None:
    with pytest.raises(PlanError, match="removes no layer; there is nothing to repair; plan with a budget first"):
        compressor.repair(compressor.keep_all())


def test_a_plan_of_another_model_is_refused(compressor: Compressor) -> None:
    other = Compressor(tiny.loaded("llama", seed=1)).plan_by_hand(DROP)
    with pytest.raises(PlanError, match="a layer number means another layer there"):
        compressor.repair(other)


def test_text_for_one_minibatch_is_refused(compressor: Compressor) -> None:
    text = CalibrationSet.builtin(max_tokens=128, sequence_length=64)
    with pytest.raises(CalibrationError, match="gives 1 minibatch; a repair is fitted on some and judged on others"):
        compressor.repair(compressor.plan_by_hand(DROP), calibration=text)


def test_tokens_of_another_vocabulary_are_refused(compressor: Compressor) -> None:
    text = CalibrationSet.from_token_ids([np.full(400, 9999)], max_tokens=400, sequence_length=16)
    with pytest.raises(CalibrationError, match="outside the model's vocabulary"):
        compressor.repair(compressor.plan_by_hand(DROP), calibration=text)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, Planted(value))
    with pytest.raises(CalibrationError, match=r"gives model\.layers\.1\.mlp\.down_proj\.weight NaN or infinity"):
        compressor.repair(compressor.plan_by_hand(DROP))


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = KeptStream(tmp_path / "s.f32")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="No space left on device; free some space, set TMPDIR"):
        stream.append(torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("refitt", {}, "unknown repair 'refitt'.*did you mean 'refit'"),
        ("refit", {"rigde": 1}, "unknown option of repair 'refit' 'rigde'.*did you mean 'ridge'"),
        ("refit", {"ridge": "-1"}, r"ridge=-1\.0 must be above 0; it is a pull towards the old weights; leave it out"),
        ("refit", {"attention": "perhaps"}, "attention='perhaps' does not fit repair 'refit'"),
        ("linear", {"ridge": 0}, r"ridge=0\.0 must be above 0"),
        ("refit", {"precision": "fp16"}, "unknown precision 'fp16'; .*auto, bf16, fp32"),
        ("local", {"precision": "bf61"}, "unknown precision 'bf61'; .*did you mean 'bf16'"),
        ("scale", {"alpha": 2}, "repair 'scale' takes no options"),
        ("local", {"epochs": 0, "window": 0}, r"epochs=0 must be at least 1(.|\n)*window=0 must be at least 1"),
        ("local", {"learning_rate": 2}, r"learning_rate=2\.0 must lie between 0 and 1"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(name, given)


def test_every_repair_is_what_the_seam_asks_for() -> None:
    for name in REPAIRS:
        made = repair(name)
        assert made.name == name
        assert made.source
        assert _io.plain(vars(made.Options())) is not None


def _live_bytes() -> int:
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # and not what traces of other tests have left
    return sum(each.nbytes for each in gc.get_objects() if type(each) in plain)


def test_memory_does_not_grow_with_the_calibration_set() -> None:
    def most(tokens: int) -> int:
        """Bytes of tensors that came to live by the time a weight is put in."""
        before = _live_bytes()
        text = CalibrationSet.builtin(max_tokens=tokens, sequence_length=64)
        made, seen, put = Compressor(tiny.loaded("llama"), calibration=text), [0], Workbench.put

        def measured(bench: Workbench, layer: int, path: str, value: torch.Tensor) -> None:
            seen.append(_live_bytes() - before)
            put(bench, layer, path, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Workbench, "put", measured)
            made.repair(made.plan_by_hand(DROP))
        assert len(seen) > 2
        return max(seen)

    assert most(8192) <= 1.05 * most(1024)

"""Overlays as values and as files, and plans that name one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tiny
from planted import MODEL, planted_stats
from sglp_deploy.errors import ArtifactError, PlanError, StorageError
from sglp_deploy.materialize import materialize
from sglp_deploy.overlay import OVERLAY_FILE, Overlay
from sglp_deploy.plan import PruningPlan, keep_all_plan, make_plan
from sglp_deploy.planners import registry
from sglp_deploy.planners.budget import Budget
from sglp_deploy.planners.seam import Evidence, LayerDecision

ONE, TWO = torch.arange(6.0).reshape(2, 3), torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
MADE_BY = [{"repair": "refit", "loss_before": 4.0, "loss_after": 3.5}]


def overlay() -> Overlay:
    return Overlay({"b.weight": TWO, "a.weight": ONE}, MADE_BY)


def plan_with(made: Overlay) -> PruningPlan:
    return keep_all_plan(4, MODEL, versions={}).with_overlay(made)


# -------------------------------------------------------------------------------------------------------- the overlay


def test_the_digest_is_over_names_shapes_types_and_values_in_order_of_name() -> None:
    # -2.0 as bfloat16 is 0xC000, 1.5 is 0x3FC0; little-endian.
    meant = b"a.weight|(2, 3)|torch.float32|" + ONE.numpy().tobytes()
    meant += b"b.weight|(2,)|torch.bfloat16|" + bytes([0xC0, 0x3F, 0x00, 0xC0])
    assert overlay().digest == hashlib.sha256(meant).hexdigest()
    assert Overlay({"a.weight": ONE, "b.weight": TWO}).digest == overlay().digest


@pytest.mark.parametrize(
    "other",
    [
        {"a.weight": ONE},
        {"a.weight": ONE, "c.weight": TWO},
        {"a.weight": ONE.reshape(3, 2), "b.weight": TWO},
        {"a.weight": ONE, "b.weight": TWO.float()},
        {"a.weight": ONE + 1e-6, "b.weight": TWO},
    ],
)
def test_anything_else_has_another_digest(other: dict[str, torch.Tensor]) -> None:
    assert Overlay(other).digest != overlay().digest


def test_a_file_gives_back_what_was_written_bfloat16_included(tmp_path: Path) -> None:
    made = overlay()
    assert made.path is None
    file = made.save(tmp_path / "new" / OVERLAY_FILE)
    assert made.path == file
    again = Overlay.open(file, made.named())
    assert list(again.tensors) == ["a.weight", "b.weight"]
    assert torch.equal(again.tensors["a.weight"], ONE)
    assert again.tensors["b.weight"].dtype == torch.bfloat16
    assert torch.equal(again.tensors["b.weight"], TWO)
    assert again.named() == {"digest": made.digest, "n_tensors": 2, "bytes": 28, "made_by": MADE_BY}
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"schema": "overlay/1"}


def test_an_overlay_keeps_its_values_whatever_becomes_of_the_tensors_it_was_made_of(tmp_path: Path) -> None:
    given = ONE.clone()
    made = Overlay({"a.weight": given})
    given.mul_(2)
    assert torch.equal(made.tensors["a.weight"], ONE)
    file = made.save(tmp_path / OVERLAY_FILE)
    read = Overlay.open(file, made.named()).tensors["a.weight"]
    data = file.read_bytes()
    with file.open("r+b") as stream:  # in place, as a program might that does not write aside
        stream.seek(len(data) - 4)
        stream.write(b"\x00\x00\x80\x7f")
    assert torch.equal(read, ONE)


def test_an_overlay_whose_tensor_was_changed_is_not_written(tmp_path: Path) -> None:
    made = overlay()
    made.tensors["a.weight"].mul_(2)
    with pytest.raises(PlanError, match="was changed after the overlay was made; the plan names other weights"):
        made.save(tmp_path / OVERLAY_FILE)
    assert list(tmp_path.iterdir()) == []


def test_training_the_pruned_model_does_not_change_the_overlay() -> None:
    model = tiny.model("llama")
    name = "model.layers.2.mlp.up_proj.weight"
    made = Overlay({name: model.get_parameter(name) * 2})
    plan = tiny.plan_for(model, (0, 2, 3, 5)).with_overlay(made)
    pruned = materialize(model, plan, tiny.source(model)).module
    with torch.no_grad():
        pruned.get_parameter("model.layers.1.mlp.up_proj.weight").zero_()
    assert torch.equal(made.tensors[name], model.get_parameter(name) * 2)


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(PlanError, match="the overlay's bias holds NaN or infinity; the model would give nonsense"):
        Overlay({"bias": torch.tensor([0.0, float("nan")])}).check(model)


@pytest.mark.parametrize(
    ("overlay_facts", "fault"),
    [
        ({"digest": "a", "n_tensors": 1, "bytes": 4, "made_by": []}, "its overlay has no digest"),
        ({"digest": "a" * 64, "n_tensors": 1, "bytes": 4}, "overlay.made_by is missing"),
        ({"digest": "a" * 64, "n_tensors": 1, "bytes": 4, "made_by": 3}, "overlay.made_by is 3"),
        ({"digest": "a" * 64, "made_by": [], "bytes": 4}, "overlay.n_tensors is missing"),
    ],
)
def test_a_plan_that_says_too_little_of_its_overlay_is_refused(overlay_facts: dict[str, Any], fault: str) -> None:
    value = keep_all_plan(4, MODEL, versions={}).to_json() | {"overlay": overlay_facts}
    with pytest.raises((ArtifactError, PlanError), match=fault):
        PruningPlan.from_json(value)


def test_equal_overlays_are_equal_files(tmp_path: Path) -> None:
    first, second = overlay().save(tmp_path / "a"), Overlay({"a.weight": ONE, "b.weight": TWO}).save(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_a_further_step_adds_and_replaces() -> None:
    made = overlay().with_tensors({"a.weight": ONE + 1, "c.weight": TWO}, {"heal": "distil"})
    assert list(made.tensors) == ["a.weight", "b.weight", "c.weight"]
    assert torch.equal(made.tensors["a.weight"], ONE + 1)
    assert list(made.made_by) == [*MADE_BY, {"heal": "distil"}]


def test_an_overlay_without_tensors_is_refused() -> None:
    with pytest.raises(PlanError, match=r"holds no tensor; a plan without changed weights has none; leave it out"):
        Overlay({})


def test_a_missing_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"overlay\.safetensors does not exist; .* expected there; check the path"):
        Overlay.open(tmp_path / OVERLAY_FILE, overlay().named())


def test_a_file_of_another_schema_is_refused_by_name(tmp_path: Path) -> None:
    made = overlay()
    save_file(dict(made.tensors), tmp_path / "o", metadata={"schema": "overlay/2"})
    opened = Overlay.open(tmp_path / "o", made.named())
    with pytest.raises(ArtifactError, match=r"has schema 'overlay/2'; this version reads 'overlay/1'; make the plan"):
        opened.tensors  # noqa: B018 -- reading is what is tested


@pytest.mark.parametrize("place", [-1, 3], ids=["value", "header"])
def test_a_damaged_file_is_refused(place: int, tmp_path: Path) -> None:
    made = overlay()
    data = bytearray(made.save(tmp_path / "o").read_bytes())
    data[place] ^= 0x40
    (tmp_path / "o").write_bytes(data)
    with pytest.raises(
        ArtifactError, match=r"(is not the overlay the plan|cannot be read as an overlay).*; restore it, or make"
    ):
        Overlay.open(tmp_path / "o", made.named()).tensors  # noqa: B018 -- reading is what is tested


def test_a_file_of_another_plan_is_refused(tmp_path: Path) -> None:
    file = Overlay({"a.weight": ONE}).save(tmp_path / "o")
    with pytest.raises(ArtifactError, match=r"is not the overlay the plan names .*; it was altered or belongs to ano"):
        Overlay.open(file, overlay().named()).tensors  # noqa: B018 -- reading is what is tested


def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = overlay()
    file = made.save(tmp_path / OVERLAY_FILE)
    before = file.read_bytes()

    def full(_tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="no space left"):
        made.with_tensors({"a.weight": ONE + 1}, {}).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


class _Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("computed", torch.zeros(2), persistent=False)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.ones(2)}, r"changes other, which is no stored tensor of the model; .* another model; make"),
        ({"computed": torch.ones(2)}, r"changes computed, which is no stored tensor of the model"),
        (
            {"weight": torch.ones(3)},
            r"weight is float32 of shape \[3\], the model's is float32 of shape \[2\]; .*; load",
        ),
        ({"weight": torch.ones(2).half()}, r"weight is float16 of shape \[2\], the model's is float32 of shape \[2\]"),
    ],
)
def test_a_tensor_the_model_cannot_take_is_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Overlay(tensors).check(_Buffers())


def test_parameters_and_stored_buffers_may_be_changed_by_any_of_their_names() -> None:
    Overlay({"weight": torch.zeros(2), "mean": torch.ones(2)}).check(_Buffers())
    tied = tiny.model("llama")
    Overlay({"lm_head.weight": torch.zeros(tied.lm_head.weight.shape)}).check(tied)


# ------------------------------------------------------------------------------------------------------ plans with one


def test_a_plan_names_its_overlay_and_finds_it_beside_its_file(tmp_path: Path) -> None:
    made = overlay()
    plan = plan_with(made)
    plan.save(tmp_path / "plan.json")
    assert plan.save_overlay(tmp_path) == tmp_path / OVERLAY_FILE
    value = json.loads((tmp_path / "plan.json").read_text())
    assert value["schema"] == "plan/3"
    assert value["overlay"] == {"digest": made.digest, "n_tensors": 2, "bytes": 28, "made_by": MADE_BY}
    assert "weights" not in value
    again = PruningPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.digest() == plan.digest()
    weights = again.require_weights()
    assert weights is not None
    assert weights.path == tmp_path / OVERLAY_FILE
    assert torch.equal(weights.tensors["a.weight"], ONE)


def test_the_plans_digest_follows_the_overlays() -> None:
    plain = keep_all_plan(4, MODEL, versions={})
    digests = {plain.digest(), plan_with(overlay()).digest(), plan_with(Overlay({"a.weight": ONE})).digest()}
    assert len(digests) == 3


def test_a_plan_without_an_overlay_is_as_before(tmp_path: Path) -> None:
    plain = keep_all_plan(4, MODEL, versions={})
    assert plain.require_weights() is None
    assert plain.save_overlay(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    overlay().save(tmp_path / OVERLAY_FILE)  # of another plan that lies there
    plain.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json").weights is None
    with pytest.raises(
        PlanError, match=r"the plan changes no weights; .* has nothing to do with it; leave the overlay"
    ):
        plain.with_weights_from(tmp_path / OVERLAY_FILE)


def test_a_plan_whose_overlay_is_not_at_hand_says_so(tmp_path: Path) -> None:
    plan = plan_with(overlay())
    plan.save(tmp_path / "plan.json")
    alone = PruningPlan.load(tmp_path / "plan.json")
    message = (
        rf"{overlay().digest[:12]}\) is not at hand; .*; put overlay\.safetensors beside the plan, or .* --overlay"
    )
    with pytest.raises(PlanError, match=message):
        alone.require_weights()
    with pytest.raises(PlanError, match=message):
        alone.save_overlay(tmp_path)


def test_a_plan_refuses_an_overlay_it_does_not_name() -> None:
    other = replace(plan_with(overlay()), weights=Overlay({"a.weight": ONE}))
    with pytest.raises(PlanError, match=r"was given one of \w{12}; they belong to different plans; give the one"):
        other.require_weights()


def test_a_planner_that_returns_weights_makes_a_plan_with_an_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = registry.planner("sglp")

    class Merging:
        name = "sglp"
        source = planned.source
        Options = planned.Options

        def decide(self, evidence: Evidence, budget: Budget, options: Any) -> LayerDecision:
            return replace(planned.decide(evidence, budget, options), weights={"a.weight": ONE, "b.weight": TWO})

    monkeypatch.setattr("sglp_deploy.plan.planner", lambda _name: Merging())
    plan = make_plan(planted_stats(), Budget(drop=3), model=MODEL)
    assert plan.overlay is not None
    assert plan.overlay["digest"] == overlay().digest
    assert plan.overlay["made_by"] == [{"planner": "sglp"}]
    assert plan.require_weights() is plan.weights

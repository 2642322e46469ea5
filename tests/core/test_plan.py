from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planted import MODEL, block_matrix, planted_stats
from sglp_deploy import plan as plan_module
from sglp_deploy.errors import ArtifactError, CalibrationError, ConfigError, PlanError
from sglp_deploy.plan import Budget, LayerDecision, PruningPlan, keep_all_plan, make_plan, planner_names
from sglp_deploy.planners.seam import NoOptions

LITERAL = """
{
  "schema": "plan/3",
  "method": "sglp",
  "n_layers": 4,
  "keep": [0, 3],
  "drop": [1, 2],
  "segments": [[0, 2], [2, 4]],
  "segment_losses": [2.0, 0.5, 0.25, 0.0],
  "scores": {"grad-norm": [4.0, 1.0, 2.0, 3.0]},
  "similarity": null,
  "criterion": "grad-norm",
  "quota": "global",
  "budget": {"drop": 2},
  "model": {"id": "org/tiny", "fingerprint": "abc", "config_digest": "def", "gguf_file": null},
  "calibration": {"digest": "123", "n_samples": 2, "n_tokens": 64},
  "compensation": null,
  "seed": 7,
  "versions": {"numpy": "2.0"},
  "elapsed_s": {"calibration": 1.5},
  "options": {"n_segments": null, "profile": "row_sum"},
  "stack": "model.layers",
  "config_changes": [{"entry": "num_hidden_layers", "before": 4, "after": 2, "rule": "number of layers"}],
  "overlay": null,
  "width": null,
  "task": "language"
}
"""
# As written before plans knew overlays and tasks.
LITERAL_2 = json.loads(LITERAL) | {"schema": "plan/2"}
del LITERAL_2["overlay"], LITERAL_2["width"], LITERAL_2["task"]
# As written before plans knew stacks and configuration changes.
LITERAL_1 = LITERAL_2 | {"schema": "plan/1"}
del LITERAL_1["stack"], LITERAL_1["config_changes"]


def plan_of(stats: Any = None, budget: Budget | None = None, **options: Any) -> PruningPlan:
    return make_plan(stats or planted_stats(), budget or Budget(drop=3), model=MODEL, **options)


def test_a_plan_file_is_read_field_by_field_and_written_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(LITERAL)
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan.keep == (0, 3)
    assert plan.drop == (1, 2)
    assert plan.segments == ((0, 2), (2, 4))
    assert plan.scores == {"grad-norm": (4.0, 1.0, 2.0, 3.0)}
    assert plan.model["id"] == "org/tiny"
    assert plan.similarity is None
    assert plan.compensation is None
    assert plan.stack == "model.layers"
    assert plan.config_changes[0]["after"] == 2
    plan.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(LITERAL)
    assert PruningPlan.load(tmp_path / "again.json") == plan


def test_the_digest_is_the_sha256_of_the_plan_without_times_and_versions() -> None:
    value = json.loads(LITERAL) | {"task": "classification"}  # says more than a plan/2 could
    plan = PruningPlan.from_json(value)
    del value["elapsed_s"], value["versions"]
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert plan.digest() == hashlib.sha256(text.encode()).hexdigest()
    assert dataclasses.replace(plan, elapsed_s={"all": 9.0}, versions={}).digest() == plan.digest()
    assert dataclasses.replace(plan, seed=8).digest() != plan.digest()


def test_a_plan_of_the_first_schema_means_the_first_stack_and_keeps_its_digest(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(LITERAL_1))
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert (plan.keep, plan.stack, plan.config_changes) == ((0, 3), None, ())
    hashed = {name: value for name, value in LITERAL_1.items() if name not in ("elapsed_s", "versions")}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert plan.digest() == digest
    plan.save(tmp_path / "again.json")  # as plan/3, and still the same decision
    assert json.loads((tmp_path / "again.json").read_text())["schema"] == "plan/3"
    assert PruningPlan.load(tmp_path / "again.json") == plan
    assert PruningPlan.load(tmp_path / "again.json").digest() == digest
    assert dataclasses.replace(plan, stack="encoder.block").digest() != digest


def test_a_plan_of_the_second_schema_was_measured_on_language_and_keeps_its_digest(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(LITERAL_2))
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert (plan.overlay, plan.width, plan.task) == (None, None, "language")
    hashed = {name: value for name, value in LITERAL_2.items() if name not in ("elapsed_s", "versions")}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert plan.digest() == digest
    assert PruningPlan.from_json(json.loads(LITERAL)).digest() == digest
    assert PruningPlan.from_json(LITERAL_2 | {"calibration": None}).task is None
    assert dataclasses.replace(plan, task="classification").digest() != digest


def test_by_default_every_segment_gives_in_proportion_to_its_size() -> None:
    # 5 x 2/12, 5 x 4/12 and 5 x 6/12 are 0.83, 1.67 and 2.5; by largest remainder that is 1, 2 and 2.
    assert plan_of(budget=Budget(drop=5)).drop == (0, 2, 3, 6, 7)


def test_the_planted_groups_become_the_segments() -> None:
    # Groups of 2, 4 and 6 layers; the scores rise with depth, so removal starts at the front.
    plan = plan_of(budget=Budget(drop=5), quota="global")
    assert plan.segments == ((0, 2), (2, 6), (6, 12))
    assert plan.drop == (0, 2, 3, 4, 6)  # layers 1 and 5 are the last of their segments
    assert plan.keep == (1, 5, 7, 8, 9, 10, 11)
    assert plan.criterion == "grad-norm"
    assert plan.scores == {"grad-norm": tuple(float(value) for value in range(1, 13))}
    assert plan.similarity is not None
    np.testing.assert_allclose(plan.similarity, block_matrix((2, 4, 6)), rtol=1e-12)
    assert len(plan.segment_losses) == 12
    assert plan.segment_losses[2] < 1e-20 < plan.segment_losses[1]
    assert plan.budget == {"drop": 5}
    assert plan.method == "sglp"
    assert plan.options == {
        "n_segments": None,
        "profile": "row_sum",
        "estimator": "unbiased",
        "statistics": {"rows": "rms", "skip_positions": 1},
    }
    assert set(plan.elapsed_s) == {"calibration", "similarity", "importance", "segmentation"}
    assert plan.elapsed_s["calibration"] == 1.25
    assert {"python", "numpy", "sglp-deploy"} <= set(plan.versions)


def test_equal_input_gives_an_equal_plan(tmp_path: Path) -> None:
    first, second = plan_of(), plan_of()
    assert first.digest() == second.digest()
    first.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == first
    assert PruningPlan.load(tmp_path / "plan.json").digest() == first.digest()


def test_calibration_counts_come_from_the_statistics() -> None:
    plan = plan_of(calibration={"digest": "d", "source": "calib.txt"})
    assert plan.calibration == {"digest": "d", "source": "calib.txt", "n_samples": 8, "n_tokens": 512, "n_rows": 256}


def test_the_matrix_can_be_left_out() -> None:
    assert plan_of(keep_matrix=False).similarity is None


@pytest.mark.parametrize(
    ("budget", "n_dropped"),
    [(Budget(drop=0), 0), (Budget(keep=9), 3), (Budget(fraction=0.5), 6), (Budget(max_parameters=1900), 3)],
)
def test_each_kind_of_budget_is_met(budget: Budget, n_dropped: int) -> None:
    plan = plan_of(budget=budget)
    assert len(plan.drop) == n_dropped
    assert plan.budget == budget.to_json()


@pytest.mark.parametrize("budget", [Budget(keep=2), Budget(max_parameters=1200)])
def test_an_automatic_number_of_segments_gives_way_to_the_budget(budget: Budget) -> None:
    plan = plan_of(budget=budget)
    assert len(plan.keep) == 2
    assert len(plan.segments) == 2


def test_an_automatic_number_of_segments_gives_way_to_layers_that_must_stay() -> None:
    # The three layers that must stay fill the budget; cutting off the last group would need a survivor there as well.
    stats = planted_stats(prunable=(False, False, False, *(True,) * 9))
    plan = plan_of(stats, Budget(keep=3))
    assert plan.segments == ((0, 12),)
    assert plan.keep == (0, 1, 2)
    with pytest.raises(
        PlanError, match=r"drop=9 exceeds the 8 layers these 3 segments can lose; .*pass drop<=8 or fewer"
    ):
        plan_of(stats, Budget(keep=3), n_segments=3)


def test_a_given_number_of_segments_is_kept_or_refused() -> None:
    assert len(plan_of(budget=Budget(keep=6), n_segments=6).segments) == 6
    with pytest.raises(
        PlanError, match=r"keep=3 is below the 6 segments of this plan; .*pass n_segments<=3 or keep>=6"
    ):
        plan_of(budget=Budget(keep=3), n_segments=6)
    with pytest.raises(PlanError, match=r"n_segments=13 is outside 1\.\.12"):
        plan_of(n_segments=13)


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(PlanError, match="drop=12 removes all 12 layers; at least one must stay; pass drop<=11"):
        plan_of(budget=Budget(drop=12))
    with pytest.raises(PlanError, match=r"max_parameters=1099 cannot be met; .*pass max_parameters>=1100$"):
        plan_of(budget=Budget(max_parameters=1099))
    with pytest.raises(PlanError, match=r"drop=11 exceeds the 10 layers that may be removed; layers \[0, 11\] may not"):
        plan_of(planted_stats(prunable=(False, *(True,) * 10, False)), Budget(drop=11))


def test_the_options_reach_the_decision() -> None:
    stats = planted_stats((4, 4, 4), grad_l2=np.arange(12.0)[::-1].copy())
    assert plan_of(stats).segments == ((0, 12),)  # equal groups have equal row sums
    assert plan_of(stats, profile="rows").segments == ((0, 4), (4, 8), (8, 12))
    assert plan_of(stats, profile="rows", quota="proportional").drop == (3, 7, 11)
    assert plan_of(stats).drop == (9, 10, 11)
    other = plan_of(stats, criterion="block-influence", estimator="biased")
    assert other.drop == (0, 1, 2)
    assert other.criterion == "block-influence"
    assert other.options["estimator"] == "biased"


def test_a_constant_layer_stops_the_plan() -> None:
    sums = planted_stats().hsic_unbiased.copy()
    sums[5, 5] = 0.0
    with pytest.raises(CalibrationError, match=r"layer 5 \(layers\.5\)"):
        plan_of(planted_stats(hsic_unbiased=sums))


def test_the_keep_all_plan_removes_nothing(tmp_path: Path) -> None:
    plan = keep_all_plan(5, MODEL)
    assert (plan.method, plan.keep, plan.drop, plan.segments) == ("keep-all", (0, 1, 2, 3, 4), (), ((0, 5),))
    assert plan.criterion is None
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


def test_a_plan_is_refused_by_another_model() -> None:
    plan = PruningPlan.from_json(json.loads(LITERAL))
    plan.check_model("abc", 4)
    message = (
        r"the plan is for org/tiny \(fingerprint abc, 4 layers\) and not for org/big \(fingerprint xyz, 9 layers\); "
        ".*make a plan for this model"
    )
    with pytest.raises(PlanError, match=message):
        plan.check_model("xyz", 9, "org/big")
    with pytest.raises(PlanError, match="not for the given model"):
        plan.check_model("abc", 5)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"keep": [3, 0]}, r"keep \[3, 0\] is not in rising order without repeats"),
        ({"drop": [1, 1, 2]}, r"drop \[1, 1, 2\] is not in rising order"),
        ({"keep": [0, 4]}, r"keep \[0, 4\] names a layer outside 0\.\.3"),
        ({"keep": [0]}, r"keep \[0\] and drop \[1, 2\] do not complete each other"),
        ({"keep": [], "drop": [0, 1, 2, 3]}, "no layer is kept"),
        ({"keep": [2, 3], "drop": [0, 1]}, r"segment \[0, 2\) has no survivor"),
        ({"segments": [[0, 2], [3, 4]]}, r"segments \[\[0, 2\], \[3, 4\]\] do not cover layers 0 to 4 without a gap"),
        ({"segments": []}, "do not cover layers 0 to 4"),
        ({"segments": [[0, 0], [0, 4]]}, "hold an empty range"),
        ({"segment_losses": [1.0]}, r"segment_losses is not one finite number for each of 1\.\.4 segments"),
        ({"scores": {"grad-norm": [1.0, 2.0]}}, "the grad-norm scores are not one finite number for each of 4 layers"),
        ({"scores": {"grad-norm": [1.0, 2.0, 3.0, float("nan")]}}, "the grad-norm scores are not one finite"),
        ({"criterion": "taylor"}, "criterion 'taylor' has no scores"),
        ({"similarity": [[1.0]]}, "similarity is not 4 by 4"),
        ({"similarity": [[float("inf")] * 4] * 4}, "similarity holds NaN or infinity"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(PlanError, match=f"the plan contradicts itself; .*{fault}.*; make the plan again"):
        PruningPlan.from_json(json.loads(LITERAL) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "plan/4"}, "the plan has schema 'plan/4'; this version reads 'plan/3'; make the plan again"),
        ({"kept": []}, "the plan's fields are wrong; kept is unknown; make the plan again"),
        ({"keep": [0.0, 3.0]}, r"keep\.0 is 0\.0: Input should be a valid integer"),
        ({"keep": 3}, "keep is 3"),
        ({"segments": [[0, 2, 4]]}, r"segments\.0 is \[0, 2, 4\]"),
        ({"scores": [1.0]}, "scores is "),
        ({"n_layers": "4"}, "n_layers is '4'"),
        ({"model": None}, "model is None"),
        ({"model": {"id": "org/tiny"}}, r"model\.fingerprint is missing"),
        ({"model": {"id": [], "fingerprint": "f"}}, r"model\.id is \[\]"),
        ({"compensation": {"refused": [{"repair": {}, "why": ""}]}}, r"compensation\.refused\.0\.repair is {}"),
    ],
)
def test_a_malformed_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        PruningPlan.from_json(json.loads(LITERAL) | changes)


def test_a_plan_with_a_field_missing_is_refused() -> None:
    value = json.loads(LITERAL)
    del value["keep"], value["budget"]
    with pytest.raises(ArtifactError, match="fields are wrong; budget is missing, keep is missing"):
        PruningPlan.from_json(value)


def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": "artifact/1"}')
    with pytest.raises(
        ArtifactError,
        match=r"manifest\.json has schema 'artifact/1'; this version reads 'plan/1' and 'plan/2' and 'plan/3'",
    ):
        PruningPlan.load(tmp_path / "manifest.json")


def test_an_unknown_method_gets_the_nearest_match_and_the_list() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'sgpl'; .*did you mean 'sglp'.* are .*sglp"):
        plan_of(method="sgpl")


PLUGIN = """
from dataclasses import dataclass
from sglp_deploy.planners.seam import LayerDecision

@dataclass(frozen=True)
class TailOptions:
    offset: int = 0
    share: float = 0.5

class Tail:
    name = "tail"
    source = "none"
    Options = TailOptions

    def decide(self, evidence, budget, options):
        n = evidence.n_layers
        depth = {"depth": tuple(float(n - i) for i in range(n))}
        return LayerDecision((n - 1 - options.offset,), ((0, n),), (), "depth", depth)

def function(stats, budget, options):
    return None

@dataclass(frozen=True)
class NamedOptions:
    model: str = "small"
    budget: int = 1
    ratio: float = 0.5
    limit: int | None = 7

class Named(Tail):
    Options = NamedOptions

    def decide(self, evidence, budget, options):
        return LayerDecision((1,), ((0, evidence.n_layers),))

class Plain(Tail):
    Options = int

@dataclass(frozen=True)
class NeedyOptions:
    must: int

class Needy(Tail):
    Options = NeedyOptions

@dataclass(frozen=True)
class TakenOptions:
    statistics: int = 1

class Taken(Tail):
    Options = TakenOptions
"""


def install_plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = folder / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sglp_deploy.planners]\ntail = third_party_planner:Tail\nbroken = third_party_planner:gone\n"
        "sglp = third_party_planner:Tail\nold = third_party_planner:function\n"
        "named = third_party_planner:Named\nplain = third_party_planner:Plain\n"
        "needy = third_party_planner:Needy\ntaken = third_party_planner:Taken\n"
    )
    (folder / "third_party_planner.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "third_party_planner", raising=False)


def test_a_third_party_planner_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch)
    assert {"sglp", "tail", "broken"} <= set(planner_names())
    plan = plan_of(method="tail", budget=Budget(drop=1))
    assert (plan.method, plan.drop, plan.criterion, plan.quota) == ("tail", (11,), "depth", None)


def test_a_third_party_cannot_replace_a_built_in_planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch)
    assert plan_of(budget=Budget(drop=1)).criterion == "grad-norm"


def test_a_broken_planner_is_named_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch)
    message = r"the planner 'broken' \(third_party_planner:gone\) cannot be loaded; .*reinstall or remove that package"
    with pytest.raises(ConfigError, match=message):
        plan_of(method="broken")


def test_a_planner_of_an_older_shape_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"the planner 'old' .* function lacks one of name, source, Options, decide"):
        plan_of(method="old")


def test_options_of_a_third_party_planner_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch)
    plan = plan_of(method="tail", budget=Budget(drop=1), offset="3")  # a text, as a command line has it
    assert plan.drop == (8,)
    assert {name: plan.options[name] for name in ("offset", "share")} == {"offset": 3, "share": 0.5}
    with pytest.raises(ConfigError) as caught:
        plan_of(method="tail", ofset=1, share="half", criterion="taylor")
    assert [fault.partition(";")[0] for fault in caught.value.faults] == [
        "unknown option of planner 'tail' 'ofset'",
        "share='half' does not fit planner 'tail'",
        "unknown option of planner 'tail' 'criterion'",
    ]
    assert "did you mean 'offset'? the choices are offset, share" in caught.value.faults[0]


class _Planted:
    """A planner that answers what it was told to."""

    name, source, Options = "planted", "none", NoOptions

    def __init__(self, **decision: Any) -> None:
        self._decision = decision

    def decide(self, evidence: Any, budget: Any, options: Any) -> Any:
        n = evidence.n_layers
        return LayerDecision(**{"drop": (1, 2), "segments": ((0, n),)} | self._decision)


def _planted(monkeypatch: pytest.MonkeyPatch, **decision: Any) -> None:
    made = _Planted(**decision)
    monkeypatch.setattr(plan_module, "planner", lambda name: made)
    monkeypatch.setattr(plan_module, "read_options", lambda name, given: NoOptions())


@pytest.mark.parametrize(
    ("decision", "fault"),
    [
        ({"drop": (1, 2, 3)}, "it removes 3 layers, and 2 were to go"),
        ({"drop": (1, 12)}, r"it removes layers \[1, 12\] of 0\.\.11"),
        ({"drop": (1, 1)}, r"it removes layers \[1, 1\] of 0\.\.11"),
        ({"drop": (0, 1)}, "it removes layer 0, which must stay"),
        ({"drop": (1, 2.5)}, "the decision holds something that is no number"),
        ({"scores": {"x": ("a",)}}, "the decision holds something that is no number"),
    ],
)
def test_a_decision_that_is_not_what_was_asked_for_is_laid_at_the_planner_s_door(
    decision: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _planted(monkeypatch, **decision)
    stats = planted_stats(prunable=(False, *[True] * 11))
    with pytest.raises(PlanError, match=rf"{fault}.*; the planner 'planted' is at fault, report it to its author"):
        plan_of(stats, Budget(drop=2), method="planted")


def test_a_decision_in_numpy_s_numbers_is_a_plan_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.argsort(np.arange(12.0))
    _planted(monkeypatch, drop=tuple(order[:2]), scores={"x": np.arange(12.0)}, criterion="x")
    plan = plan_of(budget=Budget(drop=2), method="planted")
    assert json.loads(json.dumps(plan.to_json()))["drop"] == [0, 1]
    assert plan.digest() == PruningPlan.from_json(json.loads(json.dumps(plan.to_json()))).digest()


def test_changed_weights_may_be_numpy_arrays_and_say_what_they_were_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"loss_before": 3.0, "loss_after": 2.5}
    _planted(monkeypatch, weights={"a.weight": np.ones((2, 3), dtype=np.float32)}, weights_record=record)
    plan = plan_of(budget=Budget(drop=2), method="planted")
    assert plan.overlay is not None
    assert plan.overlay["made_by"] == [{"planner": "planted", **record}]
    _planted(monkeypatch, weights={"a.weight": "no array"})
    with pytest.raises(PlanError, match=r"changed weights are tensors or arrays; .*; the planner is at fault"):
        plan_of(budget=Budget(drop=2), method="planted")


def test_an_option_may_have_the_name_of_an_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch)
    plan = plan_of(method="named", budget=Budget(drop=1), options={"model": "big", "budget": 3, "limit": "none"})
    assert {name: plan.options[name] for name in ("model", "budget", "limit")} == {
        "model": "big",
        "budget": 3,
        "limit": None,
    }
    assert plan.model == MODEL


@pytest.mark.parametrize(
    ("option", "value"), [("budget", True), ("budget", "true"), ("budget", 1.5), ("ratio", "inf"), ("ratio", True)]
)
def test_a_value_that_only_looks_like_a_number_is_refused(
    option: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=rf"{option}={value!r} does not fit planner 'named'; .* is read; correct"):
        plan_of(method="named", budget=Budget(drop=1), options={option: value})


def test_a_text_option_takes_what_looks_like_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch)
    for value in ("2024", 2024):
        plan = plan_of(method="named", budget=Budget(drop=1), options={"model": value})
        assert plan.options["model"] == "2024"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("plain", "Options of Plain is no dataclass"),
        ("needy", "option must of Needy has no default"),
        ("taken", "option statistics of Taken has a name that plans use for something else"),
    ],
)
def test_options_that_are_not_what_the_seam_says_are_refused_when_the_planner_is_loaded(
    name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=rf"the planner '{name}' .* cannot be loaded; {fault}; reinstall or remove"):
        plan_of(method=name)


def test_planning_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, sglp_deploy.plan, sglp_deploy.planners.sglp\n"
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("changes", [{"elapsed_s": {"search": {}}}, {"seed": "zero"}, {"quota": 3}])
def test_what_could_not_be_read_back_is_not_written(changes: dict[str, Any], tmp_path: Path) -> None:
    plan = replace(PruningPlan.from_json(json.loads(LITERAL)), **changes)
    with pytest.raises(PlanError, match=r"cannot be written so that it can be read back; .*; report it to its author"):
        plan.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []

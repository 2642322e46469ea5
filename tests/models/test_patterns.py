"""Whole periods, and exporters that know only the period."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from sglp_deploy import CalibrationSet, Compressor
from sglp_deploy.errors import ExportError, PlanError
from sglp_deploy.models.patterns import check_layer_types, keeps_pattern, pattern_groups, pattern_period
from sglp_deploy.planners.budget import select_groups

LOCAL, GLOBAL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("kinds", "period"),
    [
        ("aaaa", 1),
        ("abababa", 2),
        ("aabaab", 3),
        ("aabaaba", 3),
        ("aab", None),
        ("aabb", None),
        ("ab", None),
        ("a", None),
    ],
)
def test_the_period_is_the_smallest_that_occurs_twice(kinds: str, period: int | None) -> None:
    assert pattern_period(kinds) == period


@pytest.mark.parametrize("kinds", ["abababa", "aabaabaa", "aaaaaa", "abcabc"])
def test_removing_any_groups_keeps_the_pattern(kinds: str) -> None:
    """Against every choice of groups, and the formula written out by hand: place i has the kind i had before."""
    groups = pattern_groups([kinds], [True] * len(kinds))
    for count in range(len(groups) + 1):
        for chosen in itertools.combinations(groups, count):
            gone = {layer for group in chosen for layer in group}
            left = "".join(kind for index, kind in enumerate(kinds) if index not in gone)
            assert left == kinds[: len(left)]
            assert keeps_pattern(kinds, [index for index in range(len(kinds)) if index not in gone])


def test_a_broken_pattern_is_seen() -> None:
    assert not keeps_pattern("aabaab", (0, 2, 3))


def test_an_incomplete_period_and_one_with_a_layer_that_must_stay_are_no_groups() -> None:
    assert pattern_groups(["ababa"], [True] * 5) == ((0, 1), (2, 3))
    assert pattern_groups(["ababa"], [False, True, True, True, True]) == ((2, 3),)


def test_stages_are_grouped_each_by_itself() -> None:
    assert pattern_groups(["ab", "abab"], [True] * 6) == ((2, 3), (4, 5))


def test_a_pattern_that_does_not_repeat_has_no_groups() -> None:
    with pytest.raises(PlanError, match=r"no whole period of the layer pattern can be removed; .*preserve_pattern"):
        pattern_groups(["aabb"], [True] * 4)


def test_groups_go_by_their_summed_score_and_every_segment_keeps_a_layer() -> None:
    groups = ((0, 1), (2, 3), (4, 5), (6, 7))
    scores = [1, 9, 2, 2, 0, 3, 5, 5]
    assert select_groups(scores, [(0, 8)], groups, 4) == (4, 5, 2, 3)
    # The group of least score is a whole segment, so the next one goes.
    assert select_groups(scores, [(0, 4), (4, 6), (6, 8)], groups, 2) == (2, 3)


def test_a_number_that_is_no_whole_period_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        PlanError, match=r"drop=3 is no number of whole periods .* repeats every 2; .*drop=2, 4, or fewer"
    ):
        select_groups([0.0] * 6, [(0, 6)], ((0, 1), (2, 3), (4, 5)), 3)


def _gemma() -> Compressor:
    return Compressor(tiny.loaded("gemma3"), calibration=CalibrationSet.builtin(max_tokens=512, sequence_length=64))


def test_a_plan_that_preserves_the_pattern_removes_whole_periods_only() -> None:
    compressor = _gemma()
    types = compressor.model.config.layer_types  # type: ignore[union-attr]  # local, local, global, twice, and a local one
    plan = compressor.plan(drop=3, preserve_pattern=True, n_segments=1)
    assert plan.drop in ((0, 1, 2), (3, 4, 5))
    assert [types[layer] for layer in plan.keep] == [LOCAL, LOCAL, GLOBAL, LOCAL]
    assert plan.options["groups"] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(PlanError, match="drop=2 is no number of whole periods"):
        compressor.plan(drop=2, preserve_pattern=True, n_segments=1)


def test_a_pattern_cannot_be_preserved_under_a_parameter_budget() -> None:
    compressor = _gemma()
    with pytest.raises(PlanError, match="max_parameters cannot be combined with preserve_pattern"):
        compressor.plan(max_parameters=200_000, preserve_pattern=True, n_segments=1)


class _Exporter:
    name = "index"

    def __init__(self, formula: Callable[[int], str] | None) -> None:
        self._formula = formula

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        assert model_type == "gpt_oss"
        return self._formula


def _alternating(index: int) -> str:
    return GLOBAL if index % 2 else LOCAL


def _config(*types: str) -> Any:
    return SimpleNamespace(model_type="gpt_oss", layer_types=list(types))


def test_an_exporter_that_counts_is_refused_for_a_pattern_its_formula_does_not_give() -> None:
    broken = _config(LOCAL, GLOBAL, GLOBAL)
    with pytest.raises(ExportError, match=r"'index' derives .* layer 2 for 'sliding_attention', where it is 'full_att"):
        check_layer_types(_Exporter(_alternating), broken, (), (0, 1, 3))
    check_layer_types(_Exporter(_alternating), _config(LOCAL, GLOBAL, LOCAL), (), (0, 1, 2))
    check_layer_types(_Exporter(None), broken, (), (0, 1, 3))  # it reads layer_types
    # One kind is left, and the runtime would still take every second layer for the other one.
    with pytest.raises(ExportError, match=r"layer 1 for 'full_attention', where it is 'sliding_att"):
        check_layer_types(_Exporter(_alternating), _config(LOCAL, LOCAL), (), (0, 2))
    check_layer_types(_Exporter(_alternating), _config(), (), (0, 2))  # no types, no pattern


def test_an_exporter_that_declares_nothing_is_trusted_with_an_unbroken_pattern_only() -> None:
    silent = SimpleNamespace(name="silent")
    before = [LOCAL, GLOBAL, LOCAL, GLOBAL]
    changes = ({"entry": "layer_types", "before": before, "after": before[:2], "rule": ""},)
    check_layer_types(silent, _config(LOCAL, GLOBAL), changes, (0, 1))
    check_layer_types(silent, _config(LOCAL, GLOBAL), changes, (2, 3))
    with pytest.raises(ExportError, match=r"'silent' does not declare .* breaks the pattern; plan with --preserve"):
        check_layer_types(silent, _config(LOCAL, LOCAL, GLOBAL), changes, (0, 2, 3))
    with pytest.raises(ExportError, match=r"'silent' does not declare"):
        check_layer_types(silent, _config(LOCAL, LOCAL), changes, (0, 2))
    uniform = ({"entry": "layer_types", "before": [GLOBAL] * 4, "after": [GLOBAL] * 2, "rule": ""},)
    check_layer_types(silent, _config(GLOBAL, GLOBAL), uniform, (0, 3))


def test_ours_declare_what_their_runtimes_do() -> None:
    from sglp_deploy import registry

    assert registry.exporter("onnx").layer_type_formula("gpt_oss") is None  # type: ignore[attr-defined]
    assert registry.exporter("torch").layer_type_formula("gpt_oss") is None  # type: ignore[attr-defined]
    vllm = registry.exporter("vllm").layer_type_formula  # type: ignore[attr-defined]
    assert vllm("gemma3_text") is None
    assert [vllm("gpt_oss")(index) for index in range(3)] == [LOCAL, GLOBAL, LOCAL]


def test_the_vllm_export_of_an_irregular_gpt_oss_is_refused_and_a_regular_one_is_written(tmp_path: Any) -> None:
    import zoo
    import zoo_decoders
    from sglp_deploy.models import LoadedModel, source_of

    specimen: zoo.Specimen = next(item for item in zoo_decoders.SPECIMENS if item.name == "gpt_oss")
    module = specimen.build()
    compressor = Compressor(LoadedModel(module, None, source_of(module, "gpt-oss")))
    kinds = module.config.layer_types  # type: ignore[union-attr]
    broken = compressor.plan_by_hand([1])
    assert [kinds[layer] for layer in broken.keep][:2] == [LOCAL, LOCAL]
    with pytest.raises(ExportError, match=r"'vllm' derives the type of a gpt_oss layer from its number"):
        compressor.export(broken, "vllm", tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    artifact = compressor.export(compressor.plan_by_hand([2, 3]), "vllm", tmp_path / "regular")
    assert artifact.n_layers == len(kinds) - 2

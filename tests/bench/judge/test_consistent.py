"""A comparison from a file is held against the raw samples beside it; what they do not give is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from bench_results import planted_result
from sglp_bench.judge.compare import Comparison, compare_results
from sglp_bench.judge.consistent import refuse_contradiction
from sglp_bench.result import BenchmarkResult
from sglp_deploy.errors import ArtifactError, BenchmarkError

Json = dict[str, Any]
LATENCY = "decode_latency_s_per_token"


@pytest.fixture(scope="module")
def result() -> BenchmarkResult:
    return planted_result({"candidate": 1.25})


@pytest.fixture
def value(result: BenchmarkResult) -> Json:
    made = compare_results(result).with_ceilings({LATENCY: 1.4})
    return copy.deepcopy(json.loads(json.dumps(made.to_json())))


def test_what_was_made_of_the_samples_is_accepted(result: BenchmarkResult, value: Json) -> None:
    refuse_contradiction(Comparison.from_json(value), result)


def _rounded(value: Json) -> None:
    """As by a table of Student's t with four digits, and a verdict that follows from the rounded interval."""
    for metric in value["metrics"].values():
        for each in (metric, metric["control"] or {}):
            if each.get("interval"):
                each["interval"] = [round(end, 4) for end in each["interval"]]


def test_intervals_of_before_another_table_are_accepted(result: BenchmarkResult, value: Json) -> None:
    _rounded(value)
    refuse_contradiction(Comparison.from_json(value), result)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value["metrics"][LATENCY].update(ratio=9.0), "says ratio 9.0 of decode_latency"),
        (lambda value: value["metrics"][LATENCY].update(interval=[1.1, 9.0]), "says interval"),
        (lambda value: value["metrics"][LATENCY].update(candidate=1e-9), "says candidate"),
        (lambda value: value["metrics"][LATENCY].update(verdict="slower"), "calls decode_latency_s_per_token slower"),
        (lambda value: value["metrics"][LATENCY].update(fraction_of_ceiling=0.5), "share of the ceiling of decode"),
        (lambda value: value["metrics"][LATENCY]["control"].update(noise_floor=0.9), "says control"),
        (lambda value: value["metrics"].update(other=value["metrics"][LATENCY]), "has other, and its raw samples"),
        (lambda value: value.update(paired=False), "is not one of the raw result beside it"),
        (lambda value: value.update(baseline="another"), "is not one of the raw result beside it"),
        (lambda value: value["environment"].update(cpu_model="mine"), "environment is not that of its raw result"),
        (lambda value: value["workload"].update(batch_size=2), "workload is not that of its raw result"),
        (lambda value: value.update(n_pairs=99), "n pairs is not that of its raw result"),
        (lambda value: value["arms"]["candidate"]["artifact"].update(weight_bytes=1), "arms is not that of its raw"),
    ],
)
def test_a_figure_that_the_samples_do_not_give_is_refused(
    result: BenchmarkResult, value: Json, change: Callable[[Json], object], words: str
) -> None:
    change(value)
    with pytest.raises(ArtifactError, match=words):
        refuse_contradiction(Comparison.from_json(value), result)


def _without(name: str) -> Callable[[Json], object]:
    return lambda arm: arm["artifact"].pop(name)


@pytest.mark.parametrize(
    "damage",
    [
        _without("weight_bytes"),
        _without("precision"),
        lambda arm: arm["artifact"].update(format=None),
        lambda arm: arm["blocks"][0].update(conditions={"start": 3}),
        lambda arm: arm["blocks"][0].update(conditions={"start": {"load_average_1min": "x"}}),
    ],
)
def test_a_raw_result_that_cannot_be_compared_is_refused_when_it_is_read(
    result: BenchmarkResult, damage: Callable[[Json], object]
) -> None:
    value = json.loads(json.dumps(result.to_json()))
    damage(value["arms"]["candidate"])
    with pytest.raises(ArtifactError, match=r"the result lacks or mistypes a field; arms\.candidate\."):
        BenchmarkResult.from_json(value)


def test_arms_without_a_common_half_of_a_cycle_are_refused(result: BenchmarkResult) -> None:
    value = json.loads(json.dumps(result.to_json()))
    for block in value["arms"]["candidate"]["blocks"]:
        block["cycle"] += 100
    with pytest.raises(BenchmarkError, match="no block of 'baseline' and 'candidate' was measured in the same half"):
        compare_results(BenchmarkResult.from_json(value))

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench_results import WORK, planted_result
from sglp_bench.result import BenchmarkResult
from sglp_deploy.errors import ArtifactError, BenchmarkError


def with_samples(**changes: Any) -> BenchmarkResult:
    result = planted_result()
    arm = result.arm("candidate")
    block = arm.blocks[2]
    broken = replace(block, samples=replace(block.samples, **changes))
    blocks = (*arm.blocks[:2], broken, *arm.blocks[3:])
    return replace(result, arms={**result.arms, "candidate": replace(arm, blocks=blocks)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, "0.3"])
def test_a_time_that_cannot_be_true_is_refused(value: object) -> None:
    with pytest.raises(BenchmarkError, match=r"arm 'candidate', block \d+: prefill_s holds .* the clock or the runner"):
        with_samples(prefill_s=(0.3, 0.3, value, 0.3, 0.3))
    with pytest.raises(BenchmarkError, match="decode_s holds"):
        with_samples(decode_s=((*(0.1,) * 7, value), (0.1,) * 8, (0.1,) * 8))


def test_missing_samples_are_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"4 prefills and decodes of \[8, 8, 8\] steps were recorded, .* 5 and"):
        with_samples(prefill_s=(0.3,) * 4)
    with pytest.raises(BenchmarkError, match=r"decodes of \[8, 7, 8\] steps"):
        with_samples(decode_s=((0.1,) * 8, (0.1,) * 7, (0.1,) * 8))


def test_an_arm_without_blocks_and_an_unknown_label_are_refused() -> None:
    result = planted_result()
    with pytest.raises(BenchmarkError, match="arm 'candidate' has no blocks"):
        replace(result, arms={**result.arms, "candidate": replace(result.arm("candidate"), blocks=())})
    with pytest.raises(
        BenchmarkError, match="no arm is labelled 'other'; this result has baseline, candidate, control"
    ):
        result.arm("other")
    with pytest.raises(BenchmarkError, match="no arm is labelled 'gone'"):
        replace(result, control="gone")


def test_candidates_are_the_arms_that_are_neither_baseline_nor_control() -> None:
    assert planted_result({"a": 1.1, "b": 1.2}).candidates == ["a", "b"]


def test_the_file_has_this_shape(tmp_path: Path) -> None:
    planted_result().save(tmp_path / "result.json")
    value = json.loads((tmp_path / "result.json").read_text())
    assert value["schema"] == "result/2"
    assert set(value) == {
        "schema", "workload", "workload_digest", "device", "power", "baseline", "control", "vocab_size",
        "environment", "arms",
    }  # fmt: skip
    assert (value["workload"]["kind"], value["device"], value["power"]) == ("generate", "here", None)
    block = value["arms"]["candidate"]["blocks"][0]
    assert set(block) == {"index", "cycle", "half", "load_s", "warm_up", "samples", "conditions"}
    assert set(block["samples"]) == {"prefill_s", "decode_s"}
    assert block["warm_up"] == {"prefill_s": [0.4], "decode_s": [[0.1]], "settled": True}
    assert value["arms"]["baseline"]["memory"]["host_peak"]["probe"] == "VmHWM"


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = planted_result()
    result.save(tmp_path / "result.json")
    assert BenchmarkResult.load(tmp_path / "result.json") == result


def test_a_file_of_the_first_schema_is_still_read(tmp_path: Path) -> None:
    value = planted_result().to_json()
    value["schema"] = "result/1"
    del value["device"], value["power"], value["workload"]["kind"]
    (tmp_path / "result.json").write_text(json.dumps(value))
    assert BenchmarkResult.load(tmp_path / "result.json") == planted_result()
    value["schema"] = "result/2"
    with pytest.raises(ArtifactError, match=r"lacks or mistypes a field; KeyError\('device'\)"):
        BenchmarkResult.from_json(value)


def test_the_place_survives_the_file(tmp_path: Path) -> None:
    result = replace(planted_result(), device="ssh://board", power={"probe": "none"})
    result.save(tmp_path / "result.json")
    assert BenchmarkResult.load(tmp_path / "result.json") == result


def test_an_incomplete_file_and_another_schema_are_refused(tmp_path: Path) -> None:
    value = planted_result().to_json()
    del value["arms"]["candidate"]["blocks"][0]["samples"]
    with pytest.raises(ArtifactError, match=r"the result lacks .*; arms\.candidate\.blocks\.0\.samples is missing"):
        BenchmarkResult.from_json(value)
    (tmp_path / "result.json").write_text('{"schema": "result/9"}')
    with pytest.raises(ArtifactError, match=r"schema 'result/9'; this version reads 'result/1' and 'result/2'"):
        BenchmarkResult.load(tmp_path / "result.json")


def test_the_planted_results_use_the_workload_they_name() -> None:
    assert planted_result().workload == WORK
    assert len(planted_result().arm("baseline").blocks) == 2 * WORK.cycles

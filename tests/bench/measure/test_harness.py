import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench_fakes import OPENER, VOCABULARY, fake_artifact
from bench_simulated import TINY, simulated_worker
from sglp_bench.devices import here
from sglp_bench.measure.harness import benchmark_pair, run_arms, schedule, tqdm_progress, vocabulary_size
from sglp_bench.result import BenchmarkResult
from sglp_bench.workloads.generate import Workload
from sglp_deploy.artifact import ExportArtifact, TensorSpec, write_manifest
from sglp_deploy.errors import ArtifactError, BenchmarkError, ConfigError, IncomparableResultsError

OPENERS = {"baseline": OPENER, "candidate": OPENER}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(here, "run_worker", simulated_worker(names))
    return names


def two_artifacts(tmp_path: Path, **details: Any) -> tuple[ExportArtifact, ExportArtifact]:
    return (
        fake_artifact(tmp_path / "base", weight_bytes=1200, prefill_s=0.36, decode_s=0.06, **details),
        fake_artifact(tmp_path / "pruned", weight_bytes=1000, prefill_s=0.30, decode_s=0.05, **details),
    )


def test_each_cycle_is_mirrored_and_the_next_starts_one_arm_later() -> None:
    letters = "".join(slot.label for slot in schedule("bck", 3))
    assert letters == "bckkcb" + "ckbbkc" + "kbccbk"
    assert "".join(slot.label for slot in schedule("bc", 2)) == "bccb" + "cbbc"


def test_every_arm_has_the_same_mean_place_in_each_cycle_and_two_blocks_in_it() -> None:
    slots = schedule("bck", 4)
    assert [slot.index for slot in slots] == list(range(24))
    for cycle in range(4):
        mine = [slot for slot in slots if slot.cycle == cycle]
        means = {label: np.mean([slot.index for slot in mine if slot.label == label]) for label in "bck"}
        assert len(set(means.values())) == 1
        assert Counter((slot.label, slot.half) for slot in mine) == Counter(
            {(label, half): 1 for label in "bck" for half in (0, 1)}
        )


def test_a_planted_speedup_comes_out_of_the_whole_protocol(tmp_path: Path, started: list[str]) -> None:
    work = Workload.from_json({**TINY.to_json(), "cycles": 3})
    comparison = benchmark_pair(*two_artifacts(tmp_path), work, out_dir=tmp_path / "out")
    metric = comparison.metrics["decode_latency_s_per_token"]
    assert metric.interval is not None
    assert metric.interval[0] < 1.2 < metric.interval[1]
    assert metric.verdict == "faster"
    assert metric.control is not None
    assert metric.control.interval is not None
    assert metric.control.interval[0] < 1 < metric.control.interval[1]
    assert comparison.metrics["peak_host_bytes"].ratio == 1.2
    assert comparison.n_pairs == 6
    assert Counter(started) == Counter(
        {
            f"{mode}:{label}": n
            for mode, n in (("memory", 1), ("time", 6))
            for label in ("baseline", "candidate", "control")
        }
    )


def test_result_and_comparison_are_written_and_the_blocks_are_cleared(tmp_path: Path, started: list[str]) -> None:
    comparison = benchmark_pair(*two_artifacts(tmp_path), TINY, out_dir=tmp_path / "out", labels=("dense", "pruned"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.json", "result.json"]
    result = BenchmarkResult.load(tmp_path / "out" / "result.json")
    assert comparison.result == result
    assert list(result.arms) == ["dense", "pruned", "control"]
    assert result.control == "control"
    assert result.arm("dense").artifact["weight_bytes"] == 1200
    assert [block.index for block in result.arm("dense").blocks] == [0, 5]


def test_without_an_output_folder_nothing_is_left(tmp_path: Path, started: list[str]) -> None:
    arms = two_artifacts(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert benchmark_pair(*arms, TINY, control=False).control is None
    assert sorted(tmp_path.rglob("*")) == before


def test_different_precisions_are_refused_before_anything_is_measured(tmp_path: Path, started: list[str]) -> None:
    base, half = fake_artifact(tmp_path / "a"), fake_artifact(tmp_path / "b", precision="fp16")
    with pytest.raises(IncomparableResultsError, match="differ in precision"):
        benchmark_pair(base, half, TINY)
    assert started == []


def test_an_interrupted_run_continues_with_whole_halves_only(tmp_path: Path, started: list[str]) -> None:
    arms = two_artifacts(tmp_path)

    def stop(done: int, total: int, text: str) -> None:
        if done == 7:  # after three memory passes, the first half (3 blocks) and one block of the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark_pair(*arms, TINY, out_dir=tmp_path / "out", progress=stop)
    assert len(started) == 7
    assert not (tmp_path / "out" / "result.json").exists()
    started.clear()
    benchmark_pair(*arms, TINY, out_dir=tmp_path / "out")
    # The lone block of the second half is measured again beside its partners: a pair is one place in time.
    assert started == ["time:control", "time:candidate", "time:baseline"]


@pytest.mark.parametrize("change", ["workload", "artifact", "environment", "version"])
def test_saved_blocks_of_another_benchmark_are_not_reused(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    base, pruned = two_artifacts(tmp_path)

    def stop(done: int, total: int, text: str) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark_pair(base, pruned, TINY, out_dir=tmp_path / "out", control=False, progress=stop)
    started.clear()
    work = TINY
    if change == "workload":
        work = Workload.from_json({**TINY.to_json(), "seed": 5})
    elif change == "artifact":
        pruned = fake_artifact(tmp_path / "other", decode_s=0.04)
    elif change == "environment":
        monkeypatch.setattr(here, "collect_environment", lambda **_: {"python": "another"})
    else:
        for file in (tmp_path / "out" / "blocks").iterdir():
            file.write_text('{"schema": "saved-block/0"}')
    benchmark_pair(base, pruned, work, out_dir=tmp_path / "out", control=False)
    baseline_kept = change == "artifact"  # its memory pass stands; its halves lack their partner
    assert len(started) == (5 if baseline_kept else 6)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: '{"schema": "saved-block/1"}',
        lambda text: '{"schema": "saved-block/1", "key": 3, "answer": 4}',
        lambda text: text.replace('"load_s"', '"lode_s"').replace('"memory"', '"memories"'),
    ],
)
def test_saved_blocks_that_cannot_be_read_are_set_aside_and_measured_again(
    tmp_path: Path, started: list[str], damage: Callable[[str], str]
) -> None:
    said: list[str] = []

    def stop(done: int, total: int, text: str) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    arms = two_artifacts(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        benchmark_pair(*arms, TINY, out_dir=tmp_path / "out", control=False, progress=stop)
    started.clear()
    blocks = tmp_path / "out" / "blocks"
    for file in list(blocks.iterdir()):
        file.write_text(damage(file.read_text()))
    benchmark_pair(
        *arms, TINY, out_dir=tmp_path / "out", control=False, progress=lambda done, total, text: said.append(text)
    )
    assert len(started) == 6
    assert "0000-baseline.json cannot be read; set aside as 0000-baseline.unreadable and measured again" in said
    assert (tmp_path / "out" / "result.json").is_file()


def test_an_answer_without_its_fields_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_an_answer(spec: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        return {"memory": {}} if spec["mode"] == "memory" else {"samples": {}}

    monkeypatch.setattr(here, "run_worker", half_an_answer)
    with pytest.raises(
        BenchmarkError, match=r"worker of arm 'baseline' gave an answer without a usable field; KeyError"
    ):
        benchmark_pair(*two_artifacts(tmp_path), TINY, out_dir=tmp_path / "out")
    assert not list((tmp_path / "out" / "blocks").glob("0*.json"))


def test_a_nan_sample_is_refused_and_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = simulated_worker([])

    def lying(spec: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = honest(spec, **options)
        if spec["mode"] == "time":
            answer["samples"]["decode_s"][1][0] = float("nan")
        return answer

    monkeypatch.setattr(here, "run_worker", lying)
    with pytest.raises(BenchmarkError, match="decode_s holds nan; a time is finite and above zero"):
        benchmark_pair(*two_artifacts(tmp_path), TINY, out_dir=tmp_path / "out")
    assert not list((tmp_path / "out" / "blocks").glob("0*.json"))


def test_any_number_of_arms_run_interleaved_and_the_baseline_can_be_named(tmp_path: Path, started: list[str]) -> None:
    arms = {
        name: fake_artifact(tmp_path / name, decode_s=speed) for name, speed in (("x", 0.1), ("y", 0.2), ("z", 0.4))
    }
    result = run_arms(arms, TINY, baseline="y")
    assert (result.baseline, result.control, result.candidates) == ("y", "control", ["x", "z"])
    assert result.arm("control").artifact["digest"] == result.arm("y").artifact["digest"]


def test_unusable_labels_are_all_listed(tmp_path: Path) -> None:
    artifact = fake_artifact(tmp_path / "a")
    with pytest.raises(ConfigError) as caught:
        run_arms({"a/b": artifact, "control": artifact}, TINY, baseline="c", openers={"d": OPENER})
    assert len(caught.value.faults) == 4
    assert "baseline 'c' is not an arm" in str(caught.value)
    assert "an opener is given for 'd'" in str(caught.value)
    with pytest.raises(ConfigError, match="there are no arms"):
        run_arms({}, TINY)


def test_an_artifact_that_changed_since_it_was_read_is_refused(tmp_path: Path) -> None:
    base, pruned = two_artifacts(tmp_path)
    manifest = base.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"n_layers": 4', '"n_layers": 5'))
    with pytest.raises(ArtifactError, match="is no longer the artifact of arm 'baseline'"):
        benchmark_pair(base, pruned, TINY)


def test_the_vocabulary_comes_from_details_logits_or_config(tmp_path: Path) -> None:
    assert vocabulary_size(fake_artifact(tmp_path / "details")) == VOCABULARY
    facts: dict[str, Any] = {"format": "x", "inputs": (), "precision": "fp32", "model": {}}
    facts |= {"weight_bytes": 1, "n_layers": 1, "plan_digest": "p"}
    for name in ("graph", "config", "nested", "nothing"):
        (tmp_path / name).mkdir()
    logits = TensorSpec("logits", "float32", ("batch", "seq", 21))
    assert vocabulary_size(write_manifest(tmp_path / "graph", outputs=(logits,), **facts)) == 21
    (tmp_path / "config" / "config.json").write_text('{"vocab_size": 31}')
    assert vocabulary_size(write_manifest(tmp_path / "config", outputs=(), **facts)) == 31
    (tmp_path / "nested" / "config.json").write_text('{"text_config": {"vocab_size": 41}}')
    assert vocabulary_size(write_manifest(tmp_path / "nested", outputs=(), **facts)) == 41
    unknown = write_manifest(tmp_path / "nothing", outputs=(), **facts)
    assert vocabulary_size(unknown) is None
    with pytest.raises(ConfigError, match=r"the vocabulary size of a is unknown; .*; pass vocab_size"):
        run_arms({"a": unknown}, TINY)


def test_arms_with_different_vocabularies_are_refused(tmp_path: Path) -> None:
    arms = {"a": fake_artifact(tmp_path / "a"), "b": fake_artifact(tmp_path / "b", vocab_size=12)}
    with pytest.raises(ConfigError, match="vocabularies of different size"):
        run_arms(arms, TINY)


def test_the_whole_protocol_runs_in_real_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "starts.jsonl"
    base, pruned = two_artifacts(tmp_path, log=str(log))
    comparison = benchmark_pair(
        base, pruned, TINY, out_dir=tmp_path / "out", openers=OPENERS, control=False, progress=tqdm_progress()
    )
    assert len(log.read_text().splitlines()) == 2 + 4
    assert comparison.n_pairs == 2
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["arms"]["baseline"]["memory"]["host_peak"]["bytes"] > 1 << 20
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "6/6" in shown.err


def test_public_names_are_loaded_on_first_use() -> None:
    import sglp_bench

    assert sglp_bench.benchmark_pair is benchmark_pair
    assert sglp_bench.Workload is Workload
    assert set(sglp_bench.__all__) == set(dir(sglp_bench))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sglp_bench.nothing

"""The verdict over stated limits: each on the worse end of its interval, and nothing that was not measured passes."""

from __future__ import annotations

from typing import Any

import pytest

import report_fixtures
from sglp_bench.judge.accept import check_limits, missed, verdict
from sglp_bench.report.run_report import RunReport

Json = dict[str, Any]
QUALITY = {"ratio": 1.4, "ratio_interval": [1.3, 1.5]}
PIQA = {
    "metric": "acc_norm",
    "metrics": {
        "acc_norm": {
            "higher_is_better": True,
            "difference": -0.02,
            "difference_interval": [-0.05, 0.01],
            "ratio": 0.97,
            "ratio_interval": [0.93, 1.02],
        }
    },
}


def row(metric: str, ratio: float, low: float, high: float, **more: Any) -> Json:
    return {"metric": metric, "ratio": ratio, "interval": [low, high], "resolved": True, **more}


def item(name: str = "onnx", *, kind: str = "depth", **more: Any) -> Json:
    def arms(before: int, after: int) -> list[Json]:
        return [{"bytes": before}, {"bytes": after}]

    return {
        "name": name,
        "kind": kind,
        "unverified": [],
        "rows": [
            row("prefill_latency_s", 1.3, 1.25, 1.35),
            row("decode_latency_s_per_token", 1.15, 1.08, 1.22),
        ],
        "memory": [
            {"rung": "artifact_bytes", "arms": arms(1000, 850)},
            {"rung": "host_peak", "arms": arms(2000, 1800)},
        ],
        **more,
    }


def report(**more: Any) -> Json:
    parity = [{"name": "onnx", "passed": True}]
    quality = {**QUALITY, "tasks": {"piqa": PIQA}}
    return {"quality": quality, "artifacts": [], "parity": parity, "measurements": [item()], **more}


def judged(limits: Json, **more: Any) -> list[tuple[str, bool]]:
    return [(found["name"], found["met"]) for found in verdict(limits, report(**more))["findings"]]


# The figure of each limit is known from the fixtures: the bound just met, and the bound just missed.
BOUNDS = [
    ("perplexity", "1.5x", "1.49x"),  # the upper end, not the ratio of 1.4
    ("prefill", "1.25x", "1.26x"),  # the lower end, not 1.3
    ("decode", "1.08x", "1.09x"),
    ("memory", "0.9x", "0.89x"),  # 1800 of 2000
    ("size", "0.85x", "0.84x"),  # 850 of 1000
]


@pytest.mark.parametrize(("name", "good", "bad"), BOUNDS)
def test_a_limit_is_met_up_to_the_worse_end_of_the_interval(name: str, good: str, bad: str) -> None:
    label = name if name == "perplexity" else f"{name} (onnx)"
    assert judged({name: good}) == [(label, True)]
    assert judged({name: bad}) == [(label, False)]


@pytest.mark.parametrize(("good", "bad"), [("-0.05", "-0.04"), ("0.93x", "0.94x")])
def test_a_task_is_limited_by_its_ratio_or_by_its_difference(good: str, bad: str) -> None:
    assert judged({"tasks": {"piqa": good}}) == [("piqa", True)]
    assert judged({"tasks": {"piqa": bad}}) == [("piqa", False)]


def test_a_task_of_which_less_is_better_has_its_limit_above() -> None:
    metric = {**PIQA["metrics"]["acc_norm"], "higher_is_better": False}
    quality = {"tasks": {"words": {"metric": "nats", "metrics": {"nats": metric}}}}
    assert judged({"tasks": {"words": "1.02x"}}, quality=quality) == [("words", True)]
    assert judged({"tasks": {"words": "1.01x"}}, quality=quality) == [("words", False)]


def test_parity_means_every_certificate_and_at_least_one() -> None:
    assert judged({"parity": "passed"}) == [("parity", True)]
    assert judged({"parity": "passed"}, parity=[]) == [("parity", False)]
    failed = [{"name": "onnx", "passed": True}, {"name": "vllm", "passed": False}]
    found = verdict({"parity": "passed"}, report(parity=failed))
    assert missed(found) == ["parity: passed is asked; failed: vllm"]


def test_each_measured_artifact_is_judged_and_a_comparison_of_runtimes_is_not() -> None:
    slow = item("gguf", rows=[row("decode_latency_s_per_token", 1.2, 0.9, 1.6)])
    runtime = item("onnx-against-torch", kind="runtime", rows=[row("decode_latency_s_per_token", 0.5, 0.4, 0.6)])
    found = verdict({"decode": "1.05x"}, report(measurements=[item(), slow, runtime]))
    assert [(each["name"], each["met"]) for each in found["findings"]] == [
        ("decode (onnx)", True),
        ("decode (gguf)", False),
    ]
    assert found["accepted"] is False
    assert missed(found) == [
        "decode (gguf): at least 1.05x is asked; it is 1.2x, and the lower end of its 95 % interval is 0.9x"
    ]


def test_an_artifact_that_was_to_be_compared_and_was_not_misses_its_limits() -> None:
    """A format that nothing here can time has no baseline, so no limit speaks of it."""
    names = ("onnx-baseline", "onnx", "gguf-baseline", "gguf", "openvino-baseline", "openvino", "vllm")
    artifacts = [{"name": name} for name in names]
    parity = [{"name": "onnx", "passed": True}, {"name": "gguf-baseline", "passed": False}]
    found = verdict({"decode": "1.05x", "size": "0.9x"}, report(artifacts=artifacts, parity=parity))
    assert [each["name"] for each in found["findings"] if each["met"]] == ["decode (onnx)", "size (onnx)"]
    assert missed(found) == [
        "decode (gguf): at least 1.05x is asked; not accepted: parity of gguf-baseline failed, so it was not measured",
        "decode (openvino): at least 1.05x is asked; not accepted: it was not measured",
        "size (gguf): at most 0.9x is asked; not accepted: parity of gguf-baseline failed, so it was not measured",
        "size (openvino): at most 0.9x is asked; not accepted: it was not measured",
    ]


NOTHING: Json = {"quality": None, "artifacts": [], "parity": [], "measurements": []}


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"perplexity": "1.5x"}, "perplexity: at most 1.5x is asked; not accepted: not evaluated"),
        ({"tasks": {"piqa": "-0.1"}}, "piqa: at least -0.1 is asked; not accepted: this task was not asked"),
        ({"parity": "passed"}, "parity: passed is asked; no artifact was checked"),
        *(
            (
                {name: "1.1x"},
                f"{name}: at {most} 1.1x is asked; not accepted: no artifact was compared with its unpruned baseline",
            )
            for name, most in (("decode", "least"), ("prefill", "least"), ("memory", "most"), ("size", "most"))
        ),
    ],
)
def test_what_was_not_measured_misses_its_limit_and_says_why(limits: Json, sentence: str) -> None:
    found = verdict(limits, NOTHING)
    assert (found["accepted"], missed(found)) == (False, [sentence])


def test_a_figure_that_only_may_be_good_enough_is_not_accepted() -> None:
    rows = [row("decode_latency_s_per_token", 1.2, 1.15, 1.25, resolved=False)]
    assert "noise floor" in missed(verdict({"decode": "1.1x"}, report(measurements=[item(rows=rows)])))[0]
    # That nothing is slower than 0.9x needs no difference to stand out.
    assert judged({"decode": "0.9x"}, measurements=[item(rows=rows)]) == [("decode (onnx)", True)]
    rows = [row("decode_latency_s_per_token", 1.2, 0, 0, interval=None)]
    assert "gives no interval" in missed(verdict({"decode": "1.1x"}, report(measurements=[item(rows=rows)])))[0]
    unverified = item(unverified=["parity was not measured for this artifact"])
    assert missed(verdict({"prefill": "1.1x"}, report(measurements=[unverified]))) == [
        "prefill (onnx): at least 1.1x is asked; not accepted: parity was not measured for this artifact"
    ]
    one_sided = item(memory=[{"rung": "host_peak", "arms": [{"bytes": 5}]}])
    assert "not read of both models" in missed(verdict({"memory": "1x"}, report(measurements=[one_sided])))[0]


def test_a_report_judges_what_it_holds() -> None:
    inputs = report_fixtures.run_inputs()
    limits = {"decode": "1.1x", "prefill": "1.1x", "memory": "0.9x", "size": "0.9x", "parity": "passed"}
    found = RunReport(**inputs, limits=limits).to_json()["accept"]
    assert found["accepted"], missed(found)
    assert [each["limit"] for each in found["findings"]] == [
        "at least 1.1x", "at least 1.1x", "at most 0.9x", "at most 0.9x", "passed",
    ]  # fmt: skip
    assert found["findings"][2]["value"] == pytest.approx(903_000_000 / 1_081_000_000)
    assert found["findings"][3]["value"] == pytest.approx((452_900_000 + 812_345) / (538_060_032 + 812_345))
    assert RunReport(**inputs).to_json()["accept"] is None
    strict = RunReport(**inputs, limits={"decode": "1.3x", "perplexity": "1.5x"}).to_json()["accept"]
    assert not any(each["met"] for each in strict["findings"])


@pytest.mark.parametrize("text", ["1.1", "x", "-1x", "0x", "1.5 x", "1,5x", "nan", "infx", "", 1.5, "-0.03"])
def test_a_limit_that_is_none_is_refused_in_words(text: Any) -> None:
    assert check_limits({"decode": text}) == [
        f'[accept] decode = {text!r} is no limit; a multiple of the unpruned model\'s figure is read ("1.5x"); write '
        "it so"
    ]


def test_limits_of_tasks_may_be_differences_too() -> None:
    assert check_limits({"tasks": {"piqa": "-0.03", "other": "0.95x"}, "parity": "passed", "size": "0.9x"}) == []
    (fault,) = check_limits({"tasks": {"piqa": "3 %"}})
    assert fault == (
        "[accept.tasks] piqa = '3 %' is no limit; a multiple of the unpruned model's figure is read (\"1.5x\") or a "
        'difference from it ("-0.03"); write it so'
    )

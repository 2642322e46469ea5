"""What a report may say: the cards, the measured rows and the claims, derived from the other files' JSON.

Plain data comes in and plain data goes out.  All of it is kept in ``report.json``.  The page only renders it, and a
reader's own script sees the same numbers.  A speed is claimed only when parity passed, the interval excludes 1 and the
difference stands above the noise floor.  Otherwise the report says which of these is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglp_bench.judge.certificates import unverified_note
from sglp_bench.metrics.registry import METRICS
from sglp_bench.report import wording as fmt
from sglp_deploy.tasks.base import judged_models

Json = dict[str, Any]

_RUNGS = {
    "artifact_bytes": ("Files of the artifact on disk", "manifest"),
    "weight_bytes": ("Weights in the artifact", "manifest"),
    "host_idle": ("Host memory before loading", ""),
    "host_peak": ("Peak host memory of the process", ""),
    "device_allocated_peak": ("Peak of live tensors on the device", ""),
    "device_reserved_peak": ("Peak device memory reserved", ""),
    "device_process_used": ("Device memory of the process", ""),
}
# A pruned model whose perplexity is more than so many times the dense one's has a warning.
_DEAR = 2.0
_SAMPLES = {"decode_s": ("Decode step", "decode"), "prefill_s": ("Prefill", "prefill")}


def section(value: Mapping[str, Any] | None, name: str) -> Json:
    """``value[name]`` when it is an object, else an empty one: a section may always be absent."""
    inner = (value or {}).get(name)
    return dict(inner) if isinstance(inner, Mapping) else {}


def numbers_only(rows: Any) -> bool:
    """Whether ``rows`` is a list of lists of finite numbers and not empty: only then can it be drawn."""
    return bool(rows) and all(fmt.number(value) is not None for row in rows for value in row)


def measurement(
    name: str, comparison: Json, result: Mapping[str, Any] | None, plan: Json, parity: Sequence[Json]
) -> Json:
    """One comparison with the raw samples of its result, as the page shows it.

    Args:
        name: What the reader calls it, "onnx" for example.
        comparison: The comparison.
        result: Holds the raw samples; None when only the comparison was kept.
        plan: The plan, for the words of a claim.
        parity: All certificates; the one of this artifact is found by digest, then by name.
    """
    labels = [str(comparison.get("baseline", "baseline")), str(comparison.get("candidate", "candidate"))]
    arms = section(comparison, "arms")
    artifacts = [section(section(arms, label), "artifact") for label in labels]
    workload = section(comparison, "workload")
    depths = [fmt.number(artifact.get("n_layers")) for artifact in artifacts]
    found: Json = {
        "name": name,
        # The same depth on both sides compares two runtimes: then no layer was removed between the arms.
        "kind": "runtime" if depths[0] is not None and depths[0] == depths[1] else "depth",
        "n_layers": depths,
        "baseline": labels[0],
        "candidate": labels[1],
        "control": comparison.get("control"),
        "paired": comparison.get("paired"),
        "n_pairs": comparison.get("n_pairs"),
        "baseline_digest": artifacts[0].get("digest"),
        "artifact_digest": artifacts[1].get("digest"),
        "where": _where(artifacts[1] or {"format": name}, section(comparison, "environment"), workload),
        "workload": workload,
        "notes": [str(note) for note in comparison.get("notes") or []],
        "samples": samples(result, labels, comparison.get("control")) if result else [],
        "memory": memory_ladder(arms, labels),
    }
    notes = (unverified_note(label, artifact) for label, artifact in zip(labels, artifacts, strict=True))
    faults = parity_faults(found, parity)
    found["unverified"] = [note.removeprefix("UNVERIFIED: ") for note in notes if note] or faults
    faults = list(dict.fromkeys([*faults, *found["unverified"]]))
    found["rows"] = [_row(metric, values) for metric, values in section(comparison, "metrics").items()]
    found["rows"].sort(key=lambda row: METRICS[row["metric"]].place if row["metric"] in METRICS else math.inf)
    for row in found["rows"]:
        if row["metric"] in METRICS and METRICS[row["metric"]].claimed:
            row["claim"] = claim(row, plan, faults, found)
    return found


def _row(metric: str, values: Any) -> Json:
    values = dict(values) if isinstance(values, Mapping) else {}
    known = METRICS.get(metric)  # a file of another version may hold others
    control = section(values, "control")
    numbers = ("baseline", "candidate", "ratio", "p_value", "ceiling", "fraction_of_ceiling", "gain_fraction")
    return {
        "metric": metric,
        "label": known.label if known else metric.replace("_", " "),
        "unit": known.unit if known else "",
        "formula": str(values.get("formula") or ""),
        **{key: fmt.number(values.get(key)) for key in numbers},
        "interval": _pair(values.get("interval")),
        "bootstrap_interval": _pair(values.get("bootstrap_interval")),
        "control_ratio": fmt.number(control.get("ratio")),
        "control_interval": _pair(control.get("interval")),
        "noise_floor": fmt.number(control.get("noise_floor")),
        "resolved": values.get("resolved"),
        "verdict": str(values.get("verdict") or "no verdict"),
        "words": str(values.get("words") or ""),
        "percentiles": section(values, "percentiles"),
        "claim": None,
    }


def _pair(value: Any) -> list[float] | None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    low, high = fmt.number(value[0]), fmt.number(value[1])
    return None if low is None or high is None else [low, high]


def _where(artifact: Json, environment: Json, workload: Json) -> str:
    """Device, engine and element type in one phrase."""
    gpus = environment.get("gpus")
    on_card = str(workload.get("device", "cpu")).startswith("cuda")
    device = ", ".join(map(str, gpus)) if on_card and gpus else environment.get("cpu_model")
    threads = f"{workload['threads']} threads" if workload.get("threads") and not on_card else ""
    parts = (device or "an unnamed machine", artifact.get("format"), artifact.get("precision"), threads)
    return ", ".join(str(part) for part in parts if part)


def samples(result: Mapping[str, Any], labels: Sequence[str], control: Any) -> list[Json]:
    """``{"metric", "label", "arms": [{"label", "role", "blocks"}]}``: raw times in seconds by block, warm-ups apart."""
    arms = section(result, "arms")
    roles = {labels[0]: "baseline"}
    if control and result.get("baseline", labels[0]) == labels[0]:  # it is the control of the run's own baseline only
        roles[str(control)] = "control"
    roles[labels[1]] = "candidate"
    found = []
    for key, (label, metric) in _SAMPLES.items():
        entries = []
        for arm, role in roles.items():
            blocks = [_flat(section(block, "samples").get(key)) for block in section(arms, arm).get("blocks") or []]
            if any(blocks):
                words = f"{arm} (A/A)" if role == "control" else arm
                entries.append({"label": words, "role": role, "blocks": [block for block in blocks if block]})
        if entries:
            found.append({"metric": metric, "label": label, "arms": entries})
    return found


def _flat(values: Any) -> list[float]:
    if isinstance(values, list):
        return [item for value in values for item in _flat(value)]
    found = fmt.number(values)
    return [] if found is None else [found]


def memory_ladder(arms: Json, labels: Sequence[str]) -> list[Json]:
    """``{"rung", "label", "probe", "arms": [{"label", "role", "bytes"}], "reason"}`` for each rung that was tried."""
    ladder = []
    tried = [rung for label in labels for rung in section(section(arms, label), "memory")]
    for rung in dict.fromkeys((*_RUNGS, *tried)):
        title, probe = _RUNGS.get(rung, (rung.replace("_", " "), ""))
        entries, reasons = [], []
        for label, role in zip(labels, ("baseline", "candidate"), strict=True):
            arm = section(arms, label)
            reading = section(section(arm, "memory"), rung)
            size = fmt.number(reading.get("bytes", section(arm, "artifact").get(rung)))
            probe = str(reading.get("probe") or probe)
            if reading.get("note"):
                reasons.append(str(reading["note"]))
            if size is not None:
                entries.append({"label": label, "role": role, "bytes": size})
        if entries or reasons:
            reason = "; ".join(dict.fromkeys(reasons))
            ladder.append({"rung": rung, "label": title, "probe": probe, "arms": entries, "reason": reason})
    return ladder


def parity_faults(found: Json, parity: Sequence[Json]) -> list[str]:
    """Why parity does not allow a claim about this measurement; empty when it does."""
    digests = {item.get("artifact_digest"): item for item in parity}
    mine = digests.get(found["artifact_digest"]) if found["artifact_digest"] else None
    if mine is None:
        # A digest that is known and differs belongs to another artifact, whatever its name.
        mine = next(
            (item for item in parity
             if item.get("name") == found["name"] and not (item.get("artifact_digest") and found["artifact_digest"])),
            None,
        )  # fmt: skip
    base = digests.get(found["baseline_digest"]) if found["baseline_digest"] else None
    faults = []
    if mine is None:
        faults.append("parity was not measured for this artifact")
    elif mine.get("passed") is not True:
        faults.append("parity failed, and the speed of an artifact that computes something else means nothing")
    if base is not None and base.get("passed") is not True:
        faults.append("parity failed for the baseline, so there is nothing sound to compare with")
    return faults


def claim(row: Json, plan: Json, faults: Sequence[str], found: Json) -> Json:
    """May this ratio be claimed, and in which words (the claim template, or why there is no claim)."""
    reasons, batch = list(faults), found["workload"].get("batch_size")
    subject = f"batch-{batch} {row['label'].lower()}" if batch else row["label"].lower()
    subject = subject.removesuffix(" step")
    if row["ratio"] is None or row["interval"] is None:
        reasons.append("no 95 % interval was computed")
    elif row["interval"][0] <= 1 <= row["interval"][1]:
        reasons.append(f"the 95\u00a0% interval {fmt.interval(*row['interval'])} includes 1")
    elif row["resolved"] is False:
        reasons.append(f"the difference is within the noise floor of ±{fmt.percent(row['noise_floor'] or 0)}")
    elif row["verdict"] not in ("faster", "slower"):
        reasons.append(f"the verdict is “{row['verdict']}”")
    if reasons:
        sentence = f"{found['name']}, {subject}: no claim, because {'; '.join(reasons)}."
        return {"allowed": False, "sentence": sentence, "reasons": reasons}
    dropped = len(plan.get("drop", []))
    n_layers = len(plan.get("keep", [])) + dropped
    faster = row["ratio"] > 1
    ratio: float = row["ratio"]
    low, high = row["interval"]
    if not faster:
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    cause = f"Removing {dropped} of {n_layers} layers ({fmt.percent(dropped / n_layers)})" if n_layers else "Pruning"
    than = ""
    if found["kind"] == "runtime":
        cause = f"At the same {found['n_layers'][0]:.0f} layers, {found['candidate']}"
        than = f" than {found['baseline']}"
    sentence = (
        f"{cause} makes {subject} {fmt.ratio(ratio)} (95\u00a0% CI {fmt.interval(low, high)}) "
        f"{'faster' if faster else 'slower'}{than} on {found['where']}"
    )
    if row["ceiling"] and row["fraction_of_ceiling"] is not None and faster:
        sentence += (
            f", which is {fmt.percent(row['fraction_of_ceiling'])} of the physical ceiling of "
            f"{fmt.ratio(row['ceiling'])} for this model"
        )
    floor = row["noise_floor"]
    sentence += f". Noise floor from A/A: {'not measured' if floor is None else '±' + fmt.percent(floor)}."
    return {"allowed": True, "sentence": sentence, "reasons": []}


def parameters(report: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Parameters before and after, from the checkpoint's facts or the plan's model; None where unknown."""
    checkpoint, model = section(report, "checkpoint"), section(section(report, "plan"), "model")
    dense = fmt.number(checkpoint.get("dense_parameters")) or fmt.number(model.get("parameters"))
    return dense, fmt.number(checkpoint.get("parameters"))


def perplexities(report: Mapping[str, Any]) -> dict[str, float]:
    """Perplexity of those of "dense", "unrepaired", "repaired" and "pruned" that were evaluated, in this order."""
    quality = section(report, "quality")
    found = {arm: fmt.number(section(quality, arm).get("perplexity")) for arm in judged_models(quality)}
    return {arm: value for arm, value in found.items() if value}


def is_dear(report: Mapping[str, Any]) -> bool:
    """Whether the pruned model, repaired or not, has more than twice the perplexity of the dense one."""
    found = perplexities(report)
    return found.keys() >= {"dense", "pruned"} and found["pruned"] > _DEAR * found["dense"]


def cards(report: Mapping[str, Any]) -> list[Json]:
    """The headline: ``{"key", "label", "value", "detail", "state"}``; state is good, bad, plain or absent."""
    plan = section(report, "plan")
    main: Json = next((item for item in report["measurements"] if item["kind"] == "depth"), {})
    made: list[Json] = []

    def add(key: str, label: str, value: str, detail: str, state: str = "plain") -> None:
        made.append({"key": key, "label": label, "value": value, "detail": detail, "state": state})

    if plan.get("keep"):
        kept, gone = len(plan["keep"]), len(plan.get("drop", []))
        add("layers", "Layers", f"{kept + gone} → {kept}", f"{gone} removed, {fmt.percent(gone / (kept + gone))}")
    else:
        add("layers", "Layers", "not measured", "no plan was given", "absent")
    dense, pruned = parameters(report)
    if dense and pruned:
        add("parameters", "Parameters", f"{fmt.count(dense)} → {fmt.count(pruned)}", fmt.change(dense, pruned))
    elif dense or pruned:
        side = "before pruning" if dense else "after pruning"
        add("parameters", "Parameters", fmt.count(dense or pruned or 0), f"{side}; the other count was not given")
    else:
        add("parameters", "Parameters", "not measured", "no parameter count was given", "absent")
    for metric in sorted(METRICS.values(), key=lambda metric: metric.place):
        if metric.card:
            _speed_card(add, metric.name, metric.card, main)
    _memory_card(add, main, "Peak memory", ("device_allocated_peak", "device_process_used", "host_peak"))
    _memory_card(add, main, "Weights", ("weight_bytes",))
    found = perplexities(report)
    if (before := found.get("dense")) and (after := found.get("pruned")):
        models = judged_models(section(report, "quality"))
        between = [arm for arm in ("unrepaired", "repaired") if arm in found]
        steps = "".join(f"; {fmt.significant(found[arm])} {models[arm].removeprefix('pruned, ')}" for arm in between)
        detail = f"{fmt.significant(after / before)}× the dense model's{steps}; lower is better"
        value = f"{fmt.significant(before)} → {fmt.significant(after)}"
        add("perplexity", "Perplexity", value, detail, "bad" if is_dear(report) else "plain")
    else:
        add("perplexity", "Perplexity", "not measured", "no quality file was given", "absent")
    for name, task in section(section(report, "quality"), "tasks").items():
        _task_card(add, name, task)
    names = [str(item.get("name")) for item in report["parity"]]
    failed = [str(item.get("name")) for item in report["parity"] if item.get("passed") is not True]
    if failed:
        add("parity", "Parity", "failed", f"{fmt.words(failed)}: not what its reference computes", "bad")
    elif names:
        add("parity", "Parity", "passed", f"{fmt.words(names)}: computes what its reference computes", "good")
    else:
        add("parity", "Parity", "not measured", "no speed may be claimed without it", "absent")
    return made


def _task_card(add: Callable[..., None], name: str, task: Json) -> None:
    metric = section(section(task, "metrics"), str(task.get("metric")))
    before, after = (fmt.number(section(metric, arm).get("value")) for arm in ("dense", "pruned"))
    change, span = fmt.number(metric.get("difference")), _pair(metric.get("difference_interval"))
    if before is None or after is None or change is None:
        return
    interval = f", 95\u00a0% CI {span[0]:+.3f} to {span[1]:+.3f}" if span else ""
    detail = f"{metric.get('label')}; difference {change:+.3f}{interval}".replace("-", "−")
    add(f"task_{name}", name, f"{before:.3f} → {after:.3f}", detail)


def _speed_card(add: Callable[..., None], metric: str, label: str, main: Json) -> None:
    key = metric.partition("_")[0]
    row = next((row for row in main.get("rows", []) if row["metric"] == metric), None)
    if row is None or row["ratio"] is None:
        add(key, label, "not measured", "no comparison holds this metric", "absent")
        return
    span = f"95\u00a0% CI {fmt.interval(*row['interval'])}; " if row["interval"] else ""
    share = f"; {fmt.percent(row['fraction_of_ceiling'])} of ceiling" if row["fraction_of_ceiling"] is not None else ""
    detail = f"{span}{row['verdict']}{share}"
    if row["claim"]["allowed"]:
        add(key, label, fmt.ratio(row["ratio"]), f"{detail} ({main['name']})", "good" if row["ratio"] > 1 else "bad")
    elif main["unverified"]:
        add(key, label, "no claim", f"unverified: {main['unverified'][0]}", "bad")
    else:
        add(key, label, "no claim", row["claim"]["reasons"][0], "absent")


def _memory_card(add: Callable[..., None], main: Json, label: str, rungs: Sequence[str]) -> None:
    key = label.lower().replace(" ", "_")
    ladder = {row["rung"]: row for row in main.get("memory", []) if len(row["arms"]) == 2}
    row = next((ladder[rung] for rung in rungs if rung in ladder), None)
    if row is None:
        add(key, label, "not measured", "no comparison has both arms", "absent")
        return
    before, after = (arm["bytes"] for arm in row["arms"])
    value = f"{fmt.size_bytes(before)} → {fmt.size_bytes(after)}"
    add(key, label, value, f"{fmt.change(before, after)}; {row['probe'] or row['label']} ({main['name']})")


def missing(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each stage that failed, and for each thing a full report holds and this one does not."""
    plan, measured = section(report, "plan"), report["measurements"]
    wanted = (
        (plan, "plan: not given, so nothing is said about which layers were removed"),
        (plan.get("similarity") or not plan, "similarity: the plan was saved without its matrix"),
        (report["artifacts"], "artifacts: nothing was exported"),
        (report["parity"], "parity: no artifact was checked against its reference"),
        (measured, "speed: no artifact was compared with its unpruned baseline"),
        (any(item["memory"] for item in measured), "memory: no memory pass was made"),
        (any(item["samples"] for item in measured), "raw samples: no result file was given"),
        (report.get("quality"), "quality: perplexity before and after was not evaluated"),
        (report.get("provenance"), "provenance: versions, machine and command were not recorded"),
    )
    stages = section(report, "provenance").get("stages") or []
    failed = [f"{stage.get('name')} failed: {stage.get('note')}" for stage in stages if stage.get("state") == "failed"]
    return failed + [sentence for value, sentence in wanted if not value]

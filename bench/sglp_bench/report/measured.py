"""The values of the page's sections about measurements: speed, memory and quality.

They are drawn and tabulated as the comparison holds them.  No statistic is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglp_bench.report import wording as fmt
from sglp_bench.report.charts import speed_pictures
from sglp_bench.report.facts import Json, perplexities, section
from sglp_bench.report.shown import HALF, Badge, Picture, Table, code, digits, picture
from sglp_deploy.tasks.base import judged_models


def speed_values(report: Mapping[str, Any]) -> list[Json]:
    """One block per comparison: ratios on a forest plot, raw latencies, the tables."""
    return [_measurement(item, f"m{index}") for index, item in enumerate(report["measurements"])]


def _measurement(item: Json, key: str) -> Json:
    ratios = [row for row in item["rows"] if row["ratio"] is not None and row["interval"]]
    # Reports of before there were certificates of arms lack the entry.
    unverified = item.get("unverified") or []
    forest = [
        {
            "label": row["label"],
            "sub": row["unit"],
            "ratio": row["ratio"],
            "low": row["interval"][0],
            "high": row["interval"][1],
            "control_low": row["control_interval"][0] if row["control_interval"] else None,
            "control_high": row["control_interval"][1] if row["control_interval"] else None,
            "ceiling": row["ceiling"],
            "resolved": row["verdict"] in ("faster", "slower"),
            "note": "unverified" if unverified else _note(row),
        }
        for row in ratios
    ]
    before, after = (f"{depth:.0f} layers" if depth else "unknown depth" for depth in item["n_layers"])
    return {
        "name": item["name"],
        "runtimes": item["kind"] == "runtime",
        "baseline": item["baseline"],
        "candidate": item["candidate"],
        "baseline_depth": before,
        "candidate_depth": after,
        "unverified": unverified,
        "failed": any("failed" in reason for reason in unverified),
        "forest": picture(lambda width, name: speed_pictures.forest(forest, width, key=name), f"{key}-forest")
        if forest
        else None,
        "controlled": any(row["control_interval"] for row in ratios),
        "limited": any(row["ceiling"] for row in ratios),
        "latencies": [
            (sample["label"], _latency(sample, f"{key}-{number}")) for number, sample in enumerate(item["samples"])
        ],
        "notes": item["notes"],
        "ratios": _ratio_table(item, bool(unverified)),
        "percentiles": _percentile_table(item),
        "origin": [
            ("Workload", item["workload"]),
            ("Where", item["where"]),
            ("Pairs of blocks", item["n_pairs"] if item["paired"] else "none; the arms come from two runs"),
            ("Artifact", code(item["artifact_digest"])),
            ("Baseline", code(item["baseline_digest"])),
            *((row["label"], row["formula"]) for row in item["rows"] if row["formula"]),
        ],
    }


def _latency(sample: Json, key: str) -> Picture:
    arms, metric = sample["arms"], sample["label"].lower()
    return picture(
        lambda width, name: speed_pictures.latency_strips(arms, width, key=name, metric=metric), key, wide=HALF
    )


def _note(row: Json) -> str:
    share = row["fraction_of_ceiling"]
    return str(row["verdict"]) + ("" if share is None else f", {fmt.percent(share)} of ceiling")


def _ratio_table(item: Json, unverified: bool) -> Table:
    rows = [
        [
            row["label"], _level(row["metric"], row["baseline"]), _level(row["metric"], row["candidate"]),
            None if row["ratio"] is None else fmt.ratio(row["ratio"]),
            fmt.interval(*row["interval"]) if row["interval"] else None,
            fmt.interval(*row["bootstrap_interval"]) if row["bootstrap_interval"] else None,
            digits(row["p_value"]),
            Badge(False, f"unverified: {row['verdict']}") if unverified else row["verdict"],
            fmt.interval(*row["control_interval"]) if row["control_interval"] else None,
            None if row["noise_floor"] is None else f"±{fmt.percent(row['noise_floor'])}",
            None if row["ceiling"] is None else fmt.ratio(row["ceiling"]),
            None if row["fraction_of_ceiling"] is None else fmt.percent(row["fraction_of_ceiling"]),
        ]
        for row in item["rows"]
    ]  # fmt: skip
    head = [
        "metric", item["baseline"], item["candidate"], "ratio", "95 % interval", "bootstrap interval", "p", "verdict",
        "A/A interval", "noise floor", "ceiling", "of ceiling",
    ]  # fmt: skip
    return Table(head, rows, numeric=[1, 2, 3, 4, 5, 6, 8, 9, 10, 11])


def _percentile_table(item: Json) -> Table | None:
    rows = [
        [row["label"], arm, *(_percentile(values.get(rank)) for rank in ("p50", "p90", "p95", "p99"))]
        for row in item["rows"]
        for arm, values in row["percentiles"].items()
        if isinstance(values, dict) and values
    ]
    return Table(["metric", "arm", "p50", "p90", "p95", "p99"], rows, wrap=[2, 3, 4, 5]) if rows else None


def _level(metric: str, value: float | None) -> str | None:
    """A block median in the unit that the metric's name ends in."""
    if value is None:
        return None
    if metric.endswith("bytes"):
        return fmt.size_bytes(value)
    return f"{fmt.significant(value)} tok/s" if "throughput" in metric else fmt.seconds(value)


def _percentile(entry: Any) -> str | None:
    entry = entry if isinstance(entry, dict) else {}
    value = fmt.number(entry.get("value"))
    return entry.get("reason") if value is None else fmt.seconds(value)


def memory_values(report: Mapping[str, Any]) -> list[Json]:
    """One picture per comparison: every probe by name, both arms."""
    return [_memory(item, f"mem{index}") for index, item in enumerate(report["measurements"])]


def _memory(item: Json, key: str) -> Json:
    bars = []
    for row in item["memory"]:
        if row["arms"]:
            pair = [arm["bytes"] for arm in row["arms"]]
            note = fmt.change(*pair) if len(pair) == 2 else ""
            arms = [(arm["role"], arm["label"], arm["bytes"]) for arm in row["arms"]]
            bars.append({"label": row["label"], "sub": row["probe"], "note": note, "bars": arms})
    readings = [
        [row["label"], row["probe"], arm["label"], fmt.size_bytes(arm["bytes"]), row["reason"]]
        for row in item["memory"]
        for arm in row["arms"]
    ]
    readings += [
        [row["label"], row["probe"], "", "not measured", row["reason"]] for row in item["memory"] if not row["arms"]
    ]

    def draw(width: float, name: str) -> str:
        return speed_pictures.paired_bars(bars, width, key=name, title="Memory by probe", kind="bytes")

    return {
        "name": item["name"],
        "picture": picture(draw, key) if bars else None,
        "readings": Table(["quantity", "probe", "arm", "size", "note"], readings, numeric=[3], wrap=[1, 4]),
    }


# The role of each model in the pictures.
_ROLES = {"dense": "baseline", "unrepaired": "control", "repaired": "control", "pruned": "candidate"}


def quality_values(report: Mapping[str, Any]) -> Json | None:
    """Perplexity before and after, with the repair apart, and how it was taken; None when it was not evaluated."""
    quality, found = section(report, "quality"), perplexities(report)
    if not found:
        return None
    models = judged_models(quality)
    # Beside a bar there is little room.
    names = {name: words.removeprefix("pruned, ") for name, words in models.items()} | {"unrepaired": "unrepaired"}
    arms = [(names[name], section(quality, name)) for name in models]
    ratio, span = fmt.number(quality.get("ratio")), quality.get("ratio_interval")
    bars = [
        {
            "label": "Perplexity",
            "sub": "lower is better",
            "note": "" if ratio is None else f"{fmt.significant(ratio)}×",
            "bars": [(_ROLES[name], names[name], value) for name, value in found.items()],
        }
    ]
    facts: list[tuple[str, Any]] = [
        (f"{name}, nats per token", digits(arm.get("nats_per_token"))) for name, arm in arms if arm
    ]
    if words := _span(span):
        facts.append(("95 % interval of the ratio", f"{words} times, over other text of this kind"))
    facts += [
        (name.removeprefix("n_").replace("_", " "), code(value) if "digest" in name else value)
        for name, value in section(quality, "protocol").items()
    ]
    return {
        "picture": picture(
            lambda width, key: speed_pictures.paired_bars(bars, width, key=key, title="Perplexity", kind="number"),
            "quality-bars",
        ),
        "arms": _arms_table(quality, found) if len(models) > 2 else None,
        "heading": "Before repair, repaired, healed" if "repaired" in found else f"Before and after {_step(models)}",
        "facts": facts,
    }


def _step(models: Mapping[str, str]) -> str:
    return "healing" if models.get("pruned", "").endswith("healed") else "the repair"


def _arms_table(quality: Json, found: Mapping[str, float]) -> Table:
    rows = []
    for name, label in judged_models(quality).items():
        judged = quality if name == "pruned" else section(quality, name)
        rows.append([label, digits(found.get(name)), digits(judged.get("ratio")), _span(judged.get("ratio_interval"))])
    return Table(["model", "perplexity", "times dense", "95 % interval"], rows, numeric=[1, 2, 3])


def _span(value: Any) -> str | None:
    if not isinstance(value, list) or len(value) != 2 or None in value:
        return None
    return f"{fmt.significant(value[0])} to {fmt.significant(value[1])}"

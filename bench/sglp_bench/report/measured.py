"""The sections of the page about measurements: speed, memory and quality.

They draw and tabulate what the comparison holds; no statistic is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from sglp_bench.report import wording as fmt
from sglp_bench.report.charts import speed_pictures
from sglp_bench.report.facts import Json, section
from sglp_bench.report.markup import HALF, WIDE, absent, badge, code, details, digits, facts, picture, table

_FOREST_LEGEND = (
    '<ul class="legend">'
    '<li><svg viewBox="0 0 26 16" aria-hidden="true"><path d="M2 8h22M2 3v10M24 3v10" class="interval"/>'
    '<path d="M13 2l6 6-6 6-6-6z" class="point"/></svg>ratio and 95 % interval, difference resolved</li>'
    '<li><svg viewBox="0 0 26 16" aria-hidden="true"><path d="M2 8h22M2 3v10M24 3v10" class="interval"/>'
    '<circle cx="13" cy="8" r="5" class="point-open"/></svg>not resolved</li>'
    '<li><svg viewBox="0 0 26 16" aria-hidden="true"><rect x="4" width="18" height="16" class="control"/></svg>'
    "A/A control: the baseline against itself</li>"
    '<li><svg viewBox="0 0 26 16" aria-hidden="true"><path d="M13 5v11" class="ceiling"/>'
    '<path d="M8 0h10l-5 6z" class="ceiling-head"/></svg>physical ceiling</li></ul>'
)


def speed_section(report: Mapping[str, Any]) -> str:
    """One block per comparison: ratios on a forest plot, raw latencies, the table."""
    if not report["measurements"]:
        return absent("no artifact was compared with its unpruned baseline")
    lead = (
        "Two artifacts took turns in fresh processes on the same machine, with the same inputs and settings. A ratio "
        "above 1 means that the second one is faster. The baseline also ran against itself: what that control shows "
        "is noise."
    )
    parts = [f'<p class="lead">{lead}</p>']
    for index, item in enumerate(report["measurements"]):
        parts.append(_measurement(item, f"m{index}"))
    return "".join(parts)


def _measurement(item: Json, key: str) -> str:
    ratios = [row for row in item["rows"] if row["ratio"] is not None and row["interval"]]
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
            "note": "unverified" if item.get("unverified") else _note(row),
        }
        for row in ratios
    ]
    parts = []
    # Reports of before there were certificates of arms lack the entry.
    if unverified := item.get("unverified"):
        failed = any("failed" in reason for reason in unverified)
        heading = "✗ Unverified: parity failed" if failed else "✗ Unverified: no certificate"
        warning = (
            "This artifact does not compute what the model computes: these are times of something else."
            if failed
            else "Nobody has shown that what was timed computes what the model computes; do not quote these times."
        )
        reasons = "".join(f"<p>{escape(reason)}</p>" for reason in unverified)
        parts.append(f'<div class="claim unverified"><strong>{heading}</strong><p>{warning}</p>{reasons}</div>')
    if forest:
        words = (
            f"{_arms(item)} Each row is one metric: the mark is the measured ratio, the bar through it the 95 % "
            "interval. Where the bar does not touch the line at 1, the arms differ on this machine."
        )
        if any(row["control_interval"] for row in ratios):
            words += " The shaded band is the baseline against itself."
        if any(row["ceiling"] for row in ratios):
            words += " The dashed tick is the most that removing these layers can give."
        parts.append(
            picture(
                f"{item['name']}: {item['candidate']} against {item['baseline']}",
                words,
                lambda width, name: speed_pictures.forest(forest, width, key=name),
                f"{key}-forest",
                legend=_FOREST_LEGEND,
            )
        )
    else:
        parts.append(absent(f"{item['name']}: the comparison holds no ratio with an interval"))
    strips = [_latency(sample, f"{key}-{number}") for number, sample in enumerate(item["samples"])]
    if strips:
        parts.append(f'<div class="grid">{"".join(strips)}</div>' if len(strips) > 1 else strips[0])
    else:
        parts.append(absent(f"{item['name']}: raw latency samples; no result file was given"))
    if item["notes"]:
        notes = "".join(f"<li>{escape(note)}</li>" for note in item["notes"])
        parts.append(f'<div class="panel"><h3>Before quoting these numbers</h3><ul class="notes">{notes}</ul></div>')
    return "".join(parts) + details(f"{item['name']}: every ratio in numbers", _ratio_table(item))


def _arms(item: Json) -> str:
    before, after = (f"{depth:.0f} layers" if depth else "unknown depth" for depth in item["n_layers"])
    if item["kind"] == "runtime":
        return f"Two runtimes on the same model: {item['candidate']} and {item['baseline']}, both with {after}."
    return f"Baseline: {item['baseline']}, {before}. Pruned: {item['candidate']}, {after}."


def _latency(sample: Json, key: str) -> str:
    words = (
        "Each dot is one timed call; each line of dots is one block, a fresh process, and the dark tick on it the "
        "block's median. The box below holds the middle half of all calls. Blocks that agree mean a steady machine."
    )
    return picture(
        f"{sample['label']}: every measured call",
        words,
        lambda width, name: speed_pictures.latency_strips(
            sample["arms"], width, key=name, metric=sample["label"].lower()
        ),
        key,
        wide=HALF,
    )


def _note(row: Json) -> str:
    share = row["fraction_of_ceiling"]
    return str(row["verdict"]) + ("" if share is None else f", {fmt.percent(share)} of ceiling")


def _verdict(item: Json, row: Json) -> Any:
    """The verdict, in red and with the word where the arms are not certified."""
    return badge(False, bad=f"unverified: {escape(row['verdict'])}") if item.get("unverified") else row["verdict"]


def _ratio_table(item: Json) -> str:
    rows = [
        [
            row["label"], _level(row["metric"], row["baseline"]), _level(row["metric"], row["candidate"]),
            None if row["ratio"] is None else fmt.ratio(row["ratio"]),
            fmt.interval(*row["interval"]) if row["interval"] else None,
            fmt.interval(*row["bootstrap_interval"]) if row["bootstrap_interval"] else None,
            digits(row["p_value"]), _verdict(item, row),
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
    tails = [
        [row["label"], arm, *(_percentile(values.get(rank)) for rank in ("p50", "p90", "p95", "p99"))]
        for row in item["rows"]
        for arm, values in row["percentiles"].items()
        if isinstance(values, dict) and values
    ]
    origin = facts(
        [
            ("Workload", item["workload"]),
            ("Where", item["where"]),
            ("Pairs of blocks", item["n_pairs"] if item["paired"] else "none; the arms come from two runs"),
            ("Artifact", code(item["artifact_digest"])),
            ("Baseline", code(item["baseline_digest"])),
            *((row["label"], row["formula"]) for row in item["rows"] if row["formula"]),
        ]
    )
    percentiles = table(["metric", "arm", "p50", "p90", "p95", "p99"], tails, wrap=[2, 3, 4, 5]) if tails else ""
    return table(head, rows, numeric=[1, 2, 3, 4, 5, 6, 8, 9, 10, 11]) + percentiles + origin


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


def memory_section(report: Mapping[str, Any]) -> str:
    """One picture per comparison: every probe by name, both arms."""
    parts = [_memory(item, f"mem{index}") for index, item in enumerate(report["measurements"])]
    return "".join(parts) or absent("no memory pass was made")


def _memory(item: Json, key: str) -> str:
    bars = []
    for row in item["memory"]:
        if row["arms"]:
            pair = [arm["bytes"] for arm in row["arms"]]
            note = fmt.change(*pair) if len(pair) == 2 else ""
            arms = [(arm["role"], arm["label"], arm["bytes"]) for arm in row["arms"]]
            bars.append({"label": row["label"], "sub": row["probe"], "note": note, "bars": arms})
    if not bars:
        return absent(f"{item['name']}: no memory pass was made")
    words = (
        "“Memory” is a ladder of different quantities, so each group names the probe that read it; compare bars inside "
        "a group, never between groups. Read in a pass of its own, apart from the timing."
    )
    readings = [
        [row["label"], row["probe"], arm["label"], fmt.size_bytes(arm["bytes"]), row["reason"]]
        for row in item["memory"]
        for arm in row["arms"]
    ]
    readings += [
        [row["label"], row["probe"], "", "not measured", row["reason"]] for row in item["memory"] if not row["arms"]
    ]
    return picture(
        f"{item['name']}: memory by probe",
        words,
        lambda width, name: speed_pictures.paired_bars(bars, width, key=name, title="Memory by probe", kind="bytes"),
        key,
        wide=WIDE,
    ) + details(
        f"{item['name']}: every reading",
        table(["quantity", "probe", "arm", "size", "note"], readings, numeric=[3], wrap=[1, 4]),
    )


def quality_section(report: Mapping[str, Any]) -> str:
    """Perplexity before and after, and how it was taken."""
    quality = section(report, "quality")
    arms = [(name, section(quality, name)) for name in ("dense", "pruned")]
    found = [(name, value) for name, arm in arms if (value := fmt.number(arm.get("perplexity"))) is not None]
    if not found:
        return absent("perplexity before and after was not evaluated")
    ratio, span = fmt.number(quality.get("ratio")), quality.get("ratio_interval")
    bars = [
        {
            "label": "Perplexity",
            "sub": "lower is better",
            "note": "" if ratio is None else f"{fmt.significant(ratio)}×",
            "bars": [("baseline" if name == "dense" else "candidate", name, value) for name, value in found],
        }
    ]
    words = (
        "Perplexity on text the plan has not seen: how many tokens the model hesitates between, on average. Lower is "
        "better; the dense model is the mark. Removed layers cost quality, and this is how much."
    )
    protocol = section(quality, "protocol")
    pairs: list[tuple[str, Any]] = [
        (f"{name}, nats per token", digits(arm.get("nats_per_token"))) for name, arm in arms if arm
    ]
    if isinstance(span, list) and len(span) == 2 and None not in span:
        words_span = f"{fmt.significant(span[0])} to {fmt.significant(span[1])} times, over other text of this kind"
        pairs.append(("95 % interval of the ratio", words_span))
    pairs += [
        (name.removeprefix("n_").replace("_", " "), code(v) if "digest" in name else v) for name, v in protocol.items()
    ]
    return (
        picture(
            "Dense and pruned model on held-out text",
            words,
            lambda width, key: speed_pictures.paired_bars(bars, width, key=key, title="Perplexity", kind="number"),
            "quality-bars",
            wide=WIDE,
        )
        + f'<div class="panel"><h3>How it was taken</h3>{facts(pairs)}</div>'
    )

"""The sections of the page about decisions and proof: the claim, what was removed, parity, and where it comes from.

A section never fails on a part that is absent: it says what was not measured and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from sglp_bench.report import wording as fmt
from sglp_bench.report.charts import plan_pictures
from sglp_bench.report.facts import Json, numbers_only, section
from sglp_bench.report.markup import HALF, absent, badge, code, details, digits, facts, picture, table


def headline(report: Mapping[str, Any]) -> str:
    """The claim, or why there is none, and the cards."""
    cards = "".join(
        f'<div class="card {escape(card["state"])}"><div class="name">{escape(card["label"])}</div>'
        f'<div class="value">{_glyph(card)}{escape(card["value"])}</div>'
        f'<div class="detail">{escape(card["detail"])}</div></div>'
        for card in report["cards"]
    )
    return f'{claims(report["claims"])}<div class="cards">{cards}</div>'


def _glyph(card: Mapping[str, Any]) -> str:
    if card["key"] != "parity":
        return ""
    return {"good": "✓ ", "bad": "✗ "}.get(str(card["state"]), "")


def claims(items: list[Json]) -> str:
    """Allowed claims in one box, withheld ones with their reasons in another."""
    boxes = ""
    for allowed, heading, kind in (
        (True, "What may be claimed", ""),
        (False, "What may not be claimed, and why", " withheld"),
    ):
        sentences = [item["sentence"] for item in items if item["allowed"] == allowed]
        if sentences:
            body = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
            boxes += f'<div class="claim{kind}"><strong>{heading}</strong>{body}</div>'
    return boxes


def plan_section(report: Mapping[str, Any]) -> str:
    """Similarity, segmentation, importance, and the table of layers."""
    plan = section(report, "plan")
    if not plan.get("keep"):
        return absent("no plan was given, so nothing is said about which layers were removed")
    n_layers, drop, segments = plan["n_layers"], plan.get("drop", []), plan.get("segments", [])
    scores, criterion = section(plan, "scores"), str(plan.get("criterion") or "")
    removed = f"layers {fmt.words([str(layer) for layer in drop])}" if drop else "none"
    lead = (
        f"Layers that do similar work form a segment; inside the segments the layers that matter least were removed. "
        f"Method {plan.get('method')}, ranked by {criterion or 'nothing'}; removed: {removed}."
    )
    halves = []
    if numbers_only(plan.get("similarity")):
        words = (
            "Each cell compares the outputs of two layers by linear CKA: the brighter, the more alike. A bright square "
            "along the diagonal is a run of layers that do similar work; the white outlines are the segments."
        )
        draw = plan_pictures.heat_map(plan["similarity"], segments, drop, key="cka")
        caption = f"<figcaption><h3>How alike the layers are</h3><p>{words}</p></figcaption>"
        halves.append(f'<figure class="panel heat">{caption}{draw}</figure>')
    else:
        halves.append(absent("similarity between layers; the plan was saved without its matrix"))
    losses = plan.get("segment_losses")
    if losses and numbers_only([losses]):
        words = (
            "How much unlikeness is left inside the segments when the layers are cut into K of them, each cut optimal. "
            "Where the curve flattens, more segments explain little more. The ring is the K that was used."
        )
        halves.append(
            picture(
                "How many segments",
                words,
                lambda width, key: plan_pictures.loss_curve(losses, len(segments), width, key=key),
                "loss",
                wide=HALF,
            )
        )
    else:
        halves.append(absent("segmentation loss; this method does not cut the layers into segments"))
    content = f'<p class="lead">{escape(lead)}</p><div class="grid">{"".join(halves)}</div>'
    values = scores.get(criterion) or next(iter(scores.values()), None)
    if values:
        words = (
            f"How much each layer matters by {criterion}: a tall bar is a layer the model leans on. "
            "Striped bars with a cross were removed; S1, S2, … are the segments."
        )
        content += picture(
            "How much each layer matters",
            words,
            lambda width, key: plan_pictures.importance_bars(values, drop, segments, criterion, width, key=key),
            "importance",
        )
    else:
        content += absent("layer importance; the plan holds no scores")
    return content + details("Every layer in numbers", _layer_table(n_layers, set(drop), segments, scores))


def _layer_table(n_layers: int, removed: set[int], segments: list[list[int]], scores: Json) -> str:
    rows = []
    for layer in range(n_layers):
        inside = next((f"S{i + 1}" for i, (start, end) in enumerate(segments) if start <= layer < end), None)
        values = [
            fmt.significant(row[layer], 4) if fmt.number(row[layer]) is not None else None for row in scores.values()
        ]
        rows.append([layer, inside, "✗ removed" if layer in removed else "kept", *values])
    head = ["layer", "segment", "decision", *scores]
    return table(head, rows, numeric=range(3, len(head)))


def parity_section(report: Mapping[str, Any]) -> str:
    """One panel per certificate: verdict, cases, thresholds, noise floor."""
    if not report["parity"]:
        return absent("no artifact was checked against its reference, so no speed may be claimed")
    lead = (
        "Each artifact and its reference get the same inputs; their outputs are compared position by position. "
        "The reference is the unpruned model in PyTorch with the removed layers passed over. So this asks whether "
        "pruning and export were carried out right; what they cost in quality is asked below."
    )
    return f'<p class="lead">{lead}</p>' + "".join(_certificate(item) for item in report["parity"])


def _certificate(item: Json) -> str:
    rows = [_case(case) for case in item.get("cases") or [] if isinstance(case, dict)]
    head = [
        "case", "positions", "max |Δ logit|", "KL p99", "KL max", "least cosine", "top token",
        "greedy tokens", "worst place",
    ]  # fmt: skip
    words = (
        f"{item.get('runner') or 'An unknown runner'} against {item.get('reference') or 'an unknown reference'}. "
        "KL is in nats; “top token” counts the same choice where the reference is sure of its own."
    )
    reasons = "".join(f"<p>{escape(str(reason))}</p>" for reason in item.get("reasons") or [])
    why = f'<div class="claim withheld"><strong>Why it failed</strong>{reasons}</div>' if reasons else ""
    floor, bounds = section(item, "noise_floor"), section(item, "thresholds")
    pairs = [
        ("Noise floor", _named_numbers(floor) or "not measured"),
        ("Thresholds", _named_numbers(bounds) or "not recorded"),
        ("Artifact", code(item.get("artifact_digest"))),
    ]
    cases = table(head, rows, numeric=range(1, 8), wrap=[8]) if rows else absent("no case was run")
    return (
        f'<div class="panel"><h3>{escape(str(item.get("name")))} {badge(item.get("passed") is True)}</h3>'
        f'<p class="note">{escape(words)}</p>{cases}{why}{facts(pairs)}</div>'
    )


def _case(case: Json) -> list[Any]:
    numbers, worst, greedy = section(case, "statistics"), section(case, "worst"), section(case, "greedy")
    row = f"row {worst['row']}, " if worst.get("row") is not None else ""
    place = f"{row}{worst.get('phase') or ''} position {worst.get('position')}".replace("  ", " ")
    if worst.get("not_finite"):
        place = f"NaN or infinity in the {worst['not_finite']} at {place}"
    elif worst.get("token") is not None:
        place += f", token {worst['token']}"
    stable = f"{_share(numbers.get('top1_stable'))} of {numbers['n_stable']}" if "n_stable" in numbers else None
    tokens = f"{greedy['equal_tokens']} of {greedy['tokens']}" if {"equal_tokens", "tokens"} <= set(greedy) else None
    mark = "✓" if case.get("passed") is True else "✗ failed:"
    return [
        f"{mark} {case.get('name')}", case.get("positions"), digits(numbers.get("max_abs")),
        digits(numbers.get("kl_p99")), digits(numbers.get("kl_max")), _cosine(numbers.get("cosine_min")), stable,
        tokens, place.strip() if worst else None,
    ]  # fmt: skip


def _cosine(value: Any) -> str | None:
    found = fmt.number(value)
    return None if found is None else f"{found:.6f}"


def _share(value: Any) -> str:
    found = fmt.number(value)
    if found is None:
        return "–"
    return "100 %" if found == 1 else "> 99.99 %" if found > 0.9999 else f"{100 * found:.2f} %"


def _named_numbers(values: Json) -> str | None:
    return "; ".join(f"{name.replace('_', ' ')} {digits(value) or value}" for name, value in values.items()) or None


def missing_section(report: Mapping[str, Any]) -> str:
    """What a full report would also hold."""
    if not report["missing"]:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in report["missing"])
    panel = f'<div class="panel"><ul class="notes">{items}</ul></div>'
    return f'<section id="missing"><h2>What failed or was not measured</h2>{panel}</section>'


def subtitle(report: Mapping[str, Any]) -> str:
    """Method, machine and time in one line."""
    plan, provenance = section(report, "plan"), section(report, "provenance")
    machine = section(provenance, "machine")
    known = (
        f"method {plan['method']}" if plan.get("method") else "",
        str(machine.get("gpu") or machine.get("cpu") or machine.get("cpu_model") or machine.get("name") or ""),
        str(provenance.get("created") or "").replace("T", " ").replace("+00:00", " UTC"),
    )
    return " · ".join(item for item in known if item) or "no provenance was recorded"


def provenance_section(report: Mapping[str, Any]) -> str:
    """Versions, digests, seed, machine, command and stage times."""
    provenance, plan = section(report, "provenance"), section(report, "plan")
    model, calibration = section(plan, "model"), section(plan, "calibration")
    amounts = [f"{calibration[key]} {key[2:]}" for key in ("n_samples", "n_tokens") if calibration.get(key) is not None]
    source = f" from {calibration['source']}" if calibration.get("source") else ""
    pairs = [
        ("Command", code(provenance.get("command"))),
        ("Created", provenance.get("created")),
        ("Seed", provenance.get("seed", plan.get("seed"))),
        ("Model", model.get("id")),
        ("Model fingerprint", code(model.get("fingerprint"))),
        ("Calibration", f"{', '.join(amounts)}{source}"),
        ("Calibration digest", code(calibration.get("digest"))),
    ]
    content = "" if provenance else absent("versions, machine and command were not recorded")
    if known := [(name, value) for name, value in pairs if value not in (None, "", "–")]:
        content += f'<div class="panel"><h3>Run</h3>{facts(known)}</div>'
    versions = section(provenance, "versions") or section(plan, "versions")
    boxes = []
    for name, value in (("Machine", section(provenance, "machine")), ("Versions", versions)):
        present = [(key, item) for key, item in value.items() if item not in (None, {}, [])]
        lines = [(key.removesuffix("_bytes").replace("_", " "), _fact(key, item)) for key, item in present]
        boxes += [f'<div class="panel"><h3>{name}</h3>{facts(lines)}</div>'] if lines else []
    content += f'<div class="grid">{"".join(boxes)}</div>' if boxes else ""
    if report["artifacts"]:
        content += f'<div class="panel"><h3>Artifacts</h3>{_artifact_table(report["artifacts"])}</div>'
    stages = [
        [stage.get("name"), stage.get("state"), fmt.seconds(t) if (t := fmt.number(stage.get("elapsed_s"))) else None]
        for stage in provenance.get("stages") or []
    ]
    return content + (details("Stages and their times", table(["stage", "state", "time"], stages)) if stages else "")


def _fact(key: str, value: Any) -> Any:
    size = fmt.number(value) if key.endswith("bytes") else None
    return value if size is None else fmt.size_bytes(size)


def _artifact_table(artifacts: list[Json]) -> str:
    rows = []
    for item in artifacts:
        manifest = section(item, "manifest")
        weights = fmt.number(manifest.get("weight_bytes"))
        rows.append(
            [
                item.get("name"), manifest.get("format"), manifest.get("n_layers"), manifest.get("precision"),
                None if weights is None else fmt.size_bytes(weights), code(item.get("digest"), 16),
                code(manifest.get("plan_digest"), 16),
            ]
        )  # fmt: skip
    return table(["artifact", "format", "layers", "precision", "weights", "digest", "plan"], rows, numeric=[2, 4])

"""The values of the page's sections about decisions and proof: what was removed, parity, and where it comes from.

Each function takes the content of a ``report.json`` and gives what the template of its section shows.  A part that is
absent is None or empty.  The template then says what was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from sglp_bench.report import wording as fmt
from sglp_bench.report.charts import plan_pictures
from sglp_bench.report.facts import Json, is_dear, numbers_only, perplexities, section
from sglp_bench.report.shown import HALF, Badge, Table, code, digits, picture
from sglp_deploy.overlay import HEAL, repairs_of


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


def price_values(report: Mapping[str, Any]) -> Json | None:
    """What was paid, in sentences that stand before all others; None where it was not evaluated."""
    plan, found = section(report, "plan"), perplexities(report)
    if not found.keys() >= {"dense", "pruned"}:
        return None
    gone, kept = len(plan.get("drop", [])), len(plan.get("keep", []))
    cause = f"Removing {gone} of {gone + kept} layers" if kept else "Pruning"
    dense, pruned = fmt.significant(found["dense"]), fmt.significant(found["pruned"])
    times = f"{fmt.significant(found['pruned'] / found['dense'])} times the dense model's"
    said = f"{cause} takes perplexity on held-out text from {dense} to"
    refused = section(plan, "compensation").get("refused") or []
    made_by = list(dict.fromkeys(str(record["repair"]) for record in repairs_of(section(plan, "overlay"))))
    repairs, raw = [name for name in made_by if name != HEAL], found.get("unrepaired")
    by = f" ({fmt.words(repairs)})" if repairs else ""
    if raw and "repaired" in found:
        repaired = fmt.significant(found["repaired"])
        said += f" {fmt.significant(raw)} before repair, {repaired} after it{by} and {pruned} after healing, {times}."
    elif raw:
        step = "healing" if made_by == [HEAL] else "repair"
        said += f" {fmt.significant(raw)} before {step} and {pruned} after it{by}, {times}."
    else:
        said += f" {pruned}, {times}."
    sentences = [said]
    for item in refused:
        step = "Healing" if item.get("repair") == HEAL else f"The repair {item.get('repair')}"
        sentences.append(f"{step} was not used: {item.get('why')}.")
    return {"sentences": sentences, "dear": is_dear(report)}


def _layers(drop: list[int]) -> str:
    return f"layers {fmt.words([str(layer) for layer in drop])}" if drop else ""


def stack_values(report: Mapping[str, Any]) -> Json | None:
    """The row of layers under the title; None without a plan."""
    plan = section(report, "plan")
    if not plan.get("keep"):
        return None
    drop = plan.get("drop", [])
    segments = plan.get("segments", []) if len(plan.get("segments", [])) > 1 else []
    return {
        "removed": _layers(drop),
        "segmented": bool(segments),
        "picture": picture(
            lambda width, key: plan_pictures.layer_strip(plan["n_layers"], drop, segments, width, key=key), "strip"
        ),
    }


def plan_values(report: Mapping[str, Any]) -> Json | None:
    """Similarity, segmentation, importance, and the table of layers; None without a plan."""
    plan = section(report, "plan")
    if not plan.get("keep"):
        return None
    drop, segments = plan.get("drop", []), plan.get("segments", [])
    scores, criterion = section(plan, "scores"), str(plan.get("criterion") or "")
    similarity, losses = plan.get("similarity"), plan.get("segment_losses")
    values = scores.get(criterion) or next(iter(scores.values()), None)
    found: Json = {
        "method": plan.get("method"),
        "criterion": criterion,
        "removed": _layers(drop),
        "layers": _layer_table(plan["n_layers"], set(drop), segments, scores),
        **dict.fromkeys(("similarity", "losses", "importance")),
    }
    if similarity and numbers_only(similarity):
        found["similarity"] = Markup(plan_pictures.heat_map(similarity, segments, drop, key="cka"))
    if losses and numbers_only([losses]):
        found["losses"] = picture(
            lambda width, key: plan_pictures.loss_curve(losses, len(segments), width, key=key), "loss", wide=HALF
        )
    if values:
        found["importance"] = picture(
            lambda width, key: plan_pictures.importance_bars(values, drop, segments, criterion, width, key=key),
            "importance",
        )
    return found


def _layer_table(n_layers: int, removed: set[int], segments: list[list[int]], scores: Json) -> Table:
    rows = []
    for layer in range(n_layers):
        inside = next((f"S{i + 1}" for i, (start, end) in enumerate(segments) if start <= layer < end), None)
        values = [
            fmt.significant(row[layer], 4) if fmt.number(row[layer]) is not None else None for row in scores.values()
        ]
        rows.append([layer, inside, "✗ removed" if layer in removed else "kept", *values])
    head = ["layer", "segment", "decision", *scores]
    return Table(head, rows, numeric=range(3, len(head)))


def parity_values(report: Mapping[str, Any]) -> list[Json]:
    """One panel per certificate: verdict, cases, thresholds, noise floor."""
    return [_certificate(item) for item in report["parity"]]


def _certificate(item: Json) -> Json:
    rows = [_case(case) for case in item.get("cases") or [] if isinstance(case, dict)]
    head = [
        "case", "positions", "max |Δ logit|", "KL p99", "KL max", "least cosine", "top token",
        "greedy tokens", "worst place",
    ]  # fmt: skip
    passed = item.get("passed") is True
    return {
        "name": item.get("name"),
        "verdict": Badge(passed, "passed" if passed else "failed"),
        "runner": item.get("runner"),
        "reference": item.get("reference"),
        "cases": Table(head, rows, numeric=range(1, 8), wrap=[8]) if rows else None,
        "reasons": item.get("reasons") or [],
        "facts": [
            ("Noise floor", _named_numbers(section(item, "noise_floor")) or "not measured"),
            ("Thresholds", _named_numbers(section(item, "thresholds")) or "not recorded"),
            ("Artifact", code(item.get("artifact_digest"))),
        ],
    }


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


def provenance_values(report: Mapping[str, Any]) -> Json:
    """Versions, digests, seed, machine, command and stage times."""
    provenance, plan = section(report, "provenance"), section(report, "plan")
    model, calibration = section(plan, "model"), section(plan, "calibration")
    amounts = [f"{calibration[key]} {key[2:]}" for key in ("n_samples", "n_tokens") if calibration.get(key) is not None]
    source = f" from {calibration['source']}" if calibration.get("source") else ""
    run = [
        ("Command", code(provenance.get("command"))),
        ("Created", provenance.get("created")),
        ("Seed", provenance.get("seed", plan.get("seed"))),
        ("Model", model.get("id")),
        ("Model fingerprint", code(model.get("fingerprint"))),
        ("Calibration", f"{', '.join(amounts)}{source}"),
        ("Calibration digest", code(calibration.get("digest"))),
    ]
    versions = section(provenance, "versions") or section(plan, "versions")
    boxes = []
    for name, value in (("Machine", section(provenance, "machine")), ("Versions", versions)):
        present = [(key, item) for key, item in value.items() if item not in (None, {}, [])]
        lines = [(key.removesuffix("_bytes").replace("_", " "), _fact(key, item)) for key, item in present]
        boxes += [(name, lines)] if lines else []
    stages = [
        [stage.get("name"), stage.get("state"), fmt.seconds(t) if (t := fmt.number(stage.get("elapsed_s"))) else None]
        for stage in provenance.get("stages") or []
    ]
    return {
        "recorded": bool(provenance),
        "run": [(name, value) for name, value in run if value not in (None, "")],
        "boxes": boxes,
        "artifacts": _artifact_table(report["artifacts"]) if report["artifacts"] else None,
        "stages": Table(["stage", "state", "time"], stages) if stages else None,
    }


def _fact(key: str, value: Any) -> Any:
    size = fmt.number(value) if key.endswith("bytes") else None
    return value if size is None else fmt.size_bytes(size)


def _artifact_table(artifacts: list[Json]) -> Table:
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
    return Table(["artifact", "format", "layers", "precision", "weights", "digest", "plan"], rows, numeric=[2, 4])

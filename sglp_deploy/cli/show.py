"""Any of our files as text: the table a person wants first, chosen by the file's own schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from sglp_deploy import _io, plan
from sglp_deploy.cli.console import table
from sglp_deploy.errors import ArtifactError
from sglp_deploy.overlay import HEAL, repairs_of
from sglp_deploy.parity import certificate
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.tasks.base import QUALITY_VERSIONS, judged_models

_MIB = 1 << 20
_CELL = 60  # characters of a configuration value in a table
# A folder is shown by the first of these it holds.
_IN_FOLDER = ("run.json", "manifest.json", "comparison.json", "result.json", "report.json", "sglp_plan.json")

Json = Mapping[str, Any]


def read(path: Path) -> dict[str, Any]:
    """The JSON of one of our files, or of the file that stands for a folder of ours.

    Raises:
        ArtifactError: If there is none, it is not JSON, or it carries no schema.
    """
    if path.is_dir():
        found = next((path / name for name in _IN_FOLDER if (path / name).is_file()), None)
        if found is None:
            raise ArtifactError(f"{path} holds none of {', '.join(_IN_FOLDER)}; it is not a folder of ours; check it")
        path = found
    try:
        value = _io.parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; one of our files was expected; check the path") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read; {error}; one of our JSON files was expected") from error
    if not isinstance(value, dict) or not isinstance(value.get("schema"), str):
        raise ArtifactError(f"{path} carries no schema; it is not one of our files; check the path")
    return value


def describe(value: Json) -> str:
    """The table for ``value``, by its schema.

    Raises:
        ArtifactError: If the schema is unknown or the file is incomplete.
    """
    kind = str(value.get("schema"))
    if kind not in _VIEWS:
        raise ArtifactError(
            f"schema {kind!r} is unknown to this version; it cannot be shown; the known ones are "
            f"{', '.join(sorted(_VIEWS))}"
        )
    _refuse_mistyped(kind, value)
    try:
        return _VIEWS[kind](value)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ArtifactError(f"the {kind} file is incomplete; {error!r}; make it again") from error


def _refuse_mistyped(kind: str, value: Json) -> None:
    """Check what has a reader of its own by that reader, and what has none by its shape."""
    from sglp_bench import shapes
    from sglp_bench.judge.compare import Comparison
    from sglp_bench.result import BenchmarkResult
    from sglp_deploy.shapes import files

    readers: dict[str, Callable[[Json], object]] = {
        "plan": plan.PruningPlan.from_json,
        "parity": ParityReport.from_json,
        "comparison": Comparison.from_json,
        "result": BenchmarkResult.from_json,
    }
    known: dict[str, type[shapes.Shape]] = {
        "artifact": files.Artifact,
        "quality": files.Quality,
        "run": files.Run,
        "report": shapes.Report,
    }
    name = kind.partition("/")[0]
    if name in readers:
        readers[name](value)
    elif name in known:
        files.refuse_mistyped(known[name], value, f"the {kind} file", "make it again")


def _plan(value: Json) -> str:
    lines = [
        f"{value['method']}: keep {len(value['keep'])} of {value['n_layers']} layers of {value['model']['id']}",
        f"removed: {', '.join(map(str, value['drop'])) or 'none'}",
    ]
    if changed_weights := value.get("overlay"):
        steps = ", ".join(" ".join(map(str, list(record.values())[:1])) for record in changed_weights["made_by"])
        lines.append(f"weights changed: {changed_weights['n_tensors']} tensors{' by ' if steps else ''}{steps}")
    lines += repair_lines(value)
    if value.get("stack"):
        lines.append(f"layers of {value['stack']}")
    changed, looked_at = [], []
    for change in value.get("config_changes", ()):
        if change["before"] != change["after"]:
            changed.append((change["entry"], _short(change["before"]), _short(change["after"]), change["rule"]))
        elif change["rule"].startswith("not known"):
            looked_at.append(f"look at {change['entry']} = {_short(change['before'])}: {change['rule']}")
    if changed:
        lines += ["", table(changed, ("configuration", "before", "after", "why")), *looked_at, ""]
    scores = (value["scores"] or {}).get(value["criterion"] or "")
    if not scores:
        return "\n".join(lines)
    lines.append(f"criterion {value['criterion']}, quota {value['quota']}, {len(value['segments'])} segments\n")
    dropped = set(value["drop"])
    rows = []
    for number, (start, end) in enumerate(value["segments"], 1):
        for layer in range(start, end):
            rows.append((f"S{number}", layer, f"{scores[layer]:.4g}", "removed" if layer in dropped else ""))
    return "\n".join(lines) + "\n" + table(rows, ("segment", "layer", str(value["criterion"]), ""))


def repair_lines(plan: Json) -> list[str]:
    """A line for each repair of a plan, kept or refused, and one for each thing that it left as it was."""
    lines = []
    for name, words, record in _repairs(plan):
        lines.append(f"{'healing' if name == HEAL else f'repair {name}'}: {words}")
        lines += [f"healed on {_share(share)}" for share in record.get("by_share", ())]
        lines += [f"not done: {sentence}" for sentence in record.get("not_done", ())]
    return lines


def repair_summary(plan: Json) -> str:
    """All repairs of a plan in one line; empty where there is none."""
    return "; ".join(f"{name}: {words}" for name, words, _ in _repairs(plan))


def _repairs(plan: Json) -> list[tuple[str, str, Json]]:
    """Name, words and record of each repair: those that were refused after those that were kept."""
    kept = repairs_of(plan.get("overlay"))
    refused = (plan.get("compensation") or {}).get("refused") or ()
    return [
        *((record["repair"], f"kept; {_losses(record)}", record) for record in kept),
        *((record["repair"], f"refused, because {record['why']}; {_losses(record)}", record) for record in refused),
    ]


def _share(record: Json) -> str:
    losses = (_number(record[f"loss_{arm}"], ".4f") for arm in ("dense", "before", "after"))
    return "{}: {} dense, {} before, {} after".format(record["source"], *losses)


def _losses(record: Json) -> str:
    if "loss_before" not in record:
        return "nothing was fitted"
    dense, before, after = (_number(record[f"loss_{arm}"], ".4f") for arm in ("dense", "before", "after"))
    step = "healing" if record["repair"] == HEAL else "the repair"
    return f"held-out loss {dense} dense, {before} before {step}, {after} after"


def _short(value: Any) -> str:
    """A configuration value in a table's cell: a list of names by its runs."""
    if not isinstance(value, list) or not value:
        return str(value)
    runs = [(name, len(list(same))) for name, same in groupby(map(str, value))]
    text = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in runs)
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."


def _artifact(value: Json) -> str:
    rows: list[tuple[Any, ...]] = [
        ("format", value["format"]),
        ("layers", value["n_layers"]),
        ("precision", value["precision"]),
        ("weights", f"{value['weight_bytes'] / _MIB:.1f} MiB"),
        ("model", value["model"].get("id")),
        ("plan", value["plan_digest"][:16]),
    ]
    details = value["details"]
    if details.get("targets"):
        rows.append(("targets", ", ".join(details["targets"])))
    if details.get("execution"):
        rows.append(("execution", details["execution"]))
    files = [
        (name, f"{record['bytes'] / _MIB:.2f} MiB", record["sha256"][:16]) for name, record in value["files"].items()
    ]
    return table(rows) + "\n\n" + table(files, ("file", "size", "sha256"))


def _parity(value: Json) -> str:
    rows = []
    for case in value["cases"]:
        found = case["statistics"] or {}
        greedy = case["greedy"] or {}
        rows.append(
            (
                case["name"],
                "pass" if case["passed"] else "FAIL",
                case["positions"],
                _number(found.get("kl_p99")),
                _number(found.get("max_abs")),
                _number(found.get("cosine_min"), ".9f"),
                f"{greedy.get('equal_tokens', '-')}/{greedy.get('tokens', '-')}",
            )
        )
    verdict = "PASSED" if ParityReport.from_json(value).passed else "FAILED"  # worked out, whatever the file claims
    head = f"parity {verdict}: {value['format']} on {value['runner']} against {value['reference']}"
    text = head + "\n\n" + table(rows, ("case", "", "positions", "KL p99", "max abs", "cosine min", "greedy equal"))
    floor = value["noise_floor"]
    text += "\n\nnoise floor of the reference: "
    text += f"KL p99 {_number(floor.get('kl_p99'))}, max abs {_number(floor.get('max_abs'))}"
    return text + "".join(f"\nreason: {reason}" for reason in value["reasons"])


def _comparison(value: Json) -> str:
    rows = []
    for metric in value["metrics"].values():
        name, interval = metric["metric"], metric["interval"]
        rows.append(
            (
                name,
                _level(name, metric["baseline"]),
                _level(name, metric["candidate"]),
                f"{metric['ratio']:.3f}",
                f"{interval[0]:.3f} - {interval[1]:.3f}" if interval else "-",
                _number(metric["ceiling"], ".3f"),
                metric["verdict"],
            )
        )
    pairs = f"{value['n_pairs']} pairs" if value["paired"] else "not paired"
    head = f"{value['candidate']} against {value['baseline']}, {pairs}, workload {value['workload']['name']}"
    columns = ("metric", "baseline", "candidate", "ratio", "95 % interval", "ceiling", "verdict")
    return f"{head}\n\n{table(rows, columns)}" + "".join(f"\nnote: {note}" for note in value["notes"])


def _result(value: Json) -> str:
    from sglp_bench.judge.certificates import unverified_note

    rows, notes = [], []
    for label, arm in value["arms"].items():
        notes += [note] if (note := unverified_note(label, arm["artifact"])) else []
        samples = [block["samples"] for block in arm["blocks"]]
        rows.append(
            (
                label,
                len(arm["blocks"]),
                f"{1e3 * median(second for sample in samples for second in sample['prefill_s']):.3f} ms",
                f"{1e3 * median(second for sample in samples for row in sample['decode_s'] for second in row):.3f} ms",
                _bytes(arm["memory"].get("host_peak", {}).get("bytes")),
            )
        )
    columns = ("arm", "blocks", "prefill, median", "decode step, median", "peak host memory")
    head = f"workload {value['workload']['name']}"
    return f"{head}\n\n{table(rows, columns)}" + "".join(f"\nnote: {note}" for note in notes)


def _level(metric: str, value: float) -> str:
    return _bytes(value) if metric.endswith("_bytes") else f"{value:.5g}"


def _bytes(amount: Any) -> str:
    return f"{amount / _MIB:.1f} MiB" if isinstance(amount, int | float) else "not measured"


def _quality(value: Json) -> str:
    low, high = value["ratio_interval"]
    rows = [
        (words, f"{value[name]['perplexity']:.3f}", f"{value[name]['nats_per_token']:.4f}")
        for name, words in judged_models(value).items()
    ]
    protocol = value["protocol"]
    return (
        table(rows, ("model", "perplexity", "nats a token"))
        + f"\n\nratio {value['ratio']:.3f} (95 % interval {low:.3f} - {high:.3f}) on {protocol['n_tokens']} tokens of "
        f"{protocol['text']}, chunks of {protocol['chunk_tokens']}" + _tasks(value) + _generation(value)
    )


def _tasks(value: Json) -> str:
    """A line for each metric of each task; of two models with the difference over the same items."""
    rows = []
    for name, task in (value.get("tasks") or {}).items():
        for metric in task["metrics"].values():
            arms = [metric[arm] for arm in ("dense", "pruned")] if "difference" in metric else [metric]
            row = [f"{name} ({task['n_items']})", metric["label"], *(_with_interval(arm, ".3f") for arm in arms)]
            if "difference" in metric:
                paired = {"value": metric["difference"], "interval": metric["difference_interval"]}
                row.append(_with_interval(paired, "+.3f"))
            rows.append(row)
    if not rows:
        return ""
    head = ("task (items)", "metric", "dense", "pruned", "difference, 95 % interval")
    return "\n\n" + table(rows, head if len(rows[0]) == len(head) else (*head[:2], "value, 95 % interval"))


def _with_interval(figure: Json, form: str) -> str:
    low, high = figure["interval"]
    return f"{figure['value']:{form}} ({low:{form}} to {high:{form}})"


def _generation(value: Json) -> str:
    found = value.get("generation")
    if not found:
        return ""
    if "not_made" in found:
        return f"\n\nno sample was written: {found['not_made']}"
    shares = ", ".join(f"{arm} {_number(found['repetition'][arm], '.0%')}" for arm in ("dense", "pruned"))
    lines = [f"{found['decoding']}; repeated runs of {found['repetition']['n']} tokens: {shares}"]
    for row in found["rows"]:
        lines.append(row["prompt"])
        lines += [f"  {arm.ljust(6)} {_printable(row[arm]['text'])}" for arm in ("dense", "pruned")]
    return "\n\n" + "\n".join(lines)


def _printable(text: str) -> str:
    """One line that no terminal obeys: a model may write anything."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))


def _run(value: Json) -> str:
    rows = [
        (name, stage["state"], f"{stage['elapsed_s']:.1f} s", stage.get("note", ""))
        for name, stage in value["stages"].items()
    ]
    return f"{value['title']}\n\n" + table(rows, ("stage", "state", "time", ""))


def _report(value: Json) -> str:
    rows = [(card["label"], card["value"], card["detail"]) for card in value["cards"]]
    missing = "".join(f"\nnot measured: {line}" for line in value["missing"])
    limits = (value.get("accept") or {}).get("findings", ())
    lines = "".join(f"\n{'met' if found['met'] else 'MISSED'}: {found['sentence']}" for found in limits)
    return f"{value['title']}\n\n{table(rows)}{missing}{lines}"


def _perplexity(value: Json) -> str:
    return (
        f"perplexity {value['perplexity']:.3f} ({value['nats_per_token']:.4f} nats a token) on {value['n_tokens']} "
        f"tokens of {value['text']}, chunks of {value['chunk_tokens']}" + _tasks(value)
    )


def _similarity(value: Json) -> str:
    values = value["values"]
    rows = [(layer, f"{row[layer + 1]:.4f}") for layer, row in enumerate(values[:-1])]
    head = f"similarity of {len(values)} layers, {value['estimator']} linear CKA"
    return f"{head}\n\n{table(rows, ('layer', 'with the next'))}"


def _number(value: Any, form: str = ".3g") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _environment(value: Json) -> str:
    rows = [("environment", value["name"]), ("Python", value["python"]), ("packages", len(value["packages"]))]
    return table(rows) + "\n\n" + "\n".join(value["packages"])


_VIEWS: dict[str, Callable[[Json], str]] = {
    "artifact/1": _artifact,
    "comparison/1": _comparison,
    "comparison/2": _comparison,
    "environment/1": _environment,
    **{f"parity/{version}": _parity for version in certificate.VERSIONS},
    "perplexity/1": _perplexity,
    **{f"plan/{version}": _plan for version in plan.VERSIONS},
    **{f"quality/{version}": _quality for version in QUALITY_VERSIONS},
    "report/1": _report,
    "result/1": _result,
    "result/2": _result,
    "run/1": _run,
    "run/2": _run,
    "similarity/1": _similarity,
}

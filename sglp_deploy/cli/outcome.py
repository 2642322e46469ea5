"""How a run ended, in a short table: what each stage found, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglp_bench.judge.accept import missed
from sglp_bench.judge.compare import Comparison
from sglp_deploy import _io
from sglp_deploy.cli.console import table
from sglp_deploy.cli.exits import Exit
from sglp_deploy.cli.show import repair_summary
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.plan import PruningPlan
from sglp_deploy.tasks.base import QUALITY_VERSIONS, judged_models

# The metrics of a comparison that a reader is told of.
PREFILL, DECODE = "prefill_latency_s", "decode_latency_s_per_token"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    text: str
    value: dict[str, Any]
    exit_code: int


def outcome_of(root: Path, plan: PruningPlan, failures: Mapping[str, str]) -> Outcome:
    """What the files of a run say, and its exit code: parity's before that of a limit, and that before a format's.

    Args:
        root: The run folder, finished.
        plan: The run's plan.
        failures: Stages that failed alone, with what they said.
    """
    rows: list[tuple[str, str]] = [("layers", f"{plan.n_layers} -> {len(plan.keep)}")]
    if repairs := repair_summary({"overlay": plan.overlay, "compensation": plan.compensation}):
        rows.append(("repair", repairs))
    exit_code = Exit.DONE
    for file in sorted((root / "parity").glob("*.json")):
        report = ParityReport.load(file)
        rows.append((f"parity {file.stem}", _verdict(report)))
        exit_code = exit_code if report.passed else Exit.PARITY
    for file in sorted((root / "bench").glob("*/comparison.json")):
        comparison = Comparison.load(file)
        for metric, label in ((PREFILL, "prefill"), (DECODE, "decode")):
            rows.append((f"{file.parent.name} {label}", _speed(comparison, metric)))
    quality = _io.read_json(root / "quality.json", "quality", QUALITY_VERSIONS)
    verdict = _io.read_json(root / "report" / "report.json", "report").get("accept")
    if verdict:
        sentences = missed(verdict)
        # A sentence begins with what is limited; the rows are an object too, so each needs a name of its own.
        rows += [(f"MISSED {name}", why) for name, _, why in (sentence.partition(": ") for sentence in sentences)]
        rows += [] if sentences else [("limits", f"all {len(verdict['findings'])} are met")]
        exit_code = exit_code or (Exit.LIMIT if sentences else Exit.DONE)
    for what, why in failures.items():
        rows.append((what, f"FAILED: {why}"))
        exit_code = exit_code or Exit.ERROR
    perplexity = f"{quality['dense']['perplexity']:.2f} -> {quality['pruned']['perplexity']:.2f}"
    between = [
        f"{words.removeprefix('pruned, ')} {quality[name]['perplexity']:.2f}"
        for name, words in judged_models(quality).items()
        if name in ("unrepaired", "repaired")
    ]
    perplexity += f" ({', '.join(between)})" if between else ""
    rows.append(("perplexity", perplexity))
    page = root / "report" / "report.html"
    rows.append(("checkpoint", str(root / "checkpoint")))
    rows.append(("report", str(page)))
    value = {
        "schema": "outcome/1",
        "exit_code": exit_code,
        "report": str(page),
        "rows": dict(rows),
        "failures": dict(failures),
        "accept": verdict,
    }
    return Outcome(table(rows), value, exit_code)


def _verdict(report: ParityReport) -> str:
    known = [case["statistics"] for case in report.cases]
    # A case without statistics met a NaN or an infinity.
    if not known or not all(known):
        worst = "not finite"
    elif all("kl_p99" in found for found in known):
        worst = f"KL p99 {max(found['kl_p99'] for found in known):.1e} nats"
    else:  # no logits: hidden states are compared by their size
        worst = f"largest difference {max(found['max_abs'] for found in known):.1e}"
    return f"{'passed' if report.passed else 'FAILED'}, {worst}"


def _speed(comparison: Comparison, metric: str) -> str:
    found = comparison.metrics[metric]
    text = f"{found.ratio:.3f}x"
    if found.interval:
        text += f" ({found.interval[0]:.3f} - {found.interval[1]:.3f})"
    text += f", {found.verdict}"
    if found.fraction_of_ceiling and found.ceiling:
        text += f", {found.fraction_of_ceiling:.0%} of the ceiling {found.ceiling:.3f}x"
    if found.control and found.control.interval:
        text += f"; A/A {found.control.interval[0]:.3f} - {found.control.interval[1]:.3f}"
    return text

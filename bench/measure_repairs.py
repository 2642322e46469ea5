"""Perplexity of a pruned model by plan and repair, on text that neither was made from.

    python bench/measure_repairs.py MODEL --drop 8 --calibration calibration.txt --text judged.txt -o repairs.json

A plan is "auto", a criterion of the planner ``sglp`` ("grad-norm", "block-influence", "taylor"), or layers
("12,13,14").  Rows are judged by plain transformers: independent rows, the first token of each not predicted.  A cell
that is in the file already is not measured again.  Seconds are wall time of one run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from sglp_deploy import CalibrationSet, Compressor, _io
from sglp_deploy.artifact import producer_versions
from sglp_deploy.plan import PruningPlan
from sglp_deploy.tasks.language import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = "repairs/1"  # history: 1 = first


def main() -> int:
    """Measure every cell that is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--drop", type=int, default=8, help="layers to remove, where a plan is a criterion")
    parser.add_argument("--plans", nargs="+", default=["grad-norm", "block-influence", "taylor", "auto"])
    parser.add_argument("--repairs", nargs="+", default=["none", "scale", "linear", "refit", "local"])
    parser.add_argument("--calibration", required=True, help="text that plans and repairs are made from")
    parser.add_argument("--planning-tokens", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=131_072, help="calibration tokens of a repair")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--text", required=True, help="text to judge by")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    file = arguments.output
    cells: dict[str, Any] = _io.read_json(file, "repairs")["cells"] if file.exists() else {}
    compressor = Compressor.from_pretrained(
        arguments.model,
        dtype="fp32",
        calibration=CalibrationSet.parse(
            arguments.calibration, max_tokens=arguments.planning_tokens, sequence_length=arguments.sequence_length
        ),
    )
    text = CalibrationSet.parse(
        arguments.calibration, max_tokens=arguments.tokens, sequence_length=arguments.sequence_length, batch_size=2
    )
    judged = rows(compressor, arguments)
    plans: dict[str, PruningPlan] = {}
    for repair in ("dense", *arguments.repairs):
        for name in arguments.plans if repair != "dense" else [""]:
            key = f"{name} {arguments.drop if not name[:1].isdigit() else 'layers'} {repair}".strip()
            if key in cells:
                continue
            print(f"{key} ...", file=sys.stderr)
            if repair == "dense":
                cells[key] = {"perplexity": judge(compressor.model, judged)}
            else:
                plans[name] = plans.get(name) or plan_of(compressor, name, arguments.drop)
                cells[key] = measure(compressor, plans[name], repair, text, judged)
            _io.write_json(arguments.output, result(arguments, cells))
    print(table(cells))
    return 0


def plan_of(compressor: Compressor, name: str, drop: int) -> PruningPlan:
    """The plan a name stands for."""
    if name[:1].isdigit():
        return compressor.plan_by_hand([int(layer) for layer in name.split(",")])
    if name == "auto":
        return compressor.plan(drop=drop, method=name)
    return compressor.plan(drop=drop, options={"criterion": name})


def measure(
    compressor: Compressor, plan: PruningPlan, repair: str, text: CalibrationSet, judged: np.ndarray
) -> dict[str, Any]:
    """One cell: the plan repaired, and what it is judged at."""
    started = time.perf_counter()
    repaired = plan if repair == "none" else compressor.repair(plan, repair, calibration=text)
    seconds = time.perf_counter() - started
    found = {"drop": list(plan.drop), "seconds": round(seconds, 1)}
    refused = (repaired.compensation or {}).get("refused")
    if refused:
        return found | {"refused": refused[-1]["why"]}
    return found | {"perplexity": judge(compressor.materialize(repaired).module, judged)}


def rows(compressor: Compressor, arguments: argparse.Namespace) -> np.ndarray:
    """The judged text in rows of tokens, from its beginning."""
    if compressor.tokenizer is None:
        raise SystemExit("the model has no tokenizer; text cannot be judged; add its files to the model's folder")
    words = Path(arguments.text).read_text(encoding="utf-8")
    ids = np.asarray(compressor.tokenizer(words, verbose=False)["input_ids"], dtype=np.int64)
    n_rows = min(arguments.rows, len(ids) // arguments.row_tokens)
    return ids[: n_rows * arguments.row_tokens].reshape(n_rows, arguments.row_tokens)


def judge(model: torch.nn.Module, judged: np.ndarray) -> float:
    """Perplexity over independent rows."""
    batches = CalibrationSet.from_token_ids(
        list(judged), max_tokens=judged.size, sequence_length=judged.shape[1], batch_size=1
    )
    return perplexity(cast("PreTrainedModel", model), batches.encode(None)).perplexity


def result(arguments: argparse.Namespace, cells: dict[str, Any]) -> dict[str, Any]:
    """What the file holds."""
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    return {"schema": SCHEMA, "asked": asked, "cells": cells, "versions": producer_versions("torch", "transformers")}


def table(cells: dict[str, Any]) -> str:
    """The cells as a Markdown table."""
    lines = ["| plan and repair | perplexity | seconds |", "|---|---|---|"]
    for key, cell in cells.items():
        figure = f"{cell['perplexity']:.2f}" if "perplexity" in cell else f"refused: {cell['refused']}"
        lines.append(f"| {key} | {figure} | {cell.get('seconds', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

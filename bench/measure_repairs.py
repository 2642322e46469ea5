"""What a pruned model is worth by plan and repair: perplexity on texts that neither was made from, right answers.

    python bench/measure_repairs.py MODEL --drop 3 6 8 --calibration calibration.txt --text judged.txt \\
        --questions questions.jsonl -o repairs.json

A plan is "auto", a criterion of the planner ``sglp`` ("grad-norm", "block-influence", "taylor"), or layers
("12,13,14").  A repair may be a chain: "refit+heal" heals what was refitted, on the default mix of texts.  Rows are
judged by plain transformers: independent rows, the first token of each not predicted.  Questions are multiple choice,
judged by length-normalised log-likelihood.  A cell that is in the file already is not measured again.  Seconds are wall
time.
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
from sglp_deploy.evidence.precision import computing, precision_of
from sglp_deploy.plan import PruningPlan
from sglp_deploy.tasks.language import perplexity
from sglp_deploy.tasks.multiple_choice import MultipleChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = "repairs/2"  # history: 1 = one text; 2 = several, and questions


def main() -> int:
    """Measure every cell that is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--drop", type=int, nargs="+", default=[8], help="layers to remove, where none are named")
    parser.add_argument("--plans", nargs="+", default=["grad-norm", "block-influence", "taylor", "auto"])
    parser.add_argument("--repairs", nargs="+", default=["none", "scale", "linear", "refit", "local", "refit+heal"])
    parser.add_argument("--calibration", required=True, help="text that plans and repairs are made from")
    parser.add_argument("--planning-tokens", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=131_072, help="calibration tokens of a repair")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--heal-tokens", type=int, default=65_536)
    parser.add_argument("--text", nargs="+", required=True, help="texts to judge by")
    parser.add_argument("--questions", help="multiple choice to judge by, JSON lines")
    parser.add_argument("--n-questions", type=int, default=500)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    file = arguments.output
    cells: dict[str, Any] = _io.read_json(file, "repairs", (2,))["cells"] if file.exists() else {}
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
    judge = Judge(compressor, arguments)
    made: dict[str, PruningPlan] = {}
    wanted = [("", 0, "dense")] + [
        (name, drop, repair)
        for drop in arguments.drop
        for repair in arguments.repairs
        for name in arguments.plans
        if not name[:1].isdigit() or drop == arguments.drop[0]
    ]
    for name, drop, repair in wanted:
        key = f"{name} {drop if not name[:1].isdigit() else 'layers'} {repair}" if name else repair
        if key in cells:
            continue
        print(f"{key} ...", file=sys.stderr)
        if not name:
            cells[key] = judge(compressor.model)
        else:
            cells[key] = measure(compressor, name, drop, repair, text, judge, made, arguments.heal_tokens)
        _io.write_json(file, result(arguments, cells))
    _io.write_json(file, result(arguments, cells))
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
    compressor: Compressor,
    name: str,
    drop: int,
    repair: str,
    text: CalibrationSet,
    judge: Judge,
    made: dict[str, PruningPlan],
    heal_tokens: int,
) -> dict[str, Any]:
    """One cell: the plan repaired step by step, and what it is judged at; ``made`` keeps plans between the cells."""
    key = f"{name} {drop}"
    if key not in made:
        made[key] = plan_of(compressor, name, drop)
    plan, seconds = made[key], 0.0
    for step in () if repair == "none" else repair.split("+"):
        key = f"{key} {step}"
        if key not in made:
            started = time.perf_counter()
            if step == "heal":
                made[key] = compressor.heal(plan, tokens=heal_tokens)
            else:
                made[key] = compressor.repair(plan, step, calibration=text)
            seconds += time.perf_counter() - started
        plan = made[key]
    found = {"drop": list(plan.drop), "seconds": round(seconds, 1)}
    refused = (plan.compensation or {}).get("refused")
    if refused:
        return found | {"refused": refused[-1]["why"]}
    return found | judge(compressor.materialize(plan).module)


class Judge:
    """Perplexity on each text, and the share of right answers with its 95 % interval.

    Args:
        compressor: Of the unpruned model.
        arguments: Name texts and questions.
    """

    def __init__(self, compressor: Compressor, arguments: argparse.Namespace) -> None:
        self._tokenizer: Any = compressor.tokenizer
        if self._tokenizer is None:
            raise SystemExit("the model has no tokenizer; text cannot be judged; add its files to the model's folder")
        self._rows = {Path(text).name: self._cut(text, arguments) for text in arguments.text}
        asked = arguments.questions
        self._questions = MultipleChoice.read(asked, arguments.n_questions) if asked else None

    def __call__(self, model: torch.nn.Module) -> dict[str, Any]:
        """What ``model`` is worth."""
        found: dict[str, Any] = {"perplexity": {name: perplexity_of(model, rows) for name, rows in self._rows.items()}}
        if self._questions is not None:
            # Only which of two is more probable counts, so bfloat16 does.
            place = next(model.parameters()).device
            with computing(place, precision_of("auto", model)):
                right = self._questions.scores(model, self._tokenizer).values["acc_norm"]
            draws = np.random.default_rng(0).choice(right, (10_000, len(right))).mean(1)
            found["right"] = [float(right.mean()), *(float(each) for each in np.percentile(draws, [2.5, 97.5]))]
            found["answers"] = "".join(
                str(int(each)) for each in right
            )  # of each question, so that plans can be paired
        return found

    def _cut(self, text: str, arguments: argparse.Namespace) -> np.ndarray:
        """The text in rows of tokens, from its beginning."""
        ids = np.asarray(self._tokenizer(Path(text).read_text(encoding="utf-8"), verbose=False)["input_ids"], np.int64)
        n_rows = min(arguments.rows, len(ids) // arguments.row_tokens)
        return ids[: n_rows * arguments.row_tokens].reshape(n_rows, arguments.row_tokens)


def perplexity_of(model: torch.nn.Module, judged: np.ndarray) -> float:
    """Perplexity over independent rows."""
    batches = CalibrationSet.from_token_ids(
        list(judged), max_tokens=judged.size, sequence_length=judged.shape[1], batch_size=1
    )
    return perplexity(cast("PreTrainedModel", model), batches.encode(None)).perplexity


def result(arguments: argparse.Namespace, cells: dict[str, Any]) -> dict[str, Any]:
    """What the file holds."""
    files = {"model", "calibration", "text", "questions", "output"}  # by their names: where they lie says nothing
    asked = {key: names_of(value) if key in files else value for key, value in vars(arguments).items()}
    return {"schema": SCHEMA, "asked": asked, "cells": cells, "versions": producer_versions("torch", "transformers")}


def names_of(given: Any) -> Any:
    """Names of files, without their folders."""
    return [names_of(each) for each in given] if isinstance(given, list) else given and Path(given).name


def table(cells: dict[str, Any]) -> str:
    """The cells as a Markdown table."""
    texts = list(cells["dense"]["perplexity"])
    lines = [f"| plan and repair | {' | '.join(texts)} | right answers | seconds |", "|---" * (len(texts) + 3) + "|"]
    for key, cell in cells.items():
        if "refused" in cell:
            figures = [f"refused: {cell['refused']}", *[""] * len(texts)]
        else:
            figures = [f"{cell['perplexity'][text]:.1f}" for text in texts]
            figures.append("{:.1%} ({:.1%} to {:.1%})".format(*cell["right"]) if "right" in cell else "")
        lines.append(f"| {key} | {' | '.join(figures)} | {cell.get('seconds', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Export one model, dense and pruned, to several formats; write sizes, parity and seconds.

    python bench/measure_exports.py MODEL --drop-layers 3,7 --to onnx,vllm,openvino,tensorrt:target=sm_86:precision=fp16

Each format fails alone; a failure is a row of the table with its reason.  The figures in ``bench/results/`` were made
by this script.  Seconds are wall time of one run beside whatever else the machine was doing: they say what to expect,
and are no comparison.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from sglp_deploy import CalibrationSet, Compressor, _io
from sglp_deploy.artifact import producer_versions
from sglp_deploy.errors import SGLPError
from sglp_deploy.plan import PruningPlan

SCHEMA = "exports/1"  # history: 1 = first


def main() -> int:
    """Run every format on the dense and the pruned model; exit 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--drop-layers", required=True, help="layers to remove, as 3,7")
    parser.add_argument("--to", required=True, help="formats after commas, options after colons: x:key=value")
    parser.add_argument("--work", required=True, type=Path, help="folder for the artifacts, each deleted when judged")
    parser.add_argument("--keep", action="store_true", help="keep the artifacts")
    parser.add_argument("-o", "--output", required=True, type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    compressor = Compressor.from_pretrained(arguments.model, dtype="fp32")
    plans = {
        "dense": compressor.keep_all(),
        "pruned": compressor.plan_by_hand([int(layer) for layer in arguments.drop_layers.split(",")]),
    }
    rows: list[dict[str, Any]] = []
    for wanted in arguments.to.split(","):
        name, *pairs = wanted.split(":")
        options = dict(pair.split("=", 1) for pair in pairs)
        for depth, plan in plans.items():
            print(f"{wanted} {depth} ...", file=sys.stderr)
            row = measure(compressor, plan, name, options, arguments.work / f"{name}-{depth}")
            rows.append({"format": name, "options": options, "depth": depth, "layers": len(plan.keep), **row})
            if not arguments.keep:
                shutil.rmtree(arguments.work / f"{name}-{depth}", ignore_errors=True)
            _io.write_json(arguments.output, result(arguments, rows))
    print(table(rows))
    return 1 if any("error" in row for row in rows) else 0


def measure(
    compressor: Compressor, plan: PruningPlan, name: str, options: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Export and verify one artifact; what went wrong instead, when something did."""
    started = time.perf_counter()
    try:
        artifact = compressor.export(plan, name, folder, **options)
        exported = time.perf_counter()
        report = compressor.verify(artifact, plan, text=CalibrationSet.builtin_held_out(max_tokens=8_192))
    except SGLPError as error:
        return {"error": str(error), "seconds": time.perf_counter() - started}
    statistics = [case["statistics"] or {} for case in report.cases]
    return {
        "precision": artifact.precision,
        "weight_bytes": artifact.weight_bytes,
        "bytes_on_disk": sum(record.bytes for record in artifact.files.values()),
        "export_s": exported - started,
        "verify_s": time.perf_counter() - exported,
        "passed": report.passed,
        "reasons": list(report.reasons),
        "runner": report.runner,
        "kl_p99": max((case.get("kl_p99", 0.0) for case in statistics), default=None),
        "max_abs": max((case.get("max_abs", 0.0) for case in statistics), default=None),
        "execution": artifact.details.get("execution"),
    }


def result(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The file's content."""
    packages = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "onnxruntime-genai", "tensorrt-rtx")
    return {
        "schema": SCHEMA,
        "model": Path(arguments.model).name,
        "drop_layers": arguments.drop_layers,
        "python": platform.python_version(),
        "versions": producer_versions(*packages),
        "rows": rows,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| format | layers | on disk | export | parity | ran by |", "|---|---|---|---|---|---|"]
    for row in rows:
        options = " ".join(f"{key}={value}" for key, value in row["options"].items())
        name = f"{row['format']} {options}".strip()
        if "error" in row:
            lines.append(f"| {name} | {row['layers']} | - | - | failed: {row['error']} | - |")
            continue
        verdict = "passed" if row["passed"] else "FAILED"
        parity = f"{verdict}, KL p99 {row['kl_p99']:.1e}, logit {row['max_abs']:.1e}"
        size, seconds = f"{row['bytes_on_disk'] / 1e6:.0f} MB", f"{row['export_s']:.0f} s"
        lines.append(f"| {name} | {row['layers']} | {size} | {seconds} | {parity} | {row['runner']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--table":
        print(table(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["rows"]))
        sys.exit(0)
    sys.exit(main())

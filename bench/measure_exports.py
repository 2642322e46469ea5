"""Export models, dense and pruned, to several formats; write sizes, parity and seconds.

    python bench/measure_exports.py MODEL --drop-layers 3,7 --to "onnx onnx:precision=int8 tensorrt:target=sm_86,sm_89"

``make exports`` makes every table in ``bench/results/``.  MODEL is a checkpoint, or "resnet-18" or "vit-tiny": the
architecture at its real size with random weights.  Each format fails alone; a failure is a row with its reason.
Seconds are wall time of one run beside whatever else the machine was doing: they say what to expect, and are no
comparison.
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

from sglp_deploy import Compressor, _io
from sglp_deploy.artifact import producer_versions
from sglp_deploy.errors import SGLPError
from sglp_deploy.plan import PruningPlan

SCHEMA = "exports/1"  # history: 1 = first
RANDOM = ("resnet-18", "vit-tiny")


def main() -> int:
    """Run every format on the dense and the pruned model; exit 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help='a checkpoint, "resnet-18" or "vit-tiny"')
    parser.add_argument("--drop-layers", required=True, help="layers to remove, as 3,7")
    parser.add_argument("--to", required=True, help="formats after spaces, options after colons: x:key=value")
    parser.add_argument("--work", required=True, type=Path, help="folder for the artifacts, each deleted when judged")
    parser.add_argument("--keep", action="store_true", help="keep the artifacts")
    parser.add_argument("-o", "--output", required=True, type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    folder = random_model(arguments.model, arguments.work) if arguments.model in RANDOM else arguments.model
    compressor = Compressor.from_pretrained(folder, dtype="fp32")
    plans = {
        "dense": compressor.keep_all(),
        "pruned": compressor.plan_by_hand([int(layer) for layer in arguments.drop_layers.split(",")]),
    }
    rows: list[dict[str, Any]] = []
    for number, wanted in enumerate(arguments.to.split()):
        name, *pairs = wanted.split(":")
        options = dict(pair.split("=", 1) for pair in pairs)
        for depth, plan in plans.items():
            print(f"{wanted} {depth} ...", file=sys.stderr)
            out = arguments.work / f"{number}-{name}-{depth}"
            row = measure(compressor, plan, name, options, out)
            rows.append({"format": name, "options": options, "depth": depth, "layers": len(plan.keep), **row})
            if not arguments.keep:
                shutil.rmtree(out, ignore_errors=True)
            _io.write_json(arguments.output, result(arguments, rows))
    print(table(rows))
    return 1 if any("error" in row for row in rows) else 0


def random_model(name: str, work: Path) -> Path:
    """A folder with the architecture ``name`` at its real size and random weights, the same ones every time."""
    import torch
    import transformers

    torch.manual_seed(0)
    model: Any
    if name == "resnet-18":
        sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
        config = transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=1000)
        model = transformers.ResNetForImageClassification(config)
    else:
        config = transformers.ViTConfig(
            hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=1000
        )
        model = transformers.ViTForImageClassification(config)
    folder = work / name
    model.eval().save_pretrained(folder)
    return folder


def measure(
    compressor: Compressor, plan: PruningPlan, name: str, options: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Export and verify one artifact; what went wrong instead, when something did."""
    started = time.perf_counter()
    try:
        artifact = compressor.export(plan, name, folder, **options)
        exported = time.perf_counter()
        report = compressor.verify(artifact, plan)
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
        # Of the worst case; a model without logits has no KL.
        "kl_p99": max((case["kl_p99"] for case in statistics if case.get("kl_p99") is not None), default=None),
        "max_abs": max((case["max_abs"] for case in statistics if "max_abs" in case), default=None),
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
        kl = "" if row["kl_p99"] is None else f"KL p99 {row['kl_p99']:.1e}, "
        parity = f"{verdict}, {kl}output {row['max_abs']:.1e}" if row["max_abs"] is not None else verdict
        size, seconds = f"{row['bytes_on_disk'] / 1e6:.0f} MB", f"{row['export_s']:.0f} s"
        lines.append(f"| {name} | {row['layers']} | {size} | {seconds} | {parity} | {row['runner']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--table":
        print(table(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["rows"]))
        sys.exit(0)
    sys.exit(main())

"""Our ONNX graph against ONNX Runtime GenAI's own build of the same checkpoint: fp32, CPU, paired in one run.

    python bench/measure_onnx_against_genai.py MODEL --work DIR -o bench/results/onnx-against-genai.json

Both run on the same ONNX Runtime kernels, so what differs is the graph and the cache.  GenAI writes the cache in place
and fuses attention into one operator; our graph concatenates and multiplies.  Three workloads: batch 1 with a prompt of
128 tokens, batch 4 of the same, and batch 1 with 2,048 tokens, where attention takes the most.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_bench.judge.certificates import CERTIFICATE
from sglp_bench.judge.compare import compare_results
from sglp_bench.measure.harness import run_arms, tqdm_progress
from sglp_bench.workloads.generate import Workload
from sglp_deploy import Compressor, _io
from sglp_deploy.artifact import ExportArtifact
from sglp_exporters.genai.exporter import OrtGenaiExporter

SCHEMA = "onnx-against-genai/1"  # history: 1 = first
_BASE = Workload.named("demo")
WORKLOADS = (
    replace(_BASE, name="batch 1, prompt 128", cycles=8),
    replace(_BASE, name="batch 4, prompt 128", batch_size=4, cycles=2),
    replace(_BASE, name="batch 1, prompt 2,048", prompt_tokens=2_048, decode_tokens=16, prefill_repeats=2, cycles=2),
)


class BatchedGenai(OrtGenaiExporter):
    """GenAI with all rows in one generator, as its users run a batch.

    The package's runner gives each row a generator of its own, because a generator of several rows takes tokens from
    outside only once; here it goes on with the tokens it picks itself.
    """

    def open(self, artifact: ExportArtifact, **options: Any) -> BatchedRunner:  # type: ignore[override]  # only what a block asks of it
        """A runner of whole batches; ``device`` is "cpu"."""
        return BatchedRunner(artifact, options.get("threads"))


class BatchedRunner:
    """See :class:`BatchedGenai`."""

    def __init__(self, artifact: ExportArtifact, threads: int | None) -> None:
        self._folder = artifact.path
        self._threads = threads
        self._model: Any = None
        self._generator: Any = None
        self._fresh = False

    def __enter__(self) -> BatchedRunner:
        """Load the graph."""
        import onnxruntime_genai as og

        config = og.Config(str(self._folder))
        if self._threads is not None:
            config.overlay(
                f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {self._threads}}}}}}}}}'
            )
        self._model = og.Model(config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the graph."""
        self._generator = self._model = None

    def forward(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Logits of the last position."""
        return {"logits": self.prefill(inputs["input_ids"])}

    def synchronize(self) -> None:
        """Calls return when results exist."""

    def prefill(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Start all rows; logits (batch, vocab)."""
        import onnxruntime_genai as og

        del attention_mask  # the workload has no padding
        batch, tokens = input_ids.shape
        settings = og.GeneratorParams(self._model)
        settings.set_search_options(
            max_length=tokens + 64, min_length=tokens + 64, batch_size=batch, do_sample=False, early_stopping=False
        )
        self._generator = None
        self._generator = og.Generator(self._model, settings)
        self._generator.append_tokens(input_ids.astype(np.int32))
        return self._logits()

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """One step of all rows with the tokens the generator picks; logits (batch, vocab)."""
        del token_ids
        self._generator.generate_next_token()
        return self._logits()

    def _logits(self) -> NDArray[Any]:
        values = np.array(self._generator.get_logits(), dtype=np.float32)
        return values.reshape(values.shape[0], -1)


def main() -> int:
    """Export both, run every workload, write the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--work", required=True, type=Path, help="folder for the two artifacts and the raw runs")
    parser.add_argument("-o", "--output", required=True, type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    arms = {name: artifact(arguments.model, name, arguments.work) for name in ("ort-genai", "onnx")}
    found = []
    for workload in WORKLOADS:
        # A block's worker imports it by this file's name: this folder is on the path that it is given.
        openers = {"ort-genai": f"{Path(__file__).stem}:BatchedGenai"} if workload.batch_size > 1 else {}
        out = arguments.work / workload.name.replace(",", "").replace(" ", "-")
        result = run_arms(arms, workload, openers=openers, out_dir=out, progress=tqdm_progress())
        comparison = compare_results(result, baseline="ort-genai", candidate="onnx")
        found.append(comparison.to_json())
        _io.write_json(arguments.output, {"schema": SCHEMA, "model": Path(arguments.model).name, "comparisons": found})
        for name, metric in comparison.metrics.items():
            print(f"{workload.name}, {name}: {metric.words}")
    return 0


def artifact(model: str, name: str, work: Path) -> ExportArtifact:
    """The unpruned model as ``name`` (fp32), certified; from an earlier call where there is one."""
    folder = work / name
    if not (folder / CERTIFICATE).exists():
        compressor = Compressor.from_pretrained(model, dtype="fp32")
        made = ExportArtifact.load(folder) if folder.exists() else None
        made = made or compressor.export(compressor.keep_all(), name, folder)
        compressor.verify(made).save(folder / CERTIFICATE)
    return ExportArtifact.load(folder)


if __name__ == "__main__":
    sys.exit(main())

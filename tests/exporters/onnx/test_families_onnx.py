"""Every family exports to ONNX and is certified there, or is refused with the reason.

The reference of the certificate is the unpruned model with its removed layers passed over, which shares nothing with
what made the graph.  An encoder-decoder is pruned on its decoder side; its graph holds both sides all the same.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tiny
import zoo
import zoo_onnx
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import SGLPError
from sglp_deploy.models import LoadedModel, layer_stack, source_of
from sglp_deploy.models.samples import generates
from sglp_deploy.parity import decoder
from sglp_deploy.protocols import GeneratingRunner
from sglp_exporters.onnx.exporter import OnnxExporter
from short_certificates import fewer_steps

# More than ten seconds each, or a near relative of a family that is always run.
SLOW = {
    "albert-two-groups",
    "bart",
    "deberta-v2-convolution",
    "deepseek_v3",
    "dinov2-with-registers",
    "gemma3n",
    "gemma4-embeddings",
    "gemma4-shared",
    "hubert",
    "llama4",
    "mt5",
    "qwen3_moe-step",
    "resnet-basic",
    "smollm3-window",
    "swinv2",
    "t5-gated",
    "wav2vec2-conformer",
    "wav2vec2-convolutions-as-deep",
}

CASES = [
    pytest.param(
        specimen,
        "decoder" if "decoder" in specimen.keep else next(iter(specimen.keep)),
        id=specimen.name,
        marks=[pytest.mark.slow] if specimen.name in SLOW else [],
    )
    for specimen in zoo.specimens()
]


@pytest.fixture(autouse=True)
def no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test traced must not serve this one."""
    monkeypatch.setattr(OnnxExporter, "_template", None)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts of a certificate, and six decoding steps after each in place of 32, which are most of its time."""
    fewer_steps(monkeypatch, steps=6, prompts=decoder.PROMPT_TOKENS)


@pytest.mark.parametrize(("specimen", "side"), CASES)
def test_the_pruned_model_is_certified_on_onnx_runtime(specimen: zoo.Specimen, side: str, tmp_path: Path) -> None:
    module = specimen.build()
    loaded = LoadedModel(module, tiny.tokenizer(), source_of(module, specimen.name))
    compressor = Compressor(loaded, stack=side)
    drop = [index for index in range(compressor.n_layers) if index not in specimen.keep[side]]
    plan = compressor.plan_by_hand(drop)
    refusal = zoo_onnx.REFUSED.get(specimen.name)
    if refusal:
        with pytest.raises(SGLPError, match=re.escape(refusal.error)):
            compressor.export(plan, "onnx", tmp_path / "artifact")
        assert list(tmp_path.iterdir()) == []
        return
    artifact = compressor.export(plan, "onnx", tmp_path / "artifact")
    report = compressor.verify(artifact, plan, threads=1)
    assert report.passed, report.reasons
    assert report.artifact_digest == artifact.digest
    interface = "decoder" if generates(module) and specimen.name not in zoo_onnx.WITHOUT_CACHE else "forward"
    assert artifact.details["interface"] == interface
    assert zoo_onnx.WITHOUT_CACHE.get(specimen.name, "") in artifact.details["why_forward"]
    assert bool(artifact.details["why_forward"]) == (interface == "forward")
    assert isinstance(OnnxExporter().open(artifact), GeneratingRunner) == (interface == "decoder")
    whole = interface == "forward" or specimen.name in zoo_onnx.TRACED_WHOLE
    assert artifact.details["traced"] == ("whole model" if whole else "layer template")
    assert bool(artifact.details["why_whole"]) == whole
    # Each weight once; the rest are constants and buffers of the trace (a table of positions, a mask).
    assert artifact.n_layers == len(specimen.keep[side]) < layer_stack(module, side).n_layers
    assert artifact.weight_bytes >= 4 * compressor.materialize(plan).n_parameters * 0.9

"""The cache of a graph is the one its torch model keeps, tensor by tensor, or the graph is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tiny
import zoo
from exports import share_traces
from sglp_deploy.artifact import ExportArtifact, TensorSpec
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import ArtifactError
from sglp_deploy.parity.cache import CacheSizes, check_cache_layout, key_value_sizes

Specs = dict[str, TensorSpec]


def _artifact(n_layers: int, change: Callable[[Specs, Specs], None] | None = None) -> ExportArtifact:
    """What a right graph of a tiny Llama declares: two key-value heads of 32; ``change`` plants a fault."""

    def specs(prefix: str, length: str) -> Specs:
        names = [f"{prefix}.{layer}.{part}" for layer in range(n_layers) for part in ("key", "value")]
        return {name: TensorSpec(name, "float32", ("batch", 2, length, 32)) for name in names}

    inputs, outputs = specs("past_key_values", "past_sequence"), specs("present", "total_sequence")
    if change is not None:
        change(inputs, outputs)
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    logits = TensorSpec("logits", "float32", ("batch", "kept_logits", 261))
    return ExportArtifact(
        Path("nowhere"), "onnx", {}, (ids, *inputs.values()), (logits, *outputs.values()), "fp32", 0, n_layers, "p", {}
    )


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny.model("llama", num_hidden_layers=3)


def test_sizes_are_those_of_the_configuration(llama: PreTrainedModel) -> None:
    assert key_value_sizes(llama) == (CacheSizes(heads=2, key_size=32, value_size=32),) * 3


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt2", "falcon", "gemma4", "gpt_oss"])
def test_sizes_are_those_of_the_cache_the_model_makes_for_itself(name: str) -> None:
    """Latent attention keeps one head for all, some layers have larger heads than others, GPT-2 has no key heads."""
    model: Any = next(one for one in zoo.specimens() if one.name == name).build()
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=True).past_key_values
    wanted = tuple(CacheSizes(*layer.keys.shape[1::2], layer.values.shape[3]) for layer in cache.layers)
    assert key_value_sizes(model) == wanted


def test_layers_that_read_another_layers_keys_keep_none() -> None:
    specimen = next(one for one in zoo.specimens() if one.name == "gemma4-shared")
    model: Any = specimen.build()
    assert len(key_value_sizes(model)) == 5  # of 8, the last three share


@pytest.mark.parametrize("name", ["lfm2", "jamba", "qwen3_next"])
def test_state_that_is_not_keys_and_values_is_named(name: str) -> None:
    model: Any = next(one for one in zoo.specimens() if one.name == name).build()
    assert key_value_sizes(model) == "its layers keep other state than keys and values (LinearAttentionLayer)"


def test_the_right_layout_and_a_checkpoint_without_one_pass(llama: PreTrainedModel) -> None:
    check_cache_layout(_artifact(3), llama)
    check_cache_layout(replace(_artifact(3), inputs=(), outputs=()), llama)


def _drop(name: str) -> Callable[[Specs, Specs], None]:
    return lambda inputs, outputs: (inputs if name in inputs else outputs).pop(name) and None


def _put(name: str, dtype: str = "float32", shape: tuple[int | str, ...] = ("batch", 2, "n", 32)) -> Any:
    def change(inputs: Specs, outputs: Specs) -> None:
        (inputs if name.startswith("past") else outputs)[name] = TensorSpec(name, dtype, shape)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _drop("past_key_values.1.key"),
            r"lacks the cache tensor past_key_values\.1\.key, which its torch model keeps",
        ),
        (_drop("present.2.value"), r"lacks the cache tensor present\.2\.value"),
        (_put("past_key_values.3.key"), r"has a cache tensor past_key_values\.3\.key that its model of 3 caching"),
        (_put("present.7.value"), r"has a cache tensor present\.7\.value that its model"),
        (
            _put("past_key_values.0.key", dtype="float16"),
            r"past_key_values\.0\.key is float16 of shape .* keeps float32",
        ),
        (
            _put("present.1.key", shape=("batch", 4, "n", 32)),
            r"present\.1\.key is float32 of shape \['batch', 4, 'n', 32\], its torch model keeps float32 of shape "
            r"\[batch, 2, length, 32\]",
        ),
        (
            _put("past_key_values.2.value", shape=("batch", 2, "n", 16)),
            r"past_key_values\.2\.value is float32 of shape",
        ),
        (_put("past_key_values.2.value", shape=("batch", 2, 8, 32)), r"past_key_values\.2\.value is .* 2, 8, 32\]"),
        (_put("past_key_values.2.value", shape=(1, 2, "n", 32)), r"past_key_values\.2\.value is .* \[1, 2, 'n', 32\]"),
    ],
)
def test_a_planted_fault_is_refused_by_name(llama: PreTrainedModel, change: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_cache_layout(_artifact(3, change), llama)


def test_numbers_with_a_gap_are_refused(llama: PreTrainedModel) -> None:
    """The layers' old numbers, which pruning must not leave in an interface."""

    def old_numbers(inputs: Specs, outputs: Specs) -> None:
        for specs, prefix in ((inputs, "past_key_values"), (outputs, "present")):
            for part in ("key", "value"):
                _put(f"{prefix}.4.{part}")(inputs, outputs)
                specs.pop(f"{prefix}.1.{part}")

    with pytest.raises(ArtifactError, match=r"lacks the cache tensor past_key_values\.1\.key"):
        check_cache_layout(_artifact(3, old_numbers), llama)


def test_a_model_without_such_a_cache_refuses_any() -> None:
    model: Any = next(one for one in zoo.specimens() if one.name == "lfm2").build()
    with pytest.raises(
        ArtifactError, match=r"has a key-value cache, but its layers keep other state than keys and val"
    ):
        check_cache_layout(_artifact(3), model)


def test_verify_checks_the_layout_of_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)
    loaded = tiny.loaded("llama", num_hidden_layers=3)
    compressor = Compressor(loaded)
    plan = compressor.plan_by_hand([1])
    artifact = compressor.export(plan, "onnx", tmp_path / "out")
    lacking = replace(artifact, inputs=tuple(spec for spec in artifact.inputs if spec.name != "past_key_values.1.key"))
    with pytest.raises(ArtifactError, match=r"lacks the cache tensor past_key_values\.1\.key"):
        compressor.verify(lacking, plan)

"""What is said of wrong weights, types and caches, and that right ones are accused of nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import tiny
from bench_fakes import fake_artifact
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import BackendError
from sglp_deploy.parity.diagnosis import (
    StoredTensor,
    cache_faults,
    read_stored,
    stored_bytes,
    stored_type_fault,
    weight_faults,
)


def stored(name: str, value: NDArray[Any], dtype: str | None = None) -> StoredTensor:
    plain = value.astype(np.float32) if value.dtype.kind == "f" else value
    return StoredTensor(name, dtype or value.dtype.name, value.shape, lambda: plain)


class Two(nn.Module):
    """Two matrices of one shape, a norm, and a table that both ends share."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
            self.norm = nn.LayerNorm(8, bias=False)
            nn.init.normal_(self.norm.weight)


@pytest.fixture
def model() -> Two:
    return Two()


def right(model: Two) -> dict[str, NDArray[Any]]:
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def faults(model: Two, values: Mapping[str, NDArray[Any]], **dtypes: str) -> list[str]:
    return weight_faults(model, [stored(name, value, dtypes.get(name)) for name, value in values.items()])


# ------------------------------------------------------------------------------------------------------------- weights


def test_right_weights_are_accused_of_nothing_however_they_lie(model: Two) -> None:
    values = right(model)
    assert faults(model, values) == []
    assert faults(model, {"one.weight.T": values["one.weight"].T, "onnx::MatMul_7": values["two.weight"]}) == []
    half = {name: value.astype(np.float16) for name, value in values.items()}
    assert faults(model, half) == []
    # What an exporter makes up is like no parameter: a table, a norm with one added.
    assert faults(model, {**values, "cos_cache": np.linspace(0, 1, 32).reshape(4, 8).astype(np.float32)}) == []


@pytest.mark.parametrize("name", ["one.weight", "one.weight.T", "one.MatMul.weight", "onnx::MatMul_7"])
def test_one_wrong_value_is_named_with_its_tensor(model: Two, name: str) -> None:
    values = right(model)
    value = values.pop("one.weight")
    value[2, 3] += 2
    values[name] = value.T if name.endswith(".T") else value
    also = "" if name == "one.weight" else " (the model's one.weight)"
    assert faults(model, values) == [
        f"the stored weight {name}{also} differs in 1 of 32 values, by 2 at most",
    ]


def test_a_value_that_is_not_a_number_is_infinitely_far(model: Two) -> None:
    values = right(model)
    values["one.weight"][0, 0] = np.nan
    assert faults(model, values) == ["the stored weight one.weight differs in 1 of 32 values, by inf at most"]


def test_weights_that_changed_places_are_named(model: Two) -> None:
    values = right(model)
    values["one.weight"], values["two.weight"] = values["two.weight"], values["one.weight"]
    assert faults(model, values) == [
        "the stored weight one.weight is not the model's: it holds the values of two.weight",
        "the stored weight two.weight is not the model's: it holds the values of one.weight",
    ]


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_values_of_a_narrower_type_are_named_by_it(model: Two, dtype: torch.dtype, kind: str) -> None:
    values = right(model)
    values["two.weight"] = model.two.weight.detach().to(dtype).float().numpy()
    assert faults(model, values) == [f"wrong dtype: the stored weight two.weight holds two.weight rounded to {kind}"]


# --------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_the_type_most_weights_have_must_be_the_manifest_s(precision: str, kind: str) -> None:
    tensors = [stored("big", np.zeros((8, 8), np.float32), kind), stored("norm", np.zeros(8, np.float32))]
    said = stored_type_fault(precision, tensors)
    if {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision] == kind:
        assert said is None
    else:
        share = "100" if kind == "float32" else "89"
        assert said == (
            f"wrong dtype: {share}% of the weights are stored as {kind}, big for one, and the manifest says {precision}"
        )


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_must_be_whole_numbers(precision: str) -> None:
    table = stored("table", np.zeros((8, 8), np.float32))
    said = f"wrong dtype: the weights are stored as float32, and the manifest says {precision}"
    assert stored_type_fault(precision, [table]) == said
    assert stored_type_fault(precision, [table, stored("few", np.zeros(4, np.int8))]) == said
    assert stored_type_fault(precision, [table, stored("q", np.zeros(64, np.uint8))]) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("per_value", "fault"), [(1.03, True), (0.6, False), (0.54, False)])
def test_weights_of_8_bits_do_not_pass_for_4(tied: bool, per_value: float, fault: bool) -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 64, bias=False), nn.Linear(8, 100, bias=False))
    if tied:
        model[2].weight = model[0].weight
    # The table stays wide; the head is quantised, tied or not.
    tensors = [stored("table", np.zeros((100, 8), np.float32))]
    for name, size in (("middle", 512), ("head", 800)):
        tensors.append(stored(name, np.zeros(int(per_value * size), np.uint8)))
    said = stored_type_fault("int4", tensors, model)
    assert (said == "wrong dtype: the weights are stored in 8 bits each, and the manifest says int4") == fault
    assert said is None or fault
    assert stored_type_fault("int8", tensors, model) is None


def test_equal_tensors_count_once_where_a_file_holds_them_once() -> None:
    ones, others = np.ones(2048, np.float32), np.arange(2048, dtype=np.float32)
    tensors = [stored("a", ones), stored("b", ones), stored("c", others), stored("odd", ones, "complex64")]
    assert stored_bytes(tensors) == 3 * 8192
    assert stored_bytes(tensors, once=True) == 2 * 8192


def test_a_table_of_8_bits_is_part_of_int4() -> None:
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 16, bias=False), nn.Linear(8, 1000, bias=False))
    model[2].weight = model[0].weight
    tensors = [stored("table", np.zeros(8000, np.uint8)), stored("scales", np.zeros(250, np.uint8))]
    assert stored_type_fault("int4", [*tensors, stored("middle", np.zeros(70, np.uint8))], model) is None


def test_a_format_that_lists_no_weights_is_not_accused(tmp_path: Path) -> None:
    assert read_stored(object(), fake_artifact(tmp_path / "a")) == []
    assert stored_type_fault("fp32", []) is None
    assert stored_type_fault("int8", []) is None


def test_files_that_cannot_be_listed_are_one_error(tmp_path: Path) -> None:
    class Lister:
        def stored_weights(self, artifact: ExportArtifact) -> list[StoredTensor]:
            raise ValueError("header too large\nmore")

    with pytest.raises(BackendError, match=r"a cannot be listed; ValueError: header too large; export it again"):
        read_stored(Lister(), fake_artifact(tmp_path / "a"))


# --------------------------------------------------------------------------------------------------------------- cache


class Runner:
    """Hands out the cache of a torch model, altered."""

    def __init__(self, module: nn.Module, change: Any = None) -> None:
        self.module, self.change = module, change or (lambda cache: cache)

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with torch.no_grad():
            ids = torch.from_numpy(inputs["input_ids"])
            layers: Any = self.module(input_ids=ids, use_cache=True).past_key_values.layers
        cache = {}
        for index, layer in enumerate(layers):
            cache |= {f"present.{index}.key": layer.keys.numpy(), f"present.{index}.value": layer.values.numpy()}
        return {"logits": np.zeros(1), **self.change(cache)}


def said_of_cache(change: Any, tmp_path: Path, family: str = "llama") -> list[str]:
    module: Any = tiny.model(family)
    artifact = fake_artifact(tmp_path / "a")
    runner: Any = Runner(module, change)
    return cache_faults(runner, module, artifact)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_a_right_cache_is_accused_of_nothing(family: str, tmp_path: Path) -> None:
    assert said_of_cache(None, tmp_path, family) == []


def test_exchanged_caches_are_named_both(tmp_path: Path) -> None:
    def exchange(cache: dict[str, Any]) -> dict[str, Any]:
        return cache | {"present.2.value": cache["present.4.value"], "present.4.value": cache["present.2.value"]}

    assert said_of_cache(exchange, tmp_path) == [
        "cache of the wrong layer: present.2.value holds what the model keeps as present.4.value"
    ]


def test_the_first_wrong_layer_is_named_and_what_lies_before_it(tmp_path: Path) -> None:
    def from_three_on(cache: dict[str, Any]) -> dict[str, Any]:
        return {name: value * (1.5 if int(name.split(".")[1]) >= 3 else 1) for name, value in cache.items()}

    assert said_of_cache(from_three_on, tmp_path) == [
        "the cache present.3.key differs from the model's by 0.5 of its size; the caches of the layers before it "
        "agree, so the fault lies in layer 2 or in what layer 3 makes its keys from"
    ]


def test_the_first_layer_has_nothing_before_it(tmp_path: Path) -> None:
    def all_of_it(cache: dict[str, Any]) -> dict[str, Any]:
        return {name: value * 0 for name, value in cache.items()}

    assert said_of_cache(all_of_it, tmp_path) == [
        "the cache present.0.key differs from the model's by 1 of its size; the fault lies in the embedding or in what "
        "layer 0 makes its keys from"
    ]


def test_rounded_weights_and_a_runtime_that_refuses_say_nothing_of_the_cache(tmp_path: Path) -> None:
    module: Any = tiny.model("llama")
    artifact: ExportArtifact = fake_artifact(tmp_path / "a")
    broken: Any = Runner(module, lambda cache: {name: value * 0 for name, value in cache.items()})
    assert cache_faults(broken, module, replace(artifact, precision="int8")) == []

    class Refuses:
        def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            raise BackendError("no such input")

    refuses: Any = Refuses()
    assert cache_faults(refuses, module, artifact) == []

"""Models as people have them: with code of their own, quantised, under other names, with tables that end early."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    Exaone4Config,
    GPT2Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PretrainedConfig,
)

import tiny
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import CalibrationError, ConfigError, UnsupportedModelError
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.materialize import same_bits
from sglp_deploy.models import load_model
from sglp_deploy.tasks.generation import greedy_sample

_SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _write(folder: Path, config: PretrainedConfig | None = None, module: Any = None, **changes: Any) -> Path:
    """A checkpoint; ``changes`` are written into its config.json afterwards."""
    torch.manual_seed(0)
    (module or AutoModelForCausalLM.from_config(config or LlamaConfig(**_SMALL))).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def _pruned(folder: Path, drop: tuple[int, ...] = (1,), **options: Any) -> Path:
    compressor = Compressor.from_pretrained(folder, **options)
    return compressor.save(compressor.plan_by_hand(drop), folder.parent / "pruned")


def test_a_decoder_of_code_that_came_with_it_is_pruned_and_its_code_travels(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    folder = _write(tmp_path / "m", model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map)
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    out = _pruned(folder, trust_remote_code=True)
    again = load_model(out, trust_remote_code=True).module
    assert (type(again).__name__, len(again.model.layers)) == ("OwnForCausalLM", 3)


def test_a_class_of_transformers_is_read_as_that_whatever_code_lies_beside_it(tmp_path: Path) -> None:
    bert = BertForSequenceClassification(BertConfig(**{k: v for k, v in _SMALL.items() if "key_value" not in k}))
    auto_map = {"AutoModelForSequenceClassification": "modeling_own.Own"}
    folder = _write(tmp_path / "m", module=bert, auto_map=auto_map)
    assert isinstance(load_model(folder).module, BertForSequenceClassification)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8"])
def test_a_quantised_checkpoint_is_called_that_and_not_damaged(tmp_path: Path, method: str) -> None:
    folder = _write(tmp_path / "m", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    with pytest.raises(UnsupportedModelError, match=rf"is stored quantised \({method}\), .*give the checkpoint it was"):
        load_model(folder)


def test_a_folder_of_a_model_and_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        ConfigError, match=r"holds an adapter .*; merge the adapter into the model .*, or move its files"
    ):
        load_model(folder)


@pytest.mark.parametrize("drop", [(1,), (3,), (2, 3)])
def test_a_pattern_of_letters_does_not_contradict_the_list_of_kinds(tmp_path: Path, drop: tuple[int, ...]) -> None:
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * 2
    facts = _SMALL | {"num_hidden_layers": 8, "layer_types": kinds}
    folder = _write(tmp_path / "m", Exaone4Config(**facts, sliding_window=16, sliding_window_pattern="LLLG"))
    written = json.loads((_pruned(folder, drop) / "config.json").read_text())
    assert written["layer_types"] == [kind for layer, kind in enumerate(kinds) if layer not in drop]


def test_a_model_type_that_is_another_one_s_by_another_name_is_pruned(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m", model_type="internlm3", architectures=["InternLM3ForCausalLM"])
    assert type(load_model(_pruned(folder)).module).__name__ == "LlamaForCausalLM"


def test_nan_in_a_row_nobody_uses_is_copied_like_any_other(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][200, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    again = load_file(_pruned(folder) / "model.safetensors")
    assert again["model.embed_tokens.weight"][200, 0].isnan()


def test_the_same_bits_are_of_one_type_one_shape_and_one_sign() -> None:
    one = torch.tensor([0.0, float("nan")])
    assert same_bits(one, one.clone())
    assert same_bits(torch.zeros(()), torch.zeros(()))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(one, one.double())
    assert not same_bits(torch.zeros(2, 3), torch.zeros(3, 2))


def test_rows_are_as_long_as_a_learned_table_of_positions_allows(tmp_path: Path) -> None:
    facts = {"vocab_size": tiny.VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
    folder = _write(tmp_path / "m", GPT2Config(**facts))
    prose = CalibrationSet.builtin(max_tokens=512, sequence_length=128)
    compressor = Compressor.from_pretrained(folder, calibration=prose)
    plan = compressor.plan(drop=1)
    assert plan.calibration["sequence_length"] == 64
    assert compressor.evaluate(plan, prose)["protocol"]["chunk_tokens"] == 64
    rotary = Compressor(tiny.loaded("llama", num_hidden_layers=2), calibration=prose)  # turns by any angle
    assert rotary.evaluate(rotary.plan_by_hand([1]), prose)["protocol"]["chunk_tokens"] == 128


def test_tokens_without_a_row_in_the_embedding_are_explained(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m", LlamaConfig(**_SMALL | {"vocab_size": 60}, pad_token_id=0))
    compressor = Compressor.from_pretrained(folder, calibration=CalibrationSet.builtin(max_tokens=64))
    with pytest.raises(CalibrationError, match=r"vocabulary of 60; the tokenizer has tokens .* resize the embedding"):
        compressor.plan(drop=1)


def test_a_tokenizer_of_code_that_came_with_it_asks_for_trust(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m")
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    with pytest.raises(ConfigError, match=r"its code came with it; pass --trust-remote-code if you trust its author"):
        load_model(folder)


@pytest.mark.skipif(util.find_spec("sentencepiece") is not None, reason="needs an environment without sentencepiece")
def test_a_package_that_a_tokenizer_needs_is_named(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x00")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ConfigError, match=r"needs a package that is not installed; pip install sentencepiece protobuf"):
        load_model(folder)


def test_what_a_graph_cannot_hold_is_refused_in_words(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    facts = _SMALL | {"max_position_embeddings": 64, "rope_parameters": rope}
    compressor = Compressor.from_pretrained(_write(tmp_path / "m", LlamaConfig(**facts)))
    with pytest.raises(
        UnsupportedModelError, match=r"a base that grows with the text; a graph has one base; export it"
    ):
        compressor.export(compressor.plan_by_hand([1]), "onnx", tmp_path / "onnx")
    classifier = LlamaForSequenceClassification(LlamaConfig(**_SMALL, pad_token_id=None, num_labels=3))
    compressor = Compressor.from_pretrained(_write(tmp_path / "c", module=classifier))
    with pytest.raises(UnsupportedModelError, match=r"has no pad_token_id, .*; set pad_token_id in its config\.json"):
        compressor.export(compressor.plan_by_hand([1]), "onnx", tmp_path / "onnx")


@pytest.mark.parametrize("depth", [10**12, -1])
def test_a_depth_no_model_has_is_refused_before_anything_is_built(tmp_path: Path, depth: int) -> None:
    folder = _write(tmp_path / "m", num_hidden_layers=depth)
    with pytest.raises(ConfigError, match=rf"says num_hidden_layers={depth}; no model has so many layers"):
        load_model(folder)


def test_a_device_without_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device 'meta' holds no numbers here"):
        load_model(_write(tmp_path / "m"), device="meta")


def test_a_workload_beyond_the_learned_positions_is_refused_before_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"vocab_size": tiny.VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
    folder = _write(tmp_path / "m", GPT2Config(**facts))
    asked = ["run", str(folder), "--drop", "1", "--workload", "demo", "-q", "-o", str(tmp_path / "run")]
    assert main(asked) == 1
    assert (
        "the workload 'demo' runs 128 tokens and 32 more, and the model has learned positions for 64; beyond them it "
        "cannot run; choose smoke\n"
    ) in capsys.readouterr().err
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_sample_ends_where_the_learned_positions_do(tmp_path: Path) -> None:
    facts = {"vocab_size": tiny.VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 40}
    made = Compressor.from_pretrained(_write(tmp_path / "m", GPT2Config(**facts)))
    rows = greedy_sample(made.model, made.tokenizer, 48, prompts=["The mill", "The miller " * 20])
    assert [row["n_tokens"] for row in rows] == [40 - len(made.tokenizer("The mill")["input_ids"]), 1]


def _in_mxfp4(folder: Path) -> Path:
    """A tiny gpt-oss as it is published: experts in blocks of 4 bit numbers, everything else in bfloat16."""
    facts = {"vocab_size": tiny.VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    facts |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}
    torch.manual_seed(0)
    module = GptOssForCausalLM(GptOssConfig(**facts, num_experts_per_tok=1, sliding_window=8, pad_token_id=256))
    module.to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(shape, 122, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_that_is_dequantised_while_it_is_read_is_written_plainly(tmp_path: Path) -> None:
    compressor = Compressor.from_pretrained(_in_mxfp4(tmp_path / "m"))
    experts = "model.layers.3.mlp.experts.down_proj"
    before = compressor.model.get_parameter(experts)
    compressor.save(compressor.plan_by_hand([1, 2]), tmp_path / "smaller")
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert "quantization_config" not in config
    again = load_model(tmp_path / "smaller").module
    assert torch.equal(again.get_parameter(experts.replace("3", "1")), before)

from __future__ import annotations

import copy
import errno
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)

import tiny
from sglp_deploy.errors import ArtifactError, PlanError, StorageError, UnsupportedModelError
from sglp_deploy.materialize import CompressedModel, materialize, save_checkpoint, select_layers
from sglp_deploy.models import LoadedModel, load_model
from sglp_deploy.models.transformers.adapter import TransformersAdapter
from sglp_deploy.plan import PruningPlan

EVERY_FAMILY = pytest.mark.parametrize("family", tiny.FAMILIES)


def _ids(length: int = 32, rows: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (rows, length)))


def _pruned(loaded: LoadedModel, keep: tuple[int, ...]) -> CompressedModel:
    plan = tiny.plan_for(loaded.module, keep)
    return materialize(loaded.module, plan, loaded.source, tokenizer=loaded.tokenizer)


@contextmanager
def _hooked_to_identity(model: PreTrainedModel, layers: tuple[int, ...]) -> Iterator[None]:
    """The layers still run; what they return is replaced by what they were given."""

    def hook(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        given = arguments[0] if arguments else keywords["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handles = [model.model.layers[layer].register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


@EVERY_FAMILY
def test_a_dropped_layer_equals_the_same_layer_hooked_to_identity_bit_for_bit(family: str) -> None:
    loaded = tiny.loaded(family)
    pruned = _pruned(loaded, tiny.KEEP[family])
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with _hooked_to_identity(loaded.module, pruned.plan.drop):
        expected, expected_padded = _logits(loaded.module, ids), _logits(loaded.module, ids, attention_mask=mask)
    assert torch.equal(_logits(pruned.module, ids), expected)
    assert torch.equal(_logits(pruned.module, ids, attention_mask=mask), expected_padded)
    assert not torch.equal(expected, _logits(loaded.module, ids))  # the layers matter


@EVERY_FAMILY
def test_every_single_layer_can_be_dropped(family: str) -> None:
    loaded = tiny.loaded(family)
    depth = loaded.module.config.num_hidden_layers
    for layer in range(depth):
        pruned = _pruned(loaded, tuple(other for other in range(depth) if other != layer))
        with _hooked_to_identity(loaded.module, (layer,)):
            expected = _logits(loaded.module, _ids())
        assert torch.equal(_logits(pruned.module, _ids()), expected), layer


@EVERY_FAMILY
def test_a_keep_all_plan_reproduces_the_logits_bit_for_bit(family: str) -> None:
    loaded = tiny.loaded(family)
    everything = _pruned(loaded, tuple(range(loaded.module.config.num_hidden_layers)))
    assert torch.equal(_logits(everything.module, _ids()), _logits(loaded.module, _ids()))


@pytest.mark.parametrize("keep", [(0, 2, 5, 6), (2, 5), (0, 1, 3)])
def test_gemma3_pruned_irregularly_is_right_far_beyond_the_window(keep: tuple[int, ...]) -> None:
    loaded = tiny.loaded("gemma3")
    pruned = _pruned(loaded, keep)
    length = tiny.WINDOW + 24
    ids = _ids(length)
    with _hooked_to_identity(loaded.module, pruned.plan.drop):
        expected = _logits(loaded.module, ids)
    assert torch.equal(_logits(pruned.module, ids), expected)
    # Token by token through the cache: other shapes, so other rounding, but the same window.
    cache = DynamicCache(config=pruned.module.config)
    with torch.no_grad():
        steps = [pruned.module(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(length)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=2e-5)


def _state(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "addresses": {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        "config": model.config.to_json_string(),
        "generation": model.generation_config.to_json_string(),
        "layer_idx": [layer.self_attn.layer_idx for layer in model.model.layers],
        "modules": [id(module) for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "training": [module.training for module in model.modules()],
    }


def _assert_same(before: Any, after: Any) -> None:
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            _assert_same(before[key], after[key])
    elif isinstance(before, list):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            _assert_same(one, other)
    else:
        assert before == after


@EVERY_FAMILY
def test_the_callers_model_is_left_as_it_was(family: str, tmp_path: Path) -> None:
    loaded = tiny.loaded(family)
    loaded.module.train()
    loaded.module.model.layers[1].eval()
    loaded.module.model.layers[2].mlp.requires_grad_(False)
    loaded.module(input_ids=_ids(), labels=_ids()).loss.backward()
    before = copy.deepcopy(_state(loaded.module))
    pruned = _pruned(loaded, tiny.KEEP[family])
    save_checkpoint(pruned, tmp_path / "out")
    pruned.module.config.num_hidden_layers = 99
    pruned.module.generation_config.top_k = 99
    _assert_same(before, _state(loaded.module))


def test_weights_are_shared_and_not_copied() -> None:
    loaded = tiny.loaded("llama")
    pruned = _pruned(loaded, (0, 2, 5)).module
    for new, old in enumerate((0, 2, 5)):
        ours, theirs = pruned.model.layers[new].state_dict(), loaded.module.model.layers[old].state_dict()
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
        assert pruned.model.layers[new].self_attn.layer_idx == new
    assert pruned.model.embed_tokens.weight is loaded.module.model.embed_tokens.weight
    assert not pruned.training


def test_a_layer_may_be_taken_twice() -> None:
    module = tiny.model("llama")
    twice = select_layers(module, (1, 1))
    assert twice.model.layers[0] is not twice.model.layers[1]
    assert [layer.self_attn.layer_idx for layer in twice.model.layers] == [0, 1]


def test_the_compressed_model_knows_its_size() -> None:
    loaded = tiny.loaded("llama")
    pruned = _pruned(loaded, (0, 5))
    assert pruned.n_layers == pruned.stack.n_layers == 2
    # By hand: embedding; per layer q and o, k and v, three MLP matrices, two norms; the last norm.  The head is tied.
    layer = 2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert pruned.n_parameters == tiny.VOCAB_SIZE * 64 + 2 * layer + 64


def test_a_plan_for_another_model_is_refused() -> None:
    loaded = tiny.loaded("llama")
    plan = tiny.plan_for(tiny.model("llama", seed=1), (0, 1))
    with pytest.raises(PlanError, match=r"the plan is for tiny .*make a plan for this model"):
        materialize(loaded.module, plan, loaded.source)


def test_a_module_that_does_not_fit_its_plan_is_refused() -> None:
    loaded = tiny.loaded("llama")
    with pytest.raises(ValueError, match=r"module has 6 layers, the plan keeps 2"):
        CompressedModel(loaded.module, tiny.plan_for(loaded.module, (0, 1)), loaded.source)


# ---------------------------------------------------------------------------------------------------- checkpoints


@EVERY_FAMILY
def test_a_checkpoint_reloads_bit_exactly_and_without_a_word(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pruned = _pruned(tiny.loaded(family), tiny.KEEP[family])
    assert save_checkpoint(pruned, tmp_path / "out") == tmp_path / "out"
    assert capfd.readouterr() == ("", "")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert caplog.records == []
    assert not any(report.values())
    assert len(again.model.layers) == again.config.num_hidden_layers == len(tiny.KEEP[family])
    assert torch.equal(_logits(again, _ids()), _logits(pruned.module, _ids()))
    assert getattr(again.config, "layer_types", None) == getattr(pruned.module.config, "layer_types", None)


@EVERY_FAMILY
def test_greedy_decoding_is_the_same_with_and_without_a_cache(family: str, tmp_path: Path) -> None:
    pruned = _pruned(tiny.loaded(family), tiny.KEEP[family])
    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(pruned, tmp_path / "out"))
    prompt = _ids(7, 1)
    cached, plain = prompt, prompt
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for _ in range(32):
            new = cached if cached.shape[1] == prompt.shape[1] else cached[:, -1:]
            token = model(new, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            cached = torch.cat([cached, token], dim=1)
            plain = torch.cat([plain, _logits(model, plain)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert cached.tolist() == plain.tolist()
    assert len(set(cached[0, 7:].tolist())) > 1  # not one token over and over


@EVERY_FAMILY
def test_the_tied_flag_and_the_presence_of_an_output_head_agree(family: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    save_checkpoint(_pruned(tiny.loaded(family), tiny.KEEP[family]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert config["tie_word_embeddings"] is (family not in ("llama-untied", "qwen3"))
    assert ("lm_head.weight" in stored) is not config["tie_word_embeddings"]
    layers = {int(name.split(".")[2]) for name in stored if name.startswith("model.layers.")}
    assert layers == set(range(len(tiny.KEEP[family])))


def test_everything_that_is_not_a_weight_travels_along(tmp_path: Path) -> None:
    loaded = tiny.loaded("qwen2")
    pruned = _pruned(loaded, (0, 1, 3, 5))
    out = save_checkpoint(pruned, tmp_path / "out")
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.7, 11)
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "Grüße"}]
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == "<|user|>Grüße<eos><|assistant|>"
    assert tokenizer(said)["input_ids"] == tiny.tokenizer()(said)["input_ids"]
    assert AutoConfig.from_pretrained(out).max_window_layers == 2
    assert PruningPlan.load(out / "sglp_plan.json").digest() == pruned.plan.digest()
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in out.iterdir())


def test_a_tokenizer_with_several_chat_templates_leaves_a_folder_that_can_be_entered(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    pruned = replace(_pruned(loaded, (0, 2)), tokenizer=tokenizer)
    out = save_checkpoint(pruned, tmp_path / "out")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    assert folder.stat().st_mode & 0o111 == 0o111
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in out.rglob("*") if file.is_file())
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_a_model_without_a_tokenizer_is_written_without_one(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    pruned = materialize(loaded.module, tiny.plan_for(loaded.module, (0, 5)), loaded.source)
    out = save_checkpoint(pruned, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "sglp_files.json",
        "sglp_plan.json",
    ]


def test_the_type_of_the_weights_is_kept(tmp_path: Path) -> None:
    folder = tiny.save_tiny(tmp_path / "in")
    load_model(folder, dtype="bf16").module.save_pretrained(folder)
    pruned = _pruned(loaded := load_model(folder), (0, 5))
    assert loaded.module.dtype is torch.bfloat16
    again = AutoModelForCausalLM.from_pretrained(save_checkpoint(pruned, tmp_path / "out"))
    assert again.dtype is torch.bfloat16
    assert torch.equal(_logits(again, _ids()), _logits(pruned.module, _ids()))


def test_generation_settings_transformers_objects_to_are_written_all_the_same(tmp_path: Path) -> None:
    # Published models carry a temperature beside do_sample=False; transformers writes that only when nothing changed
    # since it was read.
    file = tiny.save_tiny(tmp_path / "in") / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": False}))
    out = save_checkpoint(_pruned(load_model(file.parent), (0, 5)), tmp_path / "out")
    written = json.loads((out / "generation_config.json").read_text())
    assert written["temperature"] == 0.7
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.do_sample is False


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    pruned = _pruned(tiny.loaded("llama"), (0, 5))
    pruned.module.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UnsupportedModelError, match=r"weights are quantised; .*load an unquantised checkpoint"):
        save_checkpoint(pruned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _full_disk(*_arguments: Any, **_options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["save_pretrained", "tokenizer", "interrupt"])
def test_a_failed_write_leaves_nothing_new_and_the_old_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    loaded = tiny.loaded("llama")
    out = save_checkpoint(_pruned(loaded, (0, 5)), tmp_path / "out")
    old = {file.name: file.read_bytes() for file in out.iterdir()}
    pruned = _pruned(loaded, (0, 1, 5))
    write = pruned.module.save_pretrained
    if failing == "save_pretrained":

        def half(folder: Path) -> None:
            write(folder)
            _full_disk()

        monkeypatch.setattr(pruned.module, "save_pretrained", half)
    elif failing == "tokenizer":
        monkeypatch.setattr(pruned.tokenizer, "save_pretrained", _full_disk)
    else:

        def interrupted(folder: Path) -> None:
            write(folder)
            raise KeyboardInterrupt

        monkeypatch.setattr(pruned.module, "save_pretrained", interrupted)
    for target in (out, tmp_path / "new"):
        with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
            save_checkpoint(pruned, target)
        if failing != "interrupt":
            assert str(caught.value) == (
                f"cannot write {target}; no space left on the device; free some space and run the same command again"
            )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == old


def test_a_tensor_altered_on_the_way_to_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    pruned = _pruned(tiny.loaded("llama"), (0, 5))
    write = pruned.module.save_pretrained

    def altered(folder: Path) -> None:
        write(folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] += 1e-6
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(pruned.module, "save_pretrained", altered)
    with pytest.raises(ArtifactError, match=r"1 tensors changed on the way to disk, first model\.norm\.weight; the"):
        save_checkpoint(pruned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_lost_on_the_way_to_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    pruned = _pruned(tiny.loaded("llama"), (0, 5))
    write = pruned.module.save_pretrained

    def lossy(folder: Path) -> None:
        write(folder)
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.self_attn.q_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(pruned.module, "save_pretrained", lossy)
    with pytest.raises(ArtifactError, match=r'does not load cleanly; {"missing_keys": \["model\.layers\.1\.self_attn'):
        save_checkpoint(pruned, tmp_path / "out")


def test_a_setting_altered_on_the_way_to_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = _pruned(tiny.loaded("llama"), (0, 5))
    write = pruned.module.save_pretrained

    def altered(folder: Path) -> None:
        write(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))

    monkeypatch.setattr(pruned.module, "save_pretrained", altered)
    with pytest.raises(
        ArtifactError, match=r"rms_norm_eps of the configuration changed on the way to disk from 1e-06 to"
    ):
        save_checkpoint(pruned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- a pruned model and its configuration


def _mutated_select(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """What a bug in the adapter would do: ``change`` the pruned model before anyone sees it."""
    real = TransformersAdapter.select

    def select(self: TransformersAdapter, *given: Any) -> Any:
        pruned = real(self, *given)
        change(pruned)
        return pruned

    monkeypatch.setattr(TransformersAdapter, "select", select)


def test_a_configuration_that_means_other_layers_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(pruned: Any) -> None:
        pruned.config.layer_types = ["full_attention"] * 4

    _mutated_select(monkeypatch, change)
    with pytest.raises(
        ArtifactError, match=r"layer 0 of the checkpoint is rebuilt with other settings \(.*full_attention"
    ):
        _pruned(tiny.loaded("gemma3"), (0, 2, 5, 6))


def test_a_layer_that_was_not_renumbered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(pruned: Any) -> None:
        pruned.model.layers[1].self_attn.layer_idx = 5

    _mutated_select(monkeypatch, change)
    with pytest.raises(
        ArtifactError,
        match=r"layer 1 .* does not hold its own number \(.*'layer_idx', 5\).* and not .*'layer_idx', 1\)",
    ):
        _pruned(tiny.loaded("llama"), (0, 5))


def test_a_setting_of_the_model_as_a_whole_may_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(pruned: Any) -> None:
        pruned.config.rope_parameters = {**pruned.config.rope_parameters, "rope_theta": 5.0}

    _mutated_select(monkeypatch, change)
    with pytest.raises(
        ArtifactError,
        match=r"pruning changed rope_parameters\.rope_theta of the configuration from 10000\.0 to 5\.0; it has",
    ):
        _pruned(tiny.loaded("llama"), (0, 5))


def test_a_configuration_no_model_can_be_built_from_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(pruned: Any) -> None:
        vars(pruned.config)["layer_types"] = ["no_such_attention"] * 4

    _mutated_select(monkeypatch, change)
    with pytest.raises(
        (UnsupportedModelError, ArtifactError), match=r"no model can be built from|is rebuilt with other"
    ):
        _pruned(tiny.loaded("gemma3"), (0, 2, 5, 6))


def test_a_model_in_half_precision_with_single_layers_in_full_is_materialized() -> None:
    module = tiny.model("llama").to(torch.bfloat16)
    module.model.layers[2].input_layernorm.to(torch.float32)
    pruned = materialize(module, tiny.plan_for(module, (0, 2, 5)), tiny.source(module))
    assert pruned.module.model.layers[1].input_layernorm.weight.dtype is torch.float32

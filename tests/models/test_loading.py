from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import tiny
import zoo
from sglp_deploy.errors import ConfigError, UnsupportedModelError
from sglp_deploy.models import layer_stack, load_model, quiet_libraries, source_of
from sglp_deploy.models.gguf_facts import beyond_transformers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("checkpoint") / "llama", "llama-untied")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def _edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_loads_in_evaluation_mode_with_tokenizer_and_identity(checkpoint: Path) -> None:
    loaded = load_model(checkpoint)
    meant = tiny.model("llama-untied")
    assert not loaded.module.training
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert loaded.source.id == str(checkpoint)
    assert loaded.source.fingerprint == tiny.source(meant).fingerprint
    assert loaded.source.gguf_file is None
    for name, tensor in meant.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor), name


def test_loading_writes_nothing_to_the_terminal(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(checkpoint)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("stored", "asked"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "fp16")])
def test_a_model_s_identity_is_that_of_its_stored_weights(tmp_path: Path, stored: str, asked: str) -> None:
    folder = tiny.save_tiny(tmp_path / "model", num_hidden_layers=2)
    module = load_model(folder, dtype=stored).module
    module.save_pretrained(folder)
    as_stored, again = load_model(folder), load_model(folder, dtype=asked)
    assert as_stored.module.dtype is not again.module.dtype
    assert again.source == as_stored.source
    plain = source_of(again.module, str(folder))
    assert plain.fingerprint != again.source.fingerprint  # the type alone tells two models in memory apart


def test_the_dtype_is_as_asked(checkpoint: Path) -> None:
    assert load_model(checkpoint, dtype="bf16").module.dtype is torch.bfloat16
    assert load_model(checkpoint).module.dtype is torch.float32


def test_a_folder_without_tokenizer_files_has_no_tokenizer(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert load_model(copy).tokenizer is None


def test_a_damaged_tokenizer_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"the tokenizer of .*copy cannot be read; .*; repair its files, or work"):
        load_model(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp64"}, "unknown dtype 'fp64'; .*auto, bf16, fp16, fp32"),
        ({"device": "tpu"}, "device 'tpu' is unknown to PyTorch; pass cpu, cuda or cuda:N"),
        ({"device": "cuda:63"}, r"device 'cuda:63' was asked for, but PyTorch sees \d+ CUDA devices; use --device cpu"),
    ],
)
def test_a_wrong_option_is_refused_before_any_work(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model("/nonexistent", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"nowhere is not a model folder or a \.gguf file; check the path"),
        ("nowhere.gguf", r"nowhere\.gguf does not exist; a GGUF file was expected there; check the path"),
    ],
)
def test_a_missing_model_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path / name)


def test_a_hub_identifier_without_a_connection_says_what_can_be_given_instead() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(
        ConfigError, match=r"'someone/some-model' cannot be loaded; .*give a checkpoint folder, a .gguf"
    ):
        load_model("someone/some-model")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json; a Hugging Face checkpoint folder was expected"):
        load_model(tmp_path)


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors file; the weights are missing"):
        load_model(copy)


def test_pickled_weights_are_refused_unless_allowed(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"stores its weights as pickle; .*--allow-pickle if you trust its author"):
        load_model(copy)
    module = load_model(copy, allow_pickle=True).module
    assert torch.equal(module.lm_head.weight, weights["lm_head.weight"])


def test_pickle_that_runs_code_is_refused_even_when_allowed(copy: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "harm"),))

    (copy / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Harm()}, copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be"):
        load_model(copy, allow_pickle=True)
    assert not (tmp_path / "harm").exists()


def test_a_truncated_weight_file_is_called_damaged(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"cannot be read; .*files are damaged"):
        load_model(copy)


def test_a_missing_tensor_is_refused_instead_of_filled_at_random(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors, first model\.layers\.3\.mlp\.up_proj\.weight; random"):
        load_model(copy)


@pytest.mark.parametrize(
    ("family", "entry"), [("gpt2", "n_layer"), ("bert", "num_hidden_layers"), ("opt", "num_hidden_layers")]
)
def test_layers_beyond_the_depth_are_refused_whatever_holds_them(family: str, entry: str, tmp_path: Path) -> None:
    module: Any = next(each for each in zoo.specimens() if each.name == family).build()
    module.save_pretrained(tmp_path)
    _edit_config(tmp_path, **{entry: module.config.num_hidden_layers - 1})
    with pytest.raises(ConfigError, match=rf"layers would be left out unnoticed; repair .* \({entry}\)"):
        load_model(tmp_path)


def test_layers_of_a_list_the_model_does_not_have_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    more = {"tower.layers.0.weight": torch.zeros(2)}
    save_file(weights | more, copy / "model.safetensors", metadata={"format": "pt"})
    _edit_config(copy, num_nextn_predict_layers=1)
    with pytest.raises(ConfigError, match=r"1 layer tensors .*first tower\.layers\.0\.weight"):
        load_model(copy)


@pytest.mark.parametrize(("heads", "refused"), [(0, True), (1, False), (None, True)])
def test_a_block_that_predicts_further_tokens_is_no_layer(copy: Path, heads: int | None, refused: bool) -> None:
    weights = load_file(copy / "model.safetensors")
    last = [name for name in weights if name.startswith("model.layers.5.")]
    more = {name.replace(".5.", ".6.", 1): weights[name].clone() for name in last}
    save_file(weights | more, copy / "model.safetensors", metadata={"format": "pt"})
    if heads is not None:
        _edit_config(copy, num_nextn_predict_layers=heads)
    if refused:
        with pytest.raises(ConfigError, match=r"first model\.layers\.6\."):
            load_model(copy)
    else:
        assert layer_stack(load_model(copy).module).n_layers == 6


def test_a_layer_the_configuration_does_not_know_is_refused(copy: Path) -> None:
    _edit_config(copy, num_hidden_layers=5)
    with pytest.raises(ConfigError, match=r"layer tensors its config\.json does not know, first model\.layers\.5\."):
        load_model(copy)


def test_a_tensor_of_another_shape_is_refused(copy: Path) -> None:
    _edit_config(copy, intermediate_size=128)
    with pytest.raises(ConfigError, match=r"cannot be read; .*its files are damaged or do not belong together"):
        load_model(copy)


def test_an_unknown_architecture_is_refused(copy: Path) -> None:
    _edit_config(copy, model_type="hal9000", architectures=["Hal9000"])
    with pytest.raises(
        UnsupportedModelError, match=r"cannot be loaded; .*hal9000.*; check its config\.json, and whether"
    ):
        load_model(copy)


def test_a_configuration_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be loaded; .*config\.json"):
        load_model(copy)


_SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=2, num_decoder_layers=3)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertForSequenceClassification(BertConfig(**_SIZES)),
        lambda: BertForMaskedLM(BertConfig(**_SIZES)),
        lambda: BertModel(BertConfig(**_SIZES)),
        lambda: ViTForImageClassification(ViTConfig(**_SIZES, image_size=16, patch_size=8)),
        _t5,
        lambda: tiny.model("llama").model,
    ],
    ids=["classifier", "masked-lm", "headless-encoder", "vision", "encoder-decoder", "headless-decoder"],
)
def test_a_checkpoint_is_loaded_with_the_class_it_names(tmp_path: Path, make: Callable[[], PreTrainedModel]) -> None:
    meant = make().eval()
    with quiet_libraries():
        meant.save_pretrained(tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert type(loaded.module) is type(meant)
    assert loaded.tokenizer is None
    assert not loaded.module.training
    for name, tensor in meant.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor), name
    assert loaded.source.fingerprint == source_of(meant, "").fingerprint
    assert layer_stack(loaded.module).n_layers == layer_stack(meant).n_layers


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchClass"], ["set_seed"], ["AutoTokenizer"], ["Trainer"]])
def test_without_a_model_class_by_that_name_a_decoder_is_loaded_as_a_causal_language_model(
    copy: Path, architectures: list[str] | None
) -> None:
    _edit_config(copy, architectures=architectures)
    assert type(load_model(copy).module) is LlamaForCausalLM


def test_without_a_name_a_model_that_is_no_decoder_is_loaded_without_a_head(tmp_path: Path) -> None:
    with quiet_libraries():
        ViTModel(ViTConfig(**_SIZES, image_size=16, patch_size=8)).save_pretrained(tmp_path / "out")
    _edit_config(tmp_path / "out", architectures=None)
    assert type(load_model(tmp_path / "out").module) is ViTModel


def test_a_class_of_another_family_is_refused(copy: Path) -> None:
    _edit_config(copy, architectures=["BertForMaskedLM"])
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"copy' (?:cannot be|lacks)"):
        load_model(copy)


def _write_gguf(file: Path, more: Callable[[Any], object] = lambda _writer: None) -> dict[str, np.ndarray]:
    """A Llama of one layer in float32 GGUF, written with the format's own library; ``more`` writes further keys."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    more(writer)
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *[f"word{n}" for n in range(41)]]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 41])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (300, 64),
        "output_norm": (64,),
        "output": (300, 64),
        "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_loads_in_float32_and_leaves_no_path_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = _write_gguf(tmp_path / "tiny.gguf")
    loaded = load_model(tmp_path / "tiny.gguf")
    assert capfd.readouterr() == ("", "")
    assert loaded.source.gguf_file == "tiny.gguf"
    assert loaded.module.dtype is torch.float32
    # Tensors that GGUF stores as they are (it reorders the rows of q and k).
    for ours, theirs in (("layers.0.mlp.down_proj", "blk.0.ffn_down"), ("embed_tokens", "token_embd")):
        assert np.array_equal(loaded.module.get_submodule(f"model.{ours}").weight.detach().numpy(), tensors[theirs])
    loaded.module.save_pretrained(tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def _llama_3_factors(factor: float) -> np.ndarray:
    """What llama.cpp's converter writes for 8 frequencies of base 10,000, worked out one by one."""
    found = []
    for frequency in (10000.0 ** -(index / 8) for index in range(8)):
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            found.append(1.0)
        elif wave > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


@pytest.mark.parametrize(
    ("more", "rope"),
    [
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", _llama_3_factors(32.0)),
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), {"rope_type": "default"}),
        (
            lambda writer: (writer.add_string("llama.rope.scaling.type", "linear"),
                            writer.add_float32("llama.rope.scaling.factor", 4.0)),
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            lambda writer: (writer.add_string("llama.rope.scaling.type", "yarn"),
                            writer.add_float32("llama.rope.scaling.factor", 4.0),
                            writer.add_uint32("llama.rope.scaling.original_context_length", 32)),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (lambda writer: writer.add_float32("llama.logit_scale", 1.0), None),
    ],
)  # fmt: skip
def test_rotary_scaling_of_a_gguf_file_is_read(
    tmp_path: Path, more: Callable[[Any], object], rope: dict[str, Any] | None
) -> None:
    _write_gguf(tmp_path / "tiny.gguf", more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which keys are passed over has a test of its own
        config = load_model(tmp_path / "tiny.gguf").module.config
    assert config.rope_parameters == {"rope_theta": 10000.0, **(rope or {"rope_type": "default"})}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32)),
            "by the tensor rope_freqs.weight, which follows no rule known here; .*give the checkpoint",
        ),
        (
            lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"),
            "by the type 'longrope', which transformers would leave out of a GGUF file; give the checkpoint",
        ),
        (
            lambda writer: writer.add_float32("llama.logit_scale", 0.25),
            r"does not read for this family \(llama\.logit_scale = 0\.25\); .*something else; give the checkpoint",
        ),
        (
            lambda writer: writer.add_float32("llama.attn_logit_softcapping", 30.0),
            r"llama\.attn_logit_softcapping = 30",
        ),
    ],
)
def test_numbers_of_a_gguf_file_that_would_be_left_out_are_refused(
    tmp_path: Path, more: Callable[[Any], object], message: str
) -> None:
    _write_gguf(tmp_path / "tiny.gguf", more)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path / "tiny.gguf")


class _Read:
    """A GGUF file with these keys, and the configuration that transformers made of it."""

    def __init__(self, family: str, keys: dict[str, Any], **config: Any) -> None:
        facts = {"general.architecture": family, **{f"{family}.{name}": value for name, value in keys.items()}}
        self.fields = {name: SimpleNamespace(contents=lambda value=value: value) for name, value in facts.items()}
        self.tensors: list[Any] = []
        self.config = SimpleNamespace(**config)
        self.config.get_text_config = lambda: self.config


_TWO_BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("read", "changes"),
    [
        (
            _Read("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, rope_parameters=_TWO_BASES),
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
        (
            _Read(
                "gemma2",
                {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
                attn_logit_softcapping=50.0,
                final_logit_softcapping=30.0,
            ),
            {},
        ),
        (_Read("phi3", {"attention.sliding_window": 2047}, sliding_window=None), {"sliding_window": 2047}),
        (
            _Read(
                "starcoder2", {"rope.freq_base": 999999.0}, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
            ),
            {"rope_parameters": {"rope_type": "default", "rope_theta": 999999.0}},
        ),
        (
            _Read(
                "qwen3moe",
                {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.freq_base": 1e6},
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            ),
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.5,
                    "factor": 4.0,
                }
            },
        ),
    ],
    ids=lambda each: each.fields["general.architecture"].contents() if isinstance(each, _Read) else "",
)
def test_what_a_family_s_gguf_file_states_reaches_its_configuration(
    read: _Read, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gguf.GGUFReader", lambda _path: read)
    passed_over, found = beyond_transformers(Path("model.gguf"), read.config)
    assert found == changes
    assert passed_over == ()


def test_keys_of_a_gguf_file_that_nobody_reads_are_named(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "tiny.gguf", lambda writer: writer.add_uint32("llama.pooling_type", 3))
    with pytest.warns(UserWarning, match=r"tiny\.gguf: not read, and taken to be without effect: llama\.pooling_type"):
        load_model(tmp_path / "tiny.gguf")


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"tiny\.gguf' cannot be"):
        load_model(tmp_path / "tiny.gguf")


def test_other_libraries_are_quiet_inside_and_as_before_afterwards(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()
    logger = logging.getLogger("/path/like/transformers.exporters")

    def noisy() -> None:
        with quiet_libraries():
            print("[torch.onnx] progress")
            logger.warning("advice")
            logger.error("trouble")
            warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
            assert not transformers_logging.is_progress_bar_enabled()
            raise RuntimeError("reason")

    with pytest.raises(RuntimeError, match="reason"):
        noisy()
    assert capsys.readouterr().out == ""
    assert [record.message for record in caplog.records] == ["trouble"]
    assert transformers_logging.is_progress_bar_enabled()
    logger.warning("advice again")
    assert caplog.records[-1].message == "advice again"

"""What lies beside a model's weights lies beside the pruned model's, unless pruning makes it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
from sglp_deploy._io import FILE_LIST
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.models import source_of
from sglp_deploy.models.side_files import folder_of, side_files
from sglp_deploy.models.transformers.earlier import add_earlier_names, earlier_names, name_tokenizer_as_earlier

_TRAVELS = {
    "preprocessor_config.json": '{"image_processor_type": "ViTImageProcessor"}',
    "modeling_own.py": "class Own:\n    pass\n",
    "LICENSE": "as you like",
    "NOTES.md": "mine",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "1_Pooling/config.json": '{"pooling_mode": "mean"}',
    "2_Dense/config.json": '{"in_features": 64}',
    "2_Dense/model.safetensors": "weights of a part behind the model",
    "modules.json": '[{"path": ""}, {"path": "."}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
    "site/manifest.json": '{"name": "an application"}',
    "site/parity.json": "{}",
    "not-json.json": "{",
}
_STAYS = {
    "README.md": "describes the unpruned model",
    "trainer_state.json": "is of the training of the unpruned model",
    "params.json": "states the 6 layers of the unpruned model",
    "genai_config.json": "states the 6 layers of the unpruned model",
    "parity.json": "is the certificate of the unpruned model's folder",
    "hf_quant_config.json": "says how weights were quantised that are written anew",
    "original/": "holds weights of the unpruned model",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of 6 layers with all of that beside it."""
    folder = tiny.save_tiny(tmp_path / "model")
    more = {"README.md": "# 6 layers", "trainer_state.json": "{}", "params.json": '{"n_layers": 6}'}
    more |= {"genai_config.json": '{"model": {"decoder": {"num_hidden_layers": 6}}}', "parity.json": "{}"}
    more |= {"hf_quant_config.json": "{}", "original/params.json": "{}", "original/consolidated.00.pth": "weights"}
    more |= {"pytorch_model.bin": "weights", "model.onnx": "weights", ".gitattributes": "*", "optimizer.pt": "state"}
    for name, content in (_TRAVELS | more).items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    return folder


def test_files_travel_into_the_pruned_checkpoint_unless_they_are_weights_or_wrong(folder: Path, tmp_path: Path) -> None:
    compressor = Compressor.from_pretrained(folder)
    out = compressor.save(compressor.plan_by_hand([1]), tmp_path / "out")
    for name, content in _TRAVELS.items():
        assert (out / name).read_text() == content, name
    compressor.save(compressor.plan_by_hand([2]), out)  # it is ours as a whole, and replaced
    there = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    own = {"config.json", "generation_config.json", "model.safetensors", PLAN_FILE, FILE_LIST}
    tokenizer = {name for name in there if name.startswith(("tokenizer", "special_tokens", "chat_template"))}
    assert there - tokenizer == own | set(_TRAVELS)


def test_what_does_not_travel_is_named_with_its_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dict(side_files(folder, 6).left) == _STAYS
    Compressor.from_pretrained(folder).plan_by_hand([1]).save(tmp_path / "plan.json")
    assert main(["materialize", str(folder), str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for name, why in _STAYS.items():
        assert f"{name} stays behind; it {why}" in out


def test_an_artifact_says_what_stayed_behind_and_lists_what_travelled(folder: Path, tmp_path: Path) -> None:
    compressor = Compressor.from_pretrained(folder)
    artifact = compressor.export(compressor.plan_by_hand([1]), "vllm", tmp_path / "artifact")
    assert artifact.details["left_behind"] == _STAYS
    assert set(_TRAVELS) <= set(ExportArtifact.load(tmp_path / "artifact").files)


def test_a_list_of_parts_that_names_none_of_them_lets_folders_of_weights_stay(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"path": 3}, 4]')
    assert dict(side_files(folder, 6).left) == _STAYS | {"2_Dense/": "holds weights of the unpruned model"}


def test_a_json_file_that_states_another_depth_travels(folder: Path) -> None:
    assert Path("params.json") in side_files(folder, 7).travel


def test_tokenizer_files_travel_byte_by_byte(tmp_path: Path) -> None:
    folder = tiny.save_tiny(tmp_path / "model")
    settings = folder / "tokenizer_config.json"
    facts = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast", "of_mine": 3}
    settings.write_text(json.dumps(facts, indent=7))
    compressor = Compressor.from_pretrained(folder)
    out = compressor.save(compressor.plan_by_hand([1]), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_tokenizer_changed_in_memory_is_written_and_not_the_folder_s(tmp_path: Path) -> None:
    folder = tiny.save_tiny(tmp_path / "model")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')  # as earlier releases write it
    compressor = Compressor.from_pretrained(folder)
    tokenizer: Any = compressor.tokenizer
    tokenizer.chat_template = "another"
    tokenizer.eos_token = "<pad>"
    out = compressor.save(compressor.plan_by_hand([1]), tmp_path / "out")
    again = AutoTokenizer.from_pretrained(out)
    assert (again.chat_template, again.eos_token) == ("another", "<pad>")


def test_a_model_in_memory_or_of_a_gguf_file_has_no_folder_beside_it() -> None:
    loaded = tiny.loaded("llama", num_hidden_layers=2)
    assert folder_of(source_of(loaded.module, "")) is None
    assert folder_of(source_of(loaded.module, "tests")) is None  # a folder, and no checkpoint
    assert folder_of(loaded.source) is None
    assert folder_of(source_of(loaded.module, ".", gguf_file="model.gguf")) is None
    assert folder_of(source_of(loaded.module, "no name of a/folder or/hub")) is None


@pytest.mark.parametrize(
    ("model_type", "rope", "names"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            "llama",
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        (
            "phi",
            {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5},
            {"rope_theta": 1.0, "partial_rotary_factor": 0.5},
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 1.0, "rotary_pct": 0.5},
        ),
        (
            "qwen2_vl_text",
            {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ("of-tomorrow", {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}, {}),
        ("gemma3_text", {"full_attention": {"rope_theta": 1.0}}, {}),
        ("llama", {}, {}),
    ],
)
def test_rotary_settings_have_the_names_of_the_release_before(
    model_type: str, rope: dict[str, Any], names: dict[str, Any]
) -> None:
    assert earlier_names(model_type, rope) == names


def test_earlier_names_are_added_in_every_part_and_change_nothing_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    part = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    file.write_text(
        json.dumps({"model_type": "llava", "text_config": part, "audio_config": part | {"rope_theta": 8.0}})
    )
    add_earlier_names(file)
    written = json.loads(file.read_text())
    assert written["text_config"] == part | {"rope_theta": 7.0}
    assert written["audio_config"] == part | {"rope_theta": 8.0}


def test_a_tokenizer_s_settings_name_what_both_releases_read(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_text('{"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "eos_token": "</s>"}')
    name_tokenizer_as_earlier(file)
    assert json.loads(file.read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "</s>",
    }
    theirs = '{"tokenizer_class":"LlamaTokenizer","extra_special_tokens":{"image_token":"<i>"}}'
    file.write_text(theirs)
    name_tokenizer_as_earlier(file)
    assert file.read_text() == theirs

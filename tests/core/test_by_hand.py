"""Plans a person writes: the way to prune any supported model, measured or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BartConfig, BertConfig

import tiny
from sglp_deploy import Compressor
from sglp_deploy.cli.main import main
from sglp_deploy.errors import PlanError, UnsupportedModelError
from sglp_deploy.models import LoadedModel, quiet_libraries, source_of
from sglp_deploy.plan import PruningPlan

_SIZES: dict[str, Any] = {"vocab_size": tiny.VOCAB_SIZE, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}


def _bert(folder: Path) -> Path:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=48,
        **_SIZES | {"type_vocab_size": 2},
    )
    with quiet_libraries():
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return folder


def _bart(folder: Path) -> Path:
    config = BartConfig(
        d_model=32,
        encoder_layers=4,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        **_SIZES | {"decoder_start_token_id": 257, "forced_eos_token_id": 258},
    )
    with quiet_libraries():
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


def test_an_encoder_is_pruned_from_the_command_line_and_loads_with_its_own_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan, smaller = _bert(tmp_path / "bert"), tmp_path / "plan.json", tmp_path / "smaller"
    assert main(["plan", str(model), "--drop-layers", "1,3", "-o", str(plan), "-q"]) == 0
    shown = capsys.readouterr().out
    assert "by-hand: keep 3 of 5 layers" in shown
    assert "num_hidden_layers" in shown
    assert main(["materialize", str(model), str(plan), "-o", str(smaller), "-q"]) == 0
    again, report = AutoModelForMaskedLM.from_pretrained(smaller, output_loading_info=True)
    assert again.config.num_hidden_layers == 3
    assert not any(report.values())
    assert (smaller / "tokenizer.json").is_file()


def test_encoder_and_decoder_are_pruned_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _bart(tmp_path / "bart")
    for side, layer in (("decoder", "1"), ("encoder", "2")):
        plan, out = tmp_path / f"{side}.json", tmp_path / side
        assert main(["plan", str(folder), "--drop-layers", layer, "--stack", side, "-o", str(plan), "-q"]) == 0
        assert main(["materialize", str(folder), str(plan), "-o", str(out), "-q"]) == 0
        folder = out
    capsys.readouterr()
    config = json.loads((folder / "config.json").read_text())
    assert (config["encoder_layers"], config["decoder_layers"]) == (3, 2)
    _, report = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


def test_the_plan_lists_every_configuration_entry_it_changes() -> None:
    plan = Compressor(tiny.loaded("gemma3")).plan_by_hand([0, 2])
    changes = {change["entry"]: change for change in plan.config_changes}
    assert changes["num_hidden_layers"]["after"] == 5
    local, everywhere = "sliding_attention", "full_attention"
    assert changes["layer_types"]["after"] == [local, local, local, everywhere, local]
    assert PruningPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("drop", [[7], [1, 1], list(range(6)), [-1]])
def test_a_list_of_layers_that_cannot_go_is_refused(drop: list[int]) -> None:
    with pytest.raises(PlanError, match=r"layers .* cannot be removed; .* 0\.\.5, and one must stay"):
        Compressor(tiny.loaded("llama")).plan_by_hand(drop)


def test_what_cannot_be_measured_is_planned_by_hand_and_the_refusal_says_so(tmp_path: Path) -> None:
    with quiet_libraries():
        compressor = Compressor.from_pretrained(_bert(tmp_path / "bert"))
    with pytest.raises(UnsupportedModelError, match=r"BertForMaskedLM has no next-token loss .*--drop-layers 2,5"):
        compressor.plan(drop=1)


def test_perplexity_of_a_model_without_next_token_loss_is_refused(tmp_path: Path) -> None:
    compressor = Compressor.from_pretrained(_bert(tmp_path / "bert"))
    with pytest.raises(UnsupportedModelError, match="has no next-token loss"):
        compressor.evaluate(compressor.plan_by_hand([1]))


def test_layers_that_are_one_module_cannot_be_told_apart() -> None:
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        hidden_size=32, embedding_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, **_SIZES
    )
    module = AlbertForMaskedLM(config).eval()
    compressor = Compressor(LoadedModel(module, None, source_of(module, "albert")))
    with pytest.raises(UnsupportedModelError, match="no next-token loss"):
        compressor.plan(drop=1)
    assert compressor.materialize(compressor.plan_by_hand([3])).n_layers == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--drop-layers", "1,x"), "is no list of layer numbers"),
        (("--drop-layers", "1", "--drop", "2"), "--drop-layers names the layers"),
        (("--stack", "encoder", "--drop", "2"), "--stack goes with --drop-layers"),
    ],
)
def test_flags_that_contradict_each_other_are_a_usage_error(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "model", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

"""Forward parity passes what is equal, and turns red, with the reason and the place, for every fault planted here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import zoo
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.parity.bounds import forward_thresholds_for, thresholds_for
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.parity.forward import ForwardCase, check_forward_parity, forward_cases
from sglp_deploy.parity.reference import TorchRunner, main_output
from sglp_deploy.protocols import Runner

Arrays = dict[str, NDArray[Any]]


def _specimen(name: str) -> zoo.Specimen:
    return next(specimen for specimen in zoo.specimens() if specimen.name == name)


def _compare(runner: TorchRunner, reference: nn.Module, *, window: int | None = None, **options: Any) -> ParityReport:
    artifact = ExportArtifact(Path("nowhere"), "planted", {}, (), (), "fp32", 0, 6, "plan", {"id": "tiny"})
    against = TorchRunner(reference)
    with against, runner:
        return check_forward_parity(artifact, runner, against, forward_cases(reference, window=window), **options)


class Altered(TorchRunner):
    """Passes inputs and outputs through functions on their way."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Arrays], Arrays] = dict,
        after: Callable[[Arrays], Arrays] = dict,
    ) -> None:
        super().__init__(model)
        self._before, self._after = before, after

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        given = self._before({name: value.copy() for name, value in inputs.items()})
        return self._after({name: value.copy() for name, value in super().forward(given).items()})


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return _specimen("bert").build()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return _specimen("vit").build()


# ------------------------------------------------------------------------------------------------------ what passes


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5", "whisper", "wav2vec2-stable-layer-norm", "swin", "lfm2"])
def test_the_same_model_in_another_wrapper_passes(name: str) -> None:
    specimen = _specimen(name)
    model = specimen.build()
    report = _compare(TorchRunner(copy.deepcopy(model)), model, window=specimen.window)
    assert report.passed, report.reasons
    assert ParityReport.from_json(report.to_json()) == report
    assert all(case["statistics"]["max_relative"] == 0 for case in report.cases)
    assert {case["greedy"] for case in report.cases} == {None}


def test_a_model_without_a_head_is_compared_by_its_last_hidden_state(bert: nn.Module) -> None:
    base: Any = bert.bert
    report = _compare(TorchRunner(copy.deepcopy(base)), base)
    assert report.passed
    assert {case["output"] for case in report.cases} == {"last_hidden_state"}
    assert "kl_p99" not in report.cases[0]["statistics"]  # a hidden state is no distribution


def test_a_model_that_returns_a_tensor_is_compared_by_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)).eval()
    model.main_input_name = "input"  # type: ignore[assignment]
    case = ForwardCase("one", {"input": np.ones((2, 3, 224, 224), dtype=np.float32)})
    artifact = ExportArtifact(Path("nowhere"), "planted", {}, (), (), "fp32", 0, 6, "plan", {})
    with TorchRunner(model) as one, TorchRunner(copy.deepcopy(model)) as other:
        report = check_forward_parity(artifact, one, other, [case])
    assert report.passed
    assert report.cases[0]["output"] == "output"


def test_a_difference_in_a_padded_position_is_no_fault(bert: nn.Module) -> None:
    def garbage(outputs: Arrays) -> Arrays:
        if len(outputs["logits"]) > 1:
            outputs["logits"][0, -1] = 1e6  # the first row is the padded one
        return outputs

    assert _compare(Altered(bert, after=garbage), bert).passed


# ------------------------------------------------------------------------------------------------------- the cases


def test_text_cases_vary_rows_and_length_and_pad_all_but_single_rows(bert: nn.Module) -> None:
    cases = forward_cases(bert)
    assert [case.name for case in cases] == ["1 of 7 tokens", "3 of 17 tokens, padded", "2 of 64 tokens, padded"]
    for case in cases:
        mask = case.inputs["attention_mask"]
        assert (case.valid is None) == bool(mask.all())
        assert case.valid is None or (case.valid == (mask == 1)).all()


def test_a_windowed_encoder_is_also_run_64_tokens_beyond_its_window() -> None:
    model: Any = _specimen("modernbert").build()
    model.config.max_position_embeddings = 100  # rotary: no table that could be too short
    assert "2 of 72 tokens, padded" in [case.name for case in forward_cases(model, window=8)]


def test_positions_that_start_at_the_padding_id_leave_room_for_it() -> None:
    model = _specimen("roberta").build()
    longest = max(case.inputs["input_ids"].shape[1] for case in forward_cases(model))
    assert longest == 64  # of a table of 321 of which 257 come before the first token


def test_images_have_the_models_own_size_in_batches_of_one_and_three(vit: nn.Module) -> None:
    assert [case.inputs["pixel_values"].shape for case in forward_cases(vit)] == [(1, 3, 48, 64), (3, 3, 48, 64)]


def test_speech_frames_of_padding_do_not_count() -> None:
    model: Any = _specimen("wav2vec2-stable-layer-norm").build()
    _, padded = forward_cases(model)
    assert padded.valid is not None
    with torch.no_grad():
        frames = model(torch.from_numpy(padded.inputs["input_values"])).logits.shape[1]
    assert padded.valid.shape == (3, frames)
    assert 0.7 < padded.valid[0].mean() < 0.8  # a quarter of its samples is padding
    assert padded.valid[1:].all()


# ------------------------------------------------------------------------------------------------- planted faults


def test_rows_of_the_batch_that_changed_places_are_noticed(vit: nn.Module) -> None:
    report = _compare(Altered(vit, after=lambda outputs: {"logits": outputs["logits"][::-1]}), vit)
    assert not report.passed
    assert report.cases[0]["passed"]  # one row has no other to change places with
    assert any(reason.startswith("3 of pixel_values: a value of logits differs by ") for reason in report.reasons)


def test_a_mask_shifted_by_one_is_noticed(bert: nn.Module) -> None:
    def shift(inputs: Arrays) -> Arrays:
        return inputs | {"attention_mask": np.roll(inputs["attention_mask"], 1, axis=1)}

    report = _compare(Altered(bert, before=shift), bert)
    assert [case["passed"] for case in report.cases] == [True, False, False]


def test_a_mask_that_is_ignored_is_noticed(bert: nn.Module) -> None:
    def ones(inputs: Arrays) -> Arrays:
        return inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])}

    assert not _compare(Altered(bert, before=ones), bert).passed


@pytest.mark.parametrize("name", ["bert", "t5", "whisper", "wav2vec2", "vit", "swin", "convnext", "lfm2"])
def test_one_norm_off_by_a_hundredth_is_noticed(name: str) -> None:
    model = _specimen(name).build()
    damaged = copy.deepcopy(model)
    norms = [
        tensor
        for path, tensor in damaged.named_parameters()
        if tensor.ndim == 1 and "norm" in path.lower() and path.endswith("weight")
    ]
    with torch.no_grad():
        norms[len(norms) // 2].mul_(1.01)
    report = _compare(TorchRunner(damaged), model)
    assert not report.passed
    assert "differs by" in report.reasons[0]


def test_a_layer_that_attends_through_a_wrong_window_is_noticed() -> None:
    model: Any = _specimen("modernbert").build()
    damaged = copy.deepcopy(model)
    damaged.config.sliding_window = 5
    for layer in damaged.model.layers:
        attention = layer.attn
        if getattr(attention, "sliding_window", None):
            attention.sliding_window = 5
    assert not _compare(TorchRunner(damaged), model, window=8).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails_with_its_place(bert: nn.Module, value: float) -> None:
    def plant(outputs: Arrays) -> Arrays:
        outputs["logits"][-1, 2, 5] = value
        return outputs

    report = _compare(Altered(bert, after=plant), bert)
    assert report.reasons[0] == "1 of 7 tokens: NaN or Inf in the logits of the artifact at row 0, position 2"
    assert report.cases[0]["statistics"] is None
    assert report.cases[0]["worst"] == {
        "row": 0, "phase": "forward", "position": 2, "token": 5, "not_finite": "artifact",
    }  # fmt: skip


def test_all_zeros_fail(bert: nn.Module) -> None:
    assert not _compare(Altered(bert, after=lambda outputs: {"logits": 0 * outputs["logits"]}), bert).passed


def test_an_output_of_another_name_is_an_error_and_not_a_verdict(bert: nn.Module) -> None:
    renamed = Altered(bert, after=lambda outputs: {"scores": outputs["logits"]})
    with pytest.raises(
        BackendError, match=r"the planted artifact returned scores on 1 of 7 tokens, logits was expected"
    ):
        _compare(renamed, bert)


def test_an_output_of_another_shape_is_an_error_and_not_a_verdict(bert: nn.Module) -> None:
    cut = Altered(bert, after=lambda outputs: {"logits": outputs["logits"][:, :1]})
    with pytest.raises(
        BackendError, match=r"logits of shape \(1, 1, 261\) on 1 of 7 tokens, \(1, 7, 261\) was expected"
    ):
        _compare(cut, bert)


def test_a_side_that_breaks_is_named(bert: nn.Module) -> None:
    def lose(inputs: Arrays) -> Arrays:
        raise ValueError("no kernel")

    with pytest.raises(BackendError, match=r"the planted artifact failed on 1 of 7 tokens; ValueError: no kernel; "):
        _compare(Altered(bert, before=lose), bert)


def test_a_broken_reference_cannot_talk_the_bounds_up(bert: nn.Module) -> None:
    """Its noise floor raises a bound a hundredfold at most."""
    generator = np.random.default_rng(0)

    def noisy(outputs: Arrays) -> Arrays:
        return {"logits": outputs["logits"] + generator.normal(size=outputs["logits"].shape).astype(np.float32)}

    artifact = ExportArtifact(Path("nowhere"), "planted", {}, (), (), "fp32", 0, 6, "plan", {})
    reference: Runner = Altered(bert, after=noisy)
    with TorchRunner(bert) as runner, reference:
        report = check_forward_parity(artifact, runner, reference, forward_cases(bert))
    assert not report.passed
    assert "above 0.03 " in report.reasons[0]


def test_the_verdict_follows_the_bounds_it_is_given(bert: nn.Module) -> None:
    damaged: Any = copy.deepcopy(bert)
    with torch.no_grad():
        damaged.bert.encoder.layer[2].output.dense.weight.mul_(1.001)
    loose = replace(forward_thresholds_for("bf16"), margin=1e3)
    assert not _compare(TorchRunner(damaged), bert).passed
    assert _compare(TorchRunner(damaged), bert, thresholds=loose).passed


def test_forward_bounds_are_never_looser_than_those_of_decoders_where_both_measure_the_same() -> None:
    for precision in ("float32", "float16", "bfloat16"):
        mine, theirs = forward_thresholds_for(precision), thresholds_for(precision)
        assert (mine.margin, mine.top1_stable, mine.cosine_min) == (
            theirs.margin,
            theirs.top1_stable,
            theirs.cosine_min,
        )
        assert mine.kl_p99 <= theirs.kl_p99
        assert mine.kl_max <= theirs.kl_max


def test_bounds_for_a_precision_nobody_calibrated_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"certify weights of 'int8'; they are known for fp32, fp16 and bf16; export it"
    ):
        forward_thresholds_for("int8")


def test_a_model_whose_output_is_not_known_is_refused() -> None:
    with pytest.raises(BackendError, match=r"the model returned dict, which has none of logits, last_hidden_state"):
        main_output({"scores": torch.zeros(1)})

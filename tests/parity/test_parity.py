"""Parity passes what is equal, and turns red, with the right reason and place, for every corruption planted here."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import tiny
from exports import share_traces
from sglp_deploy import CalibrationSet, Compressor
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, BackendError, CalibrationError, ConfigError, ParityError
from sglp_deploy.materialize import materialize
from sglp_deploy.parity import ParityReport, PromptCase, Thresholds, check_parity, prompt_cases, thresholds_for
from sglp_deploy.parity.bounds import limits
from sglp_deploy.parity.certificate import judge_case
from sglp_deploy.parity.reference import TorchRunner
from sglp_exporters.onnx.exporter import OnnxExporter

STEPS = 5
Change = Callable[[PreTrainedModel], None]
Logits = NDArray[np.float32]
# Bounds under which only the choice of tokens is judged.
TOKENS_ONLY = Thresholds(0.01, 1.0, kl_p99=1e3, kl_max=1e3, max_abs=1e3, noise_factor=1.0, cosine_min=-2.0)


def tokens(seed: int = 0, count: int = 900) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 256, count)


def artifact_of(precision: str = "float32") -> ExportArtifact:
    """A manifest without files: the runners of this module compute what the artifact would."""
    return ExportArtifact(Path("nowhere"), "planted", {}, (), (), precision, 0, 6, "plan", {"id": "tiny"})


def few_cases() -> tuple[PromptCase, ...]:
    """One prompt and the padded batch."""
    return tuple(case for case in prompt_cases(tokens()) if case.name in ("prompt 17", "batch of 3, padded to 40"))


def compare(
    runner: TorchRunner,
    reference: PreTrainedModel | TorchRunner,
    *,
    cases: Sequence[PromptCase] | None = None,
    precision: str = "float32",
    **options: Any,
) -> ParityReport:
    against = reference if isinstance(reference, TorchRunner) else TorchRunner(reference)
    options.setdefault("decode_steps", STEPS)
    with against, runner:
        return check_parity(artifact_of(precision), runner, against, cases or few_cases(), **options)


def changed(model: PreTrainedModel, change: Change) -> PreTrainedModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def gemma() -> PreTrainedModel:
    return tiny.model("gemma3")


class Altered(TorchRunner):
    """Passes logits through ``alter(logits, phase, step)``; phases are "prefill", "last" and "decode"."""

    def __init__(self, model: PreTrainedModel, alter: Callable[[Logits, str, int], None]) -> None:
        super().__init__(model)
        self._alter = alter

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        all_positions: bool = False,
    ) -> Logits:
        logits = super().prefill(input_ids, attention_mask, all_positions=all_positions).copy()
        self.free, self._step = not all_positions, 0
        self._alter(logits, "last" if self.free else "prefill", 0)
        return logits

    def decode(self, token_ids: NDArray[np.int64]) -> Logits:
        logits = super().decode(token_ids).copy()
        self._alter(logits, "decode", self._step)
        self._step += 1
        return logits


# ------------------------------------------------------------------------------------------------------ what passes


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_the_same_model_in_another_wrapper_passes_with_no_difference_at_all(family: str) -> None:
    model = tiny.model(family)
    report = compare(TorchRunner(copy.deepcopy(model)), model, cases=prompt_cases(tokens(), window=tiny.WINDOW))
    assert report.passed
    assert report.reasons == ()
    assert [case["name"] for case in report.cases] == [
        "prompt 1",
        "prompt 17",
        "prompt 128",
        "prompt 72 (beyond window 8)",
        "batch of 3, padded to 40",
    ]
    for case in report.cases:
        assert case["statistics"]["max_abs"] == 0.0
        assert case["statistics"]["cosine_min"] == pytest.approx(1.0, abs=1e-12)
        assert case["greedy"]["equal_tokens"] == case["greedy"]["tokens"]
    assert [case["positions"] for case in report.cases] == [1 + 5, 17 + 5, 128 + 5, 72 + 5, 9 + 17 + 40 + 3 * 5]
    assert report.runner == "TorchRunner"


def test_the_onnx_artifact_of_a_pruned_model_passes_all_cases_and_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_traces(monkeypatch)
    # Loaded from a folder, as in test_compressor.py: models of equal configuration share one trace, which is slow.
    loaded = AutoModelForCausalLM.from_pretrained(tiny.save_tiny(tmp_path / "model"))
    pruned = materialize(loaded, tiny.plan_for(loaded, tiny.KEEP["llama"]), tiny.source(loaded))
    artifact = OnnxExporter().export(pruned, tmp_path / "onnx")
    seen: list[tuple[int, int]] = []
    with TorchRunner(pruned.module) as reference, OnnxExporter().open(artifact, threads=1) as runner:
        report = check_parity(
            artifact,
            runner,
            reference,
            prompt_cases(tokens()),
            runner_name="ONNX Runtime",
            progress=lambda done, total: seen.append((done, total)),
        )
    assert report.passed, report.reasons
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert report.artifact_digest == artifact.digest
    assert (report.format, report.runner, report.precision) == ("onnx", "ONNX Runtime", artifact.precision)
    assert [case["positions"] for case in report.cases] == [33, 49, 160, 66 + 96]
    for case in report.cases:
        # Another implementation of the same arithmetic: close, far below the bounds, and not the same bits.
        assert 0 < case["statistics"]["max_abs"] < 1e-4
        assert case["statistics"]["kl_p99"] < 2e-10
        assert case["greedy"]["departures"] == []


def test_a_bfloat16_model_passes_against_itself() -> None:
    model = tiny.model("llama").bfloat16()
    report = compare(TorchRunner(copy.deepcopy(model)), model, precision="bfloat16")
    assert report.passed, report.reasons
    assert report.thresholds["margin"] == 0.5


def test_nan_under_the_padding_is_nobodys_business(llama: PreTrainedModel) -> None:
    def alter(logits: Logits, phase: str, step: int) -> None:
        if phase == "prefill" and len(logits) == 3:
            logits[0, :31] = np.nan  # the first row has 9 tokens behind 31 of padding

    assert compare(Altered(llama, alter), llama).passed


# ------------------------------------------------------------------------------------------------- damaged weights


def _scale_norm(model: PreTrainedModel) -> None:
    model.model.layers[2].input_layernorm.weight.mul_(1.01)


def _round_a_weight_to_bfloat16(model: PreTrainedModel) -> None:
    weight = model.model.layers[2].mlp.up_proj.weight
    weight.copy_(weight.bfloat16().float())


def _swap_two_layers(model: PreTrainedModel) -> None:
    first, second = model.model.layers[1], model.model.layers[3]
    state = copy.deepcopy(first.state_dict())
    first.load_state_dict(second.state_dict())
    second.load_state_dict(state)


@pytest.mark.parametrize(
    ("damage", "least_kl"),
    [
        (_scale_norm, 1e-8),
        (_round_a_weight_to_bfloat16, 1e-8),
        (_swap_two_layers, 1e-2),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_damaged_weight_is_seen_in_every_case(family: str, damage: Change, least_kl: float) -> None:
    model = tiny.model(family)
    report = compare(TorchRunner(changed(model, damage)), model)
    assert not report.passed
    for case in report.cases:
        assert not case["passed"]
        assert case["statistics"]["kl_p99"] > least_kl
        assert any(r.startswith(f"{case['name']}: KL p99 is ") and "nats (worst at row" in r for r in report.reasons)


# ------------------------------------------------------------------------------------------ cache, mask and positions


class _IgnoresTheMask(TorchRunner):
    def prefill(self, input_ids: NDArray[np.int64], attention_mask: Any = None, **options: Any) -> Logits:
        return super().prefill(input_ids, None, **options)


class _DecodesOnePositionLate(TorchRunner):
    def decode(self, token_ids: NDArray[np.int64]) -> Logits:
        self._late = 1
        try:
            return super().decode(token_ids)
        finally:
            self._late = 0

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, keep: int) -> Logits:
        return super()._run(ids, positions + getattr(self, "_late", 0), keep)


class _ForgetsWhatItDecoded(TorchRunner):
    def decode(self, token_ids: NDArray[np.int64]) -> Logits:
        assert self._mask is not None
        assert self._cache is not None
        before = self._mask
        logits = super().decode(token_ids)
        self._mask = before
        self._cache.crop(-1)
        return logits


class _GrowsItsCache(TorchRunner):
    """A cache with a slot for every index that is asked for, as transformers makes without a configuration."""

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, keep: int) -> Logits:
        if self._cache is not None and not self._cache.get_seq_length() and ids.shape == self._mask.shape:
            self._cache = DynamicCache()
        return super()._run(ids, positions, keep)


def _shift_layer_idx(model: PreTrainedModel) -> None:
    for part in model.modules():
        if isinstance(getattr(part, "layer_idx", None), int):
            part.layer_idx += 1


def test_an_ignored_mask_is_seen_in_the_padded_batch_and_only_there(llama: PreTrainedModel) -> None:
    report = compare(_IgnoresTheMask(llama), llama)
    assert [case["passed"] for case in report.cases] == [True, False]
    assert all(reason.startswith("batch of 3, padded to 40: ") for reason in report.reasons)
    # The longest row has no padding, so it is right.
    assert report.cases[1]["worst"]["row"] in (0, 1)


def test_a_decode_position_that_is_off_by_one_is_seen_after_the_prompt(llama: PreTrainedModel) -> None:
    report = compare(_DecodesOnePositionLate(llama), llama)
    for case in report.cases:
        assert not case["passed"]
        assert case["worst"]["phase"] == "decode"
    assert any("(worst at row 0, decode position " in reason for reason in report.reasons)


def test_a_cache_that_does_not_advance_is_seen_from_the_second_step(llama: PreTrainedModel) -> None:
    report = compare(_ForgetsWhatItDecoded(llama), llama)
    assert not any(case["passed"] for case in report.cases)
    assert all(case["worst"]["phase"] == "decode" and case["worst"]["position"] >= 1 for case in report.cases)
    assert compare(_ForgetsWhatItDecoded(llama), llama, decode_steps=1).cases[0]["statistics"]["max_abs"] < 1e-4


def test_a_layer_index_shifted_by_one_is_seen_in_a_cache_that_grows(llama: PreTrainedModel) -> None:
    # short-transformers numbers from 1: slot 0 is never filled, so the cache says it is empty and the mask is cut for
    # one key.  A single row needs no mask, which is why the padded batch is among the cases.
    assert compare(_GrowsItsCache(llama), llama).passed
    report = compare(_GrowsItsCache(changed(llama, _shift_layer_idx)), llama)
    assert [case["passed"] for case in report.cases] == [True, False]
    assert report.cases[1]["worst"]["phase"] == "decode"


def test_a_runner_that_raises_is_named_with_its_case_and_cause(llama: PreTrainedModel) -> None:
    with pytest.raises(BackendError) as caught:
        compare(TorchRunner(changed(llama, _shift_layer_idx)), llama)
    assert str(caught.value) == (
        "the planted artifact failed on prompt 17; IndexError: list index out of range; export the artifact again, "
        "and report this if it stays"
    )
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_window_that_is_wrong_only_beyond_its_length_needs_the_prompt_beyond_it() -> None:
    model = tiny.model("gemma3", sliding_window=150)
    blind = tiny.model("gemma3", sliding_window=4096)
    report = compare(TorchRunner(blind), model, cases=prompt_cases(tokens(), window=150), decode_steps=3)
    assert {case["name"]: case["passed"] for case in report.cases} == {
        "prompt 1": True,
        "prompt 17": True,
        "prompt 128": True,
        "prompt 214 (beyond window 150)": False,
        "batch of 3, padded to 40": True,
    }
    worst = report.cases[3]["worst"]
    assert worst["phase"] == "decode" or worst["position"] >= 150


# ------------------------------------------------------------------------------------------------- single wrong logits


@pytest.mark.parametrize(
    ("phase", "step", "row", "position", "token"), [("prefill", 0, 1, 33, 7), ("decode", 3, 2, 3, 11)]
)
def test_the_worst_place_is_the_planted_one(
    llama: PreTrainedModel, phase: str, step: int, row: int, position: int, token: int
) -> None:
    def alter(logits: Logits, now: str, at: int) -> None:
        if (now, at) == (phase, step) and len(logits) == 3 and not runner.free:
            target = logits[row, position] if phase == "prefill" else logits[row]
            target[token] += 0.5

    runner = Altered(llama, alter)
    report = compare(runner, llama)
    worst = report.cases[1]["worst"]
    assert {name: worst[name] for name in ("row", "phase", "position", "token")} == {
        "row": row,
        "phase": phase,
        "position": position,
        "token": token,
    }
    assert worst["max_abs"] == pytest.approx(0.5, abs=1e-4)
    assert report.cases[0]["passed"]
    assert f"batch of 3, padded to 40: a logit differs by 0.5, above 0.003 (worst at row {row}, {phase} position " in (
        " / ".join(report.reasons)
    )


def test_one_wrong_position_of_many_is_seen_although_a_percentile_cannot_see_it(llama: PreTrainedModel) -> None:
    def alter(logits: Logits, phase: str, step: int) -> None:
        if phase == "prefill" and logits.shape[1] == 128:
            logits[0, 60] *= 1.003  # below the bound on single logits

    case = next(case for case in prompt_cases(tokens()) if case.name == "prompt 128")
    report = compare(Altered(llama, alter), llama, cases=[case])
    assert report.cases[0]["statistics"]["kl_p99"] < 1e-8
    assert any(" KL is " in reason and "prefill position 60" in reason for reason in report.reasons)


def test_one_wrong_word_that_nobody_would_choose_is_seen(llama: PreTrainedModel) -> None:
    def alter(logits: Logits, phase: str, step: int) -> None:
        lowest = logits.argmin(-1)[..., None]
        np.put_along_axis(logits, lowest, np.take_along_axis(logits, lowest, -1) - 0.01, -1)

    report = compare(Altered(llama, alter), llama)
    assert report.cases[0]["statistics"]["cosine_min"] > thresholds_for("float32").cosine_min
    assert any("a logit differs by 0.01" in reason for reason in report.reasons)


def test_logits_of_the_last_position_that_differ_when_asked_for_alone_are_seen(llama: PreTrainedModel) -> None:
    def alter(logits: Logits, phase: str, step: int) -> None:
        if phase == "last":
            logits += np.linspace(0.0, 0.01, logits.shape[-1], dtype=np.float32)

    report = compare(Altered(llama, alter), llama)
    assert report.cases[0]["statistics"]["max_abs"] == 0.0
    assert report.reasons[0] == (
        "prompt 17: asked for the last position only, the artifact differs from itself by 0.01"
    )


def test_a_rotated_logit_vector_fails_the_cosine(llama: PreTrainedModel) -> None:
    def alter(logits: Logits, phase: str, step: int) -> None:
        logits[...] = np.roll(logits, 1, -1)

    report = compare(Altered(llama, alter), llama)
    assert any(": cosine " in reason and " is below 0.99999 (worst at " in reason for reason in report.reasons)
    assert any("stable positions choose another token" in reason for reason in report.reasons)


def test_all_zero_logits_are_compared_without_dividing_by_zero(llama: PreTrainedModel) -> None:
    def alter(logits: Logits, phase: str, step: int) -> None:
        logits[...] = 0.0

    both = compare(Altered(llama, alter), Altered(llama, alter))
    assert both.passed
    assert both.cases[0]["statistics"]["cosine_min"] == 1.0
    one = compare(Altered(llama, alter), llama)
    assert one.cases[0]["statistics"]["cosine_min"] == 0.0
    assert not one.passed


# --------------------------------------------------------------------------------------------------------------- NaN


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("phase", "step", "place"), [("prefill", 0, "row 0, prefill position 4"), ("decode", 2, "row 0, decode position 2")]
)
def test_one_logit_that_is_not_finite_never_passes_and_is_never_written(
    llama: PreTrainedModel, tmp_path: Path, value: float, phase: str, step: int, place: str
) -> None:
    def alter(logits: Logits, now: str, at: int) -> None:
        if (now, at) == (phase, step):
            target = logits[0, 4 if len(logits) == 1 else -1] if phase == "prefill" else logits[0]
            target[9] = value

    report = compare(Altered(llama, alter), llama, thresholds=TOKENS_ONLY)
    assert not report.passed
    assert report.reasons[0] == f"prompt 17: NaN or Inf in the logits of the artifact at {place}"
    assert report.cases[0]["statistics"] is None
    assert report.cases[0]["worst"]["token"] == 9
    _assert_strict_json_round_trip(report, tmp_path)


def test_nan_while_decoding_freely_never_passes(llama: PreTrainedModel, tmp_path: Path) -> None:
    def alter(logits: Logits, phase: str, step: int) -> None:
        if phase == "decode" and runner.free and step == 2:
            # On the very word that is chosen anyway: the tokens stay those of the reference.
            logits[np.arange(len(logits)), logits.argmax(-1)] = np.nan

    runner = Altered(llama, alter)
    report = compare(runner, llama)
    assert report.cases[0]["greedy"]["equal_tokens"] == STEPS + 1
    assert report.reasons == (
        "prompt 17: NaN or Inf in the artifact's logits while it decoded freely",
        "batch of 3, padded to 40: NaN or Inf in the artifact's logits while it decoded freely",
    )
    _assert_strict_json_round_trip(report, tmp_path)


def test_nan_in_the_reference_never_passes_and_blames_the_reference(llama: PreTrainedModel, tmp_path: Path) -> None:
    def damage(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")

    broken = changed(llama, damage)
    report = compare(TorchRunner(broken), broken)
    assert not report.passed
    assert report.reasons[0] == "prompt 17: NaN or Inf in the logits of the reference at row 0, prefill position 0"
    assert report.noise_floor == {"kl_p99": 0.0, "kl_max": 0.0, "max_abs": 0.0}
    _assert_strict_json_round_trip(report, tmp_path)


def _assert_strict_json_round_trip(report: ParityReport, folder: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    report.save(folder / "parity.json")
    json.loads((folder / "parity.json").read_text(), parse_constant=refuse)
    assert ParityReport.load(folder / "parity.json") == report


# ------------------------------------------------------------------------------------------------------------- shapes


class _OtherVocabulary(TorchRunner):
    def _run(self, ids: torch.Tensor, positions: torch.Tensor, keep: int) -> Logits:
        return super()._run(ids, positions, keep)[..., :-1]


class _DecodesOneRow(TorchRunner):
    def decode(self, token_ids: NDArray[np.int64]) -> Logits:
        return super().decode(token_ids)[:1]


class _KeepsAllPositions(TorchRunner):
    def prefill(self, input_ids: NDArray[np.int64], attention_mask: Any = None, **options: Any) -> Logits:
        return super().prefill(input_ids, attention_mask, all_positions=True)


@pytest.mark.parametrize(
    ("wrong", "case", "got", "wanted"),
    [
        (_OtherVocabulary, "prompt 17", "(1, 17, 260)", "(1, 17, 261)"),
        (_DecodesOneRow, "batch of 3, padded to 40", "(1, 261)", "(3, 261)"),
        (_KeepsAllPositions, "prompt 17", "(1, 17, 261)", "(1, 261)"),
    ],
)
def test_logits_of_a_wrong_shape_are_refused(
    llama: PreTrainedModel, wrong: type[TorchRunner], case: str, got: str, wanted: str
) -> None:
    with pytest.raises(BackendError) as caught:
        compare(wrong(llama), llama)
    assert str(caught.value) == (
        f"the planted artifact returned logits of shape {got} on {case}, {wanted} was expected; it is not the same "
        "model or breaks the runner protocol; export it again"
    )


def test_a_foreseen_failure_of_a_runner_passes_through_unchanged(llama: PreTrainedModel) -> None:
    class Fails(TorchRunner):
        def decode(self, token_ids: NDArray[np.int64]) -> Logits:
            raise BackendError("out of memory; the cache is full; use a shorter prompt")

    with pytest.raises(BackendError, match=r"^out of memory; the cache is full; use a shorter prompt$"):
        compare(Fails(llama), llama)


# ---------------------------------------------------------------------------------------------- noise floor, near ties


def test_the_noise_floor_is_the_reference_against_itself_in_a_doubled_batch(llama: PreTrainedModel) -> None:
    case = few_cases()[1]
    report = compare(TorchRunner(copy.deepcopy(llama)), llama, cases=[case], decode_steps=1)
    differences = []
    with TorchRunner(llama) as once, TorchRunner(llama) as twice:
        prompt = once.prefill(case.input_ids, case.attention_mask, all_positions=True)
        again = twice.prefill(np.tile(case.input_ids, (2, 1)), np.tile(case.attention_mask, (2, 1)), all_positions=True)
        differences.append((prompt.astype(np.float64) - again[:3])[case.attention_mask == 1])
        token = prompt[:, -1].argmax(-1)
        differences.append(once.decode(token).astype(np.float64) - twice.decode(np.tile(token, 2))[:3])
    assert report.noise_floor["max_abs"] == np.abs(np.concatenate(differences)).max()
    assert set(report.noise_floor) == {"max_abs", "kl_p99", "kl_max"}
    assert 0 <= report.noise_floor["kl_p99"] <= report.noise_floor["kl_max"] < 1e-9


def test_a_noisy_reference_loosens_the_bounds_but_not_without_end() -> None:
    bounds = thresholds_for("float32")
    quiet = limits(bounds, {"kl_p99": 1e-11, "kl_max": 1e-11, "max_abs": 1e-6})
    assert quiet == {"kl_p99": 1e-8, "kl_max": 1e-7, "max_abs": 3e-3}
    noisy = limits(bounds, {"kl_p99": 5e-9, "kl_max": 5e-8, "max_abs": 5e-4})
    assert noisy == pytest.approx({"kl_p99": 5e-8, "kl_max": 5e-7, "max_abs": 5e-3})
    broken = limits(bounds, {"kl_p99": 0.3, "kl_max": 2.0, "max_abs": 9.0})
    assert broken == pytest.approx({"kl_p99": 1e-6, "kl_max": 1e-5, "max_abs": 0.3})


def test_a_reference_that_disagrees_with_itself_does_not_let_damage_pass(llama: PreTrainedModel) -> None:
    def alter(logits: Logits, phase: str, step: int) -> None:
        if len(logits) % 2 == 0:  # only the doubled batch of the noise floor
            logits += np.linspace(0.0, 3.0, logits.shape[-1], dtype=np.float32)

    report = compare(TorchRunner(changed(llama, _scale_norm)), Altered(llama, alter))
    assert report.noise_floor["max_abs"] > 2.0
    assert not report.passed


def _swap_best_two(logits: Logits) -> None:
    second, best = np.argsort(logits)[-2:]
    logits[[second, best]] = logits[[best, second]]


def _gap(logits: Logits) -> float:
    second, best = np.sort(logits.astype(np.float64))[-2:]
    return float(best - second)


@pytest.mark.parametrize(("margin_over_gap", "passes"), [(1.01, True), (0.99, False)])
def test_a_flip_passes_below_the_margin_and_fails_above_it(
    llama: PreTrainedModel, margin_over_gap: float, passes: bool
) -> None:
    case = few_cases()[0]
    with TorchRunner(llama) as runner:
        gap = _gap(runner.prefill(case.input_ids, case.attention_mask, all_positions=True)[0, 6])

    def alter(logits: Logits, phase: str, step: int) -> None:
        if phase == "prefill":
            _swap_best_two(logits[0, 6])

    bounds = replace(TOKENS_ONLY, margin=gap * margin_over_gap)
    report = compare(Altered(llama, alter), llama, cases=[case], thresholds=bounds)
    assert report.passed is passes
    numbers = report.cases[0]["statistics"]
    assert numbers["n_stable"] + numbers["n_unstable"] == report.cases[0]["positions"]
    if not passes:
        assert numbers["top1_stable"] == pytest.approx(1 - 1 / numbers["n_stable"])
        assert report.reasons == (
            f"prompt 17: {1 / numbers['n_stable']:.1%} of {numbers['n_stable']} stable positions choose another token",
        )


@pytest.mark.parametrize(
    ("margin_over_gap", "share", "passes"), [(1.01, 1.0, True), (0.99, 1.0, False), (0.99, 0.9, True)]
)
def test_free_decoding_may_part_from_the_reference_only_at_a_near_tie(
    llama: PreTrainedModel, margin_over_gap: float, share: float, passes: bool
) -> None:
    def alter(logits: Logits, phase: str, step: int) -> None:
        if phase == "decode" and runner.free and step == 1:
            _swap_best_two(logits[0])

    runner = Altered(llama, alter)
    case = few_cases()[0]
    with TorchRunner(llama) as reference:
        token = reference.prefill(case.input_ids, case.attention_mask).argmax(-1)
        for _ in range(2):
            logits = reference.decode(token)
            token = logits.argmax(-1)
    bounds = replace(TOKENS_ONLY, margin=_gap(logits[0]) * margin_over_gap, top1_stable=share)
    report = compare(runner, llama, cases=[case], thresholds=bounds)
    greedy = report.cases[0]["greedy"]
    assert (greedy["tokens"], greedy["equal_tokens"]) == (STEPS + 1, 2)
    assert [(part["row"], part["token"]) for part in greedy["departures"]] == [(0, 2)]
    assert report.passed is passes
    if not passes:
        stable = report.cases[0]["statistics"]["n_stable"]
        assert report.reasons == (
            f"prompt 17: {1 / stable:.1%} of {stable} stable positions choose another token",
            "prompt 17: free-running greedy leaves the reference at token 2 of row 0, where the reference is sure by "
            f"{_gap(logits[0]):.3g}",
        )


def test_a_cache_that_is_wrong_only_where_a_deployment_decodes_is_seen_under_any_bounds(
    llama: PreTrainedModel,
) -> None:
    """After a prefill that gave the last position only; the tokens stay those of the reference."""

    def alter(logits: Logits, phase: str, step: int) -> None:
        if phase == "decode" and runner.free:
            logits[np.arange(len(logits)), logits.argmin(-1)] -= 5

    runner = Altered(llama, alter)
    report = compare(runner, llama, thresholds=replace(TOKENS_ONLY, max_abs=1.0, top1_stable=0.5))
    assert report.cases[0]["greedy"]["departures"] == []
    assert report.cases[0]["worst"]["phase"] == "decode"
    assert report.cases[0]["statistics"]["max_abs"] == pytest.approx(5, abs=1e-3)
    assert not report.passed


def test_of_two_ways_to_decode_the_worse_value_of_each_statistic_counts(llama: PreTrainedModel) -> None:
    """One wrong word moves no probability: the loop's KL is the smaller one and its logit the wrong one."""

    def alter(logits: Logits, phase: str, step: int) -> None:
        if phase != "decode":
            return
        if runner.free:
            logits[np.arange(len(logits)), logits.argmin(-1)] -= 5
        else:
            logits += np.linspace(0, 0.02, logits.shape[-1], dtype=logits.dtype)

    runner = Altered(llama, alter)
    found = compare(runner, llama, thresholds=TOKENS_ONLY).cases[0]["statistics"]
    assert found["max_abs"] == pytest.approx(5, abs=1e-3)
    untouched = compare(TorchRunner(llama), llama, thresholds=TOKENS_ONLY).cases[0]["statistics"]
    assert found["kl_max"] > 10 * untouched["kl_max"]


# -------------------------------------------------------------------------------------------------------- the prompts


def test_prompt_cases_are_cut_from_the_text_one_after_another_and_padded_on_the_left() -> None:
    cases = prompt_cases(np.arange(1, 400))
    assert [case.name for case in cases] == ["prompt 1", "prompt 17", "prompt 128", "batch of 3, padded to 40"]
    assert cases[1].input_ids.tolist() == [list(range(2, 19))]
    batch = cases[3]
    assert batch.attention_mask.sum(1).tolist() == [9, 17, 40]
    assert batch.input_ids[0].tolist() == [0] * 31 + list(range(147, 156))
    assert batch.attention_mask[0].tolist() == [0] * 31 + [1] * 9


def test_prompts_leave_room_for_the_answer_in_a_short_table_of_positions() -> None:
    cases = prompt_cases(np.arange(1, 400), positions=64)
    assert [case.name for case in cases] == ["prompt 1", "prompt 17", "prompt 32", "batch of 3, padded to 32"]
    assert cases[3].attention_mask.sum(1).tolist() == [9, 17, 32]


def test_a_model_with_few_positions_can_be_certified(tmp_path: Path) -> None:
    """A character-level GPT-2: its table of learned positions ends before the usual prompts do."""
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=3, n_head=2)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).eval().save_pretrained(tmp_path / "model")
    compressor = Compressor.from_pretrained(tmp_path / "model")
    artifact = compressor.export(compressor.plan_by_hand([1]), "torch", tmp_path / "torch")
    report = compressor.verify(artifact, text=CalibrationSet.from_token_ids(tokens()[None]))
    assert report.passed, report.reasons
    assert report.cases[-1]["name"] == "batch of 3, padded to 32"


def test_prompt_cases_repeat_a_short_text_and_refuse_an_empty_one() -> None:
    assert prompt_cases(np.array([5, 6]))[1].input_ids[0, :4].tolist() == [6, 5, 6, 5]
    with pytest.raises(CalibrationError) as caught:
        prompt_cases(np.array([], dtype=np.int64))
    assert str(caught.value) == ("the prompt text holds no token; parity is judged on natural text; give a longer text")


def test_thresholds_follow_the_element_type_and_the_unknown_is_judged_as_bfloat16() -> None:
    assert thresholds_for("fp32") == thresholds_for("float32")
    assert thresholds_for("fp16") == thresholds_for("float16")
    assert thresholds_for("bf16") == thresholds_for("bfloat16")
    with pytest.raises(
        ConfigError, match="no bounds are known by which to certify weights of 'fp8'; they are known for"
    ):
        thresholds_for("fp8")
    margins = [thresholds_for(name).margin for name in ("float32", "float16", "bfloat16")]
    assert margins == [0.01, 0.1, 0.5]


# ------------------------------------------------------------------------------------------------- the certificate


@pytest.fixture(scope="module")
def good(llama: PreTrainedModel) -> ParityReport:
    return compare(TorchRunner(copy.deepcopy(llama)), llama)


@pytest.fixture(scope="module")
def bad(llama: PreTrainedModel) -> ParityReport:
    return compare(TorchRunner(changed(llama, _scale_norm)), llama)


def test_a_certificate_survives_its_file(good: ParityReport, bad: ParityReport, tmp_path: Path) -> None:
    for report in (good, bad):
        _assert_strict_json_round_trip(report, tmp_path)
    value = json.loads((tmp_path / "parity.json").read_text())
    assert list(value) == [
        "schema",
        "passed",
        "artifact_digest",
        "format",
        "runner",
        "reference",
        "precision",
        "thresholds",
        "noise_floor",
        "cases",
        "reasons",
        "stands_in_for",
        "digest",
    ]
    assert (value["schema"], value["passed"]) == ("parity/2", False)


def test_a_verdict_can_be_worked_out_again_from_the_file_alone(bad: ParityReport, tmp_path: Path) -> None:
    bad.save(tmp_path / "parity.json")
    again = ParityReport.load(tmp_path / "parity.json")
    bounds = Thresholds(**again.thresholds)
    in_force = limits(bounds, again.noise_floor)
    faults = [f"{case['name']}: {fault}" for case in again.cases for fault in judge_case(case, in_force, bounds)]
    assert tuple(faults) == bad.reasons


def test_passed_is_worked_out_and_not_believed(bad: ParityReport, good: ParityReport) -> None:
    """As the first schema had it, which knew no digest of itself."""
    first_bad, first_good = ({**each.to_json(), "schema": "parity/1"} for each in (bad, good))
    del first_bad["digest"], first_good["digest"]
    assert not ParityReport.from_json({**first_bad, "passed": True}).passed
    assert not ParityReport.from_json({**first_bad, "passed": True, "reasons": []}).passed
    assert ParityReport.from_json({**first_good, "passed": False}).passed
    assert not ParityReport.from_json({**first_good, "cases": []}).passed


@pytest.mark.parametrize(
    "change", [{"passed": False}, {"runner": "another"}, {"stands_in_for": "vllm"}, {"cases": []}, {"digest": "0" * 64}]
)
def test_a_certificate_that_was_changed_is_refused(good: ParityReport, change: dict[str, Any]) -> None:
    assert ParityReport.from_json(good.to_json()) == good
    with pytest.raises(ArtifactError, match="is not as it was written; its digest is of another content; verify the a"):
        ParityReport.from_json({**good.to_json(), **change})


def test_a_case_that_only_claims_to_have_passed_is_refused(bad: ParityReport) -> None:
    claimed = [{**case, "passed": True} for case in bad.cases]
    with pytest.raises(ArtifactError, match=r"contradicts itself; '.*' is said to have passed, and .*; verify the art"):
        ParityReport.from_json({**bad.to_json(), "cases": claimed, "reasons": []})


@pytest.mark.parametrize("name", ["kl_p99", "kl_max", "max_abs", "top1_stable"])
def test_a_case_without_what_it_was_judged_by_is_refused(good: ParityReport, name: str) -> None:
    first, *others = good.cases
    less = {key: value for key, value in first["statistics"].items() if key != name}
    with pytest.raises(ArtifactError, match="is said to have passed, and what it was judged by is incomplete"):
        ParityReport.from_json({**good.to_json(), "cases": [{**first, "statistics": less}, *others]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "parity/9"}, "the certificate has schema 'parity/9'; this version reads 'parity/2'; verify again"),
        ({"schema": None}, "the certificate has schema None; this version reads 'parity/2'; verify again"),
        ({"cases": None}, "the certificate lacks or mistypes a field; cases is None: "),
        ({"format": 3}, "the certificate lacks or mistypes a field; format is 3: "),
        ({"thresholds": []}, "the certificate lacks or mistypes a field; thresholds is []: "),
        ({"extra": 1}, "the certificate is malformed; extra is unknown; verify the artifact again"),
        ({"reasons": [3]}, "the certificate lacks or mistypes a field; reasons.0 is 3: "),
        (
            {"cases": [{"name": "prompt 1", "passed": "yes"}]},
            "the certificate lacks or mistypes a field; cases.0.passed is 'yes': ",
        ),
        (
            {"noise_floor": {"max_abs": float("nan")}},
            "the certificate lacks or mistypes a field; noise_floor.max_abs is nan: ",
        ),
        ({"noise_floor": {}}, "the certificate contradicts itself; it lacks bounds or the noise they are over; "),
    ],
)
def test_a_malformed_certificate_is_refused_in_words(good: ParityReport, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        ParityReport.from_json({**good.to_json(), **change})
    assert str(caught.value).startswith(message)


def test_a_missing_field_is_named(good: ParityReport) -> None:
    value = good.to_json()
    del value["cases"], value["runner"]
    with pytest.raises(ArtifactError) as caught:
        ParityReport.from_json(value)
    assert str(caught.value) == (
        "the certificate is malformed; cases is missing, runner is missing; verify the artifact again"
    )


def test_a_certificate_that_cannot_be_written_cannot_be_made(good: ParityReport) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(good, noise_floor={"max_abs": float("inf")})


def test_require_raises_with_the_first_reason_and_the_report(good: ParityReport, bad: ParityReport) -> None:
    good.require()
    with pytest.raises(ParityError) as caught:
        bad.require()
    assert caught.value.report is bad
    assert str(caught.value) == (
        f"the planted artifact does not match its reference; {bad.reasons[0]}; do not deploy it, export it again and "
        "keep parity.json for a bug report"
    )
    with pytest.raises(ParityError, match="does not match its reference; no case passed; do not deploy it"):
        replace(good, cases=()).require()


def test_thresholds_in_force_are_on_the_certificate(bad: ParityReport) -> None:
    assert bad.thresholds == asdict(thresholds_for("float32"))

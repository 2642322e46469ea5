"""What planners look at: measured when it is asked for, once, and right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import tiny
from sglp_deploy.errors import CalibrationError, ConfigError, PlanError
from sglp_deploy.evidence import collect, lazy
from sglp_deploy.evidence.lazy import ModelEvidence
from sglp_deploy.evidence.statistics import MEASURED, LayerStats
from sglp_deploy.evidence.text import TokenBatches
from sglp_deploy.materialize import select_layers
from sglp_deploy.models import layer_stack
from sglp_deploy.planners.seam import Evidence, FixedEvidence
from sglp_deploy.tasks.language import LanguageTask


def batches() -> TokenBatches:
    ids = np.random.default_rng(5).integers(0, 256, size=(5, 16), dtype=np.int64)
    mask = np.ones_like(ids)
    mask[-1, -6:] = 0
    return TokenBatches(ids, mask, 2, "test")


def evidence(model: Any, **options: Any) -> ModelEvidence:
    return ModelEvidence(model, layer_stack(model), LanguageTask(), batches, **options)


def loss_of(model: Any) -> float:
    """Mean next-token loss by plain PyTorch, row by row."""
    nats, count = 0.0, 0
    for ids, mask in batches():
        for row, real in zip(ids, mask, strict=True):
            tokens = torch.from_numpy(row[real == 1])[None]
            with torch.no_grad():
                logits = model(tokens).logits[0, :-1]
            nats += float(cross_entropy(logits, tokens[0, 1:], reduction="sum"))
            count += len(logits)
    return nats / count


@pytest.mark.parametrize("gone", [(), (2,), (1, 4)])
def test_the_loss_without_layers_is_that_of_the_model_without_them(gone: tuple[int, ...]) -> None:
    model = tiny.model("llama")
    found = evidence(model).loss_without(gone)
    kept = [layer for layer in range(6) if layer not in gone]
    assert found == pytest.approx(loss_of(select_layers(model, kept)), rel=1e-5)


def test_a_loss_is_taken_once_for_each_set_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = evidence(tiny.model("llama"))
    first = seen.loss_without((1, 4))
    monkeypatch.setattr(LanguageTask, "loss", lambda *_: pytest.fail("measured again"))
    assert seen.loss_without((4, 1)) == first
    assert seen.view([(0, 1)]).loss_without((1, 4, 4)) == first


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"the loss without layers \[3\] is nan; the weights hold NaN or Inf"):
        evidence(model).loss_without((3,))


def test_hidden_states_are_those_of_the_model_without_the_layers_passed_over() -> None:
    model = tiny.model("gemma3")
    smaller = select_layers(model, (0, 1, 4, 5, 6))
    got = list(evidence(model).hidden((0, 4, 7), without=(2, 3)))
    assert len(got) == len(batches())
    for states, (ids, mask) in zip(got, batches(), strict=True):
        real = torch.from_numpy(mask) == 1
        positions = (torch.from_numpy(mask).cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            whole = smaller(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=positions,
                output_hidden_states=True,
            )
        # Boundary 4 of seven layers is what the third of the five kept ones is given; transformers norms the last one.
        wanted = {0: whole.hidden_states[0], 4: whole.hidden_states[2]}
        assert set(states) == {0, 4, 7}
        np.testing.assert_allclose(
            smaller.model.norm(torch.from_numpy(states.pop(7))).detach().numpy(),
            whole.hidden_states[-1][real].numpy(),
            rtol=1e-4,
            atol=1e-5,
        )
        for boundary, rows in states.items():
            assert rows.shape == (int(mask.sum()), 64)
            np.testing.assert_allclose(rows, wanted[boundary][real].numpy(), rtol=1e-4, atol=1e-5)


def test_only_the_probes_asked_for_are_run_and_a_pass_that_held_them_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[tuple[str, ...]] = []
    real = lazy.collect_layer_stats

    def counted(*given: Any, **named: Any) -> Any:
        passes.append(named["probes"])
        return real(*given, **named)

    monkeypatch.setattr(lazy, "collect_layer_stats", counted)
    seen = evidence(tiny.model("llama"))
    assert passes == []
    assert set(seen.measured("cosine").measured) == {"cosine"}
    both = seen.measured("gradients", "cka")
    assert "cosine" not in both.measured
    assert seen.measured("cka") is both
    whole = seen.stats
    assert set(whole.measured) == set(MEASURED)
    assert seen.measured("cosine", "cka") is whole
    assert passes == [("cosine",), ("cka", "gradients"), ("cka", "cosine", "gradients")]
    for name, value in both.measured.items():
        np.testing.assert_array_equal(value, whole.need(name), err_msg=name)


def test_a_pass_without_a_gradient_probe_never_goes_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("went backward"))
    stats = evidence(tiny.model("llama")).measured("cka", "cosine")
    assert stats.loss == pytest.approx(loss_of(tiny.model("llama")), rel=1e-5)


def test_what_no_probe_took_is_named_when_it_is_read() -> None:
    stats = evidence(tiny.model("llama")).measured("cosine")
    with pytest.raises(CalibrationError, match="the statistics lack taylor; its probe was not asked for"):
        stats.need("taylor")


def test_an_unknown_probe_gets_the_nearest_match_and_the_list() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown probe 'cosin'; .*did you mean 'cosine'.* are cka, cosine, gradients"
    ):
        evidence(tiny.model("llama")).measured("cosin")


def test_the_facts_of_the_layers_cost_no_pass() -> None:
    model = tiny.model("llama")
    seen: Evidence = evidence(model, seed=3)
    assert (seen.n_layers, seen.prunable, seen.seed, seen.groups) == (6, (True,) * 6, 3, ())
    assert int(seen.parameters.sum()) + seen.other_parameters == sum(p.numel() for p in model.parameters())
    assert seen.record() == {"counts": {}, "options": {}, "elapsed_s": 0.0}


def test_the_record_of_a_method_that_only_takes_losses_counts_the_tokens() -> None:
    seen = evidence(tiny.model("llama"))
    seen.loss_without((0,))
    assert seen.record()["counts"] == {"n_samples": 5, "n_tokens": 74, "n_rows": 0}


def test_the_record_of_a_view_says_what_that_view_looked_at() -> None:
    seen = evidence(tiny.model("llama"))
    assert seen.stats.n_rows > 0
    later = seen.view()
    later.loss_without((0,))
    assert later.record() == {"counts": {"n_samples": 5, "n_tokens": 74, "n_rows": 0}, "options": {}, "elapsed_s": 0.0}
    later.measured("cka")  # taken before, and shared
    assert later.record()["counts"]["n_rows"] == seen.stats.n_rows
    assert seen.view([(0, 1)]).groups == ((0, 1),)
    assert seen.groups == ()


@pytest.mark.parametrize(
    "ask", [lambda e: e.loss_without((6,)), lambda e: list(e.hidden((8,))), lambda e: e.weights(-1)]
)
def test_a_layer_that_is_not_there_is_refused(ask: Any) -> None:
    with pytest.raises(PlanError, match=r"the planner asks about -?\d and the model counts from 0 to \d; the"):
        ask(evidence(tiny.model("llama")))


def test_weights_of_a_layer_have_their_names_in_the_unpruned_model() -> None:
    model = tiny.model("llama")
    found = evidence(model).weights(2)
    wanted = {name: value for name, value in model.named_parameters() if name.startswith("model.layers.2.")}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not any(value.requires_grad for value in found.values())


def test_dropout_has_no_say_and_the_model_keeps_its_mode() -> None:
    model = tiny.model("llama", attention_dropout=0.5)
    calm = evidence(model).loss_without((1,))
    model.train()
    assert evidence(model).loss_without((1,)) == calm
    (first, *_) = evidence(model).hidden((6,))
    (again, *_) = evidence(model).hidden((6,))
    np.testing.assert_array_equal(first[6], again[6])
    assert all(module.training for module in model.modules())


def test_a_probe_may_leave_what_no_field_of_the_statistics_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Widest:
        name, backward = "widest", False

        def attach(self, stack: Any) -> list[Any]:
            self.found = np.zeros(stack.n_layers)
            return [layer.register_forward_hook(self._left(index)) for index, layer in enumerate(stack.layers)]

        def _left(self, index: int) -> Any:
            def hook(_layer: Any, _given: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                self.found[index] = max(self.found[index], float(hidden.abs().max()))

            return hook

        def begin(self, batch: Any) -> None:
            del batch

        def end(self, scale: float) -> None:
            del scale

        def result(self, seen: Any) -> dict[str, Any]:
            return {"widest": self.found * bool(seen.n_batches)}

    monkeypatch.setattr(lazy, "make_probes", lambda names: (Widest(),))
    monkeypatch.setattr(collect, "make_probes", lambda names: (Widest(),))
    stats = evidence(tiny.model("llama")).measured("widest")
    assert stats.need("widest").shape == (6,)
    assert (stats.need("widest") > 0).all()
    assert set(stats.measured) == {"widest"}
    again = LayerStats.from_json(stats.to_json())
    np.testing.assert_array_equal(again.need("widest"), stats.need("widest"))


def test_statistics_alone_answer_no_question_that_needs_the_model() -> None:
    stats = evidence(tiny.model("llama")).stats
    fixed = FixedEvidence(stats)
    assert fixed.loss_without() == stats.loss
    with pytest.raises(
        PlanError, match="asks for the loss without some layers; only statistics taken before were given"
    ):
        fixed.loss_without((1,))
    with pytest.raises(PlanError, match="asks for hidden states; only statistics taken before were given"):
        fixed.hidden((0,))

"""Every repair against an oracle of its own: numpy's least squares, a hook in place of a fold, a scaled stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import zoo
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.materialize import materialize
from sglp_deploy.models import LoadedModel, layer_stack, source_of
from sglp_deploy.repairs.linear import Linear
from sglp_deploy.repairs.local import Local
from sglp_deploy.repairs.options import LinearOptions, LocalOptions, RefitOptions, ScaleOptions
from sglp_deploy.repairs.refit import Refit
from sglp_deploy.repairs.scale import Scale
from sglp_deploy.repairs.workbench import Workbench
from sglp_deploy.tasks.language import LanguageTask

# Attention's output projection, the MLP's, and what each family has that the others have not.
PROJECTIONS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),  # gated, no bias, tied
    "llama-untied": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),  # Conv1D, biased, no gate
    "opt": ("self_attn.out_proj", "fc2"),  # biased, no gate
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),  # parallel branches
    "granite": ("self_attn.o_proj", "mlp.down_proj"),  # branches scaled before they are added
}
NORMED = ("gemma2", "gemma3", "olmo2")
DROP = (2, 3)
Make = Callable[..., Workbench]


def loaded(family: str) -> LoadedModel:
    """A tiny random model."""
    if family in tiny.FAMILIES:
        return tiny.loaded(family)
    module = next(each for each in zoo.specimens() if each.name == family).build()
    return LoadedModel(module, tiny.tokenizer(), source_of(module, family))


@pytest.fixture
def workbench(tmp_path: Path) -> Iterator[Make]:
    """Makes a bench, and afterwards checks that the unpruned model is bit for bit as it was."""
    made: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []

    def make(
        family: str, drop: tuple[int, ...] = DROP, tokens: int = 2048, precision: torch.dtype = torch.float32
    ) -> Workbench:
        model = loaded(family)
        made.append((model.module, {name: value.clone() for name, value in model.module.state_dict().items()}))
        stack = layer_stack(model.module)
        keep = tuple(index for index in range(stack.n_layers) if index not in drop)
        pruned = materialize(model.module, tiny.plan_for(model.module, keep), model.source)
        text = CalibrationSet.builtin(max_tokens=tokens, sequence_length=64).encode(model.tokenizer)
        return Workbench(model.module, stack, pruned, LanguageTask(), list(text), tmp_path, precision=precision)

    yield make
    for module, before in made:
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def passed(bench: Workbench, layer: int, paths: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Inputs ("in ...") and outputs ("out ...") of modules and the layer's own ("given"), rows that were fitted on."""
    found: dict[str, list[np.ndarray]] = {}
    module = bench.layers[layer]

    def keep(name: str, value: torch.Tensor, valid: torch.Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1])[valid.flatten()].double().numpy()
        found.setdefault(name, []).append(rows)

    for index in bench.fitted_on():
        valid = bench.valid(index)

        def note(path: str, valid: torch.Tensor = valid) -> Any:
            def hook(_module: nn.Module, arguments: Any, output: Any) -> None:
                keep(f"in {path}", arguments[0], valid)
                keep(f"out {path}", output, valid)

            return hook

        def given(_module: nn.Module, arguments: Any, keywords: Any, valid: torch.Tensor = valid) -> None:
            keep("given", arguments[0] if arguments else keywords["hidden_states"], valid)

        handles = [module.get_submodule(path).register_forward_hook(note(path)) for path in paths]
        handles.append(module.register_forward_pre_hook(given, with_kwargs=True))
        with torch.no_grad():
            LanguageTask().loss(bench.pruned.module, bench.batches[index])
        for handle in handles:
            handle.remove()
    return {name: np.concatenate(parts) for name, parts in found.items()}


def behind(bench: Workbench, boundary: int) -> np.ndarray:
    """The unpruned model's states at a boundary, rows that were fitted on."""
    kept = bench.dense([boundary])[boundary]
    rows = [kept.read(index)[bench.valid(index)] for index in bench.fitted_on()]
    return torch.cat(rows).double().numpy()


def matrix(module: nn.Module) -> np.ndarray:
    """(inputs, outputs) with the bias as last row, if there is one."""
    weight: Any = module.weight
    weight = weight.detach().double().numpy()
    weight = weight if type(module).__name__ == "Conv1D" else weight.T
    bias: Any = getattr(module, "bias", None)
    return weight if bias is None else np.concatenate([weight, bias.detach().double().numpy()[None]])


def ridge_oracle(x: np.ndarray, y: np.ndarray, weight: np.ndarray, old: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge towards ``old`` by numpy's least squares on stacked rows."""
    root = np.sqrt(weight)[:, None]
    pull = np.sqrt(ridge * np.mean(np.sum((root * x) ** 2, axis=0)))
    stacked = np.concatenate([root * x, pull * np.eye(x.shape[1])])
    return np.linalg.lstsq(stacked, np.concatenate([root * y, pull * old]), rcond=None)[0]


def with_ones(x: np.ndarray, module: nn.Module) -> np.ndarray:
    return x if getattr(module, "bias", None) is None else np.concatenate([x, np.ones((len(x), 1))], axis=1)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_refit_is_the_least_squares_solution_of_both_projections(family: str, workbench: Make) -> None:
    """The bench's drift is that of layers 0 and 1, which are the unpruned model's own."""
    bench, (attention, mlp) = workbench(family), PROJECTIONS[family]
    ridge, layer = 0.05, bench.layers[1]
    scale = float(getattr(bench.pruned.module.config, "residual_multiplier", 1.0))
    first, second = layer.get_submodule(attention), layer.get_submodule(mlp)
    target = behind(bench, 4)
    weight = 1 / np.mean(target**2, axis=1)
    # Attention: solved together with the MLP, of which only the activations enter.
    rows = passed(bench, 1, (attention, mlp))
    joint = np.concatenate([with_ones(rows[f"in {attention}"], first), with_ones(rows[f"in {mlp}"], second)], axis=1)
    old_mlp = matrix(second)
    old = np.concatenate([matrix(first), old_mlp])
    wanted = ridge_oracle(joint, (target - rows["given"]) / scale, weight, old, ridge)[: len(matrix(first))]
    fitted = Refit().fit(bench, RefitOptions(ridge=ridge))
    assert fitted.not_done == ()
    np.testing.assert_allclose(matrix(layer.get_submodule(attention)), wanted, rtol=2e-3, atol=2e-5)
    # The MLP: on the activations that come out with attention fitted.
    rows = passed(bench, 1, (attention, mlp))
    left = (target - rows["given"]) / scale - rows[f"out {attention}"]
    wanted = ridge_oracle(with_ones(rows[f"in {mlp}"], second), left, weight, old_mlp, ridge)
    np.testing.assert_allclose(matrix(layer.get_submodule(mlp)), wanted, rtol=2e-3, atol=2e-5)
    distances = [(fit["distance_before"], fit["distance_after"]) for fit in fitted.facts["fits"]]
    assert all(after < before for before, after in distances)
    # Nothing but these two is changed.
    owner = layer_stack(loaded(family).module).names[1]
    assert {name.rpartition(".")[0] for name in bench.changed} == {f"{owner}.{attention}", f"{owner}.{mlp}"}


@pytest.mark.parametrize("family", NORMED)
def test_refit_of_a_family_with_norms_behind_its_projections_brings_the_stream_closer(
    family: str, workbench: Make
) -> None:
    bench = workbench(family)
    fitted = Refit().fit(bench, RefitOptions())
    distances = [
        distance for fit in fitted.facts["fits"] for distance in (fit["distance_before"], fit["distance_after"])
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.9 * distances[0]
    assert any("norm" in name for name in bench.changed)


def test_gaps_are_fitted_from_shallow_to_deep_on_the_repaired_stream(workbench: Make, tmp_path: Path) -> None:
    bench, (attention, mlp) = workbench("llama", drop=(1, 4)), PROJECTIONS["llama"]
    fitted = Refit().fit(bench, RefitOptions(ridge=0.05, attention=False))
    assert [(fit["layer"], fit["behind"], fit["projection"]) for fit in fitted.facts["fits"]] == [
        (0, 2, mlp), (3, 5, mlp),
    ]  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2 + 1  # the unpruned stream behind each gap, and one of its own
    # The second gap's layer, by the pruned model as it is now: the first gap's fit is in its input.
    target, rows = behind(bench, 5), passed(bench, 2, (attention, mlp))
    old = matrix(layer_stack(loaded("llama").module).layers[3].get_submodule(mlp))
    left = target - rows["given"] - rows[f"out {attention}"]
    wanted = ridge_oracle(rows[f"in {mlp}"], left, 1 / np.mean(target**2, axis=1), old, 0.05)
    np.testing.assert_allclose(matrix(bench.layers[2].get_submodule(mlp)), wanted, rtol=2e-3, atol=2e-5)


def test_later_layers_are_fitted_to_their_own_unpruned_output(workbench: Make) -> None:
    bench = workbench("llama")
    fitted = Refit().fit(bench, RefitOptions(later=True))
    assert [(fit["layer"], fit["behind"]) for fit in fitted.facts["fits"]] == [(1, 4), (1, 4), (4, 5)]
    assert [reason[: len("layer 5, mlp.down_proj")] for reason in fitted.not_done] == ["layer 5, mlp.down_proj"]


def test_a_mixture_of_experts_gets_its_attention_fitted_and_says_what_was_left(workbench: Make) -> None:
    bench = workbench("mixtral")
    fitted = Refit().fit(bench, RefitOptions())
    assert {fit["projection"] for fit in fitted.facts["fits"]} == {"self_attn.o_proj"}
    assert fitted.not_done == (
        "layer 1, mlp.experts: no single linear map makes it (a mixture of experts); it stays as it is",
    )


def test_a_fit_that_does_not_help_is_taken_back(workbench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench("llama")
    before = {name: value.clone() for name, value in bench.pruned.module.state_dict().items()}
    monkeypatch.setattr(Workbench, "distance", lambda *_: 1.0)
    fitted = Refit().fit(bench, RefitOptions())
    assert len(fitted.not_done) == 2
    assert "does not bring the held-out stream closer (1 to 1); taken back" in fitted.not_done[0]
    assert all(torch.equal(value, before[name]) for name, value in bench.pruned.module.state_dict().items())
    assert bench.changed == {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linear_folded_equals_the_map_behind_the_projection(family: str, workbench: Make) -> None:
    bench, (attention, mlp) = workbench(family), PROJECTIONS[family]
    projection, target = bench.layers[1].get_submodule(mlp), behind(bench, 4)
    rows, ridge = passed(bench, 1, (attention, mlp)), 0.05
    left = target - rows["given"] - rows[f"out {attention}"]
    width = target.shape[1]
    turned = ridge_oracle(rows[f"out {mlp}"], left, 1 / np.mean(target**2, axis=1), np.eye(width), ridge)
    unfolded = rows[f"out {mlp}"] @ turned
    Linear().fit(bench, LinearOptions(ridge=ridge))
    folded = with_ones(rows[f"in {mlp}"], projection) @ matrix(bench.layers[1].get_submodule(mlp))
    np.testing.assert_allclose(folded, unfolded, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt2", "gemma3"])
def test_scale_multiplies_the_stream_before_the_gap_and_leaves_the_output_head_alone(
    family: str, workbench: Make
) -> None:
    """Without layers behind the gap nothing but the size of the last norm's input changes, which a norm takes out."""
    depth = layer_stack(loaded(family).module).n_layers
    bench = workbench(family, drop=(depth - 2, depth - 1))
    last = depth - 3
    before, logits = bench.states(0, last + 1), _logits(bench)
    alpha = Scale().fit(bench, ScaleOptions()).facts["fits"][0]["alpha"]
    assert abs(alpha - 1) > 0.01
    torch.testing.assert_close(bench.states(0, last + 1), before * alpha, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(_logits(bench), logits, rtol=1e-2, atol=1e-2)
    rows = behind(bench, depth)
    own = torch.cat([before[bench.valid(0)]]).double().numpy() if len(bench.batches) == 1 else None
    assert own is None or alpha == pytest.approx(np.mean(np.abs(rows).sum(0) / np.abs(own).sum(0)))


def test_scale_s_factor_is_the_mean_ratio_of_one_norms_over_channels(workbench: Make) -> None:
    bench = workbench("llama")
    rows = passed(bench, 2, ())["given"]  # the stream behind the layer before the gap
    wanted = np.mean(np.abs(behind(bench, 4)).sum(0) / np.abs(rows).sum(0))
    assert Scale().fit(bench, ScaleOptions()).facts["fits"][0]["alpha"] == pytest.approx(wanted, rel=1e-5)


def _logits(bench: Workbench) -> torch.Tensor:
    ids, mask = (torch.from_numpy(part) for part in bench.batches[0])
    with torch.no_grad():
        found: torch.Tensor = bench.pruned.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found


def test_local_trains_windows_from_refit_on_and_takes_back_what_does_not_help(workbench: Make) -> None:
    bench = workbench("llama", drop=(2, 4))
    fitted = Local().fit(bench, LocalOptions(learning_rate=3e-4, epochs=3))
    trained = {tuple(each["layers"]): each for each in fitted.facts["trained"]}
    assert set(trained) <= {(0, 1), (3,), (5,)}
    assert trained, fitted.not_done
    assert all(each["distance_after"] < each["distance_before"] for each in trained.values())
    assert all(each["behind"] == {(0, 1): 3, (3,): 5, (5,): 6}[layers] for layers, each in trained.items())
    assert all(parameter.grad is None for parameter in bench.pruned.module.parameters())
    assert len(fitted.not_done) + len(trained) == 3


def test_local_comes_out_the_same_for_the_same_seed(workbench: Make) -> None:
    options = LocalOptions(learning_rate=3e-4, epochs=1, later=False)
    results = []
    for _ in range(2):
        bench = workbench("llama")
        Local().fit(bench, options)
        results.append(bench.changed)
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_products_in_bfloat16_give_nearly_the_same_fit_and_leave_weights_float32(
    family: str, workbench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    multiply = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda *given, **more: (out := multiply(*given, **more), seen.add(out.dtype))[0]
    )
    found = []
    for precision in (torch.float32, torch.bfloat16):
        bench = workbench(family, precision=precision)
        fitted = Refit().fit(bench, RefitOptions(ridge=0.1))
        found.append((fitted.facts["fits"], bench.changed))
    (fine, _), (coarse, changed) = found
    assert [each["projection"] for each in coarse] == [each["projection"] for each in fine]
    for one, other in zip(coarse, fine, strict=True):
        assert one["distance_after"] == pytest.approx(other["distance_after"], rel=0.05)
    assert all(tensor.dtype is torch.float32 for tensor in changed.values())
    if family == "llama":
        assert torch.bfloat16 in seen


def test_local_in_bfloat16_trains_and_leaves_weights_float32(workbench: Make) -> None:
    bench = workbench("llama", drop=(2, 4), precision=torch.bfloat16)
    fitted = Local().fit(bench, LocalOptions(learning_rate=3e-4, epochs=3))
    assert fitted.facts["trained"], fitted.not_done
    assert all(tensor.dtype is torch.float32 for tensor in bench.changed.values())
